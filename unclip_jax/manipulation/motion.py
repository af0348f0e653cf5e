"""Frames as what shows their motion: a contact sheet, a GIF, an MP4."""

import os
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax import captioned_grid
from unclip_jax.errors import InputError, nearest

FORMATS = ("sheet", "gif", "mp4")
# VP9 in an MP4 is what browsers play and OpenCV's own build writes; of H.264 it has no encoder.
_CODEC = "vp09"
# Frames of small images are shown larger, by whole pixels.
_SIDE = 256

Frames = Sequence[UInt8[np.ndarray, "_ _ 3"]]


def check_formats(formats: Sequence[str]) -> None:
    """Raises InputError for what is not one of FORMATS."""
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"frames are not shown as {name!r}; {nearest(name, FORMATS)}")


def shown(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Returns a frame enlarged to about 256 pixels a side, by whole pixels; a large one as it is."""
    factor = max(_SIDE // max(frame.shape[:2]), 1)
    return np.ascontiguousarray(frame.repeat(factor, 0).repeat(factor, 1))


def there_and_back(frames: Frames) -> list[np.ndarray]:
    """Returns the frames and then those between its ends in reverse, so that a loop does not jump."""
    return [*frames, *frames[-2:0:-1]]


def write_gif(path: pathlib.Path, frames: Frames, *, fps: float = 12.0) -> None:
    """Writes frames of one size as an endless GIF; the file is there whole or not at all.

    All frames share one palette, or what does not move would flicker.

    Raises:
      InputError: there is no frame, or they are of several sizes.
    """
    large = [shown(frame) for frame in _checked(frames)]
    strip = Image.fromarray(np.concatenate(large, axis=1))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in large]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    first, *others = pictures
    first.save(
        temporary, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, optimize=False
    )
    temporary.replace(path)


def write_mp4(path: pathlib.Path, frames: Frames, *, fps: float = 12.0) -> None:
    """Writes frames of one size as an MP4 (VP9, which browsers play); the file is there whole or not at all.

    Raises:
      InputError: there is no frame, they are of several sizes, or this build of OpenCV writes no such film.
    """
    large = [_even(shown(frame)) for frame in _checked(frames)]
    height, width = large[0].shape[:2]
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # OpenCV goes by the ending
    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*_CODEC), fps, (width, height))
    try:
        if not writer.isOpened():
            raise InputError(
                f"this build of OpenCV ({cv2.__version__}) writes no MP4 ({_CODEC}); install opencv-python-headless "
                "from PyPI, which does, or ask for a gif"
            )
        for frame in large:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
    finally:
        writer.release()
    temporary.replace(path)


def sheet(
    captions: Sequence[str], rows: Sequence[Frames], *, headings: Sequence[str] = ()
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Returns one picture of all frames: a row for each caption, which stands beside it."""
    return captioned_grid.draw(captions, rows, headings=headings)


def _checked(frames: Frames) -> Frames:
    if not len(frames):
        raise InputError("a film needs at least one frame")
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise InputError(f"frames of a film are of one size, but these have {sorted(sizes)}")
    return frames


def _even(frame: np.ndarray) -> np.ndarray:
    """A frame whose sides are even, as films have them: the last row or column twice where it is not."""
    return np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")
