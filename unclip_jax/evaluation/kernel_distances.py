"""Kernel distances between sets of features: KID and CMMD, squared maximum mean discrepancies (Gretton et al., 2012).

Kernel matrices are made a block at a time in float64 and only their row sums are kept, so 30,000 x 40,000 pairs need
the memory of one block, and each sample's influence on the distance comes with it.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets
from unclip_jax.evaluation.feature_sets import Features
from unclip_jax.evaluation.uncertainty import Estimate, Measured

# (block of x, block of y) -> kernel of all pairs, all float64
_Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

SIGMA = 10.0  # of CMMD's kernel
CMMD_SCALE = 1000.0


def kid(x: Features, y: Features) -> float:
    """Returns the kernel inception distance of samples, float [n, d], from a reference, float [m, d].

    With the kernel (x . y / d + 1)^3 (Bińkowski et al., 2018), and over all pairs: the unbiased U-statistic
    (Gretton et al., lemma 6), which is 0 in the mean over sets of one law, and so may be negative.

    Raises:
      InputError: too few rows, rows that are not finite, or widths that differ.
    """
    return measured_kid(x, y).value


def measured_kid(x: Features, y: Features) -> Measured:
    """Returns `kid` with each sample's influence; the reference is held fixed."""
    feature_sets.check_pair(x, y)
    own, cross, others = len(x) * (len(x) - 1), len(x) * len(y), len(y) * (len(y) - 1)
    within, between = _sums_within(_cubic, x, diagonal=False), _sums_between(_cubic, x, y)
    value = within.sum() / own + _sums_within(_cubic, y, diagonal=False).sum() / others - 2 * between.sum() / cross
    influences = 2 * (within / (len(x) - 1) - between / len(y))
    return Measured(float(value), influences - influences.mean())


def kid_of_subsets(x: Features, y: Features, subsets: int = 100, size: int = 1000, seed: int = 0) -> Estimate:
    """Returns mean and standard deviation (not error) of KID over random subsets, as it is usually reported.

    Args:
      x, y: samples and reference, float [n, d] and [m, d].
      subsets: how many.
      size: rows of each, different ones, of both sets.
      seed: of the draws, in [0, 2**32).

    Returns:
      (mean, the values' standard deviation).

    Raises:
      InputError: as `kid`; subsets that are larger than a set, of fewer than two rows, or none.
    """
    feature_sets.check_pair(x, y)
    if not (2 <= size <= min(len(x), len(y)) and subsets >= 1):
        raise InputError(
            f"{subsets} subsets of {size} rows cannot be drawn from {len(x)} samples and {len(y)} references; take a "
            f"size from 2 to {min(len(x), len(y))} and at least 1 subset"
        )
    values = []
    for number in range(subsets):
        rows = [feature_sets.drawn(len(z), size, seed=seed, number=2 * number + k) for k, z in enumerate((x, y))]
        values.append(kid(x[rows[0]], y[rows[1]]))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def cmmd(x: Features, y: Features) -> float:
    """Returns CLIP's maximum mean discrepancy (Jayasumana et al., 2024), at least 0, times 1,000.

    Of embeddings at length 1 (they are brought to it), by a Gaussian kernel of width 10, over all pairs, each row with
    itself too: the biased V-statistic, as published. Its authors' CLIP is ViT-L/14 at 336 pixels; a value belongs to
    the CLIP that made the embeddings.

    Raises:
      InputError: as `kid`, or a row of zeros.
    """
    return measured_cmmd(x, y).value


def measured_cmmd(x: Features, y: Features) -> Measured:
    """Returns `cmmd` with each sample's influence; the reference is held fixed."""
    feature_sets.check_pair(x, y)
    x = feature_sets.unit(x, what="the samples' embeddings")
    y = feature_sets.unit(y, what="the reference's embeddings")
    within, between = _sums_within(_gaussian, x, diagonal=True), _sums_between(_gaussian, x, y)
    others = _sums_within(_gaussian, y, diagonal=True).mean() / len(y)
    value = within.mean() / len(x) + others - 2 * between.mean() / len(y)
    influences = 2 * CMMD_SCALE * (within / len(x) - between / len(y))
    return Measured(max(0.0, CMMD_SCALE * float(value)), influences - influences.mean())


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    products = x @ y.T / x.shape[1] + 1
    return products * products * products


def _gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(squares / (-2 * SIGMA**2))


def _sums_within(kernel: _Kernel, x: Features, *, diagonal: bool) -> Float64[np.ndarray, "_"]:
    """For each row the sum of the kernel with all rows, itself included or not; every pair is computed once."""
    sums = np.zeros(len(x))
    for rows, block in feature_sets.blocks(x):
        values = kernel(block, block)
        if not diagonal:
            np.fill_diagonal(values, 0.0)
        sums[rows] += values.sum(1)
        for later, other in feature_sets.blocks(x, first=rows.stop):
            values = kernel(block, other)
            sums[rows] += values.sum(1)
            sums[later] += values.sum(0)
    return sums


def _sums_between(kernel: _Kernel, x: Features, y: Features) -> Float64[np.ndarray, "_"]:
    """For each row of x the sum of the kernel with all rows of y."""
    sums = np.zeros(len(x))
    for rows, block in feature_sets.blocks(x):
        for _, other in feature_sets.blocks(y):
            sums[rows] += kernel(block, other).sum(1)
    return sums
