"""Stage "decoder": the diffusion model that turns a CLIP image embedding into an image (section 2.1).

The paper's ablations are configs of this stage: without captions (no `model.text`), without CLIP embeddings
(`model.embed_dim` 0, which is GLIDE), or on text embeddings in place of image embeddings at sampling.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax.arrays import from_uint8, to_uint8
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.guidance import classifier_free
from unclip_jax.models.decoder import Decoder
from unclip_jax.stages import base, denoising


class DecoderStage:
    """Trains p(x | z_i, caption); predicts images from `z_i` and captions."""

    splits_batch = True

    def __init__(self, config: ConfigDict):
        self.network = base.network(Decoder, config.model, base.compute_dtype(config), where="config.model")
        self.clip = base.clip_network(config)
        self.diffusion = denoising.process(config.diffusion)
        self.sampling = config.sampling
        self.sampler = denoising.sampler(self.diffusion, config.sampling)
        self.drop = config.drop
        self.side = config.model.unet.image_size
        text = config.model.get("text")
        self.context_length = text.context_length if text else 0
        self.vocab_size = text.vocab_size if text else 0
        self.embed_dim = config.model.embed_dim

    def _conditions(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"tokens": base.token_ids(batch_size, self.context_length)} if self.context_length else {}

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = {"image": base.pixels(batch_size, self.side), **self._conditions(batch_size), "id": base.ids(batch_size)}
        if self.embed_dim:
            spec["clip_image"] = base.pixels(batch_size, self.clip.image_size)
        return spec

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        sample = {**self._conditions(batch_size), "id": base.ids(batch_size)}
        if self.embed_dim:
            sample["z_i"] = base.vectors(batch_size, self.embed_dim)
        spec = self.batch_spec(batch_size)
        reconstruct = {name: spec[name] for name in spec if name != "image"}
        return {"loss": spec, "sample": sample, "reconstruct": reconstruct}

    def init(self, rng: jax.Array) -> base.Params:
        image = jnp.zeros((1, self.side, self.side, 3))
        tokens = jnp.zeros((1, self.context_length), jnp.int32) if self.context_length else None
        z_i = jnp.zeros((1, self.embed_dim)) if self.embed_dim else None
        return self.network.init(rng, image, jnp.zeros((1,), jnp.int32), tokens, z_i)

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        return {"clip": denoising.init_clip(self.clip, rng)} if self.embed_dim else {}

    def fit_statistics(self, frozen: Any, batches: Iterable[base.Batch]) -> dict[str, Any]:
        return {}

    def loss(self, params, frozen, batch, rng, *, train):
        drop_rng, noise_rng, dropout_rng = jax.random.split(rng, 3)
        x_start = from_uint8(batch["image"])
        n = x_start.shape[0]
        z_i = base.embed_images(self.clip, frozen["clip"], batch["clip_image"]) if self.embed_dim else None
        # Independent drops: 10% of the embeddings, 50% of the captions (section 2.1).
        text_rng, clip_rng = jax.random.split(drop_rng)
        drop_text, drop_clip = base.drop(text_rng, self.drop.text, n), base.drop(clip_rng, self.drop.clip, n)

        def denoise(x_t, t):
            return self.network.apply(
                params,
                x_t,
                t,
                batch.get("tokens"),
                z_i,
                drop_text if self.context_length else None,
                drop_clip if self.embed_dim else None,
                deterministic=not train,
                rngs={"dropout": dropout_rng},
            )

        return denoising.loss(self.diffusion, denoise, x_start, noise_rng)

    def sample(self, params, z_i, tokens, keys, *, x_T=None):
        """Returns float images in [-1, 1], [b, s, s, 3], from embeddings and captions (either may be None)."""
        n = keys.shape[0]

        def condition(dropped: bool):
            flags = jnp.full((n,), dropped)
            drop_text, drop_clip = (None if part is None else flags for part in (tokens, z_i))
            return self.network.apply(params, tokens, z_i, drop_text, drop_clip, method="condition")

        def denoise(x_t, t, conditioning):
            return self.network.apply(params, x_t, t, conditioning, method="denoise")

        shape = (self.side, self.side, 3)
        return self.sampler(
            classifier_free(
                denoise, condition(False), condition(True), scale=self.sampling.guidance_scale, guided_channels=3
            ),
            samplers.initial_noise(keys, shape) if x_T is None else x_T,
            keys,
        )

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def sample(params, frozen, batch, rng):
            images = self.sample(params, batch.get("z_i"), batch.get("tokens"), base.example_keys(rng, batch))
            return to_uint8(images)

        def reconstruct(params, frozen, batch, rng):
            z_i = base.embed_images(self.clip, frozen["clip"], batch["clip_image"]) if self.embed_dim else None
            return to_uint8(self.sample(params, z_i, batch.get("tokens"), base.example_keys(rng, batch)))

        return {"loss": loss, "sample": sample, "reconstruct": reconstruct}
