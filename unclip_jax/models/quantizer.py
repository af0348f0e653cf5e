"""z_i as a few integers, for the autoregressive prior (Ramesh et al., 2022, section 2.2).

Principal components of the image embeddings, ordered by eigenvalue, each quantised into buckets (the paper keeps
319 of 1,024 components, in 1,024 buckets), and the likeness z_i.z_t quantised for the token in front.

Fitting takes two sums over all embeddings, in float64: `Moments` gives mean and covariance, `Histogram` what the
buckets need. The result is a dictionary of float32 arrays, the statistics, which `encode` and `decode` take:

    mean [d], basis [d, k]      z is near mean + basis @ coefficients
    variances [d]               all eigenvalues of the covariance, largest first
    edges [k, buckets - 1]      boundaries between the buckets of each coefficient, ascending
    values [k, buckets]         what each bucket decodes to
    dot_edges [dot_buckets - 1], dot_probabilities [dot_buckets]    boundaries and shares of z_i.z_t
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from unclip_jax.arrays import Embeddings
from unclip_jax.errors import InputError

Statistics = dict[str, Array]

_BINS = 8192  # of the histograms, per quantity: 8 for each of the paper's 1,024 buckets
_REACH = 8.0  # standard deviations that a coefficient's histogram spans on either side


class Moments(NamedTuple):
    """Sums over embeddings that give their mean and covariance; those of two sets add up.

    Attributes:
      count: number of embeddings, int64.
      total: their sum, float64 [d].
      outer: the sum of their outer products, float64 [d, d].
    """

    count: Any
    total: Any
    outer: Any

    @classmethod
    def of(cls, z: Float[np.ndarray, "n d"]) -> "Moments":
        """The sums over embeddings of any dtype; there may be none.

        Raises:
          InputError: if an embedding is not finite.
        """
        z = z.astype(np.float64)
        if not np.isfinite(z).all():
            raise InputError("an embedding to measure is not finite; leave it out or mend it")
        return cls(np.int64(len(z)), z.sum(0), z.T @ z)

    @property
    def mean(self) -> Float[np.ndarray, "d"]:
        return self.total / self.count

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        covariance = self.outer / self.count - np.outer(self.mean, self.mean)
        return (covariance + covariance.T) / 2


@dataclasses.dataclass(frozen=True)
class PrincipalComponents:
    """The directions of most variance.

    Attributes:
      mean: float64 [d].
      basis: orthonormal columns, the largest eigenvalue first, float64 [d, k]. The largest entry of a column is
        positive, which settles the sign.
      variances: all eigenvalues of the covariance, largest first, float64 [d].
    """

    mean: Float[np.ndarray, "d"]
    basis: Float[np.ndarray, "d k"]
    variances: Float[np.ndarray, "d"]

    @classmethod
    def of(cls, moments: Moments, *, components: int) -> "PrincipalComponents":
        """The first `components` principal components.

        Raises:
          InputError: if there are fewer dimensions than components, or fewer than two embeddings.
        """
        dimensions = len(moments.total)
        if not 1 <= components <= dimensions:
            raise InputError(f"components must be between 1 and the embedding's {dimensions}, not {components}")
        if moments.count < 2:
            raise InputError(f"the quantizer needs at least 2 embeddings to fit, not {moments.count}")
        variances, vectors = np.linalg.eigh(moments.covariance)
        variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
        peaks = vectors[np.abs(vectors).argmax(0), np.arange(dimensions)]
        return cls(moments.mean, (vectors * np.where(peaks < 0, -1.0, 1.0))[:, :components], variances)

    def project(self, z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        """Coefficients of embeddings in float64."""
        return (z.astype(np.float64) - self.mean) @ self.basis


class Histogram(NamedTuple):
    """Counts and sums of values per bin, a row for each quantity; those of two sets add up.

    Attributes:
      counts: int64 [rows, bins].
      sums: of the values in each bin, float64 [rows, bins].
    """

    counts: Any
    sums: Any


@dataclasses.dataclass(frozen=True)
class Bins:
    """Fine, equal bins: of every coefficient, and in the last row of z_i.z_t.

    There are `_BINS` from `low` to `high`; what lies outside counts in the outermost bin.

    Attributes:
      low, high: float64 [k + 1].
    """

    low: Float[np.ndarray, "rows"]
    high: Float[np.ndarray, "rows"]

    @classmethod
    def over(cls, components: PrincipalComponents) -> "Bins":
        """Bins over 8 standard deviations of each coefficient, and over [-1, 1] for the dot product."""
        rows = components.basis.shape[1]
        # A component without variance still needs a bin of some width.
        reach = _REACH * np.sqrt(np.maximum(components.variances[:rows], 1e-12 * max(components.variances[0], 1e-12)))
        high = np.append(reach, 1.0)
        return cls(-high, high)

    def count(self, rows: Float[np.ndarray, "n rows"]) -> Histogram:
        """The histogram of examples, each its coefficients and then its dot product; there may be none."""
        scaled = (rows - self.low) / (self.high - self.low) * _BINS
        bins = np.clip(scaled, 0, _BINS - 1).astype(np.int64)
        flat = (bins + np.arange(len(self.low)) * _BINS).ravel()
        shape = (len(self.low), _BINS)
        counts = np.bincount(flat, minlength=shape[0] * _BINS).reshape(shape)
        sums = np.bincount(flat, weights=rows.ravel(), minlength=shape[0] * _BINS).reshape(shape)
        return Histogram(counts, sums.astype(np.float64))  # of no weights NumPy makes integers


@dataclasses.dataclass(frozen=True)
class Distributions:
    """What a histogram tells of each row's values.

    Attributes:
      bins: where its bins lie.
      histogram: what is in them.
    """

    bins: Bins
    histogram: Histogram

    def _boundaries(self, row: int) -> Float[np.ndarray, "bounds"]:
        return np.linspace(self.bins.low[row], self.bins.high[row], _BINS + 1)

    def _cumulative(self, row: int) -> Float[np.ndarray, "bounds"]:
        return np.append(0.0, self.histogram.counts[row].cumsum())

    def edges(self, row: int, *, buckets: int, spacing: str, tail: float) -> Float[np.ndarray, "inner"]:
        """The `buckets - 1` boundaries between buckets, ascending.

        "uniform" spaces them equally over all but a share `tail` of the values on either side (what lies
        outside falls in the outermost buckets); "quantile" puts an equal share of the values in each bucket.
        """
        boundaries, cumulative = self._boundaries(row), self._cumulative(row)
        # Quantiles are read where the cumulative share rises; flat stretches hold no values.
        rising = np.append(np.diff(cumulative) > 0, False) | np.append(False, np.diff(cumulative) > 0)
        share = cumulative[rising] / cumulative[-1]
        if spacing == "quantile":
            return np.interp(np.arange(1, buckets) / buckets, share, boundaries[rising])
        low, high = np.interp([tail, 1 - tail], share, boundaries[rising])
        return np.linspace(low, high, buckets + 1)[1:-1]

    def shares(self, row: int, edges: Float[np.ndarray, "inner"]) -> Float[np.ndarray, "buckets"]:
        """The share of the values that falls in each bucket."""
        cumulative = np.interp(edges, self._boundaries(row), self._cumulative(row))
        total = self.histogram.counts[row].sum()
        return np.diff(cumulative, prepend=0, append=total) / total

    def values(self, row: int, edges: Float[np.ndarray, "inner"], *, reconstruction: str) -> Float[np.ndarray, "m"]:
        """What each bucket decodes to: its "centre", or the "mean" of the values in it (its centre if none)."""
        boundaries = self._boundaries(row)
        filled = boundaries[np.flatnonzero(self.histogram.counts[row])[[0, -1]] + np.array([0, 1])]
        bounds = np.concatenate([[min(filled[0], edges[0])], edges, [max(filled[1], edges[-1])]])
        centres = (bounds[:-1] + bounds[1:]) / 2
        if reconstruction == "centre":
            # The outermost buckets reach to the outermost value; their centre is that of their neighbours' width.
            width = edges[1] - edges[0] if len(edges) > 1 else bounds[1] - bounds[0]
            centres[[0, -1]] = edges[0] - width / 2, edges[-1] + width / 2
            return centres
        counts = np.diff(np.interp(bounds, boundaries, self._cumulative(row)))
        sums = np.diff(np.interp(bounds, boundaries, np.append(0.0, self.histogram.sums[row].cumsum())))
        means = np.where(counts > 0, sums / np.maximum(counts, 1e-12), centres)
        # Values inside one bin are taken as even, so a mean may stray out of an inner bucket: keep it in.
        means[1:-1] = np.clip(means[1:-1], bounds[1:-2], bounds[2:-1])
        return means


def statistics(
    components: PrincipalComponents,
    distributions: Distributions,
    *,
    buckets: int,
    dot_buckets: int,
    spacing: str = "uniform",
    reconstruction: str = "mean",
    tail: float = 1e-4,
) -> Statistics:
    """The float32 arrays that `encode` and `decode` take, from both passes; arguments as in `fit`."""
    if buckets < 2 or dot_buckets < 2:
        raise InputError(f"a quantizer needs at least 2 buckets, not {buckets} and {dot_buckets} for the dot product")
    if spacing not in ("uniform", "quantile"):
        raise InputError(f"the quantizer's spacing is 'uniform' or 'quantile', not {spacing!r}")
    if reconstruction not in ("mean", "centre"):
        raise InputError(f"the quantizer's reconstruction is 'mean' or 'centre', not {reconstruction!r}")
    rows = range(components.basis.shape[1])
    edges = [distributions.edges(row, buckets=buckets, spacing=spacing, tail=tail) for row in rows]
    values = [distributions.values(row, edges[row], reconstruction=reconstruction) for row in rows]
    dot_edges = distributions.edges(-1, buckets=dot_buckets, spacing="uniform", tail=tail)
    arrays = {
        "mean": components.mean,
        "basis": components.basis,
        "variances": components.variances,
        "edges": np.stack(edges),
        "values": np.stack(values),
        "dot_edges": dot_edges,
        "dot_probabilities": distributions.shares(-1, dot_edges),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def fit(
    total: Callable[[Callable[[Any, Any], Any]], Any],
    *,
    components: int,
    buckets: int,
    dot_buckets: int,
    spacing: str = "uniform",
    reconstruction: str = "mean",
    tail: float = 1e-4,
) -> Statistics:
    """Fits the quantizer.

    Args:
      total: fn(measure) -> the sum, over all data, of the arrays that `measure(z_i, z_t)` returns; called twice.
        `measure` takes any number of CLIP embeddings [n, d] of unit norm, none included.
      components: principal components to keep.
      buckets: values of a code.
      dot_buckets: values of the dot-product token.
      spacing: of the buckets' edges, see `Distributions.edges`; the paper does not say.
      reconstruction: what a bucket decodes to, see `Distributions.values`.
      tail: share of the values on either side that "uniform" leaves to the outermost buckets.

    Returns:
      The statistics, float32.

    Raises:
      InputError: there are too few embeddings, or one that is not finite, or an option is unknown.
    """
    basis = PrincipalComponents.of(total(lambda z_i, z_t: Moments.of(z_i)), components=components)
    bins = Bins.over(basis)

    def measure(z_i, z_t):
        dots = np.einsum("nd,nd->n", z_i, z_t, dtype=np.float64)
        return bins.count(np.column_stack([basis.project(z_i), dots]))

    return statistics(
        basis,
        Distributions(bins, total(measure)),
        buckets=buckets,
        dot_buckets=dot_buckets,
        spacing=spacing,
        reconstruction=reconstruction,
        tail=tail,
    )


def describe(fitted: Statistics) -> dict[str, float]:
    """What a fit found: the share of the variance that the components keep, and the rank of the embeddings.

    The rank counts eigenvalues above a billionth of the largest.
    """
    variances = np.asarray(fitted["variances"], np.float64)
    kept = fitted["basis"].shape[1]
    return {
        "variance_kept": float(variances[:kept].sum() / variances.sum()),
        "rank": float((variances > 1e-9 * variances[0]).sum()),
    }


def encode(statistics: Statistics, z_i: Embeddings) -> Int[Array, "b k"]:
    """The codes of image embeddings, int32 in [0, buckets), the component of most variance first."""
    # Full precision: on accelerators the default would move values across edges.
    coefficients = jnp.matmul(z_i - statistics["mean"], statistics["basis"], precision=jax.lax.Precision.HIGHEST)
    return jax.vmap(jnp.searchsorted, in_axes=(0, 1), out_axes=1)(statistics["edges"], coefficients)


def decode(statistics: Statistics, codes: Int[Array, "b k"]) -> Embeddings:
    """The image embeddings that codes stand for; of nearly unit norm if the fitted ones were."""
    coefficients = jax.vmap(jnp.take, in_axes=(0, 1), out_axes=1)(statistics["values"], codes)
    return statistics["mean"] + jnp.matmul(coefficients, statistics["basis"].T, precision=jax.lax.Precision.HIGHEST)


def reconstruction_error(statistics: Statistics, z_i: Embeddings) -> Float[Array, ""]:
    """The share of the embeddings' variance that encoding and decoding loses: |z - z'|^2 over |z - mean|^2."""
    lost, there = lost_variance(statistics, z_i)
    return lost.sum() / there.sum()


def lost_variance(statistics: Statistics, z_i: Embeddings) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Returns |z - z'|^2 and |z - mean|^2 of each embedding, z' being what its codes stand for."""
    lost = jnp.square(z_i - decode(statistics, encode(statistics, z_i))).sum(-1)
    return lost, jnp.square(z_i - statistics["mean"]).sum(-1)


def encode_dot(statistics: Statistics, z_i: Embeddings, z_t: Embeddings) -> Int[Array, "b"]:
    """The dot-product token: z_i.z_t of unit embeddings as int32 in [0, dot_buckets)."""
    return jnp.searchsorted(statistics["dot_edges"], (z_i * z_t).sum(-1))


def sample_dot(key: Key[Array, ""], statistics: Statistics, *, top: float = 0.5) -> Int[Array, ""]:
    """Draws a dot-product token from the upper `top` share of its distribution (the paper's best is the top half).

    The bucket in which the boundary falls is drawn with what it holds above the boundary.
    """
    above = jnp.cumsum(statistics["dot_probabilities"][::-1])
    kept = jnp.diff(jnp.minimum(above, top), prepend=0.0)[::-1]
    return jax.random.categorical(key, jnp.log(jnp.maximum(kept, 0.0))).astype(jnp.int32)
