"""Stage "upsampler": 64 -> 256 and 256 -> 1024, or any factor (appendix C).

An unconditional diffusion model that sees the degraded low-resolution image, enlarged, beside the noisy one. It has no
attention, so it trains on crops of a quarter and samples whole images.

Karlo's is one, too: it enlarges by bicubic interpolation (`enlarge`), and a second network of the same shape takes the
last of its seven steps (`sampling.last_steps`). That one is trained by a run of its own, often from the first's
weights, and is here a frozen network, `last`.

GLIDE's reads the caption again, by a text encoder of its own (`config.text`), and attends; so it wants whole images.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from unclip_jax.arrays import Tokens, from_uint8, to_uint8
from unclip_jax.diffusion import samplers
from unclip_jax.errors import InputError, nearest
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.unet import UNet
from unclip_jax.stages import base, denoising, inpainting

# How the smaller image is enlarged, and JAX's name of it. Enlarged by JAX's, bicubic is PyTorch's with antialiasing.
ENLARGE = {"bilinear": "linear", "bicubic": "cubic"}

LowRes = UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]


class UpsamplerStage:
    """Trains p(x | low_res); predicts images of `image_size` from images of `low_res_size`.

    For "sample", `low_res` may also be float in [-1, 1], noise may be given, see `base.noise`, and a part of the image,
    see `inpainting.given`. "x_T" is the noise from which "sample" would draw `image` of `low_res`, float32.
    """

    splits_batch = True

    def __init__(self, config: ConfigDict):
        dtype, text = base.compute_dtype(config), config.get("text")
        self.network: Any = base.network(UNet, config.unet, dtype, where="config.unet")
        self.context_length: int = text.context_length if text else 0
        self.vocab_size: int = text.vocab_size if text else 0
        self.drop_text = config.drop.text if text and "drop" in config else 0.0
        if text:
            fields = {"unet": config.unet.to_dict(), "text": text.to_dict(), "embed_dim": 0, "clip_tokens": 0}
            self.network = base.network(Decoder, fields, dtype, where="config")
        self.inpaints = config.get("inpaint", False)
        inpainting.check(config.unet.get("in_channels", 3), 6, inpaints=self.inpaints)
        self.diffusion = denoising.process(config.diffusion)
        self.temperature = config.sampling.temperature
        self.sampler = denoising.sampler(self.diffusion, config.sampling)
        self.invert = denoising.inverter(self.diffusion, config.sampling)
        self.side, self.low_res_side = config.unet.image_size, config.low_res_size
        self.enlarge = config.get("enlarge", "bilinear")
        if self.enlarge not in ENLARGE:
            raise InputError(f"config.enlarge={self.enlarge!r} is unknown; {nearest(self.enlarge, ENLARGE)}")
        self.last_steps, self.last_t = config.sampling.get("last_steps", 0), -1
        if self.last_steps:
            visited = samplers.check(
                self.diffusion, method="ddpm", timesteps=denoising.timesteps(config.sampling), eta=0
            ).timesteps
            if self.last_steps > len(visited):
                raise InputError(f"sampling.last_steps={self.last_steps}, but there are {len(visited)} steps in all")
            self.last_t = int(visited[self.last_steps - 1])
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

    def _caption(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"tokens": base.token_ids(batch_size, self.context_length)} if self.context_length else {}

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "image": base.pixels(batch_size, self.crop),
            "low_res": base.pixels(batch_size, self.low_res_crop),
            **self._caption(batch_size),
            "id": base.ids(batch_size),
        }

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        low_res = base.pixels(batch_size, self.low_res_side)
        sample = {"low_res": low_res, **self._caption(batch_size), "id": base.ids(batch_size)}
        # The data makes `low_res` out of the whole image, which must be there to be reduced.
        reconstruct = {**sample, "image": base.pixels(batch_size, self.side)}
        inverted = {name: x for name, x in reconstruct.items() if name != "id"}
        return {"loss": self.batch_spec(batch_size), "sample": sample, "reconstruct": reconstruct, "x_T": inverted}

    def init(self, rng: jax.Array) -> base.Params:
        channels = 6 + inpainting.CHANNELS * self.inpaints
        x, t = jnp.zeros((1, self.crop, self.crop, channels)), jnp.zeros((1,), jnp.int32)
        if not self.context_length:
            return self.network.init(rng, x, t)
        return self.network.init(rng, x, t, jnp.zeros((1, self.context_length), jnp.int32), None)

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        return {"last": self.init(rng)} if self.last_steps else {}

    def fit_statistics(self, over_data: base.OverData) -> tuple[dict[str, Any], dict[str, float]]:
        return {}, {}

    def _enlarged(self, low_res: LowRes) -> Float[Array, "b h2 w2 3"]:
        b, h, w, _ = low_res.shape
        factor = self.side // self.low_res_side
        seen = from_uint8(low_res) if low_res.dtype == jnp.uint8 else low_res
        return jax.image.resize(seen, (b, h * factor, w * factor, 3), ENLARGE[self.enlarge])

    def loss(self, params, frozen, batch, rng, *, train):
        noise_rng, dropout_rng = jax.random.split(rng)
        caption = self._read(params, batch.get("tokens"), jax.random.fold_in(rng, 2))
        x_start = from_uint8(batch["image"])
        enlarged = self._enlarged(batch["low_res"])

        known = inpainting.erased(jax.random.fold_in(rng, 3), x_start) if self.inpaints else None

        def denoise(x_t, t):
            x = jnp.concatenate([x_t if known is None else known.beside(x_t), enlarged], -1)
            rngs = {"dropout": dropout_rng}
            if not self.context_length:
                return self.network.apply(params, x, t, deterministic=not train, rngs=rngs)
            return self.network.apply(params, x, t, caption, not train, method="denoise", rngs=rngs)

        return denoising.loss(self.diffusion, denoise, x_start, noise_rng)

    def sample(
        self,
        params: base.Params,
        low_res: LowRes,
        keys: samplers.NoiseSource,
        *,
        tokens: Tokens | None = None,
        last: base.Params | None = None,
        known: inpainting.Known | None = None,
    ) -> Float[Array, "b h2 w2 3"]:
        """Returns float images in [-1, 1] from low-resolution images of any size.

        Args:
          params: weights.
          low_res: uint8 as they were drawn, or float in [-1, 1].
          keys: one per example, or the noise itself.
          tokens: captions, where it reads any.
          last: weights of the network that takes the last steps, where `sampling.last_steps` says that there is one.
          known: a part of the images, which they keep; by default nothing is known.
        """
        enlarged = self._enlarged(low_res)
        sampler = self.sampler if known is None else known.keeping(self.sampler)
        told = inpainting.nothing(enlarged.shape[0], self.side) if known is None else known  # no int in an export
        denoise = self._denoiser(params, enlarged, tokens, last, told if self.inpaints else None)
        return sampler(denoise, self.temperature * samplers.initial_noise(keys, enlarged.shape[1:]), keys)

    def _denoiser(
        self,
        params: base.Params,
        enlarged: Float[Array, "b h2 w2 3"],
        tokens: Tokens | None,
        last: base.Params | None,
        known: inpainting.Known | None,
    ) -> samplers.Denoiser:
        """Returns the networks as samplers call them."""
        of_first, of_last = (None if p is None else self._call(p, self._read(p, tokens)) for p in (params, last))

        def denoise(x_t, t):
            x = jnp.concatenate([x_t if known is None else known.beside(x_t), enlarged], -1)
            if of_last is None:
                return of_first(x, t)
            # All examples are at one timestep, so one of the two networks runs.
            return jax.lax.cond(t[0] <= self.last_t, of_last, of_first, x, t)

        return denoise

    def _read(self, params: base.Params, tokens: Tokens | None, rng: jax.Array | None = None) -> Any:
        """What the network reads of captions at every timestep, if it reads any; with a key some are dropped."""
        if not self.context_length:
            return None
        if tokens is None:
            raise InputError("this upsampler (config.text) reads captions, and was given none")
        dropped = None if rng is None else base.drop(rng, self.drop_text, len(tokens))
        return self.network.apply(params, tokens, None, dropped, method="condition")

    def _call(self, params, caption):
        if not self.context_length:
            return lambda x, t: self.network.apply(params, x, t)
        return lambda x, t: self.network.apply(params, x, t, caption, method="denoise")

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def sample(params, frozen, batch, rng):
            last = frozen["last"] if self.last_steps else None
            noise = base.noise(rng, batch)
            known = inpainting.given(batch)
            images = self.sample(params, batch["low_res"], noise, tokens=batch.get("tokens"), last=last, known=known)
            return to_uint8(images)

        def x_T(params, frozen, batch, rng):
            last, enlarged = frozen["last"] if self.last_steps else None, self._enlarged(batch["low_res"])
            nothing = inpainting.nothing(enlarged.shape[0], self.side) if self.inpaints else None
            denoise = self._denoiser(params, enlarged, batch.get("tokens"), last, nothing)
            # At temperature 0 no noise is read, so any will do.
            return self.invert(denoise, from_uint8(batch["image"])) / (self.temperature or 1.0)

        return {"loss": loss, "sample": sample, "reconstruct": sample, "x_T": x_T}
