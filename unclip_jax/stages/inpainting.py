"""Images of which a part is known: GLIDE's fine-tuned models, which draw the rest (Nichol et al., 2021, section 4.2).

Such a network reads, beside the noisy image, the known part and a mask of where that is: four more channels. In
training all but a random box is known; in sampling every prediction of the image is given back what is known of it.

Fine-tuning begins with a network that was trained without the four channels, whose weights are zeros then (`widened`).
A network that never learned them can be given back what is known all the same: an ancestral step then draws, in that
region, q(x_{t-1} | x_t, x_start) of the true x_start, so that at every step it is as noisy there as the forward process
makes it. What such a network draws elsewhere knows of the region only through x_t.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from unclip_jax.arrays import from_uint8
from unclip_jax.diffusion import samplers
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

    def elsewhere(self, guide: samplers.Guide) -> samplers.Guide:
        """Guidance that leaves alone what is known."""
        return lambda x_t, t: jnp.where(self.mask > 0, 0.0, guide(x_t, t))

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


def widened(params: base.Params) -> base.Params:
    """Returns weights of a U-Net that reads the four channels more, as `Known.beside` and the upsamplers order them.

    With zeros for their weights it computes what it did, whatever is known (Nichol et al., 2021, section 4.2).
    """

    def one(path: Any, x: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-2:] != ["in_conv", "kernel"]:
            return x
        zeros = jnp.zeros((*x.shape[:2], CHANNELS, x.shape[3]), x.dtype)
        return jnp.concatenate([x[:, :, :3], zeros, x[:, :, 3:]], 2)

    return jax.tree_util.tree_map_with_path(one, params)


def nothing(count: int, side: int) -> Known:
    """What a network that draws whole images is told."""
    return Known(jnp.zeros((count, side, side, 3)), jnp.zeros((count, side, side, 1)))


def given(batch: base.Batch) -> Known | None:
    """What the optional fields `known`, uint8 [b, s, s, 3], and `known_mask` [b, s, s], not 0 where it is known, say.

    Raises:
      InputError: one of the two is there, and not the other.
    """
    if "known" not in batch and "known_mask" not in batch:
        return None
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
