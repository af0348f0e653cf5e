"""How published protocols turn a photograph into a square, and a square into what Inception reads.

Each function is somebody's procedure to the pixel, for the filter decides a FID as much as a model does: ADM's and
GLIDE's crop, GigaGAN's, MLPerf's; then clean-fid's resizing and pytorch-fid's. Pillow does the resizing, as it does
theirs; its `LANCZOS`, `BICUBIC` and `BOX` are antialiased when they shrink.
"""

import io

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

_INCEPTION = 299


def center_crop_arr(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """ADM's crop, which GLIDE's FID is taken to use (Dhariwal and Nichol, 2021, `center_crop_arr` of their code).

    The image is halved by averages of 2x2 pixels (BOX) while its shorter side is at least twice `size`, then brought to
    it by BICUBIC, and its middle is taken, of an odd remainder the upper and left.

    Args:
      image: uint8 [h, w, 3] in [0, 255].
      size: pixels a side of the result; smaller images are enlarged.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture)[top : top + size, left : left + size].copy()


def lanczos_crop(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """GigaGAN's crop (Kang et al., 2023, their evaluation's code): the largest middle square, then LANCZOS to `size`.

    Where the sides differ by an odd number the square begins at the even one of the two places next to the middle.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    # Python rounds halves to even numbers, as torchvision's crop does by calling it.
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return np.array(square.resize((size, size), Image.Resampling.LANCZOS))


def squeeze(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """MLPerf's resizing for Stable Diffusion: the whole image to a square, whatever its shape, by BICUBIC.

    That is Pillow's default; which filter their script names was not looked up. They keep the results as JPEG files:
    `through_jpeg`.
    """
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def through_jpeg(image: UInt8[np.ndarray, "h w 3"], *, quality: int = 75) -> UInt8[np.ndarray, "h w 3"]:
    """What is left of an image that was saved as JPEG by Pillow, at its default quality, chroma at half size."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return np.array(Image.open(buffer))


def clean_fid_input(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "299 299 3"]:
    """Resizes as clean-fid's mode "clean" (Parmar et al., 2022), for `inception.features_of_resized`.

    Each channel as float32 by Pillow's BICUBIC to 299 x 299, clipped to [0, 255] and not rounded.
    """
    channels = [
        Image.fromarray(image[..., channel].astype(np.float32)).resize(
            (_INCEPTION, _INCEPTION), Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 255)


def pytorch_fid_input(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "299 299 3"]:
    """Resizes as pytorch-fid does, for `inception.features_of_resized`.

    Bilinearly with half-pixel centres and without antialiasing, float32, not rounded. pytorch-fid maps 255 to 1 and 0
    to -1 where the graph computes (x - 128) / 128; so the result is 256/255 of the pixels, of which the graph makes the
    same, and reaches 256.
    """
    rows, columns = (_halfway(length) for length in image.shape[:2])
    pixels = image.astype(np.float32)
    pixels = _between(pixels, columns, 1)
    return _between(pixels, rows, 0) * np.float32(256 / 255)


def _halfway(length):
    """Lower neighbours, upper neighbours and weights of the upper ones, for 299 pixels out of `length`."""
    place = np.maximum((np.arange(_INCEPTION) + 0.5) * length / _INCEPTION - 0.5, 0)
    lower = np.floor(place).astype(np.int64)
    return lower, np.minimum(lower + 1, length - 1), (place - lower).astype(np.float32)


def _between(pixels, places, axis):
    lower, upper, weight = places
    weight = weight.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    return pixels.take(lower, axis) * (1 - weight) + pixels.take(upper, axis) * weight
