"""Checkpoints: Orbax, asynchronous, verified when read back.

A step holds `params`, `ema`, `rest` (optimizer, counters) and `statistics` as separate items, so that readers of the
weights read only those, and `meta`: the config, and the shape and a digest of every array. Orbax commits a step by
renaming its folder but neither notices flipped bits nor looks inside the folders that it lists, so a restore here
verifies the digests and falls back to the newest step that is whole.

Statistics of weights (`state.OF_WEIGHTS`) are measured on a step that was saved before: `replace_statistics` puts them
there. A step without them has zeros. So has one without `rest`, as imports make it: there optimizers begin.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import digests, hosts, serial_storage
from unclip_jax.errors import InputError
from unclip_jax.state import OF_WEIGHTS, TrainState

_LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
# The two folders of a step that may hold its statistics; `meta` says which one does, under "items".
_STATISTICS = ("statistics", "statistics_2")


class Checkpointer:
    """Saves and restores the state of one run."""

    def __init__(self, workdir: epath.PathLike, *, every_steps: int, keep: int):
        """Opens `workdir/checkpoints`; a step is saved every `every_steps`, and the last `keep` are kept."""
        self._directory = absolute(workdir) / FOLDER
        self._every_steps = max(every_steps, 1)
        self._keeping = _Keeping(keep, temporary=_temporary(self._directory))
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=self._every_steps,
            preservation_policy=self._keeping,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def due(self, step: int) -> bool:
        """Whether the interval of steps says that this one is to be saved."""
        return step % self._every_steps == 0

    def committed(self, step: int) -> bool:
        """Whether this step is on disk, whole."""
        return step in self._manager.all_steps() and not self._manager.is_saving_in_progress()

    def save(
        self,
        state: TrainState,
        *,
        config: ConfigDict,
        extra: Mapping[str, Any] | None = None,
        temporary: bool = False,
    ) -> None:
        """Begins to save `state`, in the background; the previous save is waited for.

        Args:
          state: what to save; must be finite.
          config: the run's config, stored beside it.
          extra: more JSON for `meta`, such as the data's fingerprint.
          temporary: it lasts until there is a newer one, and takes the place of none that is to be kept.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = _items(state)
        meta = {
            "step": step,
            "config": config.to_dict(),
            "arrays": {name: digests.described(tree) for name, tree in items.items()},
            **({"temporary": True} if temporary else {}),
            **(extra or {}),
        }
        meta["digest"] = meta_digest(meta)
        self._keeping.note(step, temporary=temporary)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest whole checkpoint and its `meta`, or None where nothing was ever saved.

        Args:
          abstract: shapes, dtypes and shardings to restore to; the mesh may differ from the one that saved.

        Raises:
          InputError: there are checkpoints, but none that is whole, or they are of another network.
        """
        steps = _same_steps(self._directory)
        for number, step in enumerate(steps):
            try:
                meta = hosts.together("meta", functools.partial(read_meta, self._directory, step))
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
        hosts.from_first("retired", lambda: steps)
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save under way and closes."""
        self._manager.wait_until_finished()
        self._manager.close()


class _Keeping:
    """Which steps stay: the newest `keep` of those that were saved to stay, and a temporary one that is the newest."""

    def __init__(self, keep: int, *, temporary: set[int]):
        self._keep, self._temporary = keep, temporary

    def note(self, step: int, *, temporary: bool) -> None:
        (self._temporary.add if temporary else self._temporary.discard)(step)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question, of whole checkpoints, oldest first."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        regular = [step for step in steps if step not in self._temporary]
        kept = {*regular[-self._keep :], *steps[-1:]}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _temporary(directory: epath.Path) -> set[int]:
    """Returns the steps that were saved for a time only; one that cannot be read is none."""
    found = set()
    for step in steps_of(directory):
        with contextlib.suppress(Exception):
            if read_meta(directory, step).get("temporary"):
                found.add(step)
    return found


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


def _same_steps(directory: epath.Path) -> list[int]:
    """Returns the steps that process 0 sees; other hosts' view of a shared disk may be a moment older."""
    return hosts.from_first("steps", lambda: steps_of(directory))


def trained_on(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """Returns what a step's run was trained on: fingerprints of its data, tokenizer and frozen networks."""
    return read_meta(absolute(workdir) / FOLDER, step).get("data", {})


def measured(workdir: epath.PathLike) -> dict[str, Any]:
    """Returns how the statistics of the newest step's weights were measured (`replace_statistics`), {} if none were."""
    directory = absolute(workdir) / FOLDER
    steps = steps_of(directory)
    meta = read_meta(directory, steps[0]) if steps else {}
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
      abstract: fn(config) -> (abstract params, abstract statistics) with the shardings wanted; what is given as NumPy
        arrays is read as such, without a second copy on its way.
      ema: whether to read the moving average or the last weights.
      step: a step to insist on.

    Returns:
      (params, statistics, config, step).

    Raises:
      InputError: there is no run, no such step, or no whole checkpoint.
    """
    directory = absolute(workdir) / FOLDER
    steps = _same_steps(directory)
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint; it should be the workdir of a training run")
    if step is not None and step not in steps:
        raise InputError(f"{workdir} holds no checkpoint of step {step}; it has {steps}")
    which = "ema" if ema else "params"
    for candidate in [step] if step is not None else steps:
        try:
            meta = hosts.together("meta", functools.partial(read_meta, directory, candidate))
            if which not in meta["arrays"]:
                raise InputError(
                    f"step {candidate} of {workdir} has no moving average of weights; --weights=params takes the last"
                )
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
    meta = read_meta(folder.parent, step)
    used = _folder_of(meta, "statistics") if "statistics" in meta["arrays"] else None
    free = next(name for name in _STATISTICS if name != used)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / free, dict(statistics), force=True)
    meta |= {"items": {**meta.get("items", {}), "statistics": free}, **(extra or {})}
    meta["arrays"]["statistics"] = digests.described(dict(statistics))
    meta["digest"] = meta_digest(meta)
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


def read_meta(directory: epath.Path, step: int) -> dict[str, Any]:
    """Returns what a step says of itself (config, data, shape and digest of every array); raises where damaged."""
    meta = ocp.JsonCheckpointHandler().restore(directory / str(step) / "meta")
    stored = meta.pop("digest")
    if stored != meta_digest(meta):
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

    def read() -> dict[str, Any]:
        # Orbax's handlers and not its checkpointers, which wait for hosts that may have found damage meanwhile.
        reader, folder = ocp.StandardCheckpointHandler(), directory / str(step)

        def restored(place: epath.Path, tree: Any) -> Any:
            if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree)):
                return serial_storage.restore(place, tree)
            return reader.restore(place, args=ocp.args.StandardRestore(tree))

        try:
            return {
                item: restored(folder / _folder_of(meta, item), tree)
                for item, tree in wanted.items()
                if item in meta["arrays"]
            }
        finally:
            reader.close()

    def verify() -> None:
        found = {item: digests.described(tree) for item, tree in items.items()}  # all, for hosts compute them together
        for item, arrays in found.items():
            for name, described in arrays.items():
                if described != meta["arrays"][item][name]:
                    raise ValueError(f"{item}{name} does not match its digest")

    items = hosts.together("read", read)
    hosts.together("digest", verify)
    for item, tree in wanted.items():
        if tree is not abstract[item]:
            absent = {name: x for name, x in abstract[item].items() if name not in tree}
            items[item] = {**items.get(item, {}), **jax.tree.map(_zeros, absent)}
    return items


def _without_unmeasured(item: str, tree: Any, meta: Mapping[str, Any]) -> Any:
    """Returns what to read of an item: what begins as zeros, and was never anything else, need not be there."""
    if item == "rest" and item not in meta["arrays"]:
        return {}
    if item != "statistics":
        return tree
    there = meta["arrays"].get(item, {})
    absent = [name for name in OF_WEIGHTS if name in tree and f"['{name}']" not in there]
    return {name: x for name, x in tree.items() if name not in absent} if absent else tree


def _zeros(like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.zeros_like(like)
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _check_shapes(stored: Mapping[str, Any], abstract: Any, *, where: str) -> None:
    wanted = {name: [str(x.dtype), list(x.shape)] for name, x in digests.named(abstract)}
    there = {name: [dtype, shape] for name, (dtype, shape, _) in stored.items()}
    differing = [name for name in wanted | there if wanted.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"{where} is of another network: {name} is {there.get(name, 'missing')} there and "
            f"{wanted.get(name, 'missing')} here, and {len(differing) - 1} more differ"
        )


def meta_digest(meta: Mapping[str, Any]) -> str:
    """Returns the digest that a step's `meta` is stored with."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
