"""The aesthetic probe: ratings of images as an affine function of their CLIP embeddings, by least squares.

Ramesh et al. (2022, section 5.5 and appendix A) fit a linear regression on CLIP ViT-L/14 embeddings to the mean ratings
of AVA, and swept guidance by what it says. LAION's published predictors are of the same form: five layers without
anything between them, which fold to one.
"""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float64

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets
from unclip_jax.evaluation.feature_sets import Features

# Numbers of the affine layers in LAION's published file; the others of that sequence are dropout. Its variants with
# activations between them count differently.
_LAION = (0, 2, 4, 6, 7)


def fit(z: Features, ratings: Float[np.ndarray, "_"], *, ridge: float = 0.0) -> tuple[Float64[np.ndarray, "_"], float]:
    """Fits ratings by least squares, in closed form and float64.

    Args:
      z: embeddings, float [n, d]; brought to length 1.
      ratings: float [n], in any unit.
      ridge: at least 0; the penalty on |weights|^2, in units of examples. The bias has none.

    Returns:
      (weights [d], bias) that minimise the sum of (z . weights + bias - rating)^2 + ridge |weights|^2; where embeddings
      leave directions open, the smallest weights that do.

    Raises:
      InputError: other numbers of ratings than embeddings, values that are not finite, a negative ridge, or without
        one no more examples than dimensions.
    """
    if len(ratings) != len(z):
        raise InputError(f"{len(z)} embeddings and {len(ratings)} ratings are no pairs; give one rating an embedding")
    if not np.isfinite(ratings).all():
        raise InputError(f"the rating in row {int(np.argmin(np.isfinite(ratings)))} is not finite; leave that row out")
    if not ridge >= 0 or not np.isfinite(ridge):
        raise InputError(f"ridge={ridge} is no penalty; give 0 or more")
    unit = feature_sets.unit(z, what="the embeddings")
    count, width = unit.shape
    if count <= width and not ridge:
        raise InputError(
            f"{count} ratings leave {width} weights and a bias open; give more than {width}, or a ridge above 0"
        )
    targets = np.asarray(ratings, np.float64)
    centre, mean = unit.mean(0), targets.mean()
    # [z - centre, rating - mean] is reduced to its triangular factor a block at a time: the same least squares, no
    # larger than d x d, without squaring its condition as the normal equations would.
    triangle = np.concatenate([np.sqrt(ridge) * np.eye(width), np.zeros((width, 1))], 1)
    for rows, block in feature_sets.blocks(unit):
        block = np.concatenate([block - centre, (targets[rows] - mean)[:, None]], 1)
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, block]), mode="r"))
    weights = np.linalg.lstsq(triangle[:, :width], triangle[:, width], rcond=None)[0]
    return weights, float(mean - centre @ weights)


def folded(tensors: Mapping[str, Float[np.ndarray, "..."]]) -> tuple[Float64[np.ndarray, "_"], float]:
    """Folds LAION's predictor into one vector.

    Args:
      tensors: by name, `layers.N.weight` [out, in] and `layers.N.bias` [out] for N = 0, 2, 4, 6, 7, as in its file
        sac+logos+ava1-l14-linearMSE; or of a single layer, `weight` [1, d] and `bias` [1].

    Returns:
      (weights [d], bias); it reads embeddings at length 1.

    Raises:
      InputError: other tensors, such as of the variants with activations, or layers that do not fit each other.
    """
    numbers = _LAION if len(tensors) > 2 else None
    names = [f"layers.{number}." for number in numbers] if numbers else [""]
    expected = {name + kind for name in names for kind in ("weight", "bias")}
    if set(tensors) != expected:
        found = ", ".join(sorted(set(tensors), key=_by_number))
        raise InputError(
            f"this is no predictor of affine layers alone, as LAION's linearMSE are: it has {found}; expected are "
            f"layers {', '.join(map(str, _LAION))} with weight and bias, or one weight and bias"
        )
    weights: np.ndarray = np.ones((1, 1))
    bias = np.zeros(1)
    for name in reversed(names):
        weight, own = (np.asarray(tensors[name + kind], np.float64) for kind in ("weight", "bias"))
        if weight.ndim != 2 or own.shape != weight.shape[:1] or weight.shape[0] != weights.shape[1]:
            raise InputError(
                f"{name}weight {list(weight.shape)} and {name}bias {list(own.shape)} do not fit the layer after them, "
                f"which takes {weights.shape[1]} numbers"
            )
        if not (np.isfinite(weight).all() and np.isfinite(own).all()):
            raise InputError(f"{name}weight or {name}bias is not finite; the file is damaged")
        bias = weights @ own + bias
        weights = weights @ weight
    return weights[0], float(bias[0])


def _by_number(name: str) -> tuple[int, str]:
    number = re.search(r"\d+", name)
    return int(number.group()) if number else -1, name
