"""Softmax attention of queries to keys, without weights: plain, and as each kind of device computes it best."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unclip_jax import sharding
from unclip_jax.models import attention_kernel

# Queries whose logits a CPU computes at a time, so that they stay in its cache.
_CHUNK = 64
# Pairs of queries and keys from which a TPU's kernels are used; fewer logits may lie in memory.
_MANY = 1 << 15
_FEW = 1 << 12
# Queries that the kernel takes at a time, and keys, of which it takes multiples: the lanes of a TPU's registers.
_BLOCK, _LANES = 512, 128
# Added to the logit of what may not be looked at. Finite, so that a query that may look at nothing gives no NaN.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
_AXES = ("batch", None, "heads", None)


def attend(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h k"],
    mask: Bool[Array, "#b #h #n #s"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b n h k"]:
    """Returns softmax(q k^T / sqrt(k)) v of each head; logits and softmax in float32.

    `mask` is True where a query may look. With `causal` the n queries stand where the last n keys do, and none may look
    past itself. Where all queries may look at the same keys, a CPU takes them in chunks and computes their weights
    again in the backward pass, which takes it a third of the time; a TPU does so in a kernel, causal or not, from some
    ten thousand pairs of query and key on. Neither pass then holds all [n, s] of them. A GPU calls cuDNN, in the types
    that it knows. Which it is, the mesh says that this is traced on (`sharding.platform`).
    """
    count, keys, platform = q.shape[1], k.shape[1], sharding.platform()
    everywhere = mask is None or mask.shape[1] == mask.shape[2] == 1
    if platform == "cpu" and everywhere and not causal and count > _CHUNK and count % _CHUNK == 0:
        return _attend_in_chunks(q, k, v, mask)
    if platform == "tpu" and everywhere and count >= _LANES and count * keys >= _MANY:
        return _attend_by_kernel(q, k, v, mask, causal=causal)
    if causal:
        past = jnp.tril(jnp.ones((count, keys), bool), keys - count)[None, None]
        mask = past if mask is None else past & mask
    cudnn = platform == "gpu" and _cudnn_takes(q)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if cudnn else None)


def attend_packed(
    qkv: Float[Array, "b n 3 h k"],
    context: Float[Array, "b m 2 h k"] | None = None,
    mask: Bool[Array, "#b #h #n #s"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b n h k"]:
    """Returns `attend` of queries, keys and values as one product made them; keys of a context stand in front.

    A TPU reads them where they lie, if its registers are filled by their heads (`attention_kernel`).
    """
    count, _, heads, head_dim = qkv.shape[1:]
    length = 0 if context is None else context.shape[1]
    everywhere = mask is None or mask.shape[1] == mask.shape[2] == 1
    if (
        sharding.platform() == "tpu"
        and everywhere
        and count * (count + length) >= _FEW
        and attention_kernel.takes(
            count=count, context=length, heads=heads // sharding.split("heads", heads), head_dim=head_dim
        )
    ):
        return _attend_packed_by_kernel(qkv, context, mask, causal=causal)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    if context is not None:
        k = jnp.concatenate([context[:, :, 0], k], 1)
        v = jnp.concatenate([context[:, :, 1], v], 1)
    return attend(q, k, v, mask, causal=causal)


def _attend_packed_by_kernel(
    qkv: jax.Array, context: jax.Array | None, mask: jax.Array | None, *, causal: bool = False, interpret: bool = False
) -> jax.Array:
    """The kernel of `attention_kernel`, on each device's own examples and heads."""
    seen = None if mask is None else mask[:, 0, 0, :, None, None, None]

    def own(qkv, context, seen):
        seen = None if seen is None else seen[:, :, 0, 0, 0]
        return attention_kernel.attend(qkv, context, seen, causal, interpret)[:, :, None]

    return sharding.each_part(own, qkv, context, seen, names=("batch", None, None, "heads", None))[:, :, 0]


def _cudnn_takes(q: jax.Array) -> bool:
    width = q.shape[-1]
    return q.dtype in (jnp.bfloat16, jnp.float16) and width <= 128 and width % 8 == 0


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


def _attend_by_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    causal: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas kernel of JAX for TPUs, on each device's own examples and heads."""
    seen = jnp.ones((1, k.shape[1]), bool) if mask is None else mask[:, 0, 0]
    seen = jnp.broadcast_to(seen, (q.shape[0], k.shape[1]))[:, :, None, None]
    kernel = functools.partial(_kernel, causal=causal, interpret=interpret)
    return sharding.each_part(kernel, q, k, v, seen, names=_AXES)


def _kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, causal: bool, interpret: bool
) -> jax.Array:
    # Late, for it takes a second that only those who run it on a TPU should wait.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    count, keys, width = q.shape[1], k.shape[1], q.shape[-1]
    # Both are filled up to whole registers; keys to whole blocks, too, where one block does not hold them all.
    multiple = _LANES if keys <= 4 * _BLOCK else _BLOCK
    q = jnp.pad(q, ((0, 0), (0, -count % _LANES), (0, 0), (0, 0)))
    k, v, seen = (jnp.pad(x, ((0, 0), (0, -keys % multiple), (0, 0), (0, 0))) for x in (k, v, seen))
    shape = (q.shape[1], k.shape[1])
    rows = next(size for size in range(_BLOCK, 0, -_LANES) if shape[0] % size == 0)
    block = shape[1] if keys <= 4 * _BLOCK else _BLOCK
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=rows,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash_mask.CausalMask(shape, offset=keys - count) if causal else splash_mask.FullMask(shape)
    masks = splash_mask.MultiHeadMask([mask] * q.shape[2])
    attend_one = splash.make_splash_mha(masks, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)
    # A query sees keys of its own segment: all are of segment 1, and what may not be seen is of segment 0.
    ours = jnp.ones((shape[0],), jnp.int32)

    def one(q, k, v, seen):
        return attend_one(q * width**-0.5, k, v, segment_ids=splash.SegmentIds(ours, seen.astype(jnp.int32)))

    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    y = jax.vmap(one)(q, k, v, seen[:, :, 0, 0])
    return jnp.moveaxis(y, 1, 2)[:, :count]
