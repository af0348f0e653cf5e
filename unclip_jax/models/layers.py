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

Single vectors (biases, scales of norms) have none: they are on every device, for a gather of each would cost more time
than they take memory. A layer uses a weight in full, gathered in its own `dtype` (`sharding.whole`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from unclip_jax import sharding
from unclip_jax.errors import InputError, nearest

# Names of results, for REMAT.
PRODUCT, ATTENTION = "product", "attention"

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


def _merged_init(scale: float, contracted: int) -> Callable[..., jax.Array]:
    """An initializer of kernels of heads: that of a matrix from the first `contracted` axes to the others."""

    def init(key, shape, dtype=jnp.float32):
        matrix = (math.prod(shape[:contracted]), math.prod(shape[contracted:]))
        return _kernel_init(scale)(key, matrix, dtype).reshape(shape)

    return init


def _product(
    fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array, axes: Sequence[str | None]
) -> jax.Array:
    """Returns fn(x, kernel) of a kernel that is gathered first, under the name by which REMAT knows it."""
    return checkpoint_name(sharding.product(fn, x, kernel, axes), PRODUCT)


def _using(product: Callable[..., jax.Array], axes: Sequence[str | None]) -> Callable[..., jax.Array]:
    """Returns `product(x, kernel, ...)` as Flax's layers call it, of a kernel that is gathered first."""

    def gathering(x, kernel, *arguments, **options):
        return _product(lambda x, kernel: product(x, kernel, *arguments, **options), x, kernel, axes)

    return gathering


def _heads_product(x: jax.Array, kernel: jax.Array, axes: Sequence[str | None], contracted: int) -> jax.Array:
    """Returns the product of x's last axis with a kernel of heads, as a matrix from its first `contracted` axes.

    Left with heads as axes of their own, a TPU's compiler computes them one by one, and a head is a quarter as wide as
    the matrix unit.
    """
    matrix = kernel.reshape(math.prod(kernel.shape[:contracted]), -1)
    return _product(jnp.dot, x, matrix, [name if name == "embed" else None for name in (axes[0], axes[-1])])


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
        bias_init=_boxed(nn.initializers.zeros, ("mlp",) if role == "up" else (None,)),
        dot_general=_using(jax.lax.dot_general, axes),
        name=name,
    )


class SplitHeads(nn.Module):
    """A linear layer on the last axis whose output is [..., count, heads, head_dim]: queries, keys, values."""

    count: int
    heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b c h k"]:
        """Returns the product; heads are split from it last, after the bias, so that it stays one matrix until then."""
        shape = (self.count, self.heads, self.head_dim)
        axes = ("embed", None, "heads", "kv")
        kernel = self.param("kernel", _boxed(_merged_init(1.0, 1), axes), (x.shape[-1], *shape))
        bias = self.param("bias", _boxed(nn.initializers.zeros, (None, "heads", "kv")), shape)
        x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if sharding.split("heads", self.heads) > 1:  # what lies in pieces cannot be merged
            return _product(lambda x, kernel: jnp.tensordot(x, kernel, 1), x, kernel, axes) + bias
        y = _heads_product(x, kernel, axes, 1) + bias.reshape(-1)
        return y.reshape(*x.shape[:-1], *shape)


class JoinHeads(nn.Module):
    """A linear layer from the last two axes, heads and their dimensions, to one of `width`; `scale` as in `dense`."""

    width: int
    scale: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b h k"]) -> Float[Array, "*b d"]:
        """Returns the product."""
        axes = ("heads", "kv", "embed")
        kernel = self.param("kernel", _boxed(_merged_init(self.scale, 2), axes), (*x.shape[-2:], self.width))
        bias = self.param("bias", _boxed(nn.initializers.zeros, (None,)), (self.width,))
        x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if sharding.split("heads", x.shape[-2]) > 1:
            return _product(lambda x, kernel: jnp.tensordot(x, kernel, 2), x, kernel, axes) + bias
        return _heads_product(x.reshape(*x.shape[:-2], -1), kernel, axes, 2) + bias


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
    axes = (None, None, "conv_in", "conv_out")
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=_boxed(_kernel_init(scale), axes),
        bias_init=_boxed(nn.initializers.zeros, (None,)),
        conv_general_dilated=_using(jax.lax.conv_general_dilated, axes),
        name=name,
    )


def embedding(rows: int, width: int, *, dtype: DTypeLike = jnp.float32, name: str | None = None) -> nn.Embed:
    """A table of `rows` learned vectors, normal with standard deviation 0.02 (Radford et al., 2021)."""
    axes = ("vocab", "embed")

    def gathered(*tables: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
        return [sharding.whole(table, axes) for table in dtypes.promote_dtype(*tables, dtype=dtype, inexact=inexact)]

    init = _boxed(nn.initializers.normal(0.02), axes)
    return nn.Embed(rows, width, dtype=dtype, embedding_init=init, promote_dtype=gathered, name=name)


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
    axes = (None,) * (len(shape) - 1) + (axis if len(shape) > 1 else None,)
    return sharding.whole(module.param(name, _boxed(init, axes), shape), axes)


def layer_norm(*, dtype: DTypeLike = jnp.float32, epsilon: float = 1e-5, name: str | None = None) -> nn.LayerNorm:
    """Layer norm over the last axis; statistics in float32 whatever `dtype` is."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        scale_init=_boxed(nn.initializers.ones, (None,)),
        bias_init=_boxed(nn.initializers.zeros, (None,)),
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
        scale = self.param("scale", _boxed(nn.initializers.ones, (None,)), (channels,))
        bias = self.param("bias", _boxed(nn.initializers.zeros, (None,)), (channels,))
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


_POLICIES = jax.checkpoint_policies
# What the backward pass finds of a block, and what it computes again.
REMAT: dict[str, Any] = {
    "none": None,  # keeps all
    # Keeps results of matrix products, convolutions and attention; norms and activations are computed again.
    "products": _POLICIES.save_only_these_names(PRODUCT, ATTENTION),
    "full": _POLICIES.nothing_saveable,  # keeps the block's input
}


def rematerialised(
    block: type[nn.Module], policy: str, *, static_argnums: tuple[int, ...] = (), prevent_cse: bool = True
) -> type[nn.Module]:
    """Returns the class `block`, of which the backward pass keeps what `policy`, a key of REMAT, says.

    Raises:
      InputError: there is no such policy.
    """
    if policy not in REMAT:
        raise InputError(f"remat={policy!r} is no way to save memory; {nearest(policy, REMAT)}")
    if policy == "none":
        return block
    return nn.remat(block, policy=REMAT[policy], static_argnums=static_argnums, prevent_cse=prevent_cse)
