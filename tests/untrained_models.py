"""Folders as training leaves them, with networks that nobody trained: what draws needs weights, not good ones."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_configs import small

from unclip_jax import checkpoint, unclip
from unclip_jax.stages import base
from unclip_jax.state import TrainState

CASES = {name: "upsampler" if name == "upsampler_1" else name for name in unclip.STAGES}


def write(folder: pathlib.Path, name: str, *, seed: int = 0, **overrides: Any) -> pathlib.Path:
    """Writes the part `name` into folder/name, with weights drawn from a seed; returns that folder."""
    config = small(CASES[name], **overrides)
    if config.get("frozen"):
        with config.unlocked():
            config.frozen.clip = str(folder / "clip")
    stage = base.create(config)
    key = jax.random.key(0)
    params = drawn(stage, seed)
    statistics = jax.jit(lambda: stage.init_frozen(key).get("statistics", {}))()
    state = TrainState.create(params, optax.sgd(0.0).init(params), statistics)
    saver = checkpoint.Checkpointer(folder / name, every_steps=1, keep=1)
    read = {"frozen.clip": checkpoint.fingerprint(drawn(base.create(small("clip")), 0))}
    saver.save(state, config=config, extra={"data": read if config.get("frozen") else {}})
    saver.close()
    return folder / name


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
    """Writes all six parts; returns the folder."""
    for name in unclip.STAGES:
        write(folder, name)
    return folder
