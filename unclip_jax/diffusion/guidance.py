"""Guidance: wraps a conditional denoiser into one that samplers call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from unclip_jax.errors import InputError

Denoiser = Callable[[Any, Any], Any]
ConditionalDenoiser = Callable[[Any, Any, Any], Any]


def classifier_free(
    denoise_fn: ConditionalDenoiser,
    cond: PyTree[Array],
    null: PyTree[Array],
    *,
    scale: int | float | Float[Array, ""] | Float[Array, "b"],
    guided_channels: int | None = None,
) -> Denoiser:
    """Returns fn(x_t, t) = null + scale (cond - null), the guided output (Ho & Salimans 2022; GLIDE, section 2.3).

    Both branches run as one batch of 2b examples. A scale that is the number 1 runs the conditional branch alone.

    Args:
      denoise_fn: fn(x_t, t, condition) -> output; every leaf of the condition has the batch as its first axis.
      cond: the condition.
      null: what to steer away from, a tree like `cond`: the dropped condition, or a negative prompt.
      scale: guidance scale, one number or one per example; 0 is unconditional, 1 unguided.
      guided_channels: how many leading channels are guided; the others, such as the variance channels of a learned
        range, are the conditional branch's own. None guides all.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x_t, t: denoise_fn(x_t, t, cond)
    condition = jax.tree.map(_interleave, cond, null)

    def guided(x_t: Float[Array, "b *rest"], t: Array) -> Array:
        both = denoise_fn(_interleave(x_t, x_t), _interleave(t, t), condition)
        both = both.reshape(-1, 2, *both.shape[1:])
        toward, away = both[:, 0], both[:, 1]
        strength = jnp.asarray(scale, both.dtype).reshape((-1,) + (1,) * (toward.ndim - 1))
        steered = away + strength * (toward - away)
        if guided_channels is None:
            return steered
        return jnp.concatenate([steered[..., :guided_channels], toward[..., guided_channels:]], axis=-1)

    return guided


def check_negative(scale: int | float) -> None:
    """Raises where there is no null branch that could read a negative prompt.

    Raises:
      InputError: the scale is 1.
    """
    if scale == 1:
        raise InputError(
            "a negative prompt is what guidance steers away from, and guidance_scale 1 steers nowhere; set another"
        )


def _interleave(first: Array, second: Array) -> Array:
    """Merges two batches as first[0], second[0], first[1], ...: a batch split over devices need not move."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
