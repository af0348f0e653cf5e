"""Stage "upsampler": 64 -> 256 and 256 -> 1024, or any factor (appendix C).

An unconditional diffusion model that sees the degraded low-resolution image, bilinearly enlarged, beside the noisy
one. It has no attention, so it trains on crops of a quarter and samples whole images.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from unclip_jax.arrays import ExampleKeys, from_uint8, to_uint8
from unclip_jax.diffusion import samplers
from unclip_jax.errors import InputError
from unclip_jax.models.unet import UNet
from unclip_jax.stages import base, denoising


class UpsamplerStage:
    """Trains p(x | low_res); predicts images of `image_size` from images of `low_res_size`."""

    splits_batch = True
    vocab_size = 0

    def __init__(self, config: ConfigDict):
        self.network = base.network(UNet, config.unet, base.compute_dtype(config), where="config.unet")
        self.diffusion = denoising.process(config.diffusion)
        self.temperature = config.sampling.temperature
        self.sampler = denoising.sampler(self.diffusion, config.sampling)
        self.side, self.low_res_side = config.unet.image_size, config.low_res_size
        fraction = config.data.crop_fraction
        self.crop, self.low_res_crop = round(self.side * fraction), round(self.low_res_side * fraction)
        if self.side % self.low_res_side:
            raise InputError(
                f"config.unet.image_size={self.side} is not a multiple of config.low_res_size={self.low_res_side}"
            )
        smallest = 2 ** (len(config.unet.channel_mult) - 1)
        if self.crop % smallest or self.crop * self.low_res_side != self.low_res_crop * self.side:
            raise InputError(
                f"config.data.crop_fraction={fraction} gives crops of {self.crop} pixels over {self.low_res_crop}; "
                f"they must be in the ratio {self.side}:{self.low_res_side}, and the larger a multiple of {smallest}"
            )

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "image": base.pixels(batch_size, self.crop),
            "low_res": base.pixels(batch_size, self.low_res_crop),
            "id": base.ids(batch_size),
        }

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        sample = {"low_res": base.pixels(batch_size, self.low_res_side), "id": base.ids(batch_size)}
        # The data makes `low_res` out of the whole image, which must be there to be reduced.
        reconstruct = {**sample, "image": base.pixels(batch_size, self.side)}
        return {"loss": self.batch_spec(batch_size), "sample": sample, "reconstruct": reconstruct}

    def init(self, rng: jax.Array) -> base.Params:
        return self.network.init(rng, jnp.zeros((1, self.crop, self.crop, 6)), jnp.zeros((1,), jnp.int32))

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        return {}

    def fit_statistics(self, over_data: base.OverData) -> tuple[dict[str, Any], dict[str, float]]:
        return {}, {}

    def _denoiser(self, params, low_res: UInt8[Array, "b l l 3"], factor: int, *, train: bool, rngs):
        b, h, w, _ = low_res.shape
        enlarged = jax.image.resize(from_uint8(low_res), (b, h * factor, w * factor, 3), "linear")

        def denoise(x_t, t):
            x = jnp.concatenate([x_t, enlarged], -1)
            return self.network.apply(params, x, t, deterministic=not train, rngs=rngs)

        return denoise

    def loss(self, params, frozen, batch, rng, *, train):
        noise_rng, dropout_rng = jax.random.split(rng)
        x_start = from_uint8(batch["image"])
        factor = self.side // self.low_res_side
        denoise = self._denoiser(params, batch["low_res"], factor, train=train, rngs={"dropout": dropout_rng})
        return denoising.loss(self.diffusion, denoise, x_start, noise_rng)

    def sample(
        self, params: base.Params, low_res: UInt8[Array, "b h w 3"], keys: ExampleKeys
    ) -> Float[Array, "b h2 w2 3"]:
        """Returns float images in [-1, 1] from low-resolution images of any size, uint8 as they were drawn."""
        factor = self.side // self.low_res_side
        shape = (low_res.shape[1] * factor, low_res.shape[2] * factor, 3)
        return self.sampler(
            self._denoiser(params, low_res, factor, train=False, rngs=None),
            self.temperature * samplers.initial_noise(keys, shape),
            keys,
        )

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def sample(params, frozen, batch, rng):
            return to_uint8(self.sample(params, batch["low_res"], base.example_keys(rng, batch)))

        return {"loss": loss, "sample": sample, "reconstruct": sample}
