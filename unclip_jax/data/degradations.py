"""How the low-resolution condition of an upsampler is spoilt in training (DALL-E 2, section 2.1).

An upsampler that has only seen clean reductions of photographs copies the faults of the decoder's samples. Each entry
of `DEGRADATIONS` maps (uint8 [h, w, 3], a generator) to uint8 [h, w, 3].
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64, UInt8

from unclip_jax.errors import InputError, nearest

Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Degradation:
    """One entry of the table.

    Attributes:
      apply: (uint8 [h, w, 3], generator) -> uint8 [h, w, 3].
      draws: "nothing" if the result is a function of the image alone and may be computed once, else "noise".
    """

    apply: Degrade
    draws: str


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
    kernel = _gaussian(kernel_size, sigma)
    blurred = image.astype(np.float32)
    for axis in (0, 1):
        size = image.shape[axis]
        sources = [_mirrored(size, tap - kernel_size // 2) for tap in range(kernel_size)]
        blurred = sum(weight * blurred.take(source, axis=axis) for weight, source in zip(kernel, sources, strict=True))
    return np.ascontiguousarray(np.rint(blurred).astype(np.uint8))


@functools.lru_cache(maxsize=256)
def _mirrored(size: int, offset: int) -> Int64[np.ndarray, " n"]:
    """Positions 0..size-1 moved by `offset`, those outside reflected about the outermost pixel."""
    places = np.abs(np.arange(size, dtype=np.int64) + offset)
    return np.where(places < size, places, 2 * (size - 1) - places)


@functools.lru_cache(maxsize=256)
def _gaussian(kernel_size: int, sigma: float) -> Float[np.ndarray, " k"]:
    if kernel_size < 1 or kernel_size % 2 == 0 or not sigma > 0:
        raise InputError(f"a blur needs an odd kernel and a positive sigma, not {kernel_size} and {sigma}")
    offsets = np.arange(kernel_size) - kernel_size // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


DEGRADATIONS = {
    "none": Degradation(lambda image, rng: image, draws="nothing"),
    "gaussian_blur": Degradation(lambda image, rng: gaussian_blur(image), draws="nothing"),
}


def named(name: str) -> Degradation:
    """Returns an entry of `DEGRADATIONS`; raises InputError for an unknown name."""
    if name not in DEGRADATIONS:
        raise InputError(f"no degradation {name!r}; {nearest(name, DEGRADATIONS)}")
    return DEGRADATIONS[name]
