"""The inception score (Salimans et al., 2016, section 4): exp of the mean KL(p(y|x) || p(y)) over images.

As ADM computes it: of the FID network's logits without their bias, 1,008 classes, over consecutive 5,000 images at a
time, float64.
"""

import numpy as np
from jaxtyping import Float64
from scipy import special

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets
from unclip_jax.evaluation.feature_sets import Features
from unclip_jax.evaluation.uncertainty import Estimate, Measured

SPLIT = 5000


def score(logits: Features, splits: int | None = None) -> Estimate:
    """Returns the score of logits, float [n, k]: (mean, standard deviation, not error, over the splits).

    Args:
      logits: before the softmax, rows in the order of the samples.
      splits: into how many equal runs of rows they are cut; by default each 5,000, and the rest where n is no multiple.

    Raises:
      InputError: logits that are not finite, fewer than two rows, or fewer rows than splits.
    """
    scores = [value for value, _ in _by_split(logits, splits)]
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def measured(logits: Features, splits: int | None = None) -> Measured:
    """Returns the mean over splits with each row's influence: a split's score times the row's KL above the mean."""
    parts = _by_split(logits, splits)
    rows = [value * (divergences - divergences.mean()) for value, divergences in parts]
    weights = [len(logits) / (len(parts) * len(divergences)) for _, divergences in parts]
    influences = np.concatenate([weight * part for weight, part in zip(weights, rows, strict=True)])
    return Measured(float(np.mean([value for value, _ in parts])), influences)


def _by_split(logits: Features, splits: int | None) -> list[tuple[float, Float64[np.ndarray, "_"]]]:
    """(score, KL of each row) of every split."""
    feature_sets.check(logits, what="the logits")
    count = len(logits)
    if splits is not None and not 1 <= splits <= count:
        raise InputError(f"{count} rows of logits cannot be cut into {splits} splits; give from 1 to {count}")
    edges = [*range(0, count, SPLIT), count] if splits is None else [i * count // splits for i in range(splits + 1)]
    parts = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        log_p = special.log_softmax(np.asarray(logits[start:stop], np.float64), axis=1)
        p = np.exp(log_p)
        # The mean's logarithm by its logits, for a class that nothing belongs to has p = 0.
        log_mean = special.logsumexp(log_p, axis=0) - np.log(stop - start)
        divergences = (p * (log_p - log_mean)).sum(1)
        parts.append((float(np.exp(divergences.mean())), divergences))
    return parts
