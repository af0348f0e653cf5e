"""Crops and antialiased resizing of decoded images, through Pillow.

Targets of the 64-pixel decoder and of the upsamplers are made by area or bicubic reduction and never by picking
pixels, which aliases.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.errors import InputError, nearest

# How a larger image becomes a smaller one. "area" averages the source pixels that a target pixel covers; "bicubic"
# weighs four target pixels' worth of them (Keys, a = -0.5) and keeps edges crisper.
FILTERS = {"area": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}

# Pillow first shrinks by a whole factor (averaging) to this many times the target, then filters: a tenth of the time
# on photographs, at differences below one grey level in the mean.
_REDUCING_GAP = 3.0


def check_filter(name: str) -> None:
    """Raises InputError if `name` is no filter of `FILTERS`."""
    if name not in FILTERS:
        raise InputError(f"no resizing filter {name!r}; {nearest(name, FILTERS)}")


def square(image: UInt8[np.ndarray, "h w 3"], *, size: int, method: str = "area") -> UInt8[np.ndarray, "size size 3"]:
    """Returns the largest centred square, resized: as resizing the shorter side to `size`, then a centre crop.

    Args:
      image: uint8 [h, w, 3] in [0, 255].
      size: pixels a side of the result.
      method: filter for shrinking, a key of `FILTERS`; enlarging is always bicubic.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if side == size:
        return np.ascontiguousarray(image[top : top + side, left : left + side])
    if method == "area" and side > size and side % size == 0:
        # One exact mean per pixel. The general filter rounds after each axis, halves upwards, which brightens by a
        # quarter of a grey level at factor 2.
        pixels = Image.fromarray(image[top : top + side, left : left + side])
        return np.array(pixels.reduce(side // size))
    # An area filter would repeat pixels where it enlarges.
    resample = FILTERS[method] if side > size else Image.Resampling.BICUBIC
    region = (left, top, left + side, top + side)
    gap = _REDUCING_GAP if side > size and method == "bicubic" else None
    return np.array(Image.fromarray(image).resize((size, size), resample, box=region, reducing_gap=gap))


def random_crop(
    image: UInt8[np.ndarray, "h w 3"], *, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a window of `size` pixels a side, every position equally likely."""
    height, width = image.shape[:2]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return image[top : top + size, left : left + size]
