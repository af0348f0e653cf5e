"""How the low-resolution condition of an upsampler is made, and spoilt, in training (DALL-E 2, section 2.1).

An upsampler that has only seen clean reductions of photographs copies the faults of the decoder's samples. Each entry
of `DEGRADATIONS` makes the small image out of the large one: some shrink it and then spoil what is left, BSR shrinks
as it goes.
"""

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import UInt8

from unclip_jax.data import bsr, resize
from unclip_jax.errors import InputError, nearest

MakeLowRes = Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Degradation:
    """One entry of the table.

    Attributes:
      low_res: (image, size=, method=, rng=) -> small image, both uint8, square and RGB. `size` is the new side,
        `method` one of `resize.FILTERS` for those that shrink first, and `rng` the example's own generator.
      draws: whether it draws from the generator; if not, its result may be computed once and kept.
      whole_factor: whether it shrinks by 2, 3, 4 and so on only.
    """

    low_res: MakeLowRes
    draws: bool = False
    whole_factor: bool = False


def gaussian_blur(
    image: UInt8[np.ndarray, "h w c"], *, kernel_size: int = 3, sigma: float = 0.6
) -> UInt8[np.ndarray, "h w c"]:
    """Convolves with a normalised Gaussian (64->256 upsampler: kernel 3, sigma 0.6; DALL-E 2, appendix C).

    Args:
      image: uint8 [h, w, c] in [0, 255], each side longer than half the kernel.
      kernel_size: odd number of taps along each axis.
      sigma: standard deviation in pixels.

    Returns:
      uint8 [h, w, c], rounded to nearest. Edges are mirrored about the outermost pixel.
    """
    if kernel_size < 1 or kernel_size % 2 == 0 or not sigma > 0:
        raise InputError(f"a blur needs an odd kernel and a positive sigma, not {kernel_size} and {sigma}")
    pixels = image.astype(np.float32)
    blurred = cv2.GaussianBlur(pixels, (kernel_size, kernel_size), sigma, borderType=cv2.BORDER_REFLECT_101)
    return np.rint(blurred).astype(np.uint8)


def _shrunk(spoil: Callable[[np.ndarray], np.ndarray]) -> MakeLowRes:
    """Shrinks cleanly, then spoils the small image."""

    def low_res(image: np.ndarray, *, size: int, method: str, rng: np.random.Generator) -> np.ndarray:
        return spoil(resize.square(image, size=size, method=method))

    return low_res


def _bsr(process: bsr.Process) -> MakeLowRes:
    """Shrinks as the process draws it; `method` has no say in it."""

    def low_res(image: np.ndarray, *, size: int, method: str, rng: np.random.Generator) -> np.ndarray:
        return bsr.degrade(image, factor=image.shape[0] // size, process=process, rng=rng)

    return low_res


# The paper's are "gaussian_blur" for 64->256 and "bsr" for 256->1024 (appendix C).
DEGRADATIONS = {
    "none": Degradation(_shrunk(lambda small: small)),
    "gaussian_blur": Degradation(_shrunk(gaussian_blur)),
    "bsr": Degradation(_bsr(bsr.LIGHT), draws=True, whole_factor=True),
    "bsrgan": Degradation(_bsr(bsr.BSRGAN), draws=True, whole_factor=True),
}


def named(name: str) -> Degradation:
    """Returns an entry of `DEGRADATIONS`; raises InputError for an unknown name."""
    if name not in DEGRADATIONS:
        raise InputError(f"no degradation {name!r}; {nearest(name, DEGRADATIONS)}")
    return DEGRADATIONS[name]
