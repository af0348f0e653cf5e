"""The diffusion prior: a causal transformer that denoises CLIP image embeddings (Ramesh et al., 2022, section 2.2).

The paper's is 24 blocks of width 2048 with 32 heads over 256 caption tokens, 1.33B parameters (table 3).
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from unclip_jax.arrays import Embeddings, Timesteps, Tokens
from unclip_jax.errors import InputError
from unclip_jax.models.captions import EncodedCaption, empty_caption, valid_tokens
from unclip_jax.models.layers import dense, embedding, layer_norm, learned, timestep_embedding
from unclip_jax.models.transformer import Cache, Transformer, empty_cache

_NOISY = 3  # timestep, noised z_i, query: the tokens after the prefix


class Prefix(NamedTuple):
    """What every step of a sampling run reads of the caption and z_t; batch first, for guidance joins batches there.

    Attributes:
      k, v: their keys and values in every block, with room for the tokens of a step.
      seen: True for the positions that those tokens may look at.
    """

    k: Float[Array, "b layers s h k"]
    v: Float[Array, "b layers s h k"]
    seen: Bool[Array, "b s"]


class DiffusionPrior(nn.Module):
    """Predicts z_i from its noised self, the timestep, the caption and z_t.

    One causal stack reads [caption tokens, z_t, timestep, noised z_i, query]; the prediction is read from the
    query. The prefix (caption and z_t) therefore never sees the timestep or the noise, and sampling computes it
    once: `prefix`, then `denoise` at every step.

    Captions come in one of two ways. "tokens": as ids, embedded here, with one learned embedding in the positions
    after the end. Dropping the condition (10% in the paper) then reads the empty caption, and a learned embedding in
    the place of z_t's projection; the noised z_i is never dropped. "clip": as the hidden states of a CLIP's text
    tower, projected, whose positions after the end are hidden. This is Karlo's prior, which knows no null: to drop a
    caption, hand over CLIP's encoding of the empty one, and its z_t.

    Attributes:
      embed_dim: dimensions of z_i and z_t.
      context_length: caption tokens.
      vocab_size: token ids; the last one ends a caption. "clip" ignores it.
      width, depth, heads: of the stack.
      caption: "tokens" or "clip".
      activation, remat, dtype: see `transformer.Transformer`.
    """

    embed_dim: int
    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    caption: str = "tokens"
    activation: str = "gelu"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self):
        if self.width % self.heads:
            raise InputError(f"the prior's width {self.width} does not divide into {self.heads} heads")
        if self.caption == "tokens":
            self.tokens = embedding(self.vocab_size, self.width, dtype=self.dtype)
            self.padding = learned(self, "padding", (self.width,))
            self.null_text_embedding = learned(self, "null_text_embedding", (self.width,))
        elif self.caption == "clip":
            self.states = dense(self.width, role="mix", dtype=self.dtype)
        else:
            raise InputError(f"the prior's caption is {self.caption!r}; it must be 'tokens' or 'clip'")
        self.text_embedding = dense(self.width, role="mix", dtype=self.dtype)
        self.time_1 = dense(self.width, role="up", dtype=self.dtype)
        self.time_2 = dense(self.width, role="down", dtype=self.dtype)
        self.image_embedding = dense(self.width, role="mix", dtype=self.dtype)
        self.query = learned(self, "query", (self.width,))
        self.positions = learned(self, "positions", (self.context_length + 1 + _NOISY, self.width))
        self.stack = Transformer(
            self.depth, self.heads, self.activation, remat=self.remat, dtype=self.dtype, causal=True
        )
        self.norm = layer_norm(dtype=self.dtype)
        self.readout = dense(self.embed_dim, role="mix", dtype=self.dtype)

    def _read_caption(
        self, caption: Tokens | EncodedCaption, drop: Bool[Array, "b"] | None
    ) -> tuple[Float[Array, "b n w"], Bool[Array, "b n"]]:
        """The caption's part of the prefix, and which of its positions may be looked at."""
        if isinstance(caption, EncodedCaption) != (self.caption == "clip"):
            wanted = "CLIP's states" if self.caption == "clip" else "token ids"
            raise InputError(f"this prior (caption={self.caption!r}) reads {wanted}")
        tokens = caption.states if isinstance(caption, EncodedCaption) else caption
        if tokens.shape[1] != self.context_length:
            raise InputError(f"the prior reads captions of {self.context_length} tokens, not {tokens.shape[1]}")
        if isinstance(caption, EncodedCaption):
            if drop is not None:
                raise InputError("a prior on CLIP's states drops nothing by itself: give it the empty caption's states")
            return self.states(caption.states), caption.seen
        if drop is not None:
            tokens = jnp.where(drop[:, None], empty_caption(self.context_length, self.vocab_size), tokens)
        embedded = self.tokens(tokens)
        valid = valid_tokens(tokens, eot=self.vocab_size - 1)
        return jnp.where(valid[..., None], embedded, self.padding.astype(embedded.dtype)), jnp.ones_like(valid)

    def _prefix_tokens(
        self, caption: Tokens | EncodedCaption, z_t: Embeddings, drop: Bool[Array, "b"] | None
    ) -> tuple[Float[Array, "b m w"], Bool[Array, "b s"]]:
        """The tokens of caption and z_t, and which positions of the whole sequence may be looked at."""
        words, seen = self._read_caption(caption, drop)
        z = self.text_embedding(z_t)
        if drop is not None:
            z = jnp.where(drop[:, None], self.null_text_embedding.astype(z.dtype), z)
        x = jnp.concatenate([words, z[:, None]], 1) + self.positions[:-_NOISY].astype(z.dtype)
        return x, jnp.pad(seen, ((0, 0), (0, 1 + _NOISY)), constant_values=True)

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
        caption: Tokens | EncodedCaption,
        z_t: Embeddings,
        drop: Bool[Array, "b"] | None = None,
    ) -> Embeddings:
        """Predicts x_start.

        Args:
          x_t: noised image embeddings, in the units that the diffusion works in.
          t: original timesteps, fed raw.
          caption: token ids [b, context_length], or CLIP's states of as many positions.
          z_t: CLIP text embeddings.
          drop: where the caption and z_t are hidden; None hides none.

        Returns:
          x_start, float32, in the units of x_t.

        Raises:
          InputError: if captions have another length, or come in the other way.
        """
        x, seen = self._prefix_tokens(caption, z_t, drop)
        x = jnp.concatenate([x, self._noisy_tokens(x_t, t)], 1)
        x, _ = self.stack(x, mask=seen[:, None, None])
        return self._read(x)

    def prefix(
        self, caption: Tokens | EncodedCaption, z_t: Embeddings, drop: Bool[Array, "b"] | None = None
    ) -> Prefix:
        """Reads the caption and z_t once for a whole sampling run; arguments as in `__call__`."""
        x, seen = self._prefix_tokens(caption, z_t, drop)
        cache = empty_cache(
            depth=self.depth,
            batch=x.shape[0],
            length=seen.shape[1],
            heads=self.heads,
            head_dim=self.width // self.heads,
            dtype=self.dtype,
        )
        _, cache = self.stack(x, mask=seen[:, None, None], cache=cache)
        return Prefix(jnp.moveaxis(cache.k, 1, 0), jnp.moveaxis(cache.v, 1, 0), seen)

    def denoise(self, prefix: Prefix, x_t: Embeddings, t: Timesteps) -> Embeddings:
        """Predicts x_start as `__call__` does, from a prefix already read: three tokens instead of all."""
        filled = jnp.asarray(prefix.seen.shape[1] - _NOISY, jnp.int32)
        cache = Cache(jnp.moveaxis(prefix.k, 0, 1), jnp.moveaxis(prefix.v, 0, 1), filled)
        x, _ = self.stack(self._noisy_tokens(x_t, t), mask=prefix.seen[:, None, None], cache=cache)
        return self._read(x)
