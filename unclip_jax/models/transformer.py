"""Transformers: attention with a cache, MLPs, and stacks of equal blocks that are compiled once."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unclip_jax import sharding
from unclip_jax.models.attention import attend, attend_packed
from unclip_jax.models.layers import (
    ACTIVATIONS,
    ATTENTION,
    JoinHeads,
    SplitHeads,
    dense,
    layer_norm,
    learned,
    rematerialised,
)


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
      causal: whether a token sees only those of `x` up to itself; with a cache it does so anyway.
    """

    heads: int
    context_kv: str = "own"
    dtype: DTypeLike = jnp.float32
    out_scale: float = 1.0
    causal: bool = False

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

        def project(count, name):
            return SplitHeads(count, self.heads, head_dim, self.dtype, name=name)

        out = JoinHeads(width, self.out_scale, self.dtype, name="out")
        own = project(3, "qkv")
        qkv = own(x)
        context_kv = None
        if context is not None and self.context_kv == "own":
            context_kv = project(2, "context_kv")(context)
        elif context is not None:
            context_kv = own(context.astype(self.dtype))[..., 1:, :, :]
        length = 0 if context is None else context.shape[1]
        if cache is None:
            if mask is not None and mask.shape[-1] != length + x.shape[1]:
                mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (length, 0)), constant_values=True)
            y = checkpoint_name(attend_packed(qkv, context_kv, mask, causal=self.causal), ATTENTION)
            return out(y), None
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), cache.filled, 1)
        v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), cache.filled, 1)
        past = jnp.arange(k.shape[1])[None] <= cache.filled + jnp.arange(x.shape[1])[:, None]
        mask = past[None, None] if mask is None else past & mask
        cache = Cache(k, v, cache.filled + x.shape[1])
        if context_kv is not None:
            k = jnp.concatenate([context_kv[..., 0, :, :], k], 1)
            v = jnp.concatenate([context_kv[..., 1, :, :], v], 1)
            if mask.shape[-1] != k.shape[1]:
                mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (length, 0)), constant_values=True)
        return out(attend(q, k, v, mask)), cache


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
    causal: bool = False

    @nn.compact
    def __call__(self, x, cache, context, mask):
        x = sharding.laid(x)
        attention = Attention(
            self.heads, self.context_kv, self.dtype, self.out_scale, self.causal, name="attention"
        )
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
      remat: what the backward pass computes again of each block, a key of `layers.REMAT`.
      dtype: compute dtype.
      mlp_ratio: hidden width of the MLPs over the width.
      epsilon: of the layer norms.
      layer_scale: what learned factors of each branch's channels begin at (Touvron et al., 2021, "Going deeper with
        image transformers"); 0 for none.
      causal: see Attention.
    """

    depth: int
    heads: int
    activation: str = "gelu"
    context_kv: str = "own"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    layer_scale: float = 0.0
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m e"] | None = None,
        mask: Bool[Array, "#b 1 #n s"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        """Returns the residual stream after the last block (no final norm), and the cache with the new tokens."""
        block = rematerialised(Block, self.remat, prevent_cse=False)
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
            self.causal,
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
