"""CLIP's two transformers (Radford et al., 2021), with the choices in which published ones differ.

The defaults are OpenAI's but for the activation, which is "quick_gelu" in their weights. OpenCLIP's differ in what is
pooled, in norms and widths; each option below says whose it is.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unclip_jax.arrays import Embeddings, Images, Timesteps, Tokens
from unclip_jax.errors import InputError, nearest
from unclip_jax.models.layers import (
    ACTIVATIONS,
    GroupNorm,
    conv,
    dense,
    embedding,
    layer_norm,
    learned,
    timestep_embedding,
)
from unclip_jax.models.transformer import Transformer, causal_mask

# Mean and standard deviation of RGB in [0, 1] by which OpenAI's CLIP normalises images.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

VISION_POOLS = ("class", "average", "normed_average", "attention")
TEXT_POOLS = ("end", "argmax", "first", "last", "class")
PROJECTIONS = ("linear", "biased", "none")


def check_known(field: str, value: str, known: Sequence[str]) -> None:
    """Refuses a value of one of CLIP's fields that is not among `known`."""
    if value not in known:
        raise InputError(f"CLIP's {field}={value!r} is unknown; {nearest(value, known)}")


def check_heads(field: str, heads: int, width: int) -> None:
    """Refuses a number of heads that does not divide the width that they share."""
    if width % heads:
        fitting = sorted((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - heads))
        near = " or ".join(str(h) for h in fitting[:2])
        raise InputError(f"CLIP's {field} {heads} does not divide the width {width} that they share; {near} would")


def normalized(images: Images, size: int, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Returns images in [-1, 1] with the statistics of RGB in [0, 1] taken out; refuses another size than `size`."""
    if images.shape[1:] != (size, size, 3):
        raise InputError(f"CLIP wants images of {size}x{size}x3, not {images.shape[1:]}")
    return ((images.astype(jnp.float32) + 1.0) / 2.0 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _projected(x: Float[Array, "b k"], kind: str, embed_dim: int, dtype: DTypeLike) -> Embeddings:
    if kind != "none":
        x = dense(embed_dim, role="mix", use_bias=kind == "biased", dtype=dtype, name="projection")(x)
    elif x.shape[-1] != embed_dim:
        raise InputError(f"CLIP's embed_dim is {embed_dim}; a tower without a projection makes it {x.shape[-1]}")
    return x.astype(jnp.float32)


class Reader(nn.Module):
    """Queries read tokens by one attention with projections of its own: `queries` [b, m, e] of `tokens` [b, n, k].

    Attributes:
      heads, width: of the attention.
      features: width of what is returned.
      dtype: compute dtype.
    """

    heads: int
    width: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, queries: Float[Array, "b m e"], tokens: Float[Array, "b n k"]) -> Float[Array, "b m f"]:
        def split(x, name):
            x = dense(self.width, dtype=self.dtype, name=name)(x)
            return x.reshape(*x.shape[:2], self.heads, -1)

        y = jax.nn.dot_product_attention(split(queries, "query"), split(tokens, "key"), split(tokens, "value"))
        return dense(self.features, role="down", dtype=self.dtype, name="out")(y.reshape(*y.shape[:2], self.width))


class VisionTransformer(nn.Module):
    """The image tower: patches, a class token, learned positions, pre-norm blocks, one vector, a projection.

    Attributes:
      image_size, patch_size: pixels; the patch must divide the image.
      width, depth, heads: of the transformer.
      embed_dim: dimensions of the shared space.
      activation: a key of `layers.ACTIVATIONS`.
      mlp_ratio, epsilon, layer_scale: see `transformer.Transformer`; the ratio is 4.9231 in OpenCLIP's ViT-bigG/14.
      input_norm: whether a layer norm stands before the blocks; not in CLIPA's.
      pool: which vector is projected. "class": the class token's, normed. "average": the mean of the patches',
        normed (CLIPA's). "normed_average": the mean of their norms. "attention": what one learned query reads, normed
        (CoCa's, whose other queries serve its captions).
      pool_heads: of that query.
      projection: "linear", "biased" or "none".
      noised: whether images are noised and come with their timestep (GLIDE's, to guide a diffusion model): an
        embedding of it is added to every token, and is zero before training, so that a CLIP of clean images may be
        gone on from.
      stem: channels of 3x3 convolutions of stride 2 that come before the patches are embedded, none in the paper. A
        small tower learns shapes from few examples with them, hardly without (Xiao et al., 2021, "Early convolutions
        help transformers see better"). Each halves the image, and `patch_size` must be 2 to their number.
      mean, std: RGB statistics in [0, 1] that images are normalised by.
      remat, dtype: see `transformer.Transformer`.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    embed_dim: int
    activation: str = "gelu"
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    layer_scale: float = 0.0
    input_norm: bool = True
    pool: str = "class"
    pool_heads: int = 8
    projection: str = "linear"
    noised: bool = False
    stem: Sequence[int] = ()
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_known("activation", self.activation, tuple(ACTIVATIONS))
        check_known("vision_pool", self.pool, VISION_POOLS)
        check_known("vision_projection", self.projection, PROJECTIONS)
        check_heads("vision_heads", self.heads, self.width)
        if self.pool == "attention":
            check_heads("vision_pool_heads", self.pool_heads, self.embed_dim)
        if self.image_size % self.patch_size:
            raise InputError(f"CLIP's patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.stem and self.patch_size != 2 ** len(self.stem):
            raise InputError(
                f"CLIP's vision_stem {tuple(self.stem)} makes patches of {2 ** len(self.stem)} pixels; patch_size is "
                f"{self.patch_size}"
            )

    @nn.compact
    def __call__(self, images: Images, t: Timesteps | None = None) -> tuple[Embeddings, Float[Array, "b n k"]]:
        """Reads images in [-1, 1] of `image_size`; noised ones with their timesteps.

        Returns:
          Embeddings, float32, not normalised; and the residual stream after the last block, float32 [b, 1 + patches,
          width], the class token first, not normed (transformers' `last_hidden_state`).
        """
        pixels = normalized(images, self.image_size, self.mean, self.std)
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
        if self.noised:
            assert t is not None
            h = dense(self.width, role="mix", name="time_1")(timestep_embedding(t, self.width))
            x = x + dense(self.width, role="mix", scale=0.0, name="time_2")(nn.silu(h))[:, None].astype(x.dtype)
        if self.input_norm:
            x = layer_norm(dtype=self.dtype, epsilon=self.epsilon, name="ln_pre")(x)
        x, _ = Transformer(
            self.depth,
            self.heads,
            self.activation,
            remat=self.remat,
            dtype=self.dtype,
            mlp_ratio=self.mlp_ratio,
            epsilon=self.epsilon,
            layer_scale=self.layer_scale,
            name="stack",
        )(x)
        embeddings = _projected(self._pooled(x), self.projection, self.embed_dim, self.dtype)
        return embeddings, x.astype(jnp.float32)

    def _pooled(self, x):
        norm = functools.partial(layer_norm, dtype=self.dtype, epsilon=self.epsilon)
        if self.pool == "attention":
            query = learned(self, "pool_query", (1, self.embed_dim), stddev=1.0)
            query = jnp.broadcast_to(norm(name="pool_norm_query")(query), (len(x), 1, self.embed_dim))
            reader = Reader(self.pool_heads, self.embed_dim, self.embed_dim, self.dtype, name="pool_reader")
            return norm(name="ln_post")(reader(query, norm(name="pool_norm_tokens")(x))[:, 0])
        last = norm(name="ln_post")
        if self.pool == "normed_average":
            return last(x[:, 1:]).mean(1)
        return last(x[:, 0] if self.pool == "class" else x[:, 1:].mean(1))


class TextTransformer(nn.Module):
    """The text tower: token and position embeddings, pre-norm blocks, the vector of one position, a projection.

    A caption without an end token is read at position 0, so the tokenizer must always write one. What follows
    the end token changes nothing, unless `causal` is off.

    Attributes:
      context_length: most tokens of a caption.
      vocab_size: rows of the token table.
      causal: whether a token sees only those before it; not in CLIPA's, SigLIP's and MobileCLIP's.
      pool: at which position the vector is read. "end": the first `end_id`. "argmax": the first of the largest id,
        the end token of OpenAI's vocabulary. "first", "last": those of the tokens given (CLIPA, SigLIP; pad captions
        as the weights are used to). "class": a class token after them (CoCa); ids of 0 are padding.
      end_id: the end token; None is the table's last row.
      others: as in VisionTransformer.
    """

    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    embed_dim: int
    activation: str = "gelu"
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    causal: bool = True
    pool: str = "end"
    end_id: int | None = None
    projection: str = "linear"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_known("activation", self.activation, tuple(ACTIVATIONS))
        check_known("text_pool", self.pool, TEXT_POOLS)
        check_known("text_projection", self.projection, PROJECTIONS)
        check_heads("text_heads", self.heads, self.width)
        if self.end_id is not None and not 0 <= self.end_id < self.vocab_size:
            raise InputError(f"CLIP's text_end_id {self.end_id} is no token; its vocab_size is {self.vocab_size}")

    @nn.compact
    def __call__(self, tokens: Tokens) -> tuple[Embeddings, Float[Array, "b n k"]]:
        """Reads at most `context_length` token ids per caption.

        Returns:
          Embeddings, float32, not normalised; and the last block's output after the final norm, float32 [b, n, width].
        """
        if tokens.shape[1] > self.context_length:
            raise InputError(f"CLIP's text tower reads {self.context_length} tokens, not {tokens.shape[1]}")
        x = embedding(self.vocab_size, self.width, dtype=self.dtype, name="tokens")(tokens)
        if self.pool == "class":
            cls = learned(self, "class", (self.width,), stddev=0.01).astype(x.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(cls, (len(x), 1, self.width))], 1)
        rows = self.context_length + (self.pool == "class")
        positions = learned(self, "positions", (rows, self.width), stddev=0.01)
        x = x + positions[: x.shape[1]].astype(x.dtype)
        x, _ = Transformer(
            self.depth,
            self.heads,
            self.activation,
            remat=self.remat,
            dtype=self.dtype,
            mlp_ratio=self.mlp_ratio,
            epsilon=self.epsilon,
            causal=self.causal and self.pool != "class",
            name="stack",
        )(x, mask=self._mask(tokens))
        norm = layer_norm(dtype=self.dtype, epsilon=self.epsilon, name="ln_final")
        # Normed after it is picked: the other positions cost nothing where only the embedding is asked for.
        pooled = jnp.take_along_axis(x, self._position(tokens)[:, None, None], axis=1)[:, 0]
        embeddings = _projected(norm(pooled), self.projection, self.embed_dim, self.dtype)
        return embeddings, norm(x[:, : tokens.shape[1]]).astype(jnp.float32)

    def _mask(self, tokens: Tokens) -> Bool[Array, "#b 1 s s"] | None:
        if self.pool != "class":
            return None
        # CoCa's weights were trained with a mask one position late: it hides whom padding precedes, itself included.
        seen = jnp.pad(tokens != 0, ((0, 0), (1, 0)), constant_values=True)[:, None, None]
        length = seen.shape[-1]
        return seen & (causal_mask(length) if self.causal else jnp.ones((1, 1, length, length), bool))

    def _position(self, tokens: Tokens) -> Int[Array, "b"]:
        if self.pool == "argmax":
            return jnp.argmax(tokens, 1)
        if self.pool == "end":
            return jnp.argmax(tokens == (self.vocab_size - 1 if self.end_id is None else self.end_id), 1)
        last = tokens.shape[1] - (self.pool == "last")
        return jnp.full(len(tokens), 0 if self.pool == "first" else last)
