"""CLIP's modified ResNets (Radford et al., 2021, section 2.4): RN50, RN101, RN50x4, RN50x16 and RN50x64.

Three changes to a ResNet-50: a stem of three convolutions and an average pool; wherever a stage halves its image, an
average pool in place of a stride (Zhang, 2019, "Making convolutional networks shift-invariant again"); and at the end
one query, the mean of all places, that reads them by attention.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from unclip_jax.arrays import Embeddings, Images
from unclip_jax.errors import InputError
from unclip_jax.models.clip_towers import MEAN, STD, Reader, check_heads, normalized
from unclip_jax.models.layers import conv, learned, rematerialised

_EXPANSION = 4  # channels of a block's output over those of its 3x3 convolution


class BatchNorm(nn.Module):
    """Batch norm by fixed statistics: scale (x - mean) / sqrt(var + 1e-5) + bias of each channel, in float32.

    A loss here is a function of the weights and one batch, so nothing measures statistics while a tower trains. They
    stand among the weights as `running_mean` and `running_var`, come with published weights and have no gradient
    (`optim` keeps them from weight decay). So these towers are for published weights, frozen or fine-tuned. From a
    random start they train as networks without a norm do.

    Attributes:
      start: what `scale` begins at.
      dtype: of the output.
    """

    start: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        vector = functools.partial(learned, self, shape=x.shape[-1:], stddev=0, axis="conv_out")
        scale, bias = vector("scale", start=self.start), vector("bias")
        mean, var = jax.lax.stop_gradient((vector("running_mean"), vector("running_var", start=1.0)))
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(self.dtype)


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions, with an average pool where it has a stride.

    It begins as the identity, or its projection: the last norm's scale starts at zero.
    """

    channels: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, _):
        features = _EXPANSION * self.channels

        def layer(x, channels, kernel_size, name, start=1.0):
            x = conv(
                channels, kernel_size, padding=kernel_size // 2, use_bias=False, dtype=self.dtype, name=f"conv_{name}"
            )(x)
            return BatchNorm(start, self.dtype, name=f"norm_{name}")(x)

        y = nn.relu(layer(x, self.channels, 1, "1"))
        y = nn.relu(layer(y, self.channels, 3, "2"))
        y = layer(_pooled(y, self.stride), features, 1, "3", start=0.0)
        if self.stride > 1 or x.shape[-1] != features:
            x = layer(_pooled(x, self.stride), features, 1, "skip")
        return nn.relu(x + y), None


def _pooled(x, stride):
    return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x


class ModifiedResNet(nn.Module):
    """The image tower of five of OpenAI's nine encoders. Each stage's blocks after the first are scanned.

    Attributes:
      image_size: pixels; a multiple of what the stages shrink it by, 32 with four stages.
      layers: blocks of each stage; (3, 4, 6, 3) in RN50.
      width: channels of the stem, and of the first stage's 3x3 convolutions; each later stage has twice as many.
      heads: of the attention at the end, over 32 times the width; its vectors are 64 wide in the published ones.
      embed_dim: dimensions of the shared space.
      mean, std: RGB statistics in [0, 1] that images are normalised by.
      remat: what the backward pass computes again of each block, a key of `layers.REMAT`.
      dtype: compute dtype.
    """

    image_size: int
    layers: Sequence[int]
    width: int
    heads: int
    embed_dim: int
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        shrinks = 4 * 2 ** (len(self.layers) - 1)
        if self.image_size % shrinks:
            raise InputError(
                f"CLIP's vision_layers {tuple(self.layers)} shrink images by {shrinks}, which does not divide "
                f"image_size {self.image_size}"
            )
        if self.width % 2:
            raise InputError(f"CLIP's vision_width {self.width} is odd; a ResNet's stem begins with half of it")
        check_heads("vision_heads", self.heads, _EXPANSION * self.width * 2 ** (len(self.layers) - 1))

    @nn.compact
    def __call__(self, images: Images) -> tuple[Embeddings, Float[Array, "b n k"]]:
        """Reads images in [-1, 1] of `image_size`.

        Returns:
          Embeddings, float32, not normalised; and the last stage's features, float32 [b, places, channels], row by row.
        """
        x = normalized(images, self.image_size, self.mean, self.std)
        for number, (channels, stride) in enumerate([(self.width // 2, 2), (self.width // 2, 1), (self.width, 1)]):
            x = conv(channels, stride=stride, padding=1, use_bias=False, dtype=self.dtype, name=f"stem_{number}")(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"stem_norm_{number}")(x))
        x = _pooled(x, 2)
        block = rematerialised(Bottleneck, self.remat)
        for number, blocks in enumerate(self.layers):
            channels = self.width * 2**number
            x, _ = block(channels, 1 if number == 0 else 2, self.dtype, name=f"stage_{number}_first")(x, None)
            if blocks > 1:
                rest = nn.scan(
                    block,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=blocks - 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = rest(channels, dtype=self.dtype, name=f"stage_{number}_rest")(x, None)
        x = x.reshape(len(x), -1, x.shape[-1])
        mean = x.mean(1, keepdims=True, dtype=jnp.float32).astype(x.dtype)
        tokens = jnp.concatenate([mean, x], 1)
        positions = learned(self, "positions", tokens.shape[1:], stddev=x.shape[-1] ** -0.5)
        tokens = tokens + positions.astype(x.dtype)
        reader = Reader(self.heads, x.shape[-1], self.embed_dim, self.dtype, name="reader")
        return reader(tokens[:, :1], tokens)[:, 0].astype(jnp.float32), x.astype(jnp.float32)
