"""Checkpoints: Orbax, asynchronous, verified when read back.

A step holds `params`, `ema`, `rest` (optimizer, counters) and `statistics` as separate items, so that readers of the
weights read only those, and `meta`: the config, and the shape and a digest of every array. Orbax commits a step by
renaming its folder but neither notices flipped bits nor looks inside the folders that it lists, so a restore here
verifies the digests and falls back to the newest step that is whole.

Statistics of weights (`state.OF_WEIGHTS`) are measured on a step that was saved before: `replace_statistics` puts them
there. A step without them has zeros.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax.errors import InputError
from unclip_jax.state import OF_WEIGHTS, TrainState

_LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
# Arrays of up to this many elements are digested on the host: a U-Net has hundreds, and to compile a reduction for
# each takes longer than a laptop's whole run spends on saving.
_HOST_ELEMENTS = 1 << 20
# The two folders of a step that may hold its statistics; `meta` says which one does, under "items".
_STATISTICS = ("statistics", "statistics_2")


class Checkpointer:
    """Saves and restores the state of one run."""

    def __init__(self, workdir: epath.PathLike, *, every_steps: int, keep: int):
        """Opens `workdir/checkpoints`; a step is saved every `every_steps`, and the last `keep` are kept."""
        self._directory = absolute(workdir) / FOLDER
        self._every_steps = max(every_steps, 1)
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=self._every_steps,
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def due(self, step: int) -> bool:
        """Whether the manager wants this step: its interval has come, or this job is being preempted."""
        # Of a run without checkpoints the manager wants any step, which would be the first and least worth it.
        return self._manager.should_save(step) and (step % self._every_steps == 0 or self.preempted(step))

    def preempted(self, step: int) -> bool:
        """Whether all hosts agreed, at this step, that the job must stop. Always False on one host."""
        return self._manager.reached_preemption(step)

    def save(self, state: TrainState, *, config: ConfigDict, extra: Mapping[str, Any] | None = None) -> None:
        """Begins to save `state`, in the background; the previous save is waited for.

        Args:
          state: what to save; must be finite.
          config: the run's config, stored beside it.
          extra: more JSON for `meta`, such as the data's fingerprint.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = _items(state)
        meta = {
            "step": step,
            "config": config.to_dict(),
            "arrays": {name: _described(tree) for name, tree in items.items()},
            **(extra or {}),
        }
        meta["digest"] = _meta_digest(meta)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest whole checkpoint and its `meta`, or None where nothing was ever saved.

        Args:
          abstract: shapes, dtypes and shardings to restore to; the mesh may differ from the one that saved.

        Raises:
          InputError: there are checkpoints, but none that is whole, or they are of another network.
        """
        steps = steps_of(self._directory)
        for number, step in enumerate(steps):
            try:
                meta = _read_meta(self._directory, step)
                items = _read_items(self._directory, step, meta, _items(abstract))
            except InputError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds; each means this step is damaged
                _LOG.warning("checkpoint %s of %s is damaged and passed over: %s", step, self._directory, _short(error))
                continue
            if number:
                _LOG.warning("resuming from step %d, the newest whole checkpoint", step)
                self._retire(steps[:number])
            state = TrainState(
                params=items["params"], ema=items["ema"], statistics=items.get("statistics", {}), **items["rest"]
            )
            return state, meta
        if steps:
            raise InputError(
                f"none of the checkpoints in {self._directory} is whole (steps {steps}); move them away to start over"
            )
        return None

    def _retire(self, steps: list[int]) -> None:
        """Renames damaged steps so that they are neither listed nor in the way when the run comes by again."""
        if jax.process_index() == 0:
            for step in steps:
                path = self._directory / str(step)
                path.rename(self._directory / f"damaged-{step}-{len(list(self._directory.glob('damaged-*')))}")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save under way and closes."""
        self._manager.wait_until_finished()
        self._manager.close()


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a local path as an absolute one, which Orbax insists on, `~` expanded; gs://… and the like as it is."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.expanduser().absolute()


def steps_of(directory: epath.PathLike) -> list[int]:
    """Returns the steps that have a folder, newest first, whole or not."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    return sorted((int(path.name) for path in directory.iterdir() if re.fullmatch(r"\d+", path.name)), reverse=True)


def trained_on(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """Returns what a step's run was trained on: fingerprints of its data, tokenizer and frozen networks."""
    return _read_meta(absolute(workdir) / FOLDER, step).get("data", {})


def measured(workdir: epath.PathLike) -> dict[str, Any]:
    """Returns how the statistics of the newest step's weights were measured (`replace_statistics`), {} if none were."""
    directory = absolute(workdir) / FOLDER
    steps = steps_of(directory)
    meta = _read_meta(directory, steps[0]) if steps else {}
    return {name: meta[name] for name in OF_WEIGHTS if name in meta}


def load(
    workdir: epath.PathLike,
    abstract: Callable[[ConfigDict], tuple[Any, Any]],
    *,
    ema: bool = True,
    step: int | None = None,
) -> tuple[Any, Any, ConfigDict, int]:
    """Reads weights for inference: the newest whole step (or `step`), the moving average by default.

    Args:
      workdir: of a training run.
      abstract: fn(config) -> (abstract params, abstract statistics) with the shardings wanted.
      ema: whether to read the moving average or the last weights.
      step: a step to insist on.

    Returns:
      (params, statistics, config, step).

    Raises:
      InputError: there is no run, no such step, or no whole checkpoint.
    """
    directory = absolute(workdir) / FOLDER
    steps = steps_of(directory)
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint; it should be the workdir of a training run")
    if step is not None and step not in steps:
        raise InputError(f"{workdir} holds no checkpoint of step {step}; it has {steps}")
    which = "ema" if ema else "params"
    for candidate in [step] if step is not None else steps:
        try:
            meta = _read_meta(directory, candidate)
            config = configs.from_json_value(meta["config"])
            params, statistics = abstract(config)
            wanted = {which: params, **({"statistics": statistics} if statistics else {})}
            items = _read_items(directory, candidate, meta, wanted)
        except InputError:
            raise
        except Exception as error:
            _LOG.warning("checkpoint %s of %s is damaged and passed over: %s", candidate, directory, _short(error))
            continue
        return items[which], items.get("statistics", {}), config, candidate
    raise InputError(f"no checkpoint in {directory} is whole (tried {steps if step is None else [step]})")


def replace_statistics(
    workdir: epath.PathLike, step: int, statistics: Mapping[str, Any], *, extra: Mapping[str, Any] | None = None
) -> None:
    """Gives a saved step other statistics. Killed at any moment, it leaves the step whole, with the old or the new.

    The new ones are written to whichever of two folders is not in use; then one rename puts another `meta` in place,
    which names that folder and holds its digests. All processes must call it.

    Args:
      workdir: of a training run.
      step: one that it has saved.
      statistics: all of them, replicated.
      extra: more JSON for `meta`, such as how they were measured.
    """
    folder = absolute(workdir) / FOLDER / str(step)
    meta = _read_meta(folder.parent, step)
    used = _folder_of(meta, "statistics") if "statistics" in meta["arrays"] else None
    free = next(name for name in _STATISTICS if name != used)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / free, dict(statistics), force=True)
    meta |= {"items": {"statistics": free}, **(extra or {})}
    meta["arrays"]["statistics"] = _described(dict(statistics))
    meta["digest"] = _meta_digest(meta)
    if jax.process_index() == 0:
        (path,) = [path for path in (folder / "meta").iterdir() if path.name == "metadata"]
        whole = folder / f"meta-{os.getpid()}.json"
        whole.write_text(json.dumps(meta))
        whole.replace(path)
    multihost_utils.sync_global_devices("replace_statistics")


def _folder_of(meta: Mapping[str, Any], item: str) -> str:
    return meta.get("items", {}).get(item, item)


def _items(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped, "streak": state.streak}
    items = {"params": state.params, "ema": state.ema, "rest": rest}
    if jax.tree.leaves(state.statistics):
        items["statistics"] = state.statistics
    return items


def _short(error: Exception) -> str:
    """TensorStore's messages hold whole specs."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def _read_meta(directory: epath.Path, step: int) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore(directory / str(step) / "meta")
    stored = meta.pop("digest")
    if stored != _meta_digest(meta):
        raise ValueError("meta does not match its digest")
    return meta


def _read_items(
    directory: epath.Path, step: int, meta: Mapping[str, Any], abstract: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the items named in `abstract`, verified.

    Raises:
      InputError: the step is whole but holds arrays of other names or shapes.
      Exception: the step is damaged.
    """
    wanted = {item: _without_unmeasured(item, tree, meta) for item, tree in abstract.items()}
    for item, tree in wanted.items():
        _check_shapes(meta["arrays"].get(item, {}), tree, where=f"{directory / str(step)}/{item}")
    items = {}
    for item, tree in wanted.items():
        if item in meta["arrays"]:
            with ocp.StandardCheckpointer() as reader:
                items[item] = reader.restore(directory / str(step) / _folder_of(meta, item), tree)
            for name, found in _described(items[item]).items():
                if found != meta["arrays"][item][name]:
                    raise ValueError(f"{item}{name} does not match its digest")
        if tree is not abstract[item]:
            absent = {name: x for name, x in abstract[item].items() if name not in tree}
            items[item] = {**items.get(item, {}), **jax.tree.map(_zeros, absent)}
    return items


def _without_unmeasured(item: str, tree: Any, meta: Mapping[str, Any]) -> Any:
    """Returns what to read of an item: statistics of weights that nobody measured need not be there."""
    if item != "statistics":
        return tree
    there = meta["arrays"].get(item, {})
    absent = [name for name in OF_WEIGHTS if name in tree and f"['{name}']" not in there]
    return {name: x for name, x in tree.items() if name not in absent} if absent else tree


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _check_shapes(stored: Mapping[str, Any], abstract: Any, *, where: str) -> None:
    wanted = {name: [str(x.dtype), list(x.shape)] for name, x in _named(abstract)}
    there = {name: [dtype, shape] for name, (dtype, shape, _) in stored.items()}
    differing = [name for name in wanted | there if wanted.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"{where} is of another network: {name} is {there.get(name, 'missing')} there and "
            f"{wanted.get(name, 'missing')} here, and {len(differing) - 1} more differ"
        )


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _named(tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def _described(tree: Any) -> dict[str, list[Any]]:
    """Returns name -> [dtype, shape, digest] of every array."""
    named = _named(tree)
    digests = jax.tree.leaves(digest([leaf for _, leaf in named]))
    return {
        name: [str(leaf.dtype), list(leaf.shape), int(value)]
        for (name, leaf), value in zip(named, digests, strict=True)
    }


def digest(tree: Any) -> Any:
    """Returns a uint32 per array that any one changed element changes, whatever the sharding.

    The sum modulo 2^32 of each element's bits times an odd number that depends on its index: a change of one
    element changes the sum, because odd numbers have inverses modulo 2^32. Large arrays are summed where they are.
    """
    return jax.tree.map(lambda x: _host_digest(x) if _is_small(x) else _device_digest(x), tree)


def fingerprint(tree: Any) -> str:
    """Returns 16 hexadecimal digits that stand for the names, shapes, dtypes and bits of a tree of arrays."""
    return hashlib.sha256(json.dumps(_described(tree), sort_keys=True).encode()).hexdigest()[:16]


def _is_small(x: Any) -> bool:
    here = isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated
    return here and math.prod(x.shape) <= _HOST_ELEMENTS


def _host_digest(x: Any) -> np.uint32:
    array = np.ascontiguousarray(x).reshape(-1)
    bits = array.view(f"u{array.dtype.itemsize}").astype(np.uint32, copy=False)
    odd = 2 * np.arange(bits.size, dtype=np.uint32) + 1
    return np.uint32(np.dot(bits, odd))


@jax.jit
def _device_digest(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[np.dtype(x.dtype).itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
