"""A run as a program: shapes, shardings and the one train step of every stage, made without allocating anything."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import optim, sharding, sharpness
from unclip_jax.errors import InputError
from unclip_jax.stages import base
from unclip_jax.state import TrainState, forget_weights


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything compiled of a run, made without allocating anything.

    Attributes:
      config, mesh, stage: what it was built from.
      total_steps: length of the run.
      learning_rate: schedule by step.
      state, frozen: abstract trees (ShapeDtypeStruct with shardings).
      batch_sharding: of every field of a batch.
      init: fn(rng) -> state.
      train_step: fn(state, frozen, batch) -> (state, metrics); the state is donated.
      predict: name -> jitted fn(params, frozen, batch, rng).
    """

    config: ConfigDict
    mesh: Mesh
    stage: base.Stage
    total_steps: int
    learning_rate: optax.Schedule
    state: Any
    frozen: Any
    batch_sharding: NamedSharding
    init: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    predict: Mapping[str, jax.stages.Wrapped]

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Abstract global batch, with shardings, to lower the step with."""
        spec = self.stage.batch_spec(self.config.batch_size)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.batch_sharding) for name, x in spec.items()
        }


def build(config: ConfigDict, mesh: Mesh) -> Program:
    """Returns shapes, shardings and jitted functions of a run; allocates nothing.

    Raises:
      InputError: the config does not make a network, or its batch does not divide over the mesh.
    """
    stage = base.create(config)
    accumulation = config.optim.accumulation
    sharding.check_batch(config.batch_size, mesh, accumulation=accumulation)
    if accumulation > 1 and not stage.splits_batch:
        raise InputError(f"config.optim.accumulation={accumulation}: the loss of {config.stage!r} needs whole batches")
    total_steps = configs.total_steps(config)
    warmup = configs.duration(config.optim, "warmup", batch_size=config.batch_size, total_steps=total_steps)
    learning_rate = optim.learning_rate(config.optim, total_steps=total_steps, warmup_steps=warmup)
    optimizer = optim.create(config.optim, learning_rate)

    def init_boxed(rng):
        params = stage.init(rng)
        statistics = stage.init_frozen(rng).get("statistics", {})
        return TrainState.create(params, optimizer.init(params), statistics)

    rules = config.sharding
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed_state = jax.eval_shape(init_boxed, key)
    boxed_frozen = jax.eval_shape(stage.init_frozen, key)
    boxed_frozen = {name: tree for name, tree in boxed_frozen.items() if name != "statistics"}
    state = _abstract(boxed_state, sharding.shardings(boxed_state, rules, mesh))
    frozen = _abstract(boxed_frozen, sharding.shardings(boxed_frozen, rules, mesh))
    state_sharding = jax.tree.map(lambda x: x.sharding, state)
    batch_sharding = sharding.batch_sharding(mesh)
    gradient = _value_and_grad(config, stage, mesh)
    step = functools.partial(_train_step, config, gradient, optimizer, learning_rate)
    return Program(
        config=config,
        mesh=mesh,
        stage=stage,
        total_steps=total_steps,
        learning_rate=learning_rate,
        state=state,
        frozen=frozen,
        batch_sharding=batch_sharding,
        init=jax.jit(
            lambda rng: nn.meta.unbox(init_boxed(rng)), out_shardings=state_sharding, compiler_options=_once(mesh)
        ),
        train_step=jax.jit(
            sharding.traced_on(mesh, rules, step),
            donate_argnums=0,
            out_shardings=(state_sharding, sharding.replicated(mesh)),
            compiler_options=_OVERLAP if mesh.devices.flat[0].platform == "tpu" else None,
        ),
        predict={name: jax.jit(sharding.traced_on(mesh, rules, fn)) for name, fn in stage.predict_fns().items()},
    )


def _value_and_grad(config: ConfigDict, stage: base.Stage, mesh: Mesh) -> Callable[..., Any]:
    """Returns fn(params, frozen, batch, rng) -> ((loss, metrics), gradient) of a whole batch."""
    loss = functools.partial(stage.loss, train=True)
    if not config.get("sam") or not config.sam.rho:
        return jax.value_and_grad(loss, has_aux=True)
    sharpness.check(config.sam, batch_size=config.batch_size // config.optim.accumulation, mesh=mesh)
    return sharpness.value_and_grad(loss, config.sam, mesh)


# A TPU's compiler then gathers weights while it computes something else; by itself it waits for them.
_OVERLAP = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
}


def _once(mesh: Mesh) -> dict[str, Any] | None:
    """Compiler options of what runs once: on CPU, optimising it takes several times longer than it saves."""
    return {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None


def _abstract(boxed: Any, shardings: Any) -> Any:
    def one(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    return jax.tree.map(one, nn.meta.unbox(boxed), shardings)


def _train_step(config, gradient, optimizer, learning_rate, state: TrainState, frozen, batch):
    """One step of any stage. A loss or gradient that is not finite changes nothing but the counters."""
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    frozen = {**frozen, "statistics": state.statistics}
    loss, parts, grads = _accumulated(config, gradient, state.params, frozen, batch, rng)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def apply(_):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = optim.ema_decay(config.optim, state.step)
        return params, optim.ema_update(state.ema, params, decay), opt_state

    def keep(_):
        return state.params, state.ema, state.opt_state

    params, ema, opt_state = jax.lax.cond(finite, apply, keep, None)
    bad = (~finite).astype(jnp.int32)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        statistics=forget_weights(state.statistics),
        skipped=state.skipped + bad,
        streak=(state.streak + bad) * bad,
    )
    report = {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
        "learning_rate": learning_rate(state.step),
        "skipped_steps": new.skipped,
        "streak": new.streak,
    }
    return new, {**report, **parts}


def _accumulated(config, value_and_grad, params, frozen, batch, rng):
    """Returns loss, metrics and gradient of a batch, in one piece or as the mean over equal parts of it."""
    parts = config.optim.accumulation
    if parts == 1:
        (loss, aux), grads = value_and_grad(params, frozen, batch, rng)
        return loss, aux, grads

    def split(x):  # part i takes every parts-th example, so that each device keeps its own examples
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def add(total, item):
        number, part = item
        (loss, aux), grads = value_and_grad(params, frozen, part, jax.random.fold_in(rng, number))
        return jax.tree.map(jnp.add, total, (loss, aux, grads)), None

    first = jax.eval_shape(value_and_grad, params, frozen, jax.tree.map(lambda x: split(x)[0], batch), rng)
    (loss, aux), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    (loss, aux, grads), _ = jax.lax.scan(add, (loss, aux, grads), (jnp.arange(parts), jax.tree.map(split, batch)))
    # Pairs (sum, count) add up; means are averaged.
    aux = {name: value if isinstance(value, tuple) else value / parts for name, value in aux.items()}
    return loss / parts, aux, jax.tree.map(lambda g: g / parts, grads)
