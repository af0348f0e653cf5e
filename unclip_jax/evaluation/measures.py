"""The numbers of a result: those that a protocol names, each with its error bar, of features in the order of the rows.

Which of them there are depends on the network: the Inception Score needs Inception's logits, a CLIP score needs a CLIP.
A number's name says whose features it is of; "FID" is said of Inception's published weights alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.evaluation import (
    clip_scores,
    frechet,
    inception_score,
    kernel_distances,
    manifolds,
    oracle,
    uncertainty,
)
from unclip_jax.evaluation.uncertainty import Measured
from unclip_jax.evaluation.units import Units

PUBLISHED = "inception-2015-12-05"
_SPATIAL, _LOGITS, _IMAGE, _TEXT = "spatial", "logits_unbiased", "z_i", "z_t"
_NEIGHBOURS = 3
# ADM's evaluation compares with so many real images.
_REFERENCE_ROWS = 10_000
# A point of the line to infinity costs a decomposition, which at Inception's width takes many seconds.
_WIDE, _POINTS, _FEW_POINTS = 512, 15, 5
_CLIP_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
      key: what it is.
      name: what results call it, with the network that its features are of.
      value: of all rows.
      standard_error: over other draws of as many images; None where there is none.
      better: "lower" or "higher".
      about: how it was computed, where the name does not say it.
    """

    key: str
    name: str
    value: float
    standard_error: float | None
    better: str
    about: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """What was measured at one point: its numbers, and the main distance with each row's influence."""

    measures: list[Measure]
    main: Measured


class Reference:
    """Features of real images, in the order of their rows.

    Attributes:
      main, moments: features that distances are of, and their moments.
      count, width: images, and numbers for each.
    """

    def __init__(self, found: Units, *, main: str):
        """Gathers them, once every row is proven to be there."""
        self._units = found
        self.main: np.ndarray = found.gathered(main)[main]
        self.moments = frechet.moments(self.main)
        self.count, self.width = self.main.shape

    def gathered(self, name: str) -> np.ndarray:
        """Returns other features of the same images."""
        return self._units.gathered(name)[name]


@dataclasses.dataclass(frozen=True)
class _Given:
    """What a metric may look at."""

    reference: Reference
    found: Units
    network: str
    x: np.ndarray
    main: Measured
    captions: Sequence[str]
    images: Iterable[np.ndarray] | None
    seed: int

    @property
    def is_inception(self) -> bool:
        return self.network.startswith(PUBLISHED)

    def named(self, name: str) -> str:
        return f"{name} ({self.network})"

    def gathered(self, name: str) -> np.ndarray:
        return self.found.gathered(name)[name]


def _fid(given: _Given) -> list[Measure]:
    name = "FID" if given.network == PUBLISHED else "Fréchet distance"
    return [_measured("fid", given.named(name), given.main, "lower")]


def _sfid(given: _Given) -> list[Measure]:
    if not given.is_inception:
        return []
    moments = frechet.moments(given.reference.gathered(_SPATIAL))
    found = frechet.measured(given.gathered(_SPATIAL), moments)
    name = "sFID" if given.network == PUBLISHED else "spatial Fréchet distance"
    return [_measured("sfid", given.named(name), found, "lower")]


def _fid_infinity(given: _Given) -> list[Measure]:
    if len(given.x) < 4:
        return []
    points = _FEW_POINTS if given.reference.width > _WIDE else _POINTS
    line = frechet.at_infinity(given.x, given.reference.moments, given.seed, points=points)
    about = f"line over 1/N through {points} points from {line.counts[0]} images on; the samples' bias is taken off"
    name = "FID" if given.network == PUBLISHED else "Fréchet distance"
    return [Measure("fid_infinity", given.named(f"{name} at infinity"), line.value, None, "lower", about)]


def _kid(given: _Given) -> list[Measure]:
    found = kernel_distances.measured_kid(given.x, given.reference.main)
    name = "KID" if given.network == PUBLISHED else "kernel distance"
    return [_measured("kid", given.named(name), found, "lower", "over all pairs, unbiased, cubic kernel")]


def _cmmd(given: _Given) -> list[Measure]:
    if given.is_inception:
        return []
    found = kernel_distances.measured_cmmd(given.gathered(_IMAGE), given.reference.gathered(_IMAGE))
    what = "over all pairs, Gaussian kernel of width 10, x 1,000"
    return [_measured("cmmd", given.named("CMMD"), found, "lower", what)]


def _inception_score(given: _Given) -> list[Measure]:
    if not given.is_inception:
        return []
    found = inception_score.measured(given.gathered(_LOGITS))
    about = "1,008 classes, logits without bias, 5,000 images at a time"
    return [_measured("inception_score", given.named("Inception Score"), found, "higher", about)]


def _precision_recall(given: _Given) -> list[Measure]:
    if min(len(given.x), given.reference.count) <= _NEIGHBOURS:
        return []
    real = given.reference.main[:_REFERENCE_ROWS]
    about = f"{_NEIGHBOURS} neighbours, {len(given.x):,} images, {len(real):,} real ones"
    if len(given.x) < uncertainty.GROUPS:  # too few to leave a group out
        found = manifolds.measures(real, given.x, _NEIGHBOURS)
        return [Measure(key, given.named(key), float(value), None, "higher", about) for key, value in found.items()]
    measured = manifolds.measured(real, given.x, _NEIGHBOURS, seed=given.seed)
    return [_measured(key, given.named(key), value, "higher", about) for key, value in measured.items()]


def _clip_score(given: _Given) -> list[Measure]:
    if given.is_inception:
        return []
    found = clip_scores.measured(given.gathered(_IMAGE), given.gathered(_TEXT), _CLIP_SCALE)
    about = f"cosine of image and caption times {_CLIP_SCALE:g}, no prefix"
    return [_measured("clip_score", given.named("CLIP score"), found, "higher", about)]


def _r_precision(given: _Given) -> list[Measure]:
    distinct = len(set(given.captions))
    if given.is_inception or distinct < 2:
        return []
    drawn = clip_scores.draw(given.captions, others=min(clip_scores.OTHERS, distinct - 1))
    found = clip_scores.measured_r_precision(given.gathered(_IMAGE), given.gathered(_TEXT), drawn)
    about = f"how often an image is nearest to its own caption of {drawn.shape[1] + 1} different ones"
    return [_measured("r_precision", given.named("CLIP R-precision"), found, "higher", about)]


def _oracle(given: _Given) -> list[Measure]:
    if given.images is None:
        return []
    readings = [reading for batch in given.images for reading in oracle.read(batch)]
    scores = oracle.score_readings(readings, given.captions)
    made = []
    for group, words in (("single", "one object"), ("two", "two objects")):
        if group not in scores:
            continue
        for key in ("colour", "shape", "both", "all"):
            share, count = scores[group][key], scores[group]["n"]
            error = float(np.sqrt(share * (1 - share) / count))
            about = f"share of {count:,} captions; pixels read by rule, no network"
            key = f"oracle_{key}" if group == "single" else f"oracle_two_{key}"
            made.append(Measure(key, f"{key.rpartition('_')[2]} right, {words}", share, error, "higher", about))
    return made


# Key of a protocol's metrics -> what computes its numbers; none where the network does not have them.
METRICS: dict[str, Callable[[_Given], list[Measure]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "fid_infinity": _fid_infinity,
    "kid": _kid,
    "cmmd": _cmmd,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
    "clip_score": _clip_score,
    "r_precision": _r_precision,
    "oracle": _oracle,
}


def _measured(key: str, name: str, found: Any, better: str, about: str = "") -> Measure:
    return Measure(key, name, float(found.value), float(found.standard_error), better, about)


def scored(
    metrics: Sequence[str],
    reference: Reference,
    found: Units,
    *,
    network: str,
    main: str,
    captions: Sequence[str],
    images: Iterable[np.ndarray] | None = None,
    seed: int = 0,
) -> Scored:
    """Measures images against a reference.

    Args:
      metrics: keys of METRICS.
      reference: real images' features.
      found: features of the images, every row once.
      network: name of what made both.
      main: name of the features that distances are of.
      captions: of the rows.
      images: the images themselves, uint8 batches in order, for metrics that read pixels.
      seed: of what a metric draws.

    Raises:
      InputError: a row is missing or there twice, or a feature is not finite; the row is named.
    """
    x = found.gathered(main)[main]
    wild = np.flatnonzero(~np.isfinite(x).all(1))
    if wild.size:
        raise InputError(f"features of row {wild[0]} by {network} are not finite; {wild.size} rows of {len(x)} are so")
    distance = frechet.measured(x, reference.moments)
    given = _Given(reference, found, network, x, distance, captions, images, seed)
    return Scored([measure for key in metrics for measure in METRICS[key](given)], distance)


def difference(score: Scored, base: Scored) -> tuple[float, float]:
    """Returns by how much the main distance is larger than another point's of the same rows, and its standard error."""
    found = score.main.minus(base.main)
    return float(found.value), float(found.standard_error)
