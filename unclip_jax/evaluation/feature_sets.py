"""Sets of features, a row for each image: looked at before anything is computed of them, and read in blocks."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float64, Int64

from unclip_jax.data import order
from unclip_jax.errors import InputError

# [n, d], any float type; may be a memory map. Functions compare widths themselves, to say which of two is wrong.
Features = Float[np.ndarray, "_ _"]
BLOCK = 2048  # rows that are float64 at once


def check(features: np.ndarray, *, what: str, least: int = 2) -> None:
    """Raises InputError where features are no table of rows, fewer rows than `least`, or not finite."""
    if features.ndim != 2 or not features.shape[1]:
        raise InputError(f"{what} have the shape {list(features.shape)}; a row of features for each image is needed")
    if len(features) < least:
        raise InputError(f"{what} are {len(features)} rows of features; this needs at least {least}")
    for start in range(0, len(features), BLOCK):
        finite = np.isfinite(features[start : start + BLOCK]).all(1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise InputError(f"{what} are not finite, first in row {row}; find out which image that is and why")


def check_pair(samples: np.ndarray, reference: np.ndarray, *, least: int = 2) -> None:
    """Raises InputError where either is no set of features, or their widths differ."""
    check(samples, what="the samples' features", least=least)
    check(reference, what="the reference's features", least=least)
    check_widths(samples.shape[1], reference.shape[1])


def check_widths(samples: int, reference: int) -> None:
    """Raises InputError where features of two networks, or layers, would be compared."""
    if samples != reference:
        raise InputError(
            f"the samples' features have {samples} dimensions, the reference's {reference}: they are of different "
            "layers or networks; compute both with one"
        )


def blocks(features: Features, *, first: int = 0) -> Iterator[tuple[slice, Float64[np.ndarray, "_ _"]]]:
    """Yields (rows, a float64 copy of their features), in order, from a first row on."""
    for start in range(first, len(features), BLOCK):
        rows = slice(start, min(start + BLOCK, len(features)))
        yield rows, np.array(features[rows], np.float64)


def unit(features: Features, *, what: str) -> Float64[np.ndarray, "_ _"]:
    """Returns the rows at length 1, float64 [n, d].

    Raises:
      InputError: features that are not finite, or a row of zeros, which has no direction.
    """
    check(features, what=what, least=1)
    rows = np.asarray(features, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(f"{what} are zeros in row {int(np.argmin(lengths))}, which has no direction")
    return rows / lengths


def drawn(count: int, size: int, *, seed: int, number: int = 0) -> Int64[np.ndarray, "_"]:
    """Draws `size` different rows of `count`, in rising order: draw `number` of a seed, the same for ever.

    NumPy's own draws may change between its versions; these are a keyed permutation's (`data/order.py`).
    """
    positions = np.arange(size, dtype=np.int64)
    _, rows = order.shuffled(positions, count=count, seed=order.member_seed(seed, number))
    return np.sort(rows)
