"""GLIDE's text transformer: reads a caption in both directions, one vector per position (Nichol et al., 2021)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.errors import InputError
from unclip_jax.models import captions, layers, transformer


class TextEncoder(nn.Module):
    """A bidirectional pre-norm transformer over a caption's tokens.

    Positions past the caption's end hold a learned vector of that position and are attended to like any other, so
    the last position, which the decoder adds to the timestep's embedding, has always read the whole caption.

    Attributes:
      context_length: number of tokens, padding included.
      vocab_size: rows of the token table; the last two are the start and the end token.
      width, depth, heads: of the transformer.
      activation: a key of `layers.ACTIVATIONS`.
      bare: whether captions come without start and end token, as GLIDE's published weights read them: words, and then
        the table's last row as padding.
      remat: what the backward pass computes again of each block, a key of `layers.REMAT`.
      dtype: compute dtype.
    """

    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    activation: str = "gelu"
    bare: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise InputError(f"text encoder: width {self.width} does not split into {self.heads} heads")

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b n"], drop: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b n {self.width}"]:
        """Encodes [start] words [end] 0 0 0 ..., or bare words; where `drop`, the empty caption is read instead."""
        if tokens.shape[1] != self.context_length:
            raise InputError(f"the text encoder reads {self.context_length} tokens, not {tokens.shape[1]}")
        if drop is not None:
            empty = captions.empty_caption(self.context_length, self.vocab_size, bare=self.bare)
            tokens = jnp.where(drop[:, None], empty, tokens)
        position = layers.learned(self, "position", (self.context_length, self.width))
        padding = layers.learned(self, "padding", (self.context_length, self.width))
        embedded = layers.embedding(self.vocab_size, self.width, dtype=self.dtype, name="token")(tokens)
        valid = captions.valid_tokens(tokens, eot=self.vocab_size - 1, bare=self.bare)
        x = jnp.where(valid[..., None], embedded + position.astype(self.dtype), padding.astype(self.dtype))
        stack = transformer.Transformer(
            self.depth, self.heads, self.activation, remat=self.remat, dtype=self.dtype, name="transformer"
        )
        return layers.layer_norm(dtype=self.dtype, name="final_norm")(stack(x)[0])
