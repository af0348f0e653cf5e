"""Sums and differences of embeddings, of images and of texts, which CLIP puts into one space."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from unclip_jax.errors import InputError
from unclip_jax.unclip import Vectors

# Sides are free, for terms of one row go with those of many.
Term = Float[np.ndarray, "_ _"]


def combined(terms: Sequence[tuple[float, Term]]) -> Vectors:
    """Returns sum_k w_k z_k as long as the first term's embeddings are, float32 [n, d].

    Args:
      terms: weights, and embeddings [n, d], or [1, d] for one that all share.

    Raises:
      InputError: there is no term, widths differ, or the terms cancel out.
    """
    if not terms:
        raise InputError("a sum of embeddings needs at least one")
    widths = sorted({z.shape[1] for _, z in terms})
    if len(widths) > 1:
        raise InputError(f"embeddings of {widths[0]} and of {widths[1]} numbers cannot be added")
    first = terms[0][1].astype(np.float64)
    total = sum((weight * z.astype(np.float64) for weight, z in terms), np.zeros_like(first))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    if not (length > 1e-6).all():
        raise InputError("the terms of a sum of embeddings cancel out, so it says nothing of what to draw")
    return (total / length * np.linalg.norm(first, axis=1, keepdims=True)).astype(np.float32)
