"""Looks for the layout of a run that is fastest among those that fit: mesh, rematerialisation, parts of a batch.

Every candidate is the config with a few options changed, and is planned like any other. Compiling takes minutes, so the
order matters, and arithmetic comes first:

- a candidate whose arguments alone do not fit is not compiled;
- candidates come in the order of what they cost: the batch in one piece before the batch in parts, nothing recomputed
  before everything, on every mesh. Recomputing adds operations and parts add exchanges, so once a mesh has one that
  fits with headroom, what follows for it is slower and is left out.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import planning, traced_run
from unclip_jax.errors import InputError
from unclip_jax.models.layers import REMAT
from unclip_jax.plans import HEADROOM_WANTED, Plan
from unclip_jax.stages import base
from unclip_jax.topologies import Topology

_PARTS = (1, 2, 4, 8)
_MODEL_SPLITS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Changes to a config: option -> value.

    Attributes:
      changes: dotted names and values.
      mesh: the part of them that is the mesh; candidates with the same one are alternatives of each other.
    """

    changes: Mapping[str, Any]
    mesh: tuple[int, ...]

    def options(self) -> str:
        """Returns the changes as they are written on a command line."""
        return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())


@dataclasses.dataclass
class Found:
    """What came of a candidate: its plan, or a word on why it has none."""

    candidate: Candidate
    plan: Plan | None
    word: str = ""


def meshes(topology: Topology) -> list[tuple[int, int, int]]:
    """Returns (data, fsdp, model) splits of a topology to try: weights over all chips first, then over fewer.

    Slices are joined by replicas, which are left out here: no weight is split over the network between them.
    """
    inside = topology.devices // topology.slices
    found = []
    for model in _MODEL_SPLITS:
        if inside % model:
            continue
        fsdp = inside // model
        while fsdp >= 1:
            found.append((inside // (model * fsdp), fsdp, model))
            if fsdp % 4:
                break
            fsdp //= 4
    if (inside, 1, 1) not in found:
        found.append((inside, 1, 1))
    return sorted(found, key=lambda mesh: (mesh[2], -mesh[1]))


def candidates(config: ConfigDict, topology: Topology) -> Iterator[Candidate]:
    """Yields settings of a run, those that cost least first."""
    parts = _PARTS if base.create(config).splits_batch else (1,)
    for count, policy, mesh in itertools.product(parts, list(_policies(config)), meshes(topology)):
        if config.batch_size % (topology.slices * mesh[0] * mesh[1] * count) == 0:
            split = dict(zip(("mesh.data", "mesh.fsdp", "mesh.model"), mesh, strict=True))
            yield Candidate({**split, "optim.accumulation": count, **policy}, mesh)


def _policies(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Yields values for all keys named remat: all parts alike, in the order of what they recompute."""
    trained = [name for name in traced_run.remat_policies(config) if not name.startswith("clip.")]
    for policy in REMAT if trained else ("",):  # those that recompute least come first
        yield dict.fromkeys(trained, policy)


def search(
    config: ConfigDict,
    topology: Topology,
    *,
    limit: int,
    effort: str = "quick",
    name: str = "train",
    batch_per_chip: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    planner: Callable[..., Plan] = planning.plan_apart,
) -> list[Found]:
    """Plans candidates until `limit` of them have been compiled; those that fit come first, the fastest first.

    Args:
      config: a checked config.
      topology: the hardware.
      limit: compilations.
      effort, name, batch_per_chip, options: see `planning.plan`.
      progress: called with a line about each candidate.
      planner: what plans one.
    """
    devices = traced_run.devices_of(topology)
    config = traced_run.prepare(config, topology, batch_per_chip=batch_per_chip)
    found: list[Found] = []
    settled: set[tuple[int, ...]] = set()
    compiled = 0
    for candidate in candidates(config, topology):
        if compiled >= limit:
            progress(f"{limit} compilations are done (--limit)")
            break
        if candidate.mesh in settled:
            continue
        try:
            layout = traced_run.lay_out(_changed(config, candidate.changes), topology, devices, name=name)
        except InputError as error:
            progress(f"{candidate.options()}: {error}")
            continue
        needed = layout.argument_bytes * topology.chip.devices
        if needed > (1 - HEADROOM_WANTED) * topology.chip.hbm_bytes:
            found.append(Found(candidate, None, f"arguments alone take {needed / 2**30:.3g} GiB"))
            progress(f"{candidate.options()}: {found[-1].word}, not compiled")
            settled.add(candidate.mesh)  # recomputing and parts change no argument
            continue
        plan = planner(layout.program.config, topology, effort=effort, name=name, options=options)
        compiled += 1
        found.append(Found(candidate, plan))
        progress(f"{candidate.options()}: {_said(plan)} ({compiled} of {limit})")
        if plan.fits_with_headroom:
            settled.add(candidate.mesh)
    return sorted(found, key=_rank)


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(dict(changes))
    return configs.check(changed)


def _said(plan: Plan) -> str:
    size = f"{plan.bytes_per_chip / 2**30:.3g} GiB a chip"
    if not plan.fits:
        return f"{size}, does not fit"
    return f"{size}, {plan.step_seconds_estimate or math.nan:.3g} s a step"


def _rank(found: Found) -> tuple[int, float]:
    plan = found.plan
    if plan is None:
        return 3, 0.0
    if not plan.fits:
        return 2, float(plan.bytes_per_chip)
    return (0 if plan.fits_with_headroom else 1), plan.step_seconds_estimate or math.inf
