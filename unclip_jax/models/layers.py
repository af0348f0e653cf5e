"""Layers that every network shares, and the only place that names the logical axes of weights.

Weights are float32; matrix products run in each module's `dtype`; norms and softmax run in float32. Every
weight is boxed with logical axis names (`flax.linen.LogicallyPartitioned`), which `unclip_jax.sharding` maps to
the mesh by the config's table:

    layers      stacked blocks of a scanned transformer
    embed       the residual stream, in and out of a block
    mlp         the wide side of a dense layer
    heads, kv   attention heads, and the dimensions of one head
    vocab       rows of an embedding table
    conv_in, conv_out   channels of a convolution
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.models.attention import attend

_AXES = {  # role of a dense layer -> axes of its [in, out] kernel
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "mix": ("embed", None),
}


def _boxed(initializer, axes):
    return nn.with_logical_partitioning(initializer, axes)


def _kernel_init(scale):
    """LeCun's uniform initializer with its variance scaled; zeros for a scale of 0."""
    if scale == 0:
        return nn.initializers.zeros
    return nn.initializers.variance_scaling(scale, "fan_in", "uniform")


def dense(
    features: int,
    *,
    role: str = "up",
    dtype: DTypeLike = jnp.float32,
    use_bias: bool = True,
    scale: float = 1.0,
    name: str | None = None,
) -> nn.Dense:
    """A linear layer on the last axis.

    Args:
      features: width of the output.
      role: "up" (residual stream to a wide layer), "down" (back), or "mix" (output never split); decides how the
        kernel is sharded.
      dtype: compute dtype.
      use_bias: whether to add a zero-initialised bias.
      scale: variance scale of the LeCun-uniform kernel; 0 makes the layer start at zero.
      name: parameter name.
    """
    axes = _AXES[role]
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=_boxed(_kernel_init(scale), axes),
        bias_init=_boxed(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def conv(
    features: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: str | int = "SAME",
    dtype: DTypeLike = jnp.float32,
    use_bias: bool = True,
    scale: float = 1.0,
    name: str | None = None,
) -> nn.Conv:
    """A square 2-D convolution of NHWC images; `scale` 0 makes it start at zero."""
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=_boxed(_kernel_init(scale), (None, None, "conv_in", "conv_out")),
        bias_init=_boxed(nn.initializers.zeros, ("conv_out",)),
        name=name,
    )


def embedding(rows: int, width: int, *, dtype: DTypeLike = jnp.float32, name: str | None = None) -> nn.Embed:
    """A table of `rows` learned vectors, normal with standard deviation 0.02 (Radford et al., 2021)."""
    init = _boxed(nn.initializers.normal(0.02), ("vocab", "embed"))
    return nn.Embed(rows, width, dtype=dtype, embedding_init=init, name=name)


def learned(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    *,
    stddev: float = 0.02,
    start: float = 0.0,
    axis: str = "embed",
) -> Float[Array, "..."]:
    """A learned array (positions, class tokens, null embeddings); `axis` names its last, the residual stream's here.

    It begins normal with `stddev`; for a `stddev` of 0 it is `start` everywhere.
    """
    init = nn.initializers.constant(start) if stddev == 0 else nn.initializers.normal(stddev)
    return module.param(name, _boxed(init, (None,) * (len(shape) - 1) + (axis,)), shape)


def layer_norm(*, dtype: DTypeLike = jnp.float32, epsilon: float = 1e-5, name: str | None = None) -> nn.LayerNorm:
    """Layer norm over the last axis; statistics in float32 whatever `dtype` is."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        scale_init=_boxed(nn.initializers.ones, ("embed",)),
        bias_init=_boxed(nn.initializers.zeros, ("embed",)),
        name=name,
    )


class GroupNorm(nn.Module):
    """Group norm over channels-last features, statistics in float32 (32 groups in ADM, Dhariwal & Nichol 2021).

    Where the channels are not a multiple of 32 the largest common divisor is used, so that tiny networks work.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        modulate: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b *space c"]:
        """Normalises; with `modulate` and `shift` returns `norm(x) * (1 + modulate) + shift` in one pass over x."""
        channels = x.shape[-1]
        groups = math.gcd(self.groups, channels)
        scale = self.param("scale", _boxed(nn.initializers.ones, ("conv_out",)), (channels,))
        bias = self.param("bias", _boxed(nn.initializers.zeros, ("conv_out",)), (channels,))
        wide = x.astype(jnp.float32)
        # Sums per channel first: a reduction over leading axes keeps channels in the vector lanes.
        space = tuple(range(1, x.ndim - 1))
        mean = wide.mean(space).reshape(x.shape[0], groups, -1).mean(-1)
        square = jnp.square(wide).mean(space).reshape(x.shape[0], groups, -1).mean(-1)
        rstd = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.epsilon)
        # To channels by a product with zeros and ones: XLA would do any other repetition again for each pixel.
        member = jnp.repeat(jnp.eye(groups), channels // groups, axis=-1)
        rstd, mean = jnp.matmul(jnp.stack([rstd, mean]), member, precision=jax.lax.Precision.HIGHEST)
        per_channel = (x.shape[0],) + (1,) * len(space) + (channels,)
        multiplier = rstd * scale
        offset = bias - mean * multiplier
        if modulate is not None and shift is not None:
            gain = 1.0 + modulate.astype(jnp.float32)
            multiplier, offset = multiplier * gain, offset * gain + shift.astype(jnp.float32)
        return (wide * multiplier.reshape(per_channel) + offset.reshape(per_channel)).astype(self.dtype)


def timestep_embedding(t: Int[Array, "b"], width: int, *, max_period: float = 10000.0) -> Float[Array, "b {width}"]:
    """Sinusoidal features of timesteps, cosines first, as ADM and GLIDE order them."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(features, ((0, 0), (0, width - 2 * half)))


ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),  # SigLIP's text towers
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "silu": nn.silu,
}


class Cache(NamedTuple):
    """Keys and values of tokens already read, so that later tokens need not read them again.

    Attributes:
      k, v: [layers, b, length, heads, head_dim] buffers (no `layers` axis inside one block).
      filled: int32 scalar, the number of positions that are filled.
    """

    k: Float[Array, "*layers b s h k"]
    v: Float[Array, "*layers b s h k"]
    filled: Int[Array, "*layers"]


class Attention(nn.Module):
    """Multi-head attention of `x` to itself and, in front, to `context`, in one softmax (GLIDE's concatenation).

    Attributes:
      heads: number of heads; must divide the width.
      context_kv: "own" projects the context by weights of its own (GLIDE's `encoder_kv`); "shared" uses the
        block's, and wants a context of the block's width.
      dtype: compute dtype.
      out_scale: variance scale of the output projection; 0 starts the layer as the identity of its residual.
    """

    heads: int
    context_kv: str = "own"
    dtype: DTypeLike = jnp.float32
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m e"] | None = None,
        mask: Bool[Array, "#b 1 #n s"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        """Attends; `mask` is True where a query may look, over [context, tokens], or over the tokens alone.

        With a cache, the tokens of `x` stand at positions `cache.filled …` and see all of the context and positions
        up to themselves, those of them that `mask`, over the positions of the cache, does not hide. The returned
        cache holds them too.
        """
        width = x.shape[-1]
        head_dim = width // self.heads
        # DenseGeneral hands its initializer the kernel as [in, out], so fan-in is what it should be.
        init = _kernel_init(1.0)

        def project(inputs, count, name):
            layer = nn.DenseGeneral(
                (count, self.heads, head_dim),
                dtype=self.dtype,
                kernel_init=_boxed(init, ("embed", None, "heads", "kv")),
                bias_init=_boxed(nn.initializers.zeros, (None, "heads", "kv")),
                name=name,
            )
            return layer, jnp.moveaxis(layer(inputs), -3, 0)

        qkv, (q, k, v) = project(x, 3, "qkv")
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), cache.filled, 1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), cache.filled, 1)
            causal = jnp.arange(k.shape[1])[None] <= cache.filled + jnp.arange(x.shape[1])[:, None]
            mask = causal[None, None] if mask is None else causal & mask
            cache = Cache(k, v, cache.filled + x.shape[1])
        if context is not None:
            if self.context_kv == "own":
                _, (context_k, context_v) = project(context, 2, "context_kv")
            else:
                _, context_k, context_v = jnp.moveaxis(qkv(context.astype(self.dtype)), -3, 0)
            k = jnp.concatenate([context_k, k], 1)
            v = jnp.concatenate([context_v, v], 1)
            if mask is not None and mask.shape[-1] != k.shape[1]:
                mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (context.shape[1], 0)), constant_values=True)
        y = attend(q, k, v, mask)
        out = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=_boxed(_kernel_init(self.out_scale), ("heads", "kv", "embed")),
            bias_init=_boxed(nn.initializers.zeros, ("embed",)),
            name="out",
        )
        return out(y), cache


class MLP(nn.Module):
    """Two dense layers with an activation between; the hidden width is `ratio` times the width."""

    ratio: float = 4.0
    activation: str = "gelu"
    dtype: DTypeLike = jnp.float32
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        width = x.shape[-1]
        hidden = dense(int(width * self.ratio), role="up", dtype=self.dtype, name="up")(x)
        return dense(width, role="down", dtype=self.dtype, scale=self.out_scale, name="down")(
            ACTIVATIONS[self.activation](hidden)
        )


class Block(nn.Module):
    """One pre-norm transformer block: `x += attention(norm(x)); x += mlp(norm(x))`."""

    heads: int
    activation: str = "gelu"
    context_kv: str = "own"
    dtype: DTypeLike = jnp.float32
    out_scale: float = 1.0
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    layer_scale: float = 0.0

    @nn.compact
    def __call__(self, x, cache, context, mask):
        attention = Attention(self.heads, self.context_kv, self.dtype, self.out_scale, name="attention")
        norm = functools.partial(layer_norm, dtype=self.dtype, epsilon=self.epsilon)
        y, cache = attention(norm(name="norm_1")(x), context, mask, cache)
        x = x + self._scaled(y, "scale_1")
        mlp = MLP(self.mlp_ratio, self.activation, self.dtype, self.out_scale, name="mlp")
        return x + self._scaled(mlp(norm(name="norm_2")(x)), "scale_2"), cache

    def _scaled(self, branch, name):
        if not self.layer_scale:
            return branch
        scale = learned(self, name, branch.shape[-1:], stddev=0, start=self.layer_scale)
        return branch * scale.astype(branch.dtype)


class Transformer(nn.Module):
    """`depth` equal pre-norm blocks, scanned: one block is compiled, the weights are stacked on axis 0.

    Attributes:
      depth, heads: blocks, and heads of each.
      activation: a key of ACTIVATIONS.
      context_kv: see Attention.
      remat: whether the backward pass recomputes each block instead of keeping its activations.
      dtype: compute dtype.
      mlp_ratio: hidden width of the MLPs over the width.
      epsilon: of the layer norms.
      layer_scale: what learned factors of each branch's channels begin at (Touvron et al., 2021, "Going deeper with
        image transformers"); 0 for none.
    """

    depth: int
    heads: int
    activation: str = "gelu"
    context_kv: str = "own"
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    layer_scale: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m e"] | None = None,
        mask: Bool[Array, "#b 1 #n s"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        """Returns the residual stream after the last block (no final norm), and the cache with the new tokens."""
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = None if cache is None else Cache(cache.k, cache.v, jnp.broadcast_to(cache.filled, (self.depth,)))
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        # Residual branches start smaller the deeper the stack is (GPT-2's 1/sqrt(2 * depth) on the weights).
        out_scale = 1.0 / (2 * self.depth)
        blocks = scanned(
            self.heads,
            self.activation,
            self.context_kv,
            self.dtype,
            out_scale,
            self.mlp_ratio,
            self.epsilon,
            self.layer_scale,
            name="blocks",
        )
        x, layers = blocks(x.astype(self.dtype), layers, context, mask)
        return x, None if layers is None else Cache(layers.k, layers.v, layers.filled[0])


def empty_cache(*, depth: int, batch: int, length: int, heads: int, head_dim: int, dtype: DTypeLike) -> Cache:
    """A cache of `length` positions, none filled, for a Transformer of `depth` blocks."""
    zeros = jnp.zeros((depth, batch, length, heads, head_dim), dtype)
    return Cache(zeros, zeros, jnp.zeros((), jnp.int32))


def causal_mask(length: int) -> Bool[Array, "1 1 {length} {length}"]:
    """True where a query may look: at itself and before."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]
