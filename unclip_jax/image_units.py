"""What an evaluation makes, unit by unit: embeddings, images of them, their features, and features of real images.

A unit's rows are captions of the protocol. Noise is numbered by caption id and stage, so what a unit holds depends on
nothing but its manifest; embeddings are drawn once for a prior's guidance and shared by all of the decoder's.
"""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax import hosts, metrics
from unclip_jax.evaluated_models import EvaluatedModels, Point
from unclip_jax.evaluation import inception_paths
from unclip_jax.evaluation.protocols import Protocol
from unclip_jax.evaluation.rows import Pool, Row
from unclip_jax.evaluation.units import Units
from unclip_jax.feature_networks import FeatureNetwork

_LOG = logging.getLogger(__name__)
NON_FINITE, CONSTANT = "the prior's embedding is not finite", "all pixels are equal"
_SHOW_SECONDS = 20.0


class DrawnUnits:
    """The units of one point: embeddings, images and features, each in a folder of its own."""

    def __init__(
        self,
        models: EvaluatedModels,
        point: Point,
        rows: Sequence[Row],
        networks: Sequence[FeatureNetwork],
        *,
        folder: pathlib.Path,
        common: Mapping[str, Any],
        seed: int,
        unit_rows: int,
    ):
        """Describes them; nothing is computed or written yet.

        Args:
          models: what draws.
          point: at which guidance.
          rows: captions.
          networks: whose features are kept.
          folder: of the evaluation.
          common: the evaluation's manifest.
          seed: of the noise.
          unit_rows: rows of a unit.
        """
        self.point, self.networks = point, {network.key + network.path: network for network in networks}
        self._models, self._rows, self._seed = models, rows, seed

        def units(place: str, manifest: Mapping[str, Any]) -> Units:
            return Units(folder / place, {**common, **manifest}, rows=len(rows), unit_rows=unit_rows)

        prior = {"prior": point.prior}
        self.z_i = None
        if models.prior != "dropped":
            self.z_i = units(f"points/z_i-prior_{point.prior:g}", {"kind": "z_i", "guidance": prior})
        both = {"guidance": {"decoder": point.decoder, **prior}}
        self.images = units(f"points/{point.name}", {"kind": "images", **both})
        self.features = {
            key: units(
                f"points/{point.name}-{network.key}-{network.path.split(',')[0]}",
                {"kind": "features", "images": self.images.id, "network": network.described()},
            )
            for key, network in self.networks.items()
        }

    @property
    def all(self) -> list[Units]:
        """All of them, in the order in which they are made."""
        return [*([self.z_i] if self.z_i else []), self.images, *self.features.values()]

    def make(self, number: int) -> None:
        """Makes what is missing of one unit."""
        rows = [self._rows[row] for row in self.images.rows_of(number)]
        if not self.images.is_whole(number):
            z_i = self._embeddings(number, rows)
            began = time.monotonic()
            pixels = self._drawn(z_i, rows)
            bad = _bad(rows, z_i, pixels)
            self.images.write(number, {"image": pixels}, bad, _cost(began))
        else:
            pixels = self.images.read(number, ("image",))["image"]
        for key, network in self.networks.items():
            if not self.features[key].is_whole(number):
                began = time.monotonic()
                found = network.compute(pixels, [row.caption for row in rows])
                self.features[key].write(number, found, cost=_cost(began))

    def _embeddings(self, number: int, rows: Sequence[Row]) -> np.ndarray | None:
        if self.z_i is None:
            return None
        if not self.z_i.is_whole(number):
            began, chain = time.monotonic(), self._models.at(self.point)
            ids = [row.caption_id for row in rows]
            captions = [row.caption for row in rows]
            drawn = chain.sample_prior(captions, prior=self._models.prior, seed=self._seed, ids=ids)
            self.z_i.write(number, {"z_i": drawn}, cost=_cost(began))
        return self.z_i.read(number, ("z_i",))["z_i"]

    def _drawn(self, z_i: np.ndarray | None, rows: Sequence[Row]) -> np.ndarray:
        """Returns the last part's images, uint8 [n, s, s, 3]."""
        chain, ids = self._models.at(self.point), [row.caption_id for row in rows]
        small = chain.decode(z_i, [row.caption for row in rows], seed=self._seed, ids=ids)
        return {"decoder": small, **chain.upsample(small, seed=self._seed, ids=ids)}[self._models.last]


def _bad(rows: Sequence[Row], z_i: np.ndarray | None, pixels: np.ndarray) -> dict[int, str]:
    """Returns row -> why, of images that nothing sensible can have been drawn for."""
    flat = pixels.reshape(len(pixels), -1, 3)
    bad = {rows[n].row: CONSTANT for n in np.flatnonzero((flat == flat[:, :1]).all((1, 2))).tolist()}
    if z_i is not None:
        bad |= {rows[n].row: NON_FINITE for n in np.flatnonzero(~np.isfinite(z_i).all(1)).tolist()}
    return bad


class ReferenceUnits:
    """Features of a protocol's real images by one network."""

    def __init__(
        self,
        protocol: Protocol,
        pool: Pool,
        image_ids: Sequence[int],
        network: FeatureNetwork,
        *,
        folder: pathlib.Path,
        about: Mapping[str, Any],
        unit_rows: int,
    ):
        """Describes them.

        Args:
          protocol: says how real images become pixels.
          pool: the images.
          image_ids: which of them.
          network: whose features are kept.
          folder: of all references.
          about: what else they depend on.
          unit_rows: images of a unit.
        """
        self._pool, self._ids, self.network = pool, image_ids, network
        self.path = inception_paths.REAL[protocol.real]
        manifest = {
            "kind": "reference",
            "protocol": {"name": protocol.name, "digest": protocol.digest},
            "data": dict(pool.fingerprint),
            "images": len(image_ids),
            "network": network.described(),
            **about,
        }
        place = f"{protocol.name}-{network.key}"
        self.units = Units(folder / place, manifest, rows=len(image_ids), unit_rows=unit_rows)

    @property
    def all(self) -> list[Units]:
        """All units, as of `DrawnUnits`."""
        return [self.units]


    def pixels(self, rows: Sequence[int]) -> np.ndarray:
        """Returns real images as the protocol has them, uint8 [n, s, s, 3]; raises InputError for one that is bad."""
        return np.stack([self.path(self._pool.image(self._ids[row])) for row in rows])

    def make(self, number: int) -> None:
        """Makes one unit."""
        if not self.units.is_whole(number):
            began = time.monotonic()
            found = self.network.compute(self.pixels(self.units.rows_of(number)), None)
            self.units.write(number, found, cost=_cost(began))


def _cost(began: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - began, 3)}


@dataclasses.dataclass(frozen=True)
class Share:
    """Which units are a process's.

    Attributes:
      index, count: of the process.
      joined: whether the processes know each other through JAX; else each goes by its number alone.
    """

    index: int = 0
    count: int = 1
    joined: bool = False


def missing(work: DrawnUnits | ReferenceUnits) -> list[int]:
    """Returns the numbers of units of which something is missing or damaged."""
    return sorted({number for units in work.all for number in units.missing()})


def fill(work: DrawnUnits | ReferenceUnits, share: Share, *, label: str, stop: Callable[[], None]) -> None:
    """Makes this process's share of the units that are missing.

    Processes that know each other deal out what is missing among them; others have every count-th unit.

    Args:
      work: the units.
      share: which are this process's.
      label: what progress is called.
      stop: called between units; ends the program where it was told to end.
    """
    for units in work.all:
        units.begin()
    if share.joined:
        todo = hosts.from_first("missing units", lambda: missing(work))[share.index :: share.count]
    else:
        todo = [number for number in missing(work) if number % share.count == share.index]
    if not todo:
        return
    sizes = [len(work.all[0].rows_of(number)) for number in todo]
    progress = metrics.Progress(label, start=0, total=sum(sizes), examples_per_step=1)
    done, shown = 0, time.monotonic()
    try:
        for number, size in zip(todo, sizes, strict=True):
            stop()
            work.make(number)
            done += size
            if time.monotonic() - shown > _SHOW_SECONDS or done == sum(sizes):
                progress.report(done, {})
                shown = time.monotonic()
    finally:
        progress.close()
