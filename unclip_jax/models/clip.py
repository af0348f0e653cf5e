"""CLIP (Radford et al., 2021): a vision transformer and a causal text transformer into one space.

unCLIP's own is ViT-H/16 at 256 px, width 1280, 32 blocks, and a text tower of width 1024, 24 blocks
(Ramesh et al., 2022, appendix C): 632.3M and 354.0M parameters.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from unclip_jax.arrays import Embeddings, Images, Tokens
from unclip_jax.errors import InputError
from unclip_jax.models.layers import (
    GroupNorm,
    Transformer,
    causal_mask,
    conv,
    dense,
    embedding,
    layer_norm,
    learned,
)

# Mean and standard deviation of RGB in [0, 1] by which OpenAI's CLIP normalises images.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _check_heads(tower: str, width: int, heads: int) -> None:
    if width % heads:
        raise InputError(f"CLIP's {tower}_width {width} does not divide into {tower}_heads {heads}")


class VisionTransformer(nn.Module):
    """The image tower: patches, a class token, learned positions, pre-norm blocks, a bias-free projection.

    Attributes:
      image_size, patch_size: pixels; the patch must divide the image.
      width, depth, heads: of the transformer.
      embed_dim: dimensions of the shared space.
      activation: "gelu", or "quick_gelu" for OpenAI's weights.
      stem: channels of 3x3 convolutions of stride 2 that come before the patches are embedded, none in the paper. A
        small tower learns shapes from few examples with them, hardly without (Xiao et al., 2021, "Early convolutions
        help transformers see better"). Each halves the image, and `patch_size` must be 2 to their number.
      mean, std: RGB statistics in [0, 1] that images are normalised by.
      remat, dtype: see `layers.Transformer`.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    embed_dim: int
    activation: str = "gelu"
    stem: Sequence[int] = ()
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Embeddings:
        """Embeds images in [-1, 1] of `image_size`; float32, not normalised."""
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise InputError(f"CLIP wants images of {self.image_size}x{self.image_size}x3, not {images.shape[1:]}")
        if self.image_size % self.patch_size:
            raise InputError(f"CLIP's patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.stem and self.patch_size != 2 ** len(self.stem):
            raise InputError(
                f"CLIP's vision_stem {tuple(self.stem)} makes patches of {2 ** len(self.stem)} pixels; patch_size is "
                f"{self.patch_size}"
            )
        _check_heads("vision", self.width, self.heads)
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        pixels = ((images.astype(jnp.float32) + 1.0) / 2.0 - mean) / std
        for number, channels in enumerate(self.stem):
            pixels = conv(channels, stride=2, dtype=self.dtype, name=f"stem_{number}")(pixels)
            pixels = nn.gelu(GroupNorm(dtype=self.dtype, name=f"stem_norm_{number}")(pixels))
        side = self.patch_size // 2 ** len(self.stem)
        patches = conv(
            self.width, side, stride=side, padding="VALID", use_bias=False, dtype=self.dtype, name="patches"
        )(pixels)
        batch = images.shape[0]
        x = patches.reshape(batch, -1, self.width)
        # Class token and positions start at the scale of the patch features (Radford et al.'s width**-0.5).
        stddev = self.width**-0.5
        cls = learned(self, "class", (self.width,), stddev=stddev).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, self.width)), x], 1)
        x = x + learned(self, "positions", (x.shape[1], self.width), stddev=stddev).astype(x.dtype)
        x = layer_norm(dtype=self.dtype, name="ln_pre")(x)
        stack = Transformer(self.depth, self.heads, self.activation, remat=self.remat, dtype=self.dtype, name="stack")
        x, _ = stack(x)
        pooled = layer_norm(dtype=self.dtype, name="ln_post")(x[:, 0])
        projection = dense(self.embed_dim, role="mix", use_bias=False, dtype=self.dtype, name="projection")
        return projection(pooled).astype(jnp.float32)


class TextTransformer(nn.Module):
    """The text tower: causal, read at the first end token (id `vocab_size - 1`), a bias-free projection.

    A caption without an end token is read at position 0, so the tokenizer must always write one. What follows
    the end token changes nothing. Attributes as in VisionTransformer.
    """

    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    embed_dim: int
    activation: str = "gelu"
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens) -> Embeddings:
        """Embeds at most `context_length` token ids per caption; float32, not normalised."""
        length = tokens.shape[1]
        if length > self.context_length:
            raise InputError(f"CLIP's text tower reads {self.context_length} tokens, not {length}")
        _check_heads("text", self.width, self.heads)
        x = embedding(self.vocab_size, self.width, dtype=self.dtype, name="tokens")(tokens)
        positions = learned(self, "positions", (self.context_length, self.width), stddev=0.01)
        x = x + positions[:length].astype(x.dtype)
        stack = Transformer(self.depth, self.heads, self.activation, remat=self.remat, dtype=self.dtype, name="stack")
        x, _ = stack(x, mask=causal_mask(length))
        end = jnp.argmax(tokens == self.vocab_size - 1, axis=1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        pooled = layer_norm(dtype=self.dtype, name="ln_final")(pooled)
        projection = dense(self.embed_dim, role="mix", use_bias=False, dtype=self.dtype, name="projection")
        return projection(pooled).astype(jnp.float32)


class CLIP(nn.Module):
    """Both towers, and the learned temperature of the contrastive loss, kept as the log of the logit scale.

    Attributes: as in the towers; `vision_*` and `text_*` are each tower's own.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_depth: int
    vision_heads: int
    context_length: int
    vocab_size: int
    text_width: int
    text_depth: int
    text_heads: int
    embed_dim: int
    activation: str = "gelu"
    vision_stem: Sequence[int] = ()
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.vision = VisionTransformer(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.vision_width,
            depth=self.vision_depth,
            heads=self.vision_heads,
            embed_dim=self.embed_dim,
            activation=self.activation,
            stem=self.vision_stem,
            mean=self.mean,
            std=self.std,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.text = TextTransformer(
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            width=self.text_width,
            depth=self.text_depth,
            heads=self.text_heads,
            embed_dim=self.embed_dim,
            activation=self.activation,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def encode_image(self, images: Images) -> Embeddings:
        """Embeds images in [-1, 1]; float32 [b, embed_dim], not normalised."""
        return self.vision(images)

    def encode_text(self, tokens: Tokens) -> Embeddings:
        """Embeds captions; float32 [b, embed_dim], not normalised."""
        return self.text(tokens)

    def __call__(self, images: Images, tokens: Tokens) -> tuple[Embeddings, Embeddings, Float[Array, ""]]:
        """Returns image embeddings, text embeddings (neither normalised) and the log of the logit scale.

        Raises:
          InputError: if images or captions do not have the sizes of this CLIP.
        """
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale
