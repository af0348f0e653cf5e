"""Crops and antialiased resizing of decoded images.

Targets of the 64-pixel decoder and of the upsamplers are made by area or bicubic reduction and never by picking
pixels, which aliases.
"""

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.errors import InputError, nearest

# How a larger image becomes a smaller one. "area" averages the source pixels that a target pixel covers, those at its
# edges in part (Pillow's filter of that name takes them whole or not at all, and between 1 and 2 picks pixels);
# "bicubic" weighs four target pixels' worth of them (Keys, a = -0.5) and keeps edges crisper.
FILTERS = ("area", "bicubic")

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
      method: filter for shrinking, one of `FILTERS`; enlarging is always bicubic.
    """
    region = centre(image)
    side = region.shape[0]
    if side == size:
        return np.ascontiguousarray(region)
    if method == "area" and side > size:
        return cv2.resize(region, (size, size), interpolation=cv2.INTER_AREA)
    # An area filter would repeat pixels where it enlarges.
    gap = _REDUCING_GAP if side > size else None
    return np.asarray(Image.fromarray(region).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=gap))


def random_crop(
    image: UInt8[np.ndarray, "h w 3"], *, fraction: float, size: int, method: str, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a window of the largest centred square, resized to `size`; all places are equally likely.

    Only the window is resized: its side is `fraction` of the square's, to the nearest pixel.
    """
    region = centre(image)
    side = max(1, round(fraction * region.shape[0]))
    top, left = rng.integers(region.shape[0] - side + 1, size=2).tolist()
    return square(region[top : top + side, left : left + side], size=size, method=method)


def centre(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """Returns the largest centred square, as a view."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]
