"""Captions as networks read them: token ids with an end, or what a CLIP made of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class EncodedCaption(NamedTuple):
    """CLIP's reading of captions, where a network has no text encoder of its own.

    Attributes:
      states: the text tower's last hidden states, after its final norm.
      seen: True for the positions that may be looked at, those of the caption from its start to its end token.
    """

    states: Float[Array, "b n w"]
    seen: Bool[Array, "b n"]


def valid_tokens(tokens: Int[Array, "b n"], *, eot: int, bare: bool = False) -> Bool[Array, "b n"]:
    """True for a caption's positions up to and including its first end token; before that, if captions are `bare`."""
    ended = jnp.cumsum(tokens == eot, axis=-1)
    return ended - (0 if bare else tokens == eot) == 0


def empty_caption(length: int, vocab_size: int, *, bare: bool = False) -> Int[Array, "{length}"]:
    """The tokens of an empty caption: the start and the end token (the table's last two), then zeros.

    A `bare` one, without either, is end tokens all through, which then are padding.
    """
    if bare:
        return jnp.full((length,), vocab_size - 1, jnp.int32)
    return jnp.zeros((length,), jnp.int32).at[:2].set(jnp.array([vocab_size - 2, vocab_size - 1], jnp.int32))
