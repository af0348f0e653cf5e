"""Where of an image is to be filled: masks and boxes, checked, and what they leave known at the size of each part.

A mask is True, or white in a file, where an image is to be filled; networks are told the opposite, where it is known.
At a smaller size a pixel is known only where all that it covers is, so that nothing of what is to be replaced shows.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from unclip_jax import picture_files
from unclip_jax.data import resize
from unclip_jax.errors import InputError

Mask = Bool[np.ndarray, "h w"]
Masks = Bool[np.ndarray, "n s s"]
Pixels = UInt8[np.ndarray, "n s s 3"]

# From which value on a pixel of a mask's file is white.
_WHITE = 128


def read(path: str, *, height: int, width: int) -> Mask:
    """Returns the mask in a picture file, white (from half grey on) where an image of this size is to be filled.

    Raises:
      InputError: the file cannot be read, has another size, or is white all over or nowhere.
    """
    pixels, _ = picture_files.read(path)
    if pixels.shape[:2] != (height, width):
        raise InputError(
            f"the mask {path!r} has {pixels.shape[1]} x {pixels.shape[0]} pixels, its picture {width} x {height}; make "
            "one of the picture's size"
        )
    mask = pixels.astype(np.float64).mean(-1) >= _WHITE
    check(mask, f"the mask {path!r}")
    return mask


def box(corners: Sequence[int], *, height: int, width: int) -> Mask:
    """Returns the mask of a box: x0, y0, x1, y1 in pixels from the upper left corner, x1 and y1 not included.

    Raises:
      InputError: these are not four numbers, or no box inside the picture, or all of it.
    """
    named = ",".join(str(number) for number in corners)
    if len(corners) != 4:
        raise InputError(f"the box {named} has {len(corners)} numbers; it is x0,y0,x1,y1, such as 8,8,24,24")
    x0, y0, x1, y1 = corners
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(
            f"the box {named} is none in a picture of {width} x {height} pixels: 0 <= x0 < x1 <= {width} and "
            f"0 <= y0 < y1 <= {height} must hold"
        )
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    check(mask, f"the box {named}")
    return mask


def parse_box(text: str) -> list[int]:
    """Returns the numbers of a box as it is written, "x0,y0,x1,y1".

    Raises:
      InputError: they are no whole numbers.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"the box {text!r} is not four whole numbers x0,y0,x1,y1, such as 8,8,24,24") from error


def check(mask: Mask, what: str) -> None:
    """Refuses a mask with nothing to fill, or with nothing to go by.

    Raises:
      InputError: with `what` as its subject.
    """
    if not mask.any():
        raise InputError(f"{what} is empty, so there is nothing to fill; mark it white, or give a box")
    if mask.all():
        raise InputError(f"{what} covers the whole picture, so nothing of it is kept; generate draws whole pictures")


def square(mask: Mask, *, size: int) -> Bool[np.ndarray, "_ _"]:
    """Returns a mask as `resize.square` brings its image to `size`: to be filled where any part of a pixel is.

    Raises:
      InputError: the central square has nothing to fill, or nothing else.
    """
    height, width = mask.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    reduced = _touched(mask[top : top + side, left : left + side], size)
    check(reduced, f"the mask, in the central square of its picture at {size} pixels,")
    return reduced


def known(images: Pixels, masks: Masks, *, side: int) -> dict[str, np.ndarray]:
    """Returns the fields that tell a part of this size what is known (`stages.inpainting.given`).

    Args:
      images: what is known, and anything where it is not.
      masks: True where they are to be filled.
      side: pixels a side that the part draws.
    """
    reduced = np.stack([resize.square(image, size=side) for image in images])
    is_known = ~np.stack([_touched(mask, side) for mask in masks])
    return {"known": reduced * is_known[..., None], "known_mask": is_known.astype(np.float32)}


def _touched(mask: Mask, size: int) -> Bool[np.ndarray, "_ _"]:
    """A square mask at another size: True where a pixel overlaps any that is True."""
    side = len(mask)
    new, old = np.arange(size)[:, None] * side, np.arange(side)[None] * size
    overlaps = (new < old + size) & (old < new + side)
    return (overlaps.astype(np.int64) @ mask @ overlaps.T) > 0
