"""The autoregressive prior: z_i as a sentence of quantised principal components (Ramesh et al., 2022, section 2.2).

The paper's has a text encoder of 24 blocks of width 2048 (1.31B parameters) and a decoder of 24 blocks of width
1664 with 26 heads (0.81B), over 319 components of 1,024 buckets each (table 3).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.arrays import Embeddings, Tokens
from unclip_jax.errors import InputError
from unclip_jax.models.layers import dense, embedding, layer_norm, learned
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.transformer import Cache, Transformer, empty_cache

# What cached decoding carries: keys and values of the caption, then of the tokens already read.
ARPrefix = Cache
_FIRST = 2  # the dot-product token and z_t stand before the codes


class ARPrior(nn.Module):
    """Predicts the codes of z_i (see `quantizer`) one after another, from the caption, z_t and their likeness.

    A text encoder reads the caption; its outputs, projected to the decoder's width, stand in front of the keys
    and values of every decoder block (through the block's own weights: with weights apart for the caption the
    decoder would be a fifth larger than the paper's). The causal decoder reads [quantised z_i.z_t, z_t, code 0,
    ..., code k-2] and predicts codes 0 to k-1. One table embeds the codes of all components; learned positions
    tell the components apart.

    Dropping the condition (10% in the paper) reads the empty caption, and a learned embedding in the place of
    z_t's projection; the dot-product token stays.

    Attributes:
      embed_dim: dimensions of z_t.
      components: codes per embedding, k.
      buckets, dot_buckets: values of a code, and of the dot-product token.
      context_length, vocab_size, text_width, text_depth, text_heads: of the text encoder.
      width, depth, heads: of the decoder.
      activation, remat, dtype: see `transformer.Transformer`.
    """

    embed_dim: int
    components: int
    buckets: int
    dot_buckets: int
    context_length: int
    vocab_size: int
    text_width: int
    text_depth: int
    text_heads: int
    width: int
    depth: int
    heads: int
    activation: str = "gelu"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self):
        if self.width % self.heads:
            raise InputError(f"the AR prior's width {self.width} does not divide into {self.heads} heads")
        if self.components < 1:
            raise InputError(f"the AR prior needs at least 1 component, not {self.components}")
        self.text_encoder = TextEncoder(
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            width=self.text_width,
            depth=self.text_depth,
            heads=self.text_heads,
            activation=self.activation,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.context = dense(self.width, role="mix", dtype=self.dtype)
        self.dots = embedding(self.dot_buckets, self.width, dtype=self.dtype)
        self.text_embedding = dense(self.width, role="mix", dtype=self.dtype)
        self.null_text_embedding = learned(self, "null_text_embedding", (self.width,))
        self.codes = embedding(self.buckets, self.width, dtype=self.dtype)
        self.positions = learned(self, "positions", (_FIRST + self.components - 1, self.width))
        self.decoder = Transformer(
            self.depth,
            self.heads,
            self.activation,
            context_kv="shared",
            remat=self.remat,
            dtype=self.dtype,
            causal=True,
        )
        self.norm = layer_norm(dtype=self.dtype)
        self.readout = dense(self.buckets, role="up", dtype=self.dtype)

    def _context(self, tokens: Tokens, drop: Bool[Array, "b"] | None) -> Float[Array, "b m w"]:
        return self.context(self.text_encoder(tokens, drop))

    def _first_tokens(self, dot: Int[Array, "b"], z_t: Embeddings, drop: Bool[Array, "b"] | None):
        z = self.text_embedding(z_t)
        if drop is not None:
            z = jnp.where(drop[:, None], self.null_text_embedding.astype(z.dtype), z)
        return jnp.stack([self.dots(dot), z], 1)

    def _logits(self, x: Float[Array, "*b w"]) -> Float[Array, "*b v"]:
        return self.readout(self.norm(x)).astype(jnp.float32)

    def __call__(
        self,
        codes: Int[Array, "b k"],
        dot: Int[Array, "b"],
        tokens: Tokens,
        z_t: Embeddings,
        drop: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b k v"]:
        """Predicts every code from those before it.

        Args:
          codes: [b, components], each in [0, buckets).
          dot: the quantised z_i.z_t, in [0, dot_buckets).
          tokens: captions, [b, context_length].
          z_t: CLIP text embeddings.
          drop: where the caption and z_t are hidden; None hides none.

        Returns:
          Logits [b, components, buckets], float32: those at i are of code i.

        Raises:
          InputError: if codes or captions have another length.
        """
        if codes.shape[1] != self.components:
            raise InputError(f"the AR prior predicts {self.components} codes, not {codes.shape[1]}")
        x = jnp.concatenate([self._first_tokens(dot, z_t, drop), self.codes(codes[:, :-1])], 1)
        x = x + self.positions.astype(x.dtype)
        x, _ = self.decoder(x, context=self._context(tokens, drop))
        return self._logits(x[:, _FIRST - 1 :])

    def prefix(
        self,
        dot: Int[Array, "b"],
        tokens: Tokens,
        z_t: Embeddings,
        drop: Bool[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b v"], ARPrefix]:
        """Reads what stands before the codes; returns the logits of code 0 and the state for `step`."""
        x = self._first_tokens(dot, z_t, drop)
        x = x + self.positions[:_FIRST].astype(x.dtype)
        x, state = self.decoder(x, cache=self._caption_cache(self._context(tokens, drop)))
        return self._logits(x[:, -1]), state

    def step(self, state: ARPrefix, code: Int[Array, "b"], position: Int[Array, ""]) -> tuple[Array, ARPrefix]:
        """Reads code number `position` (from 0); returns the logits of the next code and the new state.

        Shapes do not change from step to step, so `jax.lax.scan` can carry the state:
        k-1 steps after `prefix` give all k codes.
        """
        x = self.codes(code) + self.positions[_FIRST + position].astype(self.dtype)
        x, state = self.decoder(x[:, None], cache=state)
        return self._logits(x[:, 0]), state

    def _caption_cache(self, context: Float[Array, "b m w"]) -> Cache:
        """A cache whose first positions hold the caption's keys and values of every block.

        The caption is the same in every block and at every step, so it is projected once by the stacked weights
        rather than by each step again.
        """
        batch, length = context.shape[:2]
        cache = empty_cache(
            depth=self.depth,
            batch=batch,
            length=length + self.positions.shape[0],
            heads=self.heads,
            head_dim=self.width // self.heads,
            dtype=self.dtype,
        )
        qkv = nn.meta.unbox(self.decoder.variables["params"])["blocks"]["attention"]["qkv"]
        kernel, bias = qkv["kernel"].astype(self.dtype), qkv["bias"].astype(self.dtype)
        keys_values = jnp.einsum("bmw,lwchk->clbmhk", context, kernel[:, :, 1:])
        k, v = keys_values + jnp.moveaxis(bias[:, 1:], 1, 0)[:, :, None, None]
        return Cache(
            cache.k.at[:, :, :length].set(k),
            cache.v.at[:, :, :length].set(v),
            jnp.asarray(length, jnp.int32),
        )
