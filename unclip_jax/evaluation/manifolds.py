"""Precision, recall, density and coverage: two sets by the balls that reach to each row's k-th neighbour.

Precision and recall are Kynkäänniemi et al.'s (2019, equations 1 and 2), computed as ADM does (Dhariwal and Nichol,
2021): a row lies in a ball if its squared distance to the centre is at most the radius squared, and a row is no
neighbour of its own. Density and coverage are Naeem et al.'s (2020), by the same balls. Products are
float32. All four move with the sizes of both sets, so these belong to any number.
"""

import math

import numpy as np
from jaxtyping import Float32, Float64, Int64

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets, uncertainty
from unclip_jax.evaluation.feature_sets import Features
from unclip_jax.evaluation.uncertainty import Estimate

_PAIRS = 1 << 24  # distances that are held at once: 64 MB
# Squared distances below this, in units of both rows' squared lengths, are float32's rounding: equal rows.
_EQUAL = 2e-6


def measures(reference: Features, samples: Features, k: int = 3) -> dict[str, float]:
    """Compares samples with a reference.

    Args:
      reference, samples: features, float [n, d] and [m, d].
      k: which neighbour within its own set a row's ball reaches to, from 1.

    Returns:
      precision: share of samples that lie in the ball of some reference row.
      recall: share of reference rows that lie in the ball of some sample.
      density: reference balls that a sample lies in, over k, in the mean; 1 where both are of one law, and may be more.
      coverage: share of reference rows whose ball holds some sample.

    Raises:
      InputError: fewer than k + 1 rows, rows that are not finite, or widths that differ.
    """
    one = np.ones(len(samples), np.int64)
    return {name: float(values[0]) for name, values in _without_groups(reference, samples, k, one, 0).items()}


def measured(
    reference: Features, samples: Features, k: int = 3, *, seed: int = 0, groups: int = uncertainty.GROUPS
) -> dict[str, Estimate]:
    """Returns `measures` with standard errors over draws of the samples, the reference held fixed.

    These are `uncertainty.of`'s, by leaving out groups of samples, but distances are computed once: without a group,
    the balls of the other samples reach farther, to neighbours that are left.

    Raises:
      InputError: as `measures`, or too few samples to leave a group out.
    """
    group = uncertainty.dealt(len(samples), groups, seed) + 1
    if len(samples) - np.bincount(group).max() <= k:
        raise InputError(f"{len(samples)} samples less one of {groups} groups have no {k} neighbours each; give more")
    found = _without_groups(reference, samples, k, group, groups)
    return {name: uncertainty.jackknifed(np.asarray(values[0]), values[1:]) for name, values in found.items()}


def _without_groups(
    reference: Features, samples: Features, k: int, group: Int64[np.ndarray, "m"], groups: int
) -> dict[str, Float64[np.ndarray, "_"]]:
    """Measures with all samples (first), and without those of group 1, 2 … `groups`; groups are counted from 1."""
    if k < 1:
        raise InputError(f"k={k} is no neighbour; the first is k=1")
    feature_sets.check_pair(samples, reference, least=k + 1)
    real, made = _centred(reference, samples)
    real_radii, made_radii = _radii(real, k)[:, 0], _radii(made, k, group, groups)
    hits = np.zeros(len(made), np.int64)
    recalled, touched = (np.zeros((count + 1, len(real)), bool) for count in (groups, group.max()))
    size = max(1, _PAIRS // len(real))
    for start in range(0, len(made), size):
        rows = slice(start, start + size)
        squares = _squares(made[rows], real)
        in_real = squares <= real_radii
        hits[rows] = in_real.sum(1)
        for number in range(len(recalled)):
            recalled[number] |= (squares <= made_radii[rows, number, None]).any(0)
        for number in range(1, len(touched)):
            touched[number] |= in_real[group[rows] == number].any(0)
    left = [group != number for number in range(groups + 1)]
    by_groups = touched.sum(0)  # of how many groups some sample lies in a reference's ball
    return {
        "precision": np.array([(hits[rows] > 0).mean() for rows in left]),
        "recall": recalled.mean(1),
        "density": np.array([hits[rows].mean() / k for rows in left]),
        "coverage": np.array([(by_groups > touched[number]).mean() for number in range(groups + 1)]),
    }


def _centred(reference: Features, samples: Features) -> tuple[Float32[np.ndarray, "_ _"], Float32[np.ndarray, "_ _"]]:
    """Both in float32, less the reference's mean: it changes no distance, and lengths no longer dwarf these."""
    mean = np.mean(reference, axis=0, dtype=np.float64)
    real, made = (np.empty(x.shape, np.float32) for x in (reference, samples))
    for source, out in ((reference, real), (samples, made)):
        for rows, block in feature_sets.blocks(source):
            out[rows] = block - mean
    return real, made


def _radii(
    x: Float32[np.ndarray, "n d"], k: int, group: Int64[np.ndarray, "n"] | None = None, groups: int = 0
) -> Float32[np.ndarray, "n _"]:
    """Squared distance of each row to its k-th neighbour among all others, and among those of no group 1, 2 … `groups`.

    A row's own group has -1 in the place of a radius: without it the row has no ball, and nothing lies in one of -1.
    """
    radii = np.full((len(x), groups + 1), -1, np.float32)
    # Without any one group k are left of so many neighbours, but for a chance that nobody will see: groups are random.
    kept = min(len(x), math.ceil((4 * k + 16) * groups / (groups - 1)) if groups else k)
    size = max(1, _PAIRS // len(x))
    for start in range(0, len(x), size):
        squares = _squares(x[start : start + size], x)
        own = np.arange(len(squares))
        squares[own, start + own] = np.inf
        near = np.argpartition(squares, kept - 1, axis=1)[:, :kept]
        nearest = np.take_along_axis(squares, near, 1)
        radii[start : start + size, 0] = np.partition(nearest, k - 1, axis=1)[:, k - 1]
        for number in range(1, groups + 1):
            assert group is not None
            others = np.where(group[near] == number, np.inf, nearest)
            rows = start + np.flatnonzero(group[start : start + size] != number)
            radii[rows, number] = np.partition(others, k - 1, axis=1)[rows - start, k - 1]
    return radii


def _squares(x: Float32[np.ndarray, "n d"], y: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "n m"]:
    """Squared distances of all pairs."""
    lengths = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("md,md->m", y, y)
    squares = lengths - 2 * (x @ y.T)
    squares[squares < _EQUAL * lengths] = 0
    return squares
