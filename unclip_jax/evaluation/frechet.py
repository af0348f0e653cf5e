"""The Fréchet distance between Gaussians with two sets' moments: FID and sFID, by which features are given.

|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al., 2017, equation 6; Dowson and Landau, 1982). With
roots S_a = A A^T and S_b = B B^T, the eigenvalues of S_a S_b are the squared singular values of A^T B, so the last
trace is their sum: always real, never negative, and as exact where a matrix has no full rank, which a square root of
the product is not. Everything is float64 NumPy on the host, rows in their order: the same digits however many hosts
made the features.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets
from unclip_jax.evaluation.feature_sets import Features
from unclip_jax.evaluation.uncertainty import Measured

_POINTS = 15


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
      count: n, rows of the set; 0 where a file does not say.
      mu: the mean, float64 [d].
      sigma: the covariance, divided by n - 1, float64 [d, d]; zeros where n is 1.
    """

    count: int
    mu: Float64[np.ndarray, "d"]
    sigma: Float64[np.ndarray, "d d"]

    @property
    def deficient(self) -> bool:
        """Whether there are too few rows for a covariance of full rank: a distance is then mostly bias."""
        return 0 < self.count <= len(self.mu)


def moments(x: Features) -> Moments:
    """Returns the moments of features, float [n, d], n at least 2; two passes in blocks, so a memory map will do.

    Raises:
      InputError: too few rows, or rows that are not finite.
    """
    feature_sets.check(x, what="these features")
    mu = np.zeros(x.shape[1])
    for _, block in feature_sets.blocks(x):
        mu += block.sum(0)
    mu /= len(x)
    squares = np.zeros((len(mu), len(mu)))
    for _, block in feature_sets.blocks(x):
        block -= mu
        squares += block.T @ block
    return Moments(len(x), mu, squares / (len(x) - 1))


def merged(a: Moments, b: Moments) -> Moments:
    """Returns the moments of two sets together (Chan, Golub and LeVeque, 1983): as of all rows but for rounding.

    Raises:
      InputError: one does not know its count, or their widths differ.
    """
    feature_sets.check_widths(len(a.mu), len(b.mu))
    if not (a.count and b.count):
        raise InputError("moments can only be merged where both say of how many rows they are")
    count, apart = a.count + b.count, b.mu - a.mu
    squares = (a.count - 1) * a.sigma + (b.count - 1) * b.sigma
    squares += np.outer(apart, apart) * (a.count * b.count / count)
    return Moments(count, a.mu + apart * (b.count / count), squares / (count - 1))


def streamed(batches: Iterable[Features]) -> Moments:
    """Returns the moments of features that come in batches, in one pass: for sets that are not kept.

    Raises:
      InputError: fewer than two rows, rows that are not finite, or batches of different widths.
    """
    total: Moments | None = None
    for batch in batches:
        feature_sets.check(batch, what="these features", least=1)
        block = np.asarray(batch, np.float64)
        mu = block.mean(0)
        block = block - mu
        own = Moments(len(block), mu, block.T @ block / max(len(block) - 1, 1))
        total = own if total is None else merged(total, own)
    if total is None or total.count < 2:
        raise InputError("moments need at least 2 rows of features")
    return total


def distance(a: Moments, b: Moments) -> float:
    """Returns the Fréchet distance (squared, as FID is), at least 0; exactly 0 between equal moments.

    Raises:
      InputError: widths that differ, or moments that are not finite.
    """
    _check(a, b)
    if np.array_equal(a.mu, b.mu) and np.array_equal(a.sigma, b.sigma):
        return 0.0  # as defined; the traces' rounding would leave 1e-13 of them
    return _distance(a, b, _singular_values(root(a.sigma), root(b.sigma)))


def distance_of_features(x: Features, y: Features) -> float:
    """Returns the Fréchet distance between two sets of features, float [n, d] and [m, d]; symmetric.

    Where a set has no more rows than dimensions its rows are the root, and no eigenvalue has to be told from 0.

    Raises:
      InputError: too few rows, rows that are not finite, or widths that differ.
    """
    feature_sets.check_pair(x, y)
    if np.array_equal(x, y):
        return 0.0
    a, b = moments(x), moments(y)
    return _distance(a, b, _singular_values(_root_of(x, a), _root_of(y, b)))


def measured(x: Features, reference: Moments) -> Measured:
    """Returns the distance of samples, float [n, d], from a reference that is held fixed, with each row's influence.

    The derivative of the distance by mu is 2 (mu - nu), by S it is 1 - T, where T = B (B^T S B)^(-1/2) B^T carries the
    samples' Gaussian onto the reference's (Rippl, Munk and Sturm, 2016). On the rows' own span this holds
    for fewer rows than dimensions, too.

    Raises:
      InputError: as `distance_of_features`.
    """
    feature_sets.check(x, what="the samples' features")
    own = moments(x)
    _check(own, reference)
    basis = root(reference.sigma)
    _, singular, axes = np.linalg.svd(_root_of(x, own).T @ basis, full_matrices=False)
    kept = singular > singular[:1] * 1e-12
    half = (basis @ axes[kept].T) / np.sqrt(singular[kept])  # T = half half^T
    apart, unbiased = own.mu - reference.mu, len(x) / (len(x) - 1)
    influences = np.zeros(len(x))
    for rows, block in feature_sets.blocks(x):
        block -= own.mu
        influences[rows] = 2 * block @ apart + unbiased * ((block**2).sum(1) - ((block @ half) ** 2).sum(1))
    equal = np.array_equal(own.mu, reference.mu) and np.array_equal(own.sigma, reference.sigma)
    value = 0.0 if equal else _distance(own, reference, singular)
    return Measured(value, influences - influences.mean())


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """A distance at infinitely many samples.

    Attributes:
      value: where the line through the points meets 1 / N = 0; may be below 0 for sets of one law.
      slope: of that line: the bias of N samples is slope / N.
      counts, distances: the points, N and the distance of N samples from the reference.
    """

    value: float
    slope: float
    counts: Sequence[int]
    distances: Sequence[float]


def at_infinity(
    x: Features, y: Features | Moments, seed: int, *, points: int = _POINTS, smallest: int = 0
) -> Extrapolation:
    """Extrapolates the distance over 1 / N (Chong and Forsyth, 2020): free of the samples' bias.

    The reference is as it is: its own bias stays. The law 1 / N holds where N is well above d.

    Args:
      x: samples, float [n, d].
      y: the reference, features float [m, d] or moments.
      seed: of the rows that stand for each N, in [0, 2**32).
      points: how many N are measured, at equal distances from `smallest` to n.
      smallest: the first N; by default n / 6 (their 5,000, of 30,000), but 2 d if that is more and at most n / 2.

    Raises:
      InputError: as `distance_of_features`; fewer than two points, or `smallest` is not in [2, n).
    """
    feature_sets.check(x, what="the samples' features", least=4)
    count, width = x.shape
    reference = y if isinstance(y, Moments) else moments(y)
    first = smallest or max(count // 6, min(2 * width, count // 2))
    if not (2 <= first < count and points >= 2):
        raise InputError(
            f"{points} points from {first} to {count} samples give no line; give at least 2 points and a smallest "
            f"number from 2 to {count - 1}"
        )
    basis = root(reference.sigma)
    counts = [int(number) for number in np.linspace(first, count, points)]
    distances = []
    for number, size in enumerate(counts):
        part = x[feature_sets.drawn(count, size, seed=seed, number=number)]
        own = moments(part)
        _check(own, reference)
        distances.append(_distance(own, reference, _singular_values(_root_of(part, own), basis)))
    slope, value = np.polyfit(1 / np.asarray(counts), distances, 1)
    return Extrapolation(float(value), float(slope), counts, distances)


def root(sigma: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """Returns A with A A^T = sigma, for a covariance; eigenvalues that are rounding alone count as 0."""
    values, vectors = np.linalg.eigh(sigma)
    noise = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors * np.sqrt(np.where(values > noise, values, 0.0))


def _root_of(x: Features, own: Moments) -> np.ndarray:
    """A with A A^T = sigma of these rows: [d, n] or [d, d], whichever is smaller."""
    if not own.deficient:
        return root(own.sigma)
    return (np.asarray(x, np.float64) - own.mu).T / np.sqrt(own.count - 1)


def _singular_values(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.svd(a.T @ b, compute_uv=False)


def _distance(a: Moments, b: Moments, singular: np.ndarray) -> float:
    shift = ((a.mu - b.mu) ** 2).sum()
    return max(0.0, float(shift + np.trace(a.sigma) + np.trace(b.sigma) - 2 * singular.sum()))


def _check(samples: Moments, reference: Moments) -> None:
    feature_sets.check_widths(len(samples.mu), len(reference.mu))
    for what, one in (("samples", samples), ("reference", reference)):
        if not (np.isfinite(one.mu).all() and np.isfinite(one.sigma).all()):
            raise InputError(f"the moments of the {what} are not finite; compute them anew")
