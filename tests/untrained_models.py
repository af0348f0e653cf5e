"""Folders as training leaves them, with networks that nobody trained: what draws needs weights, not good ones."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from small_configs import small

from unclip_jax import checkpoint, digests, parts, unclip
from unclip_jax import config as configs
from unclip_jax.stages import base
from unclip_jax.state import TrainState

CASES = {name: "upsampler" if name.startswith("upsampler_1") else name for name in unclip.STAGES}


def write(folder: pathlib.Path, name: str, *, seed: int = 0, **overrides: Any) -> pathlib.Path:
    """Writes the part `name` into folder/name, with weights drawn from a seed; returns that folder."""
    config = small(CASES[name], **overrides)
    if config.get("frozen"):
        with config.unlocked():
            config.frozen.clip = str(folder / "clip")
    read = {"frozen.clip": digests.fingerprint(drawn(base.create(small("clip")), 0))}
    save(folder / name, config, seed=seed, extra={"data": read if config.get("frozen") else {}})
    return folder / name


def save(workdir: pathlib.Path, config: ConfigDict, *, seed: int = 0, step: int = 0, extra: Any = None) -> None:
    """Writes the checkpoint of a step of a run with this config, and its config.json."""
    stage = base.create(config)
    key = jax.random.key(0)
    params = drawn(stage, seed)
    statistics = jax.jit(lambda: stage.init_frozen(key).get("statistics", {}))()
    state = TrainState.create(params, optax.sgd(0.0).init(params), statistics)
    saver = checkpoint.Checkpointer(workdir, every_steps=1, keep=1)
    saver.save(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)), config=config, extra=extra)
    saver.close()
    (workdir / "config.json").write_text(configs.to_json(config))


def drawn(stage: base.Stage, seed: int) -> Any:
    """Returns weights of a stage drawn from a seed."""
    rng = np.random.default_rng(seed)
    abstract = nn.meta.unbox(jax.eval_shape(stage.init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(lambda path, x: _weights(rng, path, x.shape), abstract)


def _weights(rng: np.random.Generator, path: Any, shape: tuple[int, ...]) -> jax.Array:
    """Norms near the identity, all else small and random: output layers that begin at zero would test nothing."""
    centre = 1.0 if jax.tree_util.keystr(path).endswith("scale']") else 0.0
    return jnp.asarray(centre + rng.normal(0, 0.1, shape), jnp.float32)


def write_all(folder: pathlib.Path) -> pathlib.Path:
    """Writes all six parts of the paper; returns the folder."""
    for name in unclip.STAGES:
        if name not in (parts.NOISED, *parts.LAST.values()):
            write(folder, name)
    return folder
