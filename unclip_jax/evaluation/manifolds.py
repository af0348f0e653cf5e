"""Precision, recall, density and coverage: two sets by the balls that reach to each row's k-th neighbour.

Precision and recall are Kynkäänniemi et al.'s (2019, equations 1 and 2), computed as ADM does (Dhariwal and Nichol,
2021): a row lies in a ball if its squared distance to the centre is at most the radius squared, and a row is no
neighbour of its own. Density and coverage are Naeem et al.'s (2020, equations 4 and 5), by the same balls. Products are
float32. All four move with the sizes of both sets, so these belong to any number.
"""

import numpy as np
from jaxtyping import Float32

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets
from unclip_jax.evaluation.feature_sets import Features

_PAIRS = 1 << 25  # distances that are held at once: 128 MB
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
    if k < 1:
        raise InputError(f"k={k} is no neighbour; the first is k=1")
    feature_sets.check_pair(samples, reference, least=k + 1)
    real, made = _centred(reference, samples)
    real_radii, made_radii = _radii(real, k), _radii(made, k)
    inside, hits = np.zeros(len(made), bool), 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    size = max(1, _PAIRS // len(real))
    for start in range(0, len(made), size):
        rows = slice(start, start + size)
        squares = _squares(made[rows], real)
        in_real = squares <= real_radii
        inside[rows] = in_real.any(1)
        hits += int(in_real.sum())
        covered |= in_real.any(0)
        recalled |= (squares <= made_radii[rows, None]).any(0)
    return {
        "precision": float(inside.mean()),
        "recall": float(recalled.mean()),
        "density": hits / (k * len(made)),
        "coverage": float(covered.mean()),
    }


def _centred(reference: Features, samples: Features) -> tuple[Float32[np.ndarray, "_ _"], Float32[np.ndarray, "_ _"]]:
    """Both in float32, less the reference's mean: it changes no distance, and lengths no longer dwarf these."""
    mean = np.mean(reference, axis=0, dtype=np.float64)
    real, made = (np.empty(x.shape, np.float32) for x in (reference, samples))
    for source, out in ((reference, real), (samples, made)):
        for rows, block in feature_sets.blocks(source):
            out[rows] = block - mean
    return real, made


def _radii(x: Float32[np.ndarray, "n d"], k: int) -> Float32[np.ndarray, "n"]:
    """Squared distance of each row to its k-th neighbour among the others."""
    radii = np.empty(len(x), np.float32)
    size = max(1, _PAIRS // len(x))
    for start in range(0, len(x), size):
        squares = _squares(x[start : start + size], x)
        own = np.arange(len(squares))
        squares[own, start + own] = np.inf
        radii[start : start + size] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def _squares(x: Float32[np.ndarray, "n d"], y: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "n m"]:
    """Squared distances of all pairs."""
    lengths = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("md,md->m", y, y)
    squares = lengths - 2 * (x @ y.T)
    squares[squares < _EQUAL * lengths] = 0
    return squares
