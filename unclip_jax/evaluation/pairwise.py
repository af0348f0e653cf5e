"""The preference probe: which of two images people prefer, by logistic regression on their embeddings' difference.

As Ramesh et al. (2022, appendix A) chose hyper-parameters before they asked people. There is no intercept: which image
is called the first says nothing, so P(a before b) = 1 - P(b before a) holds exactly.
"""

import numpy as np
from jaxtyping import Float, Float64
from scipy import special

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets
from unclip_jax.evaluation.feature_sets import Features

_STEPS = 100


def differences(first: Features, second: Features) -> Float64[np.ndarray, "_ _"]:
    """Returns what the probe reads of pairs, float64 [n, d]: embeddings at length 1, subtracted.

    Raises:
      InputError: the two sides do not belong together, or have rows that are zeros or not finite.
    """
    if first.shape != second.shape:
        raise InputError(
            f"the pairs' embeddings have shapes {list(first.shape)} and {list(second.shape)}; give both images of each "
            "pair, by one CLIP"
        )
    return feature_sets.unit(first, what="the first images' embeddings") - feature_sets.unit(
        second, what="the second images' embeddings"
    )


def check(preferred: Float[np.ndarray, "_"], pairs: int) -> None:
    """Raises InputError where answers are not in [0, 1], or not one for each pair."""
    if len(preferred) != pairs:
        raise InputError(f"{pairs} pairs and {len(preferred)} answers do not belong together; give one for each pair")
    right = (preferred >= 0) & (preferred <= 1)
    if not right.all():
        row = int(np.argmin(right))
        raise InputError(
            f"the answer in row {row} is {preferred[row]:g}; it has to be 1 (the first image), 0 (the second), or "
            "between them, 0.5 for a tie"
        )


def fit(
    read: Float64[np.ndarray, "n d"], preferred: Float[np.ndarray, "_"], *, strength: float
) -> Float64[np.ndarray, "_"]:
    """Fits the probe by Newton's method, float64.

    Args:
      read: from `differences`.
      preferred: float [n] in [0, 1]: 1 where the first image is preferred, 0 where the second, 0.5 a tie.
      strength: of the penalty, above 0, in units of pairs.

    Returns:
      The weights [d] that minimise the sum over pairs of -log P(answer), with P(first) = 1 / (1 + exp(-w . read)), plus
      strength / 2 * |w|^2. A tie counts as half an answer of each kind.

    Raises:
      InputError: as `check`; or a strength that is not above 0, with which separable answers would have no minimum.
    """
    check(preferred, len(read))
    if not (strength > 0 and np.isfinite(strength)):
        raise InputError(f"strength={strength} is no penalty; give more than 0")
    count, width = read.shape
    if count < 1:
        raise InputError("there are no pairs to fit a preference probe to")
    weights = np.zeros(width)
    loss, gradient, slopes = _objective(read, preferred, weights, strength)
    for _ in range(_STEPS):
        hessian = (read.T * slopes) @ read + strength * np.eye(width)
        step = np.linalg.solve(hessian, gradient)
        decrease = float(gradient @ step)
        if decrease <= 1e-20 * count:
            break
        length = 1.0
        while True:  # a whole step may overshoot; a short one of a convex function's cannot
            moved = weights - length * step
            found = _objective(read, preferred, moved, strength)
            if found[0] <= loss - 1e-4 * length * decrease or length < 1e-10:
                break
            length /= 2
        if length < 1e-10:
            break  # the loss cannot be told from its minimum any more
        weights, (loss, gradient, slopes) = moved, found
    return weights


def log_likelihood(read: Float64[np.ndarray, "n d"], preferred: Float[np.ndarray, "_"], weights: np.ndarray) -> float:
    """Returns the mean over pairs of log P(answer); -log 2 is what a coin gets."""
    logits = read @ weights
    return float(np.mean(preferred * special.log_expit(logits) + (1 - preferred) * special.log_expit(-logits)))


def _objective(
    read: np.ndarray, preferred: np.ndarray, weights: np.ndarray, strength: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, its gradient, p (1 - p) of each pair)."""
    p = special.expit(read @ weights)
    loss = -len(read) * log_likelihood(read, preferred, weights) + strength / 2 * float(weights @ weights)
    return loss, read.T @ (p - preferred) + strength * weights, p * (1 - p)
