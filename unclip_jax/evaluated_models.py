"""The models that an evaluation draws with: read once, sampled at any guidance, and described for its manifest."""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import digests, fitting, hosts, parts, sharding, unclip
from unclip_jax.errors import InputError
from unclip_jax.parts import STAGES, Part
from unclip_jax.stages import base

_LOG = logging.getLogger(__name__)
# threefry draws the same numbers for an example whatever batch it stands in; JAX's others do not.
PRNG = "threefry2x32"


@dataclasses.dataclass(frozen=True)
class Point:
    """Guidance that images are drawn with.

    Attributes:
      decoder: scale of the decoder's.
      prior: scale of the prior's; 1 where there is none.
    """

    decoder: float
    prior: float

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"decoder_{self.decoder:g}-prior_{self.prior:g}"


class EvaluatedModels:
    """Trained parts that reach the size which a protocol wants."""

    def __init__(self, found: Mapping[str, Part], *, models: str, prior: str, microbatch: int):
        """Takes parts that fit; see `read`."""
        self.models, self.prior, self.microbatch = models, prior, microbatch
        self._parts = dict(found)
        self._chains: dict[Point, unclip.UnCLIP] = {}
        self.own = self.default_point()
        self.at(self.own).check(prior=prior)

    @classmethod
    def read(
        cls,
        models: str,
        *,
        prior: str,
        size: int,
        sampling: Mapping[str, Mapping[str, Any]],
        weights: str,
        microbatch: int,
        steps: Mapping[str, int] | None = None,
    ) -> "EvaluatedModels":
        """Reads the parts from the decoder up to the upsampler that makes images of `size` pixels.

        Args:
          models: folder with the workdirs of the trained parts.
          prior: a key of `unclip.PRIORS`.
          size: of the images that are wanted.
          sampling: part -> {key of config.sampling: value}.
          weights: "ema" or "params".
          microbatch: images of a call, on each device.
          steps: part -> step of a checkpoint to insist on.

        Raises:
          InputError: a part is missing, damaged or without a moving average, or none makes that size.
        """
        if prior not in unclip.PRIORS:
            raise InputError(f"config.prior={prior!r} is unknown; known are {', '.join(unclip.PRIORS)}")
        if (found_prng := str(jax.random.key_impl(jax.random.key(0)))) != PRNG:
            raise InputError(
                f"JAX draws random numbers by {found_prng}, which depend on the batch; unset JAX_DEFAULT_PRNG_IMPL"
            )
        folders = parts.folders(models)
        found: dict[str, Part] = {}
        sides: dict[str, int] = {}
        for name in unclip.names_for(models, priors=[prior]):
            if name not in folders:
                raise InputError(parts.missing(name, models))
            # Nothing above the size that is wanted, but what takes the last steps of a part that is.
            if size in sides.values() and name not in [parts.LAST.get(drawing) for drawing in sides]:
                continue
            part = _read(name, folders[name], weights, sampling.get(name, {}), (steps or {}).get(name))
            found[name] = part
            if _draws(name):
                sides[name] = int(getattr(part.stage, "side", 0))
        if size not in sides.values():
            said = ", ".join(f"{name} {side}" for name, side in sides.items())
            raise InputError(
                f"the protocol wants images of {size} pixels, and {models} makes others ({said}); "
                "train what is missing, or choose another protocol"
            )
        unknown = sorted(set(sampling) - set(STAGES))
        if unknown:
            raise InputError(f"config.sampled.{unknown[0]} is no part; known are {', '.join(STAGES)}")
        return cls(found, models=models, prior=prior, microbatch=microbatch * jax.local_device_count())

    def default_point(self) -> Point:
        """Returns the guidance that the parts' configs, or what replaced them, say."""
        prior = self._parts.get(unclip.PRIORS[self.prior] or "")
        return Point(_guidance(self._parts["decoder"]), _guidance(prior) if prior else 1.0)

    def points(self, decoder: Sequence[float], prior: Sequence[float]) -> list[Point]:
        """Returns all pairs of guidance scales; an empty list stands for the parts' own.

        Raises:
          InputError: scales of a prior that has no guidance.
        """
        if prior and unclip.PRIORS[self.prior] is None:
            raise InputError(f"config.sweep.prior is set, but the prior {self.prior!r} draws nothing to guide")
        own = self.own
        pairs = itertools.product(prior or [own.prior], decoder or [own.decoder])
        return [Point(float(g_decoder), float(g_prior)) for g_prior, g_decoder in pairs]

    def at(self, point: Point) -> unclip.UnCLIP:
        """Returns the chain at a guidance; all have the same weights."""
        if point not in self._chains:
            scales = {"decoder": point.decoder, unclip.PRIORS[self.prior]: point.prior}
            found = {
                name: _with_guidance(part, scales[name]) if name in scales else part
                for name, part in self._parts.items()
            }
            chain = unclip.UnCLIP(found, models=self.models, microbatch=self.microbatch)
            for other in self._chains.values():
                chain.predictor.share(other.predictor)
            self._chains[point] = chain
        return self._chains[point]

    @property
    def last(self) -> str:
        """The part whose images are evaluated."""
        return [name for name in self._parts if _draws(name)][-1]

    def described(self) -> dict[str, Any]:
        """Returns what a manifest says of the models: weights and all that sampling does, but for guidance."""
        sampling = {}
        for name, part in self._parts.items():
            if "sampling" in part.config:
                sampling[name] = part.config.sampling.to_dict()
                sampling[name].pop("guidance_scale", None)
        return {
            "models": {
                name: {"step": part.step, "digest": digests.fingerprint(part.params)}
                for name, part in self._parts.items()
            },
            "prior": self.prior,
            "sampling": sampling,
            "dtype": {name: part.config.get("dtype", "") for name, part in self._parts.items()},
        }

    def steps(self) -> dict[str, int]:
        """Returns part -> step of its checkpoint."""
        return {name: part.step for name, part in self._parts.items()}


def read_clip(workdir: str, *, microbatch: int) -> unclip.UnCLIP:
    """Returns a model that is a CLIP alone, of the run in `workdir`; all processes must ask."""
    return unclip.UnCLIP({"clip": _read("clip", workdir, "ema", {}, None)}, microbatch=microbatch)


def _draws(name: str) -> bool:
    return STAGES[name] in ("decoder", "upsampler") and name not in parts.LAST.values()


def _guidance(part: Part) -> float:
    return float(part.config.get("sampling", {}).get("guidance_scale", 1.0))


def _with_guidance(part: Part, scale: float) -> Part:
    if scale == _guidance(part):
        return part
    config: ConfigDict = parts.with_sampling(part.config, {"guidance_scale": scale}, name=part.name)
    return dataclasses.replace(part, config=config, stage=base.create(config))


def _read(name: str, folder: str, weights: str, sampling: Mapping[str, Any], step: int | None) -> Part:
    """Reads a part onto this process's devices; all processes must ask."""
    if hosts.count() == 1:
        mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
        return parts.read(name, folder, mesh, weights=weights, sampling=sampling, step=step)
    # Orbax reads onto the devices of all hosts; each then takes all of it, for each draws images of its own.
    part = parts.read(name, folder, sharding.make_mesh({"data": -1}), weights=weights, sampling=sampling, step=step)
    here = sharding.replicated(sharding.make_mesh({"data": -1}, jax.local_devices()))
    params, statistics = (
        jax.tree.map(lambda x: jax.device_put(np.asarray(x), here), fitting.whole(tree))
        for tree in (part.params, part.statistics)
    )
    return dataclasses.replace(part, params=params, statistics=statistics)
