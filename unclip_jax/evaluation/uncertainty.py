"""Error bars: how far a metric would lie elsewhere had other images been drawn.

Two ways, which tests hold against each other and against simulation:

* Influences. A smooth function of a sample's distribution changes, to first order, by the mean of one number per row,
  its influence (Hampel, 1974; for the Fréchet distance between Gaussians the limit law is Rippl, Munk and Sturm's,
  2016). Their standard deviation over sqrt(n) is the standard error (the delete-one jackknife's, in the limit), and of
  two samples of the same captions and noise the influences subtract row by row, which is why a sweep's differences are
  far more certain than its points. Metrics that have them return `Measured`.
* The delete-a-group jackknife (Kott, 2001; Efron and Tibshirani, 1993, chapter 11), for anything else: rows are dealt
  into groups by a seed, and each is left out once.

The bootstrap is not used: its samples repeat rows, so they have fewer different ones and a larger Fréchet distance, by
as much again as the bias of the distance itself, and every neighbour at distance 0 spoils precision and recall.

A standard error says nothing of the bias that a metric of n images has (`frechet.at_infinity`), and all of these hold
the reference fixed, as a protocol does. Where samples and reference are of the same law, Fréchet and kernel distances
have no first-order term and an interval of +-1.96 standard errors is no longer one of 95%.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from unclip_jax.data import order
from unclip_jax.errors import InputError

GROUPS = 20


class Estimate(NamedTuple):
    """A number, or float64 [k], and its standard error of the same shape."""

    value: Any
    standard_error: Any


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric of n images.

    Attributes:
      value: of the metric.
      influences: float64 [n], mean 0: n times how much the value would change, to first order, had the row a little
        more weight; in the metric's unit.
    """

    value: float
    influences: Float64[np.ndarray, "_"]

    @property
    def standard_error(self) -> float:
        """The standard deviation of `value` over draws of n images."""
        return _of_mean(self.influences)

    def minus(self, other: "Measured") -> Estimate:
        """Returns the difference to another measurement of the same rows (captions and noise) in the same order.

        Raises:
          InputError: the two have different numbers of rows.
        """
        if len(self.influences) != len(other.influences):
            raise InputError(
                f"a paired difference needs the same rows on both sides, not {len(self.influences)} and "
                f"{len(other.influences)}"
            )
        return Estimate(self.value - other.value, _of_mean(self.influences - other.influences))


def mean(values: Float[np.ndarray, "_"]) -> Measured:
    """Returns the mean of one number per row, float [n].

    Raises:
      InputError: fewer than two values, or one that is not finite.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise InputError(f"a mean with an error bar needs two finite values or more; {len(values)} were given")
    value = values.mean()
    return Measured(float(value), values - value)


def of(
    statistic: Callable[[Any], float | Float[np.ndarray, "_"]],
    rows: Shaped[np.ndarray, "_ ..."],
    seed: int,
    *,
    groups: int = GROUPS,
) -> Estimate:
    """Measures any statistic with its standard error, by the delete-a-group jackknife.

    Args:
      statistic: rows -> a number or float [k]; it is asked `groups` + 1 times, and must not depend on rows' order.
      rows: [n, ...], features or row numbers (`np.arange(n)`, where several arrays belong together).
      seed: of the dealing into groups, in [0, 2**32).
      groups: G, at most n. With 20, 95% is +-2.1 standard errors.

    Returns:
      The statistic of all rows, and sqrt((G - 1) / G * sum over groups of (without the group - mean of these)^2).

    Raises:
      InputError: fewer rows than groups, or fewer than two groups.
    """
    group = dealt(len(rows), groups, seed)
    without = np.stack([np.asarray(statistic(rows[group != number]), np.float64) for number in range(groups)])
    return jackknifed(np.asarray(statistic(rows), np.float64), without)


def dealt(count: int, groups: int, seed: int) -> Int64[np.ndarray, "_"]:
    """Deals rows into groups of nearly equal size at random: int64 [count] in [0, groups); the same for ever.

    Raises:
      InputError: fewer rows than groups, or fewer than two groups.
    """
    if not 2 <= groups <= count:
        raise InputError(f"{count} rows cannot be dealt into {groups} groups; give at least 2 groups and as many rows")
    _, places = order.shuffled(np.arange(count, dtype=np.int64), count=count, seed=seed)
    return places % groups


def jackknifed(value: Float64[np.ndarray, "..."], without: Float64[np.ndarray, "groups ..."]) -> Estimate:
    """Returns the estimate of a statistic, given what it is without each group."""
    groups = len(without)
    error = np.sqrt((groups - 1) / groups * ((without - without.mean(0)) ** 2).sum(0))
    return Estimate(value, error) if value.ndim else Estimate(float(value), float(error))


def difference(
    statistic: Callable[[Any], float | Float[np.ndarray, "_"]],
    samples: Shaped[np.ndarray, "_ ..."],
    others: Shaped[np.ndarray, "_ ..."],
    seed: int,
    *,
    groups: int = GROUPS,
) -> Estimate:
    """Measures how much larger a statistic is for samples than for others of the same rows, as `of` does.

    The same rows are left out on both sides, so that what they have in common cancels.

    Raises:
      InputError: different numbers of rows, or as `of`.
    """
    if len(samples) != len(others):
        raise InputError(f"a paired difference needs the same rows on both sides, not {len(samples)} and {len(others)}")

    def apart(rows: np.ndarray) -> np.ndarray:
        return np.asarray(np.subtract(statistic(samples[rows]), statistic(others[rows])))

    return of(apart, np.arange(len(samples)), seed, groups=groups)


def _of_mean(influences: np.ndarray) -> float:
    return float(influences.std(ddof=1) / np.sqrt(len(influences)))
