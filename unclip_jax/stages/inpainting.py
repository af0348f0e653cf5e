"""Images of which a part is known: GLIDE's fine-tuned models, which draw the rest (Nichol et al., 2021, section 4).

Such a network reads, beside the noisy image, the known part and a mask of where that is: four more channels. In
training all but a random box is known; in sampling every prediction of the image is given back what is known of it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from unclip_jax.arrays import from_uint8
from unclip_jax.errors import InputError
from unclip_jax.stages import base

CHANNELS = 4


class Known(NamedTuple):
    """What is known of images.

    Attributes:
      image: in [-1, 1], zeros where nothing is known.
      mask: 1 where it is, 0 elsewhere.
    """

    image: Float[Array, "b h w 3"]
    mask: Float[Array, "b h w 1"]

    def beside(self, x_t: Float[Array, "b h w 3"]) -> Float[Array, "b h w 7"]:
        """What the network reads of noisy images."""
        return jnp.concatenate([x_t, self.image, self.mask], -1)

    def keeping(self, sampler: "functools.partial[Array]") -> "functools.partial[Array]":
        """A sampler (`denoising.sampler`) whose predictions of the image keep what is known of it."""
        process = sampler.keywords.get("process_x_start")

        def kept(x_start, t):
            x_start = x_start if process is None else process(x_start, t)
            return jnp.where(self.mask > 0, self.image, x_start)

        return functools.partial(sampler, process_x_start=kept)


def check(in_channels: int, others: int, *, inpaints: bool) -> None:
    """Refuses a network that does not read as many channels as the config's `inpaint` says.

    Args:
      in_channels: of the network.
      others: of what it reads without inpainting.
      inpaints: `config.inpaint`.
    """
    wanted = others + CHANNELS * inpaints
    if in_channels != wanted:
        raise InputError(f"the U-Net's in_channels is {in_channels}; with inpaint={inpaints} it must be {wanted}")


def given(batch: base.Batch, count: int, side: int) -> Known:
    """What the optional fields `known`, uint8 [b, s, s, 3], and `known_mask` [b, s, s], not 0 where it is known, say.

    Without them nothing is known, and the network draws whole images.
    """
    if "known" not in batch and "known_mask" not in batch:
        return Known(jnp.zeros((count, side, side, 3)), jnp.zeros((count, side, side, 1)))
    if "known" not in batch or "known_mask" not in batch:
        raise InputError("an image that is known in part comes in two fields, known and known_mask")
    mask = (batch["known_mask"] != 0).astype(jnp.float32)[..., None]
    return Known(from_uint8(batch["known"]) * mask, mask)


def erased(rng: Key[Array, ""], images: Float[Array, "b h w 3"]) -> Known:
    """What is left of images when a box is taken out of each, a quarter of a side to all of it long, anywhere."""
    b, h, w, _ = images.shape

    def outside(key: Any, length: int) -> Array:
        """False along the axis where the box is, [b, length]."""
        size_key, place_key = jax.random.split(key)
        size = jax.random.uniform(size_key, (b, 1), minval=0.25, maxval=1.0) * length
        begin = jax.random.uniform(place_key, (b, 1)) * (length - size)
        middle = jnp.arange(length) + 0.5
        return (middle < begin) | (middle > begin + size)

    down, across = jax.random.split(rng)
    mask = (outside(down, h)[:, :, None] | outside(across, w)[:, None, :]).astype(jnp.float32)[..., None]
    return Known(images * mask, mask)
