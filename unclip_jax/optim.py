"""Optimizers, learning-rate schedules and the moving average of weights, by name from a config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip_jax.errors import InputError, nearest


def learning_rate(config: ConfigDict, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then "constant", "cosine" or "linear" decay to `final_fraction` of the peak.

    Args:
      config: `learning_rate`, `schedule`, `final_fraction`.
      total_steps: where the decay ends.
      warmup_steps: length of the warm-up.
    """
    peak = config.learning_rate
    final = peak * config.final_fraction
    decay_steps = max(total_steps - warmup_steps, 1)
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, decay_steps),
    }
    if config.schedule not in decays:
        raise InputError(f"config.optim.schedule={config.schedule!r} is unknown; {nearest(config.schedule, decays)}")
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    return optax.join_schedules([warmup, decays[config.schedule]()], [warmup_steps])


def create(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay (appendix C: "Adam with corrected weight decay"), after clipping by norm.

    Args:
      config: `beta1`, `beta2`, `eps`, `weight_decay`, `decay` ("all" weights but the statistics of batch norms, or
        only "matrices": no biases, norms or single vectors), `grad_clip` (0: off).
      schedule: the learning rate by step.
    """
    masks = {
        "all": _by_name(lambda name: name not in ("running_mean", "running_var")),
        "matrices": _by_name(lambda name: name in ("kernel", "embedding")),
    }
    if config.decay not in masks:
        raise InputError(f"config.optim.decay={config.decay!r} is unknown; {nearest(config.decay, masks)}")
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=masks[config.decay],
    )
    if not config.grad_clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)


def _by_name(belongs: Callable[[str], bool]) -> Callable[[Any], Any]:
    """Returns the mask of a tree: whether the last name on the path to each weight belongs."""

    def one(path, leaf) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return belongs(names[-1])

    return lambda params: jax.tree_util.tree_map_with_path(one, params)


def ema_decay(config: ConfigDict, step: jax.Array) -> jax.Array:
    """Decay of the moving average of weights at `step`.

    With `ema_warmup`, short runs do not average in their random start: min(decay, (1 + step) / (10 + step)).
    """
    decay = jnp.float32(config.ema_decay)
    if not config.ema_warmup:
        return decay
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def ema_update(ema: Any, params: Any, decay: jax.Array) -> Any:
    """Returns decay * ema + (1 - decay) * params, leaf by leaf, in float32."""
    return optax.incremental_update(params, ema, 1.0 - decay)
