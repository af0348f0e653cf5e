"""Pictures as files: what people give is decoded strictly, what is drawn carries its text."""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, PngImagePlugin

from unclip_jax.data import images as images_lib
from unclip_jax.errors import InputError


def read(path: str) -> tuple[np.ndarray, str]:
    """Returns a picture, uint8 [h, w, 3], and the SHA-256 of its file.

    Raises:
      InputError: the file cannot be read, or is no whole JPEG, PNG or WebP.
    """
    try:
        content = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"the picture {path!r} cannot be read: {error}") from error
    try:
        return images_lib.decode(content), hashlib.sha256(content).hexdigest()
    except InputError as error:
        raise InputError(f"the picture {path!r} cannot be decoded: {error}") from error


def save(path: pathlib.Path, pixels: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes uint8 [h, w, 3] as a PNG with text chunks; the file is there whole or not at all."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)
