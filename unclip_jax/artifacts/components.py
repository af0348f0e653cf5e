"""What an export reads: the parts of a model, each from its run's folder, one in memory at a time."""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import checkpoint, digests, sharding
from unclip_jax import config as configs
from unclip_jax import parts as parts_lib
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError, nearest
from unclip_jax.interop import names
from unclip_jax.interop.tensors import Tensor
from unclip_jax.parts import STAGES, Part
from unclip_jax.stages import base


@dataclasses.dataclass(frozen=True)
class Component:
    """A part of a model, without its weights.

    Attributes:
      name: a key of `parts.STAGES`.
      workdir: of its run.
      config: with `sampling`, the caller's own options, in place.
      step: training steps that it has seen.
      data: what its run was trained on: fingerprints of data, tokenizer and frozen networks; or where it was imported.
      fingerprint: of its moving average.
    """

    name: str
    workdir: str
    config: ConfigDict
    sampling: Mapping[str, Any]
    step: int
    data: dict[str, Any]
    fingerprint: str

    @property
    def stage(self) -> Any:
        """The stage, a handful of functions."""
        return base.create(self.config)


def mesh() -> jax.sharding.Mesh:
    """One CPU: what is traced on it runs on every device, and what is read onto it lies in this machine's memory."""
    return sharding.make_mesh({"data": 1}, jax.local_devices(backend="cpu")[:1])


def newest(workdir: str) -> tuple[dict[str, Any], int]:
    """Returns `meta` (config, data, shape and digest of every array) of the newest step that has one, and that step.

    Raises:
      InputError: the folder holds no checkpoint, or none that tells what it is.
    """
    directory = checkpoint.absolute(workdir) / checkpoint.FOLDER
    for step in checkpoint.steps_of(directory):
        with contextlib.suppress(Exception):  # damaged; `checkpoint.load` says so when it passes it over
            return checkpoint.read_meta(directory, step), step
    raise InputError(f"{workdir} holds no whole checkpoint; it should be the workdir of a training run")


def find(workdir: str, *, with_clip: bool, clip: str = "") -> dict[str, str]:
    """Returns part -> folder, of a run's workdir or of a folder that holds several.

    Args:
      workdir: of one training run, or a folder with sub-folders named as STAGES.
      with_clip: whether the CLIP that a run's config names is wanted besides.
      clip: the folder to read that CLIP from instead.

    Raises:
      InputError: there is no such folder, or no checkpoint in it.
    """
    root = checkpoint.absolute(workdir)
    if not checkpoint.steps_of(root / checkpoint.FOLDER):
        found = parts_lib.folders(workdir)
        return {**found, "clip": clip} if clip else found
    meta, _ = newest(workdir)
    config = configs.from_json_value(meta["config"])
    known = [name for name, stage in STAGES.items() if stage == config.stage]
    if not known:
        raise InputError(f"{workdir} holds a {config.stage!r}, which is no part of a model; {nearest('', STAGES)}")
    name = root.name if root.name in known else known[0]
    wanted = clip or config.get("frozen", {}).get("clip", "")
    if with_clip and wanted and name != "clip" and reads_clip(_described(name, str(workdir), {}, "")):
        return {"clip": wanted, name: str(workdir)}
    return {name: str(workdir)}


def describe(
    folders: Mapping[str, str], *, sampling: Mapping[str, Mapping[str, Any]] | None = None, dtype: str = ""
) -> dict[str, Component]:
    """Returns the components in these folders, in the order of STAGES; no weights are read.

    Args:
      folders: part -> workdir.
      sampling: part -> {key of `config.sampling`: value}.
      dtype: of matrix products, in place of `config.dtype`.

    Raises:
      InputError: a folder holds another stage or no checkpoint, an option that is none, or parts that do not fit.
    """
    sampling = dict(sampling or {})
    for name in sampling:
        if name not in folders:
            raise InputError(f"--sampling names {name!r}, which is not exported; {nearest(name, folders)}")
    found = {name: _described(name, folders[name], sampling.get(name, {}), dtype) for name in STAGES if name in folders}
    _check(found)
    return found


def _described(name: str, folder: str, sampling: Mapping[str, Any], dtype: str) -> Component:
    meta, step = newest(folder)
    config = configs.from_json_value(meta["config"])
    if config.stage != STAGES[name]:
        raise InputError(f"{folder} holds a {config.stage}, where a {STAGES[name]} is wanted as {name}")
    if dtype:
        config = configs.from_json_value({**config.to_dict(), "dtype": dtype})
    config = parts_lib.with_sampling(config, sampling, name=name)
    fingerprint = digests.fingerprint_of(meta["arrays"].get("ema", meta["arrays"]["params"]))
    data = {**meta.get("data", {}), **({"imported": meta["imported"]} if "imported" in meta else {})}
    return Component(name, folder, config, sampling, step, data, fingerprint)


def _check(components: Mapping[str, Component]) -> None:
    parts = {name: as_part(one) for name, one in components.items()}
    parts_lib.check_sizes(parts)
    parts_lib.check_units(parts)
    if "clip" in components:  # or none of what is exported reads it, see `roles`
        parts_lib.check_clip(parts, fingerprint=components["clip"].fingerprint)


def as_part(one: Component) -> Part:
    """What `parts` checks; without weights."""
    return Part(one.name, one.workdir, one.stage, one.config, None, None, one.step)


def load(component: Component, *, weights: str) -> Part:
    """Returns a component with its weights and statistics in memory.

    Raises:
      InputError: no whole checkpoint.
    """
    part = parts_lib.read(component.name, component.workdir, None, weights=weights, sampling=component.sampling)
    if part.step != component.step:
        raise InputError(
            f"step {component.step} of {component.workdir} is damaged, step {part.step} is whole: move "
            f"{component.workdir}/{checkpoint.FOLDER}/{component.step} away to export that one"
        )
    return part


def tensors(part: Part) -> dict[str, Tensor]:
    """Returns name -> array of a part's weights and statistics.

    Names are the tree's keys joined by dots: "params.…", flax's, and "statistics.…", what was measured of the data.
    """
    flat = names.flattened({**part.params, **({"statistics": part.statistics} if part.statistics else {})})
    return {path.replace("/", "."): _tensor(leaf) for path, leaf in flat.items()}


def _tensor(leaf: Any) -> Tensor:
    return Tensor(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.asarray(leaf))


def unflattened(flat: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the params and the statistics whose names and arrays `tensors` gave."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *sections, last = name.split(".")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[last] = leaf
    statistics = tree.pop("statistics", {})
    return tree, statistics


def roles(component: Component, there: Collection[str]) -> dict[str, str]:
    """Returns frozen network -> part that it is, of those that a part reads when it draws.

    Raises:
      InputError: one is not among the parts that are there.
    """
    roles = parts_lib.frozen_of(as_part(component), there)
    if not reads_clip(component):
        return {role: part for role, part in roles.items() if role != "clip"}
    if "clip" not in there:
        raise InputError(f"{component.name} ({component.workdir}) reads captions by CLIP: name it by --clip=WORKDIR")
    return roles


def reads_clip(component: Component) -> bool:
    """Whether what a part draws depends on CLIP's weights: a decoder is given z_i, a prior is not."""
    return STAGES[component.name].startswith("prior") or getattr(component.stage, "clip_reads", False)


def tokenizer(components: Mapping[str, Component], vocabulary: str = "") -> Tokenizer | None:
    """Returns the one tokenizer of all parts that read captions, None where none does.

    Args:
      components: the parts.
      vocabulary: "tiny" or a folder, where that of the runs is not to be had here.

    Raises:
      InputError: it cannot be read, is not the one of the training runs, or the parts have several.
    """
    found: Tokenizer | None = None
    for name, one in components.items():
        if not one.stage.vocab_size:
            continue
        if not (vocabulary or one.config.data.vocabulary):
            raise InputError(f"{name} ({one.workdir}) came without a vocabulary; name one by --vocabulary")
        new = Tokenizer(vocabulary or one.config.data.vocabulary)
        if new.bare:
            raise InputError(f"{name} reads GLIDE's tokens, which what runs an export does not make; use safetensors")
        trained = one.data.get("tokenizer") or new.digest
        if new.vocab_size != one.stage.vocab_size or trained != new.digest:
            raise InputError(
                f"{name} was trained with another vocabulary than {vocabulary or one.config.data.vocabulary!r}; name "
                "that one by --vocabulary"
            )
        if found and found.digest != new.digest:
            raise InputError(f"{name} has another vocabulary than the parts before it; an export has one for all")
        found = new
    return found
