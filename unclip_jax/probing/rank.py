"""How many dimensions CLIP's image embeddings use (Ramesh et al., 2022, section 2.2).

The paper says that training CLIP with SAM drastically lowers "the rank of the CLIP representation space", and counts it
by principal components: 319 of 1,024 give embeddings back with less than 1% of mean squared error. That count is
`components`. It moves by whole numbers and depends on the tail, so two smooth measures stand beside it, both the number
of dimensions where variance is spread evenly over so many: the exponential of the entropy of the eigenvalues' shares
(Roy and Vetterli, 2007), and the participation ratio. `numerical` counts all eigenvalues that are not rounding.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from unclip_jax.errors import InputError
from unclip_jax.evaluation import uncertainty
from unclip_jax.evaluation.uncertainty import Estimate
from unclip_jax.models.quantizer import Moments
from unclip_jax.unclip import Vectors

LOST = 0.01  # of the variance, in the paper's count
_ROUNDING = 1e-9  # of the largest eigenvalue: below it there is nothing


@dataclasses.dataclass(frozen=True)
class Rank:
    """The dimensions that embeddings use, of d that they have.

    Attributes:
      components: fewest principal components that lose less than `lost` of the variance.
      effective: exp of the entropy of the eigenvalues' shares, from 1 to d.
      participation: (sum of eigenvalues)^2 over the sum of their squares, from 1 to d.
      numerical: eigenvalues above a billionth of the largest.
      variances: the eigenvalues, largest first, float64 [d].
    """

    components: int
    effective: float
    participation: float
    numerical: int
    variances: Float[np.ndarray, "d"]

    def numbers(self) -> dict[str, float]:
        """Returns the four ranks by name."""
        return {name: float(getattr(self, name)) for name in NAMES}


NAMES = ("components", "effective", "participation", "numerical")


def of_variances(variances: Float[np.ndarray, "d"], *, lost: float = LOST) -> Rank:
    """Returns the rank of a spectrum.

    Args:
      variances: eigenvalues of a covariance in any order, none below 0, float [d].
      lost: share of the variance that may be lost, in (0, 1).

    Raises:
      InputError: no variance at all, or a share out of range.
    """
    if not 0 < lost < 1:
        raise InputError(f"lost={lost:g} is no share of the variance; give one between 0 and 1, as the paper's 0.01")
    ordered = np.sort(np.maximum(np.asarray(variances, np.float64), 0.0))[::-1]
    if not np.isfinite(ordered).all() or ordered[0] <= 0:
        raise InputError("embeddings that are all the same, or not finite, have no rank; give different pictures")
    there = ordered[ordered > _ROUNDING * ordered[0]]
    shares = there / there.sum()
    # What is left after k components; its last entry is exactly 0.
    left = np.append(np.cumsum(shares[::-1])[::-1][1:], 0.0)
    return Rank(
        components=int(np.argmax(left < lost)) + 1,
        effective=float(np.exp(-(shares * np.log(shares)).sum())),
        participation=float(1 / np.square(shares).sum()),
        numerical=len(there),
        variances=ordered,
    )


def of(z: Vectors, *, lost: float = LOST) -> Rank:
    """Returns the rank of embeddings about their mean, float [n, d], n at least 2.

    n embeddings span n - 1 dimensions at most, so there should be several times as many as dimensions.

    Raises:
      InputError: as `of_variances`; fewer than two embeddings, or one that is not finite.
    """
    if len(z) < 2:
        raise InputError(f"a rank needs at least 2 embeddings, not {len(z)}")
    return of_variances(np.maximum(np.linalg.eigvalsh(Moments.of(z).covariance), 0.0), lost=lost)


def measured(z: Vectors, *, lost: float = LOST, seed: int = 0) -> Mapping[str, Estimate]:
    """Returns each of NAMES with its standard error over draws of as many pictures (`uncertainty.of`).

    Raises:
      InputError: as `of`, or fewer than 20 embeddings.
    """

    def numbers(rows: np.ndarray) -> np.ndarray:
        return np.array(list(of(rows, lost=lost).numbers().values()))

    value, error = uncertainty.of(numbers, z, seed)
    return {name: Estimate(float(value[row]), float(error[row])) for row, name in enumerate(NAMES)}
