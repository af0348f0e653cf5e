"""The evaluation of trained models by named protocols, as a job that any number of processes share and any may die of.

    manifest.json                        all that the images depend on; its digest is the run's id
    rows.jsonl                           the captions
    points/z_i-prior_<g>/                embeddings, drawn once for each guidance of the prior
    points/decoder_<g>-prior_<g>/        images, and beside it their features by each network
    reference/<protocol>-<network>/      features of real images
    results.json, results.md, results.html, …

One process reduces, in the order of the rows and in float64, after a proof that every row is there exactly once; so a
result does not depend on how many processes there were or how often they were killed.
"""

import dataclasses
import importlib.metadata
import json
import logging
import pathlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from unclip_jax import feature_networks, unclip
from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.evaluated_models import PRNG, EvaluatedModels, Point
from unclip_jax.evaluation import measures, near_duplicates, pools, protocols, rows, units
from unclip_jax.image_units import DrawnUnits, ReferenceUnits, Share, fill, missing

_LOG = logging.getLogger(__name__)
MANIFEST, ROWS, RESULTS, REFERENCE = "manifest.json", "rows.jsonl", "results.json", "reference"
_FORMAT = 1
_POLL_SECONDS = 2.0
_LIBRARIES = ("unclip_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "opencv-python-headless")


def versions() -> dict[str, str]:
    """Returns library -> version, of those that images and features depend on."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "unknown"
    return found


def arithmetic() -> dict[str, Any]:
    """Returns what else decides about the last bits: the kind of device and the precision of its products."""
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "matmul_precision": str(precision or "default"),
        "prng": PRNG,
    }


class EvaluationJob:
    """One evaluation in one folder.

    Attributes:
      manifest: what it is.
      id: of its run.
      points: guidance scales that images are drawn at.
    """

    def __init__(
        self,
        config: ConfigDict,
        models: EvaluatedModels,
        workdir: pathlib.Path,
        *,
        networks_clip: unclip.UnCLIP | None = None,
        reference: pathlib.Path | None = None,
    ):
        """Opens the data and the feature networks, and claims the folder.

        Args:
          config: of `configs/eval_*.py`.
          models: what is evaluated, made for the protocols' size.
          workdir: the folder.
          networks_clip: a model with the CLIP whose features are taken; that of `models` by default.
          reference: folder of the real images' features; one of the workdir by default.

        Raises:
          InputError: the protocols do not go together, their data is not there, or the folder is of another run.
        """
        self.config, self.models, self.workdir = config, models, workdir
        feature_networks.check(config.features)
        self.protocols = protocols.together(config.protocols)
        first = self.protocols[0]
        self._pool = pools.opened(first, {"data_dir": config.data_dir, **config.coco_files})
        self._removed = {protocol.name: _removed(protocol, config) for protocol in self.protocols}
        self.rows = self._chosen()
        self.points = models.points(config.sweep.decoder, config.sweep.prior)
        clip = networks_clip or models.at(models.own)
        self._networks = {
            protocol.name: [
                feature_networks.read(
                    key, protocol, weights=config.inception, clip=clip, microbatch=config.microbatch
                )
                for key in config.features
            ]
            for protocol in self.protocols
        }
        self.manifest = self._described()
        self.id = units.run_id(self.manifest)
        units.claim(workdir / MANIFEST, self.manifest)
        self._reference = reference or workdir / REFERENCE
        self._write_rows()

    def _chosen(self) -> list[rows.Row]:
        chosen = [rows.chosen(protocol, self._pool) for protocol in self.protocols]
        for protocol, found in zip(self.protocols[1:], chosen[1:], strict=True):
            if found != chosen[0]:
                raise InputError(
                    f"{self.protocols[0].name} and {protocol.name} draw other captions; evaluate them in workdirs of "
                    "their own"
                )
        return chosen[0]

    def _described(self) -> dict[str, Any]:
        config = self.config
        swept = bool(config.sweep.decoder or config.sweep.prior)
        return {
            "format": _FORMAT,
            "protocols": {protocol.name: protocol.digest for protocol in self.protocols},
            "rows": {"count": len(self.rows), "digest": rows.digest(self.rows)},
            "data": dict(self._pool.fingerprint),
            **self.models.described(),
            "weights": config.weights,
            "guidance": "sweep" if swept else dataclasses.asdict(self.models.own),
            "seed": config.seed,
            "microbatch_per_device": config.microbatch,
            "unit_rows": config.unit_rows,
            **arithmetic(),
            "versions": versions(),
        }

    def _write_rows(self) -> None:
        path = self.workdir / ROWS
        if not path.exists():
            with sealed.Replacing(path) as file:
                for row in self.rows:
                    file.write((json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n").encode())

    def drawn(self, point: Point) -> DrawnUnits:
        """Returns the units of a point; of networks that two protocols share only one."""
        networks = {network.key + network.path: network for found in self._networks.values() for network in found}
        return DrawnUnits(
            self.models,
            point,
            self.rows,
            list(networks.values()),
            folder=self.workdir,
            common=self.manifest,
            seed=self.config.seed,
            unit_rows=self.config.unit_rows,
        )

    def references(self, protocol: protocols.Protocol) -> list[ReferenceUnits]:
        """Returns the units of a protocol's real images, by each network."""
        removed = self._removed[protocol.name]
        ids = rows.references(protocol, self._pool, self.rows, removed.ids if removed else ())
        about = {"removed": removed.digest if removed else "", **arithmetic(), "versions": versions()}
        about |= {"microbatch": self.config.microbatch, "unit_rows": self.config.unit_rows}
        return [
            ReferenceUnits(
                protocol,
                self._pool,
                ids,
                network,
                folder=self._reference,
                about=about,
                unit_rows=self.config.unit_rows,
            )
            for network in self._networks[protocol.name]
        ]

    def shown(self, count: int) -> list[dict[str, Any]]:
        """Returns the first rows' captions, real images and images at every point, uint8, to be looked at."""
        drawn = {point: self.drawn(point).images for point in self.points}
        real = self.references(self.protocols[0])[0]
        number, made = 0, list[dict[str, Any]]()
        while len(made) < min(count, len(self.rows)):
            pixels = {point: one.read(number, ("image",))["image"] for point, one in drawn.items()}
            for place, row in enumerate(next(iter(drawn.values())).rows_of(number)):
                own = self.rows[row]
                real_image = real.path(self._pool.image(own.image_id))
                made.append({"caption": own.caption, "real": real_image, "drawn": [x[place] for x in pixels.values()]})
            number += 1
        return made[:count]

    def run(self, share: Share, *, stop: Callable[[], None]) -> dict[str, Any] | None:
        """Makes this process's share of what is missing; returns the results, or None where others are not done.

        Args:
          share: which units are this process's; of processes that know each other all wait for the results.
          stop: called between units; ends the program where it was told to end.

        Raises:
          InputError: a real image cannot be read, a unit is of another run, or too many images are bad.
        """
        began = time.monotonic()
        references = {protocol.name: self.references(protocol) for protocol in self.protocols}
        for name, found in references.items():
            for reference in found:
                fill(reference, share, label=f"{name}, real images", stop=stop)
        for point in self.points:
            fill(self.drawn(point), share, label=f"guidance {point.decoder:g}/{point.prior:g}", stop=stop)
        work: list[DrawnUnits | ReferenceUnits] = [one for found in references.values() for one in found]
        work += [self.drawn(point) for point in self.points]
        while any(missing(one) for one in work):
            if not share.joined:
                return None
            stop()
            time.sleep(_POLL_SECONDS)
        if share.index and share.joined:
            return None
        results = self._reduced(references, stop=stop)
        results["seconds"] |= {"this start": round(time.monotonic() - began, 1)}
        return results

    # ------------------------------------------------------------ the reduction

    def _reduced(self, references: Mapping[str, Sequence[ReferenceUnits]], *, stop: Callable[[], None]) -> dict:
        began = time.monotonic()
        real: dict[str, Any] = {}
        points: list[dict[str, Any]] = []
        scored: dict[str, dict[Point, measures.Scored]] = {}
        for point in self.points:
            drawn = self.drawn(point)
            entry: dict[str, Any] = {"name": point.name, **dataclasses.asdict(point), "images": drawn.images.id}
            entry |= {"bad": self._bad(drawn), "protocols": {}}
            for protocol in self.protocols:
                found = entry["protocols"].setdefault(protocol.name, {})
                for reference in references[protocol.name]:
                    stop()
                    key = f"{protocol.name} {reference.network.name}"
                    if key not in real:
                        real[key] = _Real(reference)
                    score = self._scored(protocol, drawn, reference, real[key])
                    found[reference.network.name] = [dataclasses.asdict(one) for one in score.measures]
                    scored.setdefault(key, {})[point] = score
            points.append(entry)
        return {
            "format": _FORMAT,
            "run": self.id,
            "manifest": self.manifest,
            "protocols": {protocol.name: protocol.as_json() for protocol in self.protocols},
            "removed": {name: len(one.ids) if one else 0 for name, one in self._removed.items()},
            "references": {key: one.described() for key, one in real.items()},
            "points": points,
            "differences": _differences(scored, self.models.own),
            "seconds": {**self._seconds(references), "reduction": round(time.monotonic() - began, 1)},
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }

    def _scored(
        self, protocol: protocols.Protocol, drawn: DrawnUnits, reference: ReferenceUnits, real: "_Real"
    ) -> measures.Scored:
        network = reference.network
        found = drawn.features[network.key + network.path]
        images = None
        if "oracle" in protocol.metrics and network is self._networks[protocol.name][0]:
            images = (unit["image"] for unit in drawn.images.each(("image",)))
        return measures.scored(
            protocol.metrics,
            real.features,
            found,
            network=network.name,
            main=network.main,
            captions=[row.caption for row in self.rows],
            images=images,
            seed=self.config.seed,
        )

    def _bad(self, drawn: DrawnUnits) -> dict[str, Any]:
        bad = drawn.images.bad()
        share = 100.0 * len(bad) / len(self.rows)
        named = [{"row": row, "caption": self.rows[row].caption, "why": why} for row, why in sorted(bad.items())]
        if share > self.config.max_bad_percent:
            raise InputError(
                f"{len(bad)} of {len(self.rows)} images are bad, more than config.max_bad_percent="
                f"{self.config.max_bad_percent:g}: the first is row {named[0]['row']}, {named[0]['caption']!r} "
                f"({named[0]['why']})"
            )
        return {"count": len(bad), "images": named[:100]}

    def _seconds(self, references: Mapping[str, Sequence[ReferenceUnits]]) -> dict[str, float]:
        total: dict[str, float] = {}
        for found in references.values():
            for reference in found:
                total[f"real images, {reference.network.name}"] = reference.units.cost().get("seconds", 0.0)
        for point in self.points:
            drawn = self.drawn(point)
            named = {"images": drawn.images}
            named |= {f"features, {drawn.networks[key].name}": one for key, one in drawn.features.items()}
            if drawn.z_i:
                total[f"embeddings, prior at {point.prior:g}"] = drawn.z_i.cost().get("seconds", 0.0)
            for name, one in named.items():
                total[name] = total.get(name, 0.0) + one.cost().get("seconds", 0.0)
        return {name: round(seconds, 1) for name, seconds in total.items()}


class _Real:
    """Features of real images by one network, gathered once for all points."""

    def __init__(self, reference: ReferenceUnits):
        self.reference = reference
        self.features = measures.Reference(reference.units, main=reference.network.main)

    def described(self) -> dict[str, Any]:
        return {
            "run": self.reference.units.id,
            "images": self.features.count,
            "width": self.features.width,
            "deficient": self.features.moments.deficient,
        }


def _removed(protocol: protocols.Protocol, config: ConfigDict) -> near_duplicates.Removed | None:
    if not protocol.without_near_duplicates:
        return None
    if not config.removed:
        raise InputError(
            f"{protocol.name} leaves near-duplicates of the training set out, which a file must name: "
            "--config.removed=FILE; make it: python -m unclip_jax.evaluate near_duplicates"
        )
    return near_duplicates.read(config.removed, protocol=protocol.name)


def _differences(scored: Mapping[str, Mapping[Point, measures.Scored]], own: Point) -> list[dict[str, Any]]:
    """Returns how each point's main distance differs from that of the parts' own guidance, or of the first point."""
    found = []
    for key, by_point in scored.items():
        base = own if own in by_point else next(iter(by_point))
        for point, score in by_point.items():
            if point != base:
                value, error = measures.difference(score, by_point[base])
                found.append(
                    {"of": key, "point": point.name, "from": base.name, "value": value, "standard_error": error}
                )
    return found


