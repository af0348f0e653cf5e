"""The unCLIP decoder: GLIDE's U-Net and text encoder, conditioned on a CLIP image embedding too (section 2.1).

The embedding enters twice: projected and added to the timestep's, and as extra tokens behind the text's. Either part
can be left out by config, which gives the paper's ablations: without the embedding this is GLIDE. Captions may also
come as a CLIP's text tower has read them, in place of a text encoder of its own: this is Karlo's decoder.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.errors import InputError
from unclip_jax.models import layers
from unclip_jax.models.captions import EncodedCaption
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.unet import UNet


class Conditioning(NamedTuple):
    """All that the U-Net reads of a caption and an embedding: the same at every timestep, so computed once.

    Attributes:
      emb: [b, 4 * channels], added to the timestep's embedding; None without any condition.
      context: [b, m, width], read by the attention blocks; None likewise.
      seen: True for the vectors of the context that may be looked at; None for all.
    """

    emb: Float[Array, "b e"] | None
    context: Float[Array, "b m d"] | None
    seen: Bool[Array, "b m"] | None = None


class Decoder(nn.Module):
    """A U-Net conditioned on a caption, on a CLIP embedding, or on both.

    Attributes:
      unet: fields of the UNet.
      text: fields of the TextEncoder, or None for a decoder that reads no caption.
      embed_dim: length of CLIP embeddings; 0 for a decoder that reads none (GLIDE).
      clip_tokens: how many context tokens are made of the embedding (4 in the paper).
      null_clip: what stands for a dropped embedding: "zeros" (figure 8) or "learned", the two that section 2.1 names.
      caption: "tokens" for a decoder that reads token ids, if it reads captions at all; "clip" for the hidden states of
        a CLIP's text tower, projected and normed, with z_t in the place of the last position. What stands after a
        caption's end is hidden then, and to drop a caption, CLIP's encoding of the empty one is handed over. `text` is
        None with it.
      context_width: width of the context with "clip"; 0 for that of the timestep's embedding.
      clip_scale: multiplies embeddings on entry, a dropped one's zeros and learned vector excepted. The paper says
        nothing of it (1); sqrt(embed_dim) gives unit-norm embeddings coordinates of variance 1.
      dtype: compute dtype.
    """

    unet: Mapping[str, Any]
    text: Mapping[str, Any] | None
    embed_dim: int
    clip_tokens: int = 4
    null_clip: str = "zeros"
    clip_scale: float = 1.0
    caption: str = "tokens"
    context_width: int = 0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.caption not in ("tokens", "clip"):
            raise InputError(f"the decoder's caption is {self.caption!r}; it must be 'tokens' or 'clip'")
        if self.caption == "clip" and self.text is not None:
            raise InputError("a decoder with caption='clip' has no text encoder; its text must be None")
        if self.null_clip not in ("zeros", "learned"):
            raise InputError(f"null_clip is {self.null_clip!r}; it must be 'zeros' or 'learned'")

    def setup(self) -> None:
        self.network = UNet(**{**self.unet, "dtype": self.dtype})
        width = 4 * self.network.channels
        if self.text is not None or self.caption == "clip":
            self.text_emb = layers.dense(4 * self.network.channels, role="mix", dtype=self.dtype)
        if self.text is not None:
            self.text_encoder = TextEncoder(**{**self.text, "dtype": self.dtype})
            width = self.text_encoder.width
        elif self.caption == "clip":
            width = self.context_width or width
            self.states = layers.dense(width, role="mix", dtype=self.dtype)
            self.states_norm = layers.layer_norm(dtype=self.dtype)
        if self.embed_dim:
            self.clip_emb = layers.dense(4 * self.network.channels, role="mix", dtype=self.dtype)
            if self.clip_tokens:
                self.clip_context = layers.dense(self.clip_tokens * width, role="mix", dtype=self.dtype)
            if self.null_clip == "learned":
                self.null_embedding = layers.learned(self, "null_embedding", (self.embed_dim,))

    def _read_caption(
        self, caption: Int[Array, "b n"] | EncodedCaption | None, drop: jax.Array | None, z_t: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """One vector of the whole caption, one of each position, and which of these may be looked at."""
        if self.caption == "clip":
            if not isinstance(caption, EncodedCaption) or z_t is None:
                raise InputError("this decoder (caption='clip') reads a caption as CLIP's states, and its z_t")
            if drop is not None:
                raise InputError("a decoder on CLIP's states drops no text by itself: give it the empty caption's")
            return z_t, self.states_norm(self.states(caption.states)), caption.seen
        if caption is None or isinstance(caption, EncodedCaption):
            raise InputError("this decoder has a text encoder and needs tokens; for no caption use drop_text")
        encoded = self.text_encoder(caption, drop)
        # GLIDE reads the last position, a padding slot that has attended to the whole caption.
        return encoded[:, -1], encoded, None

    def condition(
        self,
        caption: Int[Array, "b n"] | EncodedCaption | None,
        z_i: Float[Array, "b d"] | None,
        drop_text: Bool[Array, "b"] | None = None,
        drop_clip: Bool[Array, "b"] | None = None,
        z_t: Float[Array, "b d"] | None = None,
    ) -> Conditioning:
        """Computes the part of the conditioning that no timestep changes.

        Args:
          caption: tokens, [start] words [end] 0 0 ..., read iff there is a text encoder; or CLIP's states.
          z_i: CLIP embeddings of unit norm (of images; of texts in the paper's ablation); read iff embed_dim is set.
          drop_text: where True the empty caption is read in the caption's place.
          drop_clip: where True the null embedding is read in the embedding's place.
          z_t: CLIP embeddings of the captions, as the network is to read them; with CLIP's states only.
        """
        embs: list[jax.Array] = []
        contexts: list[jax.Array] = []
        seen = None
        if self.text is not None or self.caption == "clip":
            whole, positions, seen = self._read_caption(caption, drop_text, z_t)
            embs.append(self.text_emb(whole))
            contexts.append(positions)
        if self.embed_dim:
            if z_i is None or z_i.shape[-1] != self.embed_dim:
                found = "none" if z_i is None else f"one of {z_i.shape[-1]}"
                raise InputError(f"this decoder needs a CLIP embedding of {self.embed_dim} numbers, not {found}")
            z_i = z_i * self.clip_scale
            if drop_clip is not None:
                null = self.null_embedding if self.null_clip == "learned" else jnp.zeros((), z_i.dtype)
                z_i = jnp.where(drop_clip[:, None], null, z_i)
            embs.append(self.clip_emb(z_i))
            if self.clip_tokens:
                contexts.append(self.clip_context(z_i).reshape(z_i.shape[0], self.clip_tokens, -1))
        emb = sum((part.astype(jnp.float32) for part in embs), start=jnp.zeros((), jnp.float32))
        context = jnp.concatenate(contexts, 1) if contexts else None
        if seen is not None and context is not None:
            seen = jnp.pad(seen, ((0, 0), (0, context.shape[1] - seen.shape[1])), constant_values=True)
        return Conditioning(emb if embs else None, context, seen)

    def denoise(
        self,
        x_t: Float[Array, "b h w c"],
        t: Int[Array, "b"],
        conditioning: Conditioning,
        deterministic: bool = True,
    ) -> Float[Array, "b h w o"]:
        """Applies the U-Net: float32 predictions [b, h, w, 2c] for images `x_t` at timesteps `t`."""
        return self.network(x_t, t, conditioning.emb, conditioning.context, deterministic, conditioning.seen)

    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Int[Array, "b"],
        caption: Int[Array, "b n"] | EncodedCaption | None,
        z_i: Float[Array, "b d"] | None,
        drop_text: Bool[Array, "b"] | None = None,
        drop_clip: Bool[Array, "b"] | None = None,
        deterministic: bool = True,
        z_t: Float[Array, "b d"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """`denoise` under `condition`: what training calls."""
        return self.denoise(x_t, t, self.condition(caption, z_i, drop_text, drop_clip, z_t), deterministic)
