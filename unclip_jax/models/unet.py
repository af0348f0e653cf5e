"""The U-Net of ADM (Dhariwal & Nichol, 2021) with GLIDE's conditioning (Nichol et al., 2021).

The decoder is this network with attention and a text context; the two upsamplers are it without either ("ADMNet
without attention", appendix C of the unCLIP paper), and so run at any image size.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unclip_jax import sharding
from unclip_jax.errors import InputError
from unclip_jax.models import layers, transformer


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Doubles both sides by repeating pixels (nearest neighbour)."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Halves both sides by the mean of each 2x2 square."""
    b, h, w, c = x.shape
    # Rows first, then columns: both sums read whole rows of channels.
    rows = x.reshape(b, h // 2, 2, w, c)
    rows = (rows[:, :, 0] + rows[:, :, 1]).reshape(b, h // 2, w // 2, 2, c)
    return (rows[:, :, :, 0] + rows[:, :, :, 1]) * 0.25


# Of images: a table that splits "height" spreads one image over devices, which trade the rows at their borders.
_AXES = ("batch", "height")
_RESAMPLE = {"none": lambda x: x, "up": upsample, "down": downsample}


class ResBlock(nn.Module):
    """ADM's residual block, with the resampling inside when it has any (BigGAN's up/down block, `resblock_updown`).

    Attributes:
      channels: of the output; a 1x1 convolution carries the residual iff the input has another number.
      resample: "none", "up" (nearest, 2x) or "down" (2x2 mean), on both the branch and the residual.
      dropout: probability of dropping a feature before the second convolution.
      scale_shift: "film" scales and shifts the second norm's output by the embedding (ADM, GLIDE); "add" adds the
        embedding before that norm (Karlo's upsamplers).
      norm_groups: of both norms.
      dtype: compute dtype.
    """

    channels: int
    resample: str = "none"
    dropout: float = 0.0
    scale_shift: str = "film"
    norm_groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], deterministic: bool = True
    ) -> Float[Array, "b h2 w2 {self.channels}"]:
        """`emb` is the embedding of the timestep and whatever is added to it, before its SiLU."""
        x = sharding.laid(x, _AXES)
        resample = _RESAMPLE[self.resample]
        h = nn.silu(layers.GroupNorm(self.norm_groups, dtype=self.dtype, name="norm_1")(x))
        h = layers.conv(self.channels, dtype=self.dtype, name="conv_1")(resample(h))
        width = self.channels * (2 if self.scale_shift == "film" else 1)
        modulation = layers.dense(width, role="up", dtype=self.dtype, name="emb")(nn.silu(emb))
        norm = layers.GroupNorm(self.norm_groups, dtype=self.dtype, name="norm_2")
        if self.scale_shift == "film":
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = norm(h, scale, shift)
        else:
            h = norm(h + modulation[:, None, None])
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=deterministic)
        # The last convolution starts at zero, so that every block starts as its residual.
        h = layers.conv(self.channels, dtype=self.dtype, scale=0.0, name="conv_2")(h)
        x = resample(x)
        if x.shape[-1] != self.channels:
            x = layers.conv(self.channels, 1, dtype=self.dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with the context's keys and values in front of theirs, in one softmax (GLIDE).

    `seen` is True for the vectors of the context that may be looked at (Karlo); pixels are always seen.
    """

    head_channels: int
    norm_groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b m e"] | None = None,
        seen: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        y = layers.GroupNorm(self.norm_groups, dtype=self.dtype, name="norm")(x).reshape(x.shape[0], -1, channels)
        heads = channels // self.head_channels
        attention = transformer.Attention(heads, dtype=self.dtype, out_scale=0.0, name="attention")
        mask = None
        if seen is not None:
            mask = jnp.pad(seen, ((0, 0), (0, y.shape[1])), constant_values=True)[:, None, None]
        return x + attention(y, context, mask)[0].reshape(x.shape)


class UNet(nn.Module):
    """Predicts channels per pixel from a noisy image and its timestep.

    Attributes:
      in_channels: of the input (3; 6 for an upsampler, whose input has the low-resolution image beside it).
      out_channels: of the output (6 with learned variance).
      channels: at the first level.
      channel_mult: channels of each level over `channels`; each level but the first is half the size of the one before.
      depth: residual blocks of a level on the way down; there is one more on the way up.
      attention_resolutions: sizes, at inputs of `image_size`, that attend. The middle attends iff there is any.
      image_size: side of the training images. Without attention any multiple of 2^(levels - 1) can be fed.
      head_channels: channels of one attention head.
      dropout: inside residual blocks.
      scale_shift: "film" or "add", see ResBlock.
      norm_groups: of every group norm (32 in ADM). With as many groups as channels each channel is normalised on its
        own and an image's mean is lost: without attention, which could carry it, colours then drift.
      remat: what the backward pass computes again of each block, a key of `layers.REMAT`.
      dtype: compute dtype; norms, softmax and the output are float32.

    Raises:
      InputError: at construction, for a shape that is not a network.
    """

    in_channels: int = 3
    out_channels: int = 6
    channels: int = 512
    channel_mult: Sequence[int] = (1, 2, 3, 4)
    depth: int = 3
    attention_resolutions: Sequence[int] = (32, 16, 8)
    image_size: int = 64
    head_channels: int = 64
    dropout: float = 0.0
    scale_shift: str = "film"
    norm_groups: int = 32
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        """Raises InputError where the attributes do not make a network."""
        smallest = 2 ** (len(self.channel_mult) - 1)
        if self.scale_shift not in ("film", "add"):
            raise InputError(f"scale_shift is {self.scale_shift!r}; it must be 'film' or 'add'")
        if self.depth < 1 or not self.channel_mult:
            raise InputError(f"depth {self.depth} and channel_mult {self.channel_mult} hold no block; give 1 or more")
        if self.image_size % smallest:
            raise InputError(
                f"image_size {self.image_size} cannot be halved {len(self.channel_mult) - 1} times for channel_mult "
                f"{tuple(self.channel_mult)}; it must be a multiple of {smallest}"
            )
        sizes = [self.image_size >> level for level in range(len(self.channel_mult))]
        for resolution in self.attention_resolutions:
            if resolution not in sizes:
                raise InputError(
                    f"attention resolution {resolution} is never reached: the levels of a "
                    f"{self.image_size}-pixel image under channel_mult {tuple(self.channel_mult)} are {sizes}"
                )
        for size, mult in zip(sizes, self.channel_mult, strict=True):
            attends = size in self.attention_resolutions or (self.attention_resolutions and size == sizes[-1])
            if attends and self.channels * mult % self.head_channels:
                raise InputError(
                    f"the {size}-pixel level has {self.channels} x {mult} = {self.channels * mult} channels, which "
                    f"head_channels {self.head_channels} does not divide"
                )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w {self.in_channels}"],
        t: Int[Array, "b"],
        emb: Float[Array, "b e"] | None = None,
        context: Float[Array, "b m d"] | None = None,
        deterministic: bool = True,
        seen: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """Applies the network.

        Args:
          x: noisy images, about [-1, 1].
          t: timesteps of the unrespaced process, 0 to T-1.
          emb: added to the timestep's embedding; e is 4 * channels.
          context: vectors that every attention block reads beside the image.
          deterministic: whether dropout is off (else it wants a "dropout" key).
          seen: True for the vectors of the context that may be looked at; None for all.

        Returns:
          float32 predictions.
        """
        levels = len(self.channel_mult)
        smallest = 2 ** (levels - 1)
        if x.shape[1] % smallest or x.shape[2] % smallest:
            raise InputError(f"sides of {x.shape[1]} and {x.shape[2]} pixels are not multiples of {smallest}")
        emb = self._embed_time(t, emb)
        h = layers.conv(self.channels, dtype=self.dtype, name="in_conv")(sharding.laid(x.astype(self.dtype), _AXES))
        skips = [h]
        for level, mult in enumerate(self.channel_mult):
            for block in range(self.depth):
                h = self._block(f"down_{level}_{block}", level, h, emb, (context, seen), deterministic)
                skips.append(h)
            if level != levels - 1:
                h = self._res_block(f"down_{level}", self.channels * mult, "down")(h, emb, deterministic)
                skips.append(h)
        h = self._res_block("middle_0", h.shape[-1])(h, emb, deterministic)
        if self.attention_resolutions:
            h = self._attention("middle")(h, context, seen)
        h = self._res_block("middle_1", h.shape[-1])(h, emb, deterministic)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for block in range(self.depth + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self._block(f"up_{level}_{block}", level, h, emb, (context, seen), deterministic)
            if level:
                h = self._res_block(f"up_{level}", self.channels * mult, "up")(h, emb, deterministic)
        h = nn.silu(layers.GroupNorm(self.norm_groups, name="out_norm")(h))
        return layers.conv(self.out_channels, scale=0.0, name="out_conv")(h)

    def _embed_time(self, t: jax.Array, emb: jax.Array | None) -> jax.Array:
        """The embedding that every residual block reads, in float32: timesteps up to 1000 are too fine for bfloat16."""
        width = 4 * self.channels
        h = layers.dense(width, role="mix", name="time_1")(layers.timestep_embedding(t, self.channels))
        h = layers.dense(width, role="mix", name="time_2")(nn.silu(h))
        return h if emb is None else h + emb.astype(h.dtype)

    def _res_block(self, name: str, channels: int, resample: str = "none") -> nn.Module:
        kind = layers.rematerialised(ResBlock, self.remat, static_argnums=(3,))
        return kind(channels, resample, self.dropout, self.scale_shift, self.norm_groups, self.dtype, name=name)

    def _attention(self, name: str) -> nn.Module:
        kind = layers.rematerialised(AttentionBlock, self.remat)
        return kind(self.head_channels, self.norm_groups, self.dtype, name=f"{name}_attention")

    def _block(self, name, level, h, emb, context, deterministic) -> jax.Array:
        """A residual block and, where its level attends, an attention block."""
        h = self._res_block(name, self.channels * self.channel_mult[level])(h, emb, deterministic)
        if self.image_size >> level in self.attention_resolutions:
            h = self._attention(name)(h, *context)
        return h
