"""Attention as a TPU kernel that reads queries, keys and values where a layer's product left them.

A product leaves [b, n, 3 * heads * head_dim], whose last axis lies in the lanes of a TPU's registers, 128 of them: two
heads of 64. Kernels that want a head by itself make the compiler turn and pad these arrays first, several times the
bytes of all else around attention. This one takes the heads of 128 lanes at a time, and all keys of an example at once,
so no logit leaves the chip's vector memory, and its backward pass needs nothing but what went in.

Queries, keys and values of the tokens are columns of one array; those of a context, such as a caption's, are columns
of another and stand behind them, which changes no sum. Sizes are filled up in vector memory only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

LANES = 128
# Rows of a register that holds numbers of 16 bits: arrays in vector memory are filled up to these.
_ROWS = 16
# Queries at a time, where they are many; fewer than twice as many are taken at once.
_QUERIES = 256
# Keys that vector memory holds beside the logits of as many queries.
_MOST_KEYS = 2048
# Added to the logit of what may not be looked at. Finite, so that a query that may look at nothing gives no NaN.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static sizes of one call: tokens, those of the context (0 without), heads and their width."""

    count: int
    context: int
    heads: int
    head_dim: int
    causal: bool
    interpret: bool

    @property
    def blocks(self) -> int:  # of lanes
        return self.heads * self.head_dim // LANES

    @property
    def queries(self) -> int:  # at a time
        return self.count if self.count < 2 * _QUERIES or self.count % _QUERIES else _QUERIES

    @property
    def rows(self) -> int:  # the same, filled up
        return _up(self.queries, _ROWS)

    @property
    def behind(self) -> int:  # where the context's keys begin
        return _up(self.count, _ROWS)

    @property
    def keys(self) -> int:  # of tokens and context, filled up
        return _up(self.behind + self.context, LANES)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def takes(*, count: int, context: int, heads: int, head_dim: int) -> bool:
    """Whether the kernel can take this attention: its heads fill whole registers, its keys fit vector memory.

    Args:
      count, context: tokens, and those of the context.
      heads, head_dim: as of `attend`.
    """
    whole = LANES % head_dim == 0 and (heads * head_dim) % LANES == 0
    divides = count < 2 * _QUERIES + LANES or count % _QUERIES == 0
    return whole and divides and _up(count, _ROWS) + context <= _MOST_KEYS


def attend(
    qkv: Float[Array, "b n 3 h k"],
    context: Float[Array, "b m 2 h k"] | None,
    seen: Bool[Array, "#b s"] | None,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "b n h k"]:
    """Returns softmax(q k^T / sqrt(k)) v of each head; logits and softmax in float32.

    Args:
      qkv: queries, keys and values of the tokens; see `takes`.
      context: keys and values of a context, which every token may look at.
      seen: True where a key may be looked at, those of the context first; all may without it.
      causal: whether a token sees, of the tokens, only those up to itself.
      interpret: computes it without a TPU.
    """
    batch, count, _, heads, head_dim = qkv.shape
    length = 0 if context is None else context.shape[1]
    shape = _Shape(count, length, heads, head_dim, causal, interpret)
    hidden = jnp.zeros((batch, length + count), jnp.float32)
    if seen is not None:
        hidden = jnp.broadcast_to(jnp.where(seen, 0.0, _HIDDEN), hidden.shape)
    gap = ((0, 0), (0, shape.behind - count))
    hidden = jnp.concatenate([jnp.pad(hidden[:, length:], gap, constant_values=_HIDDEN), hidden[:, :length]], 1)
    hidden = jnp.pad(hidden, ((0, 0), (0, shape.keys - hidden.shape[1])), constant_values=_HIDDEN)
    flat = None if context is None else context.reshape(batch, length, -1)
    y = _attend(qkv.reshape(batch, count, -1), flat, hidden[:, None], shape)
    return y.reshape(batch, count, heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(qkv, context, hidden, shape):
    batch, width = qkv.shape[0], shape.blocks * LANES
    return pl.pallas_call(
        functools.partial(_forward, shape=shape),
        grid=(batch, shape.blocks, shape.count // shape.queries),
        in_specs=_inputs(shape),
        out_specs=pl.BlockSpec((1, shape.queries, LANES), lambda b, c, i: (b, i, c)),
        out_shape=jax.ShapeDtypeStruct((batch, shape.count, width), qkv.dtype),
        scratch_shapes=_held(shape, qkv.dtype),
        compiler_params=_PARAMS,
        interpret=shape.interpret,
        name="attention",
    )(*_operands(qkv, context, hidden))


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _operands(qkv, context, hidden):
    return (qkv, qkv, qkv, hidden) if context is None else (qkv, qkv, qkv, hidden, context, context)


def _inputs(shape):
    """Blocks of queries, keys and values, of what is added to logits, and of the context's keys and values."""

    def columns(part, length):
        return pl.BlockSpec((1, length, LANES), lambda b, c, i: (b, 0, part * shape.blocks + c))

    specs = [
        pl.BlockSpec((1, shape.queries, LANES), lambda b, c, i: (b, i, c)),
        columns(1, shape.count),
        columns(2, shape.count),
        pl.BlockSpec((1, 1, shape.keys), lambda b, c, i: (b, 0, 0)),
    ]
    return specs + [columns(part, shape.context) for part in (0, 1) if shape.context]


def _held(shape, dtype):
    """Vector memory for queries, keys and values, filled up."""
    return [pltpu.VMEM((size, LANES), dtype) for size in (shape.rows, shape.keys, shape.keys)]


def _load(shape, q, parts, queries, keys, values):
    """Copies a block's queries; and, at its first, all keys and values. What fills them up is 0."""
    queries[...] = jnp.zeros_like(queries)
    queries[: shape.queries] = q[0]
    k, v, *context = parts

    @pl.when(pl.program_id(2) == 0)
    def _():
        for number, (own, held) in enumerate(((k, keys), (v, values))):
            held[...] = jnp.zeros_like(held)
            held[: shape.count] = own[0]
            if context:
                held[shape.behind : shape.behind + shape.context] = context[number][0]


def _weights(shape, head, queries, keys, hidden):
    """Returns softmax of one head's logits [rows, keys] and its queries, which are 0 in the lanes of other heads."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    own = (lane >= head * shape.head_dim) & (lane < (head + 1) * shape.head_dim)
    q = jnp.where(own, queries[...], 0)
    logits = _product_of_rows(q, keys[...])
    logits = logits * shape.head_dim**-0.5 + hidden[0]
    if shape.causal:
        row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) + pl.program_id(2) * shape.queries
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where((column <= row) | (column >= shape.behind), logits, _HIDDEN)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return own, q, weights / weights.sum(-1, keepdims=True)


def _forward(q, k, v, hidden, *rest, shape):
    *context, y, queries, keys, values = rest
    _load(shape, q, (k, v, *context), queries, keys, values)
    both = jnp.zeros(queries.shape, jnp.float32)
    for head in range(LANES // shape.head_dim):
        own, _, weights = _weights(shape, head, queries, keys, hidden)
        product = jnp.dot(weights.astype(values.dtype), values[...], preferred_element_type=jnp.float32)
        both = jnp.where(own, product, both)
    y[0] = both[: shape.queries].astype(y.dtype)


def _attend_forward(qkv, context, hidden, shape):
    return _attend(qkv, context, hidden, shape), (qkv, context, hidden)


def _attend_backward(shape, kept, dy):
    qkv, context, hidden = kept
    batch, width, dtype = qkv.shape[0], shape.blocks * LANES, qkv.dtype

    def columns(length):
        return pl.BlockSpec((1, length, LANES), lambda b, c, i: (b, 0, c))

    def like(length):
        return jax.ShapeDtypeStruct((batch, length, width), dtype)

    rows = pl.BlockSpec((1, shape.queries, LANES), lambda b, c, i: (b, i, c))
    lengths = [shape.count] * 2 + [shape.context] * 2 * (context is not None)
    dq, dk, dv, *others = pl.pallas_call(
        functools.partial(_backward, shape=shape),
        grid=(batch, shape.blocks, shape.count // shape.queries),
        in_specs=[rows, *_inputs(shape)],
        out_specs=[rows, *map(columns, lengths)],
        out_shape=[like(shape.count), *map(like, lengths)],
        scratch_shapes=[
            *_held(shape, dtype),
            pltpu.VMEM((shape.rows, LANES), dtype),
            *(pltpu.VMEM((shape.keys, LANES), jnp.float32) for _ in range(2)),
        ],
        compiler_params=_PARAMS,
        interpret=shape.interpret,
        name="attention_gradient",
    )(dy, *_operands(qkv, context, hidden))
    d_context = jnp.concatenate(others, -1) if others else None
    return jnp.concatenate([dq, dk, dv], -1), d_context, jnp.zeros_like(hidden)


_attend.defvjp(_attend_forward, _attend_backward)


def _backward(dy, q, k, v, hidden, *rest, shape):
    """Gradients of one block of queries; those of keys and values are summed over the blocks and written at the last.

    With P the weights, s the logits and y = P v:
    dv = P^T dy; dP = dy v^T; ds = P (dP - sum(P dP)); dq = ds k; dk = ds^T q.
    """
    *rest, queries, keys, values, toward, d_keys, d_values = rest
    given = 2 * (shape.context > 0)
    context, (dq, dk, dv, *d_context) = rest[:given], rest[given:]
    _load(shape, q, (k, v, *context), queries, keys, values)
    toward[...] = jnp.zeros_like(toward)
    toward[: shape.queries] = dy[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_keys[...] = jnp.zeros_like(d_keys)
        d_values[...] = jnp.zeros_like(d_values)

    dtype = keys.dtype
    scale = shape.head_dim**-0.5
    d_queries = jnp.zeros(queries.shape, jnp.float32)
    for head in range(LANES // shape.head_dim):
        own, own_q, weights = _weights(shape, head, queries, keys, hidden)
        own_dy = jnp.where(own, toward[...], 0)
        # Lanes of other heads are 0 in what these are multiplied with, so each sum has its own head's alone.
        d_values[...] += _transposed_product(weights.astype(dtype), own_dy)
        d_weights = _product_of_rows(own_dy, values[...])
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
        d_logits = d_logits.astype(dtype)
        d_keys[...] += _transposed_product(d_logits, own_q)
        product = jnp.dot(d_logits, keys[...], preferred_element_type=jnp.float32)
        d_queries = jnp.where(own, product, d_queries)
    dq[0] = d_queries[: shape.queries].astype(dq.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for number, (own, held) in enumerate(((dk, d_keys), (dv, d_values))):
            own[0] = held[: shape.count].astype(own.dtype)
            if d_context:
                there = held[shape.behind : shape.behind + shape.context]
                d_context[number][0] = there.astype(own.dtype)


def _product_of_rows(left, right):
    """left right^T, summed over lanes."""
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _transposed_product(left, right):
    """left^T right, summed over queries."""
    return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
