"""Checkpoints: Orbax, asynchronous, verified when read back.

A step holds `params`, `ema` and `rest` (optimizer, counters, statistics) as separate items, so that readers of the
weights read only those, and `meta`: the config and a digest of every array. Orbax commits a step by renaming its
folder but neither notices flipped bits nor looks inside the folders that it lists, so a restore here verifies the
digests and falls back to the newest step that is whole.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax.errors import InputError
from unclip_jax.state import TrainState

_LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"


class Checkpointer:
    """Saves and restores the state of one run."""

    def __init__(self, workdir: epath.PathLike, *, every_steps: int, keep: int):
        """Opens `workdir/checkpoints`; a step is saved every `every_steps`, and the last `keep` are kept."""
        self._directory = epath.Path(workdir) / FOLDER
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=max(every_steps, 1),
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._digest = jax.jit(digest)

    def due(self, step: int) -> bool:
        """Whether the manager wants this step: its interval has come, or this job is being preempted."""
        return self._manager.should_save(step)

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
            "digests": {name: _named(self._digest(tree)) for name, tree in items.items()},
            **(extra or {}),
        }
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest whole checkpoint and its `meta`, or None where nothing was ever saved.

        Args:
          abstract: shapes, dtypes and shardings to restore to; the mesh may differ from the one that saved.

        Raises:
          InputError: there are checkpoints, but none that is whole.
        """
        steps = steps_of(self._directory)
        for step in steps:
            try:
                meta = _read_meta(self._directory, step)
                items = {name: _read(self._directory, step, name, tree) for name, tree in _items(abstract).items()}
                _verify(meta, items, self._digest)
            except Exception as error:  # Orbax and TensorStore raise many kinds; each means this step is damaged
                _LOG.warning("checkpoint %s of %s is damaged and passed over: %s", step, self._directory, error)
                self._retire(step)
                continue
            if step != steps[0]:
                _LOG.warning("resuming from step %d, the newest whole checkpoint", step)
            state = TrainState(
                params=items["params"], ema=items["ema"], statistics=items.get("statistics", {}), **items["rest"]
            )
            return state, meta
        if steps:
            raise InputError(
                f"none of the checkpoints in {self._directory} is whole (steps {steps}); move them away to start over"
            )
        return None

    def _retire(self, step: int) -> None:
        """Renames a damaged step so that it is neither listed nor in the way when the run comes by again."""
        if jax.process_index() == 0:
            path = self._directory / str(step)
            path.rename(self._directory / f"damaged-{step}-{len(list(self._directory.glob('damaged-*')))}")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save under way and closes."""
        self._manager.wait_until_finished()
        self._manager.close()


def steps_of(directory: epath.PathLike) -> list[int]:
    """Returns the steps that have a folder, newest first, whole or not."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    return sorted((int(path.name) for path in directory.iterdir() if re.fullmatch(r"\d+", path.name)), reverse=True)


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
    directory = epath.Path(workdir) / FOLDER
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
            items = {which: _read(directory, candidate, which, params)}
            if statistics:
                items["statistics"] = _read(directory, candidate, "statistics", statistics)
            _verify(meta, items, jax.jit(digest))
        except InputError:
            raise
        except Exception as error:
            _LOG.warning("checkpoint %s of %s is damaged and passed over: %s", candidate, directory, error)
            continue
        return items[which], items.get("statistics", {}), config, candidate
    raise InputError(f"no checkpoint in {directory} is whole (tried {steps if step is None else [step]})")


def _items(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped, "streak": state.streak}
    items = {"params": state.params, "ema": state.ema, "rest": rest}
    if jax.tree.leaves(state.statistics):
        items["statistics"] = state.statistics
    return items


def _read_meta(directory: epath.Path, step: int) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(directory / str(step) / "meta")


def _read(directory: epath.Path, step: int, item: str, abstract: Any) -> Any:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(directory / str(step) / item, abstract)


def _named(digests: Any) -> dict[str, int]:
    flat, _ = jax.tree_util.tree_flatten_with_path(digests)
    return {jax.tree_util.keystr(path): int(value) for path, value in flat}


def _verify(meta: Mapping[str, Any], items: Mapping[str, Any], compute: Callable[[Any], Any]) -> None:
    for item, tree in items.items():
        stored = meta["digests"][item]
        for name, value in _named(compute(tree)).items():
            if stored.get(name) != value:
                raise ValueError(f"{item}{name} does not match its digest")


def digest(tree: Any) -> Any:
    """Returns a uint32 per leaf that any one changed element changes, whatever the sharding.

    The sum modulo 2^32 of each element's bits times an odd number that depends on its index: a change of one
    element changes the sum, because odd numbers have inverses modulo 2^32.
    """
    return jax.tree.map(_leaf_digest, tree)


def _leaf_digest(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    width = np.dtype(x.dtype).itemsize
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
