"""Scores anyone's samples against anyone's reference: features of both, then every metric that these allow.

Samples are an npz with ADM's `arr_0` or a folder of pictures. A reference is either of these, or a file of moments
(`references`), of which FID alone can be had, and sFID and the rest as far as it holds what they need.
"""

import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float32

from unclip_jax.errors import InputError
from unclip_jax.evaluation import (
    frechet,
    image_sets,
    inception,
    inception_score,
    kernel_distances,
    manifolds,
    references,
    uncertainty,
)
from unclip_jax.evaluation.frechet import Moments
from unclip_jax.evaluation.uncertainty import Measured

NEEDED = ("2048", "spatial", "logits_unbiased")
Compute = Callable[[Any, Any], Mapping[str, jax.Array]]
_SECONDS = 10.0  # between two lines of progress


def extracted(
    feature_set: inception.FeatureSet,
    batches: Iterable[image_sets.Batch],
    count: int,
    *,
    names: Sequence[str] = NEEDED,
    batch_size: int = 64,
    compute: Compute = inception.features,
    report: Callable[[str], None] = lambda line: None,
    what: str = "images",
) -> dict[str, Float32[np.ndarray, "n _"]]:
    """Computes features of images, always in batches of one size, so that one program does all.

    Args:
      feature_set: the network.
      batches: uint8 [b, h, w, 3] in order, b at most `batch_size`; smaller ones are filled up with their first image.
      count: images in all.
      names: keys of `inception.WIDTHS`.
      batch_size: images in a call.
      compute: weights and images to features.
      report: gets a line of progress now and then.
      what: how such lines call the images.

    Returns:
      float32 [count, width] by name, rows in order.

    Raises:
      InputError: there are more images or fewer, or an image's features are not finite.
    """
    found = {name: np.empty((count, inception.WIDTHS[name]), np.float32) for name in names}
    done, begin = 0, time.monotonic()
    said = begin
    for batch in batches:
        if done + len(batch) > count:
            raise InputError(f"{what}: more came than the {count} that were announced")
        filled = np.concatenate([batch, np.repeat(batch[:1], batch_size - len(batch), 0)])
        computed = compute(feature_set.params, filled)
        for name in names:
            rows = np.asarray(computed[name])[: len(batch)]
            if not np.isfinite(rows).all():
                bad = done + int(np.argmin(np.isfinite(rows).all(1)))
                raise InputError(f"{what}: the features {name!r} of image {bad} are not finite; look at that image")
            found[name][done : done + len(batch)] = rows
        done += len(batch)
        now = time.monotonic()
        if now - said > _SECONDS or done == count:
            said = now
            report(f"{what}: {done} of {count}, {done / max(now - begin, 1e-9):.1f} images/s")
    if done != count:
        raise InputError(f"{what}: {done} came, and {count} were announced")
    return found


def score(
    samples: str | os.PathLike,
    reference: str | os.PathLike,
    feature_set: inception.FeatureSet,
    *,
    batch_size: int = 64,
    prepare: image_sets.Prepare | None = None,
    compute: Compute = inception.features,
    expected: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures samples.

    Args:
      samples: npz with `arr_0`, or a folder of pictures.
      reference: the same of real images, or a file of moments.
      feature_set: the Inception network.
      batch_size: images in a call of the network.
      prepare: applied to each image of a reference that is a folder, such as a crop of `preprocessing`; an npz holds
        images that are prepared.
      compute: weights and images to features; another than the graph's own where a protocol resizes otherwise.
      expected: what a file of moments must say of itself, beside the features' name.
      report: gets lines of progress.

    Returns:
      an object for JSON: `features`, their name; `samples` and `reference`, path and images each; `metrics`, by name
      {"value", "standard_error"} (sampling error of the samples, the reference held fixed; None where none is known);
      `notes`, sentences about what a reader of the numbers should know.

    Raises:
      InputError: a file cannot be read or is of another kind or protocol, or there are too few images for a distance.
    """

    def features_of(path, what, prepare=None):
        batches = image_sets.read(path, batch_size=batch_size, prepare=prepare)
        count = image_sets.count(path)
        return extracted(feature_set, batches, count, batch_size=batch_size, compute=compute, report=report, what=what)

    notes: list[str] = []
    held: dict[str, Any] | None = None
    if references.is_reference(reference):
        file = references.read(reference, expected={**(expected or {}), "features": feature_set.name})
        known, spatial, count = file.moments, file.spatial, file.moments.count
        if file.about is None:
            notes.append("the reference does not say of which features and images it is")
        if file.images:
            held = features_of(reference, "images in the reference")
            notes.append(f"KID, precision and recall are against the {file.images} images in the reference file")
    else:
        held = features_of(reference, "reference", prepare if pathlib.Path(reference).expanduser().is_dir() else None)
        known, spatial = frechet.moments(held["2048"]), frechet.moments(held["spatial"])
        count = known.count
    own = features_of(samples, "samples")
    return {
        "features": feature_set.name,
        "samples": {"path": str(samples), "images": len(own["2048"])},
        "reference": {"path": str(reference), "images": count or None},
        "metrics": metrics(own, known, spatial, held, notes),
        "notes": notes,
    }


def metrics(
    own: Mapping[str, Float[np.ndarray, "n _"]],
    known: Moments,
    spatial: Moments | None,
    held: Mapping[str, Float[np.ndarray, "m _"]] | None,
    notes: list[str],
) -> dict[str, dict[str, float | None]]:
    """Computes all metrics that can be had.

    Args:
      own: the samples' features, with the keys NEEDED.
      known: moments of the reference's "2048".
      spatial: moments of its "spatial", if they are known.
      held: features of its images, if these are known.
      notes: gets a sentence for each doubt about a number.
    """
    found = {"fid": _measured(frechet.measured(own["2048"], known))}
    if spatial is not None:
        found["sfid"] = _measured(frechet.measured(own["spatial"], spatial))
    found["inception_score"] = _measured(inception_score.measured(own["logits_unbiased"]))
    if held is not None:
        found["kid"] = _measured(kernel_distances.measured_kid(own["2048"], held["2048"]))
        if min(len(own["2048"]), len(held["2048"])) > _NEIGHBOURS:
            found |= _shares(held["2048"], own["2048"])
    for whose, count in (("samples", len(own["2048"])), ("reference", known.count)):
        if 0 < count <= len(known.mu):
            notes.append(
                f"FID and sFID are mostly bias: there are {count} images in the {whose}, no more than the "
                f"{len(known.mu)} dimensions of a feature"
            )
    return found


_NEIGHBOURS = 3  # as in ADM's evaluation


def _shares(held: Float[np.ndarray, "m d"], own: Float[np.ndarray, "n d"]) -> dict[str, dict[str, float | None]]:
    """Precision, recall, density and coverage; an error bar leaves out groups, which takes some samples."""
    if len(own) < 2 * uncertainty.GROUPS:
        shares = manifolds.measures(held, own, k=_NEIGHBOURS)
        return {name: {"value": value, "standard_error": None} for name, value in shares.items()}
    estimates = manifolds.measured(held, own, k=_NEIGHBOURS)
    return {name: estimate._asdict() for name, estimate in estimates.items()}


def _measured(result: Measured) -> dict[str, float | None]:
    return {"value": result.value, "standard_error": result.standard_error}
