"""The diffusion prior: a causal transformer that denoises CLIP image embeddings (Ramesh et al., 2022, section 2.2).

The paper's is 24 blocks of width 2048 with 32 heads over 256 caption tokens, 1.33B parameters (table 3).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from unclip_jax.arrays import Embeddings, Timesteps, Tokens
from unclip_jax.errors import InputError
from unclip_jax.models.layers import (
    Cache,
    Transformer,
    causal_mask,
    dense,
    embedding,
    empty_cache,
    empty_caption,
    layer_norm,
    learned,
    timestep_embedding,
    valid_tokens,
)

_NOISY = 3  # timestep, noised z_i, query: the tokens after the prefix


class DiffusionPrior(nn.Module):
    """Predicts z_i from its noised self, the timestep, the caption and z_t.

    One causal stack reads [caption tokens, z_t, timestep, noised z_i, query]; the prediction is read from the
    query. The prefix (caption and z_t) therefore never sees the timestep or the noise, and sampling computes it
    once: `prefix`, then `denoise` at every step.

    Positions after the caption's end hold one learned padding embedding. Dropping the condition (10% in the
    paper) reads the empty caption, and a learned embedding in the place of z_t's projection; the noised z_i is
    never dropped.

    Attributes:
      embed_dim: dimensions of z_i and z_t.
      context_length: caption tokens.
      vocab_size: token ids; the last one ends a caption.
      width, depth, heads: of the stack.
      activation, remat, dtype: see `layers.Transformer`.
    """

    embed_dim: int
    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    activation: str = "gelu"
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        if self.width % self.heads:
            raise InputError(f"the prior's width {self.width} does not divide into {self.heads} heads")
        self.tokens = embedding(self.vocab_size, self.width, dtype=self.dtype)
        self.padding = learned(self, "padding", (self.width,))
        self.text_embedding = dense(self.width, role="mix", dtype=self.dtype)
        self.null_text_embedding = learned(self, "null_text_embedding", (self.width,))
        self.time_1 = dense(self.width, role="up", dtype=self.dtype)
        self.time_2 = dense(self.width, role="down", dtype=self.dtype)
        self.image_embedding = dense(self.width, role="mix", dtype=self.dtype)
        self.query = learned(self, "query", (self.width,))
        self.positions = learned(self, "positions", (self.context_length + 1 + _NOISY, self.width))
        self.stack = Transformer(self.depth, self.heads, self.activation, remat=self.remat, dtype=self.dtype)
        self.norm = layer_norm(dtype=self.dtype)
        self.readout = dense(self.embed_dim, role="mix", dtype=self.dtype)

    def _prefix_tokens(self, tokens: Tokens, z_t: Embeddings, drop: Bool[Array, "b"] | None) -> Float[Array, "b m w"]:
        if tokens.shape[1] != self.context_length:
            raise InputError(f"the prior reads captions of {self.context_length} tokens, not {tokens.shape[1]}")
        z = self.text_embedding(z_t)
        if drop is not None:
            tokens = jnp.where(drop[:, None], empty_caption(self.context_length, self.vocab_size), tokens)
            z = jnp.where(drop[:, None], self.null_text_embedding.astype(z.dtype), z)
        caption = self.tokens(tokens)
        valid = valid_tokens(tokens, eot=self.vocab_size - 1)
        caption = jnp.where(valid[..., None], caption, self.padding.astype(caption.dtype))
        x = jnp.concatenate([caption, z[:, None]], 1)
        return x + self.positions[:-_NOISY].astype(x.dtype)

    def _noisy_tokens(self, x_t: Embeddings, t: Timesteps) -> Float[Array, "b 3 w"]:
        time = self.time_2(nn.silu(self.time_1(timestep_embedding(t, self.width))))
        image = self.image_embedding(x_t)
        query = jnp.broadcast_to(self.query.astype(image.dtype), image.shape)
        x = jnp.stack([time, image, query], 1)
        return x + self.positions[-_NOISY:].astype(x.dtype)

    def _read(self, x: Float[Array, "b n w"]) -> Embeddings:
        return self.readout(self.norm(x[:, -1])).astype(jnp.float32)

    def __call__(
        self,
        x_t: Embeddings,
        t: Timesteps,
        tokens: Tokens,
        z_t: Embeddings,
        drop: Bool[Array, "b"] | None = None,
    ) -> Embeddings:
        """Predicts x_start.

        Args:
          x_t: noised image embeddings, in the units that the diffusion works in.
          t: original timesteps, fed raw.
          tokens: captions, [b, context_length].
          z_t: CLIP text embeddings.
          drop: where the caption and z_t are hidden; None hides none.

        Returns:
          x_start, float32, in the units of x_t.

        Raises:
          InputError: if captions have another length.
        """
        x = jnp.concatenate([self._prefix_tokens(tokens, z_t, drop), self._noisy_tokens(x_t, t)], 1)
        x, _ = self.stack(x, mask=causal_mask(x.shape[1]))
        return self._read(x)

    def prefix(self, tokens: Tokens, z_t: Embeddings, drop: Bool[Array, "b"] | None = None) -> Cache:
        """Reads the caption and z_t once for a whole sampling run; arguments as in `__call__`."""
        x = self._prefix_tokens(tokens, z_t, drop)
        cache = empty_cache(
            depth=self.depth,
            batch=x.shape[0],
            length=x.shape[1] + _NOISY,
            heads=self.heads,
            head_dim=self.width // self.heads,
            dtype=self.dtype,
        )
        _, cache = self.stack(x, cache=cache)
        return cache

    def denoise(self, cache: Cache, x_t: Embeddings, t: Timesteps) -> Embeddings:
        """Predicts x_start as `__call__` does, from a prefix already read: three tokens instead of all."""
        x, _ = self.stack(self._noisy_tokens(x_t, t), cache=cache)
        return self._read(x)
