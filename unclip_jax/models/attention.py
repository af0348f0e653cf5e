"""Softmax attention of queries to keys, without weights."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Queries whose logits a CPU computes at a time, so that they stay in its cache.
_CHUNK = 64
# Added to the logit of what may not be looked at. Finite, so that a query that may look at nothing gives no NaN.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h k"],
    mask: Bool[Array, "#b #h #n #s"] | None = None,
) -> Float[Array, "b n h k"]:
    """Returns softmax(q k^T / sqrt(k)) v of each head; logits and softmax in float32.

    `mask` is True where a query may look. Where all queries may look at the same keys, a CPU takes them in chunks and
    computes their weights again in the backward pass, which takes it a third of the time; neither pass then holds all
    [n, s] of them.
    """
    at_once = functools.partial(jax.nn.dot_product_attention, q, k, v, mask=mask)
    count = q.shape[1]
    if count <= _CHUNK or count % _CHUNK or (mask is not None and mask.shape[2] > 1):
        return at_once()
    return jax.lax.platform_dependent(cpu=functools.partial(_attend_in_chunks, q, k, v, mask), default=at_once)


def _attend_in_chunks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    batch, count, heads, width = q.shape
    # Heads in front once, not for each chunk.
    q, k, v = (jnp.moveaxis(part, 1, 2) for part in (q * width**-0.5, k, v))
    hidden = jnp.zeros((), jnp.float32) if mask is None else jnp.where(mask, 0.0, _HIDDEN)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_chunk(q: jax.Array) -> jax.Array:
        logits = jnp.einsum("bhnk,bhsk->bhns", q, k, preferred_element_type=jnp.float32) + hidden
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        y = jnp.einsum("bhns,bhsk->bhnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (y / weights.sum(-1, keepdims=True)).astype(q.dtype)

    chunks = jnp.moveaxis(q.reshape(batch, heads, count // _CHUNK, _CHUNK, width), 2, 0)
    y = jax.lax.map(attend_chunk, chunks)
    return jnp.moveaxis(y, (0, 3), (1, 2)).reshape(batch, count, heads, width)
