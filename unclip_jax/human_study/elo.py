"""Elo ratings of models by maximum likelihood, as GLIDE (arXiv 2112.10741) computes them in its appendix A.1.

The exponent printed there has the other sign, by which whoever wins would be rated lower. GLIDE begins at zero for all
and descends, which keeps the mean at zero, as here.
"""

import math
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse.csgraph
import scipy.special
from jaxtyping import Float

from unclip_jax.errors import InputError

# A rating of 400 more means odds of ten to one.
_POINTS = 400 / math.log(10)


def ratings(wins: Float[np.ndarray, "n n"], names: Sequence[str]) -> Float[np.ndarray, "n"]:
    """Returns the ratings s that minimise sum_ij wins_ij log(1 + 10^((s_j - s_i) / 400)), with mean 0.

    Args:
      wins: how often model i won against model j; a tie is half a win of each. The diagonal does not count.
      names: of the models, for messages.

    Returns:
      Ratings in Elo's points; the likelihood depends on their differences alone.

    Raises:
      InputError: no finite ratings are the most likely (see `unbounded`).
    """
    if reason := unbounded(wins, names):
        raise InputError(reason)
    wins = wins * (1 - np.eye(len(wins)))

    # In natural units, with the first rating held at 0: the loss is then strictly convex, and flat in one place.
    def slope(free: Float[np.ndarray, "_"]) -> Float[np.ndarray, "_"]:
        expected = wins * scipy.special.expit(_behind(free))
        return (expected.sum(0) - expected.sum(1))[1:] / wins.sum()

    def curvature(free: Float[np.ndarray, "_"]) -> Float[np.ndarray, "_ _"]:
        share = scipy.special.expit(_behind(free))
        pairs = wins * share * (1 - share)
        pairs = pairs + pairs.T
        return (np.diag(pairs.sum(1)) - pairs)[1:, 1:] / wins.sum()

    found = scipy.optimize.root(slope, np.zeros(len(wins) - 1), jac=curvature, tol=1e-12)
    if not found.success:
        raise RuntimeError(f"the ratings were not found: {found.message}")
    scores = _POINTS * np.concatenate([np.zeros(1), found.x])
    return scores - scores.mean()


def unbounded(wins: Float[np.ndarray, "n n"], names: Sequence[str]) -> str:
    """Returns why no finite ratings are the most likely, as a sentence; "" where they exist.

    They exist where no group of models is such that nobody outside it ever won against one inside (Ford, 1957).
    """
    beats = wins > 0
    count, group = scipy.sparse.csgraph.connected_components(beats, connection="strong")
    for number in range(count if count > 1 else 0):
        inside = group == number
        if beats[np.ix_(~inside, inside)].any():
            continue
        best, others = _listed(names, inside), _listed(names, ~inside)
        if beats[np.ix_(inside, ~inside)].any():
            return f"{best} won every comparison with {others}, so the most likely Elo difference is infinite"
        return f"{best} and {others} were never compared, so they have no Elo difference"
    return ""


def _listed(names: Sequence[str], which: np.ndarray) -> str:
    return " and ".join(name for name, there in zip(names, which, strict=True) if there)


def _behind(free: Float[np.ndarray, "m"]) -> Float[np.ndarray, "_ _"]:
    """Returns s_j - s_i at [i, j]."""
    scores = np.concatenate([np.zeros(1), free])
    return scores[None] - scores[:, None]

