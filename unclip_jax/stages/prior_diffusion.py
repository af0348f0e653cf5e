"""Stage "prior_diffusion": the diffusion prior p(z_i | caption), section 2.2.

Embeddings are scaled so that their coordinates have the variance of pixels ("scale the CLIP embedding inputs by
17.2", appendix C: for unit vectors of 1,024 numbers that is a variance of 0.289).
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax.arrays import Embeddings, ExampleKeys, Tokens
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.guidance import check_negative, classifier_free
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.stages import base, denoising


class DiffusionPriorStage:
    """Trains p(z_i | caption, z_t); predicts `z_i` from captions."""

    splits_batch = True

    def __init__(self, config: ConfigDict):
        self.network = base.network(DiffusionPrior, config.model, base.compute_dtype(config), where="config.model")
        self.clip = base.clip_network(config)
        self.diffusion = denoising.process(config.diffusion)
        self.sampling = config.sampling
        # Embeddings are not pixels: what exceeds a range says nothing of how to rescale the rest.
        self.sampler = denoising.sampler(self.diffusion, config.sampling, thresholds=("static", "none"))
        self.drop = config.drop
        self.scale = config.embedding_scale
        self.context_length = config.model.context_length
        self.vocab_size = config.model.vocab_size

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "clip_image": base.pixels(batch_size, self.clip.image_size),
            "clip_tokens": base.token_ids(batch_size, self.clip.context_length),
            "tokens": base.token_ids(batch_size, self.context_length),
            "id": base.ids(batch_size),
        }

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        spec = self.batch_spec(batch_size)
        sample = {name: spec[name] for name in ("clip_tokens", "tokens", "id")}
        return {"loss": spec, "sample_z_i": sample, "z_i": {"clip_image": spec["clip_image"]}}

    def init(self, rng: jax.Array) -> base.Params:
        z = jnp.zeros((1, self.network.embed_dim))
        return self.network.init(
            rng, z, jnp.zeros((1,), jnp.int32), jnp.zeros((1, self.context_length), jnp.int32), z, jnp.zeros((1,), bool)
        )

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        return {"clip": denoising.init_clip(self.clip, rng)}

    def fit_statistics(self, frozen: Any, batches: Iterable[base.Batch]) -> dict[str, Any]:
        return {}

    def loss(self, params, frozen, batch, rng, *, train):
        drop_rng, noise_rng = jax.random.split(rng)
        z_i = base.embed_images(self.clip, frozen["clip"], batch["clip_image"])
        z_t = base.embed_tokens(self.clip, frozen["clip"], batch["clip_tokens"])
        dropped = base.drop(drop_rng, self.drop.text, z_i.shape[0])

        def denoise(x_t, t):
            return self.network.apply(params, x_t, t, batch["tokens"], self.scale * z_t, dropped)

        return denoising.loss(self.diffusion, denoise, self.scale * z_i, noise_rng)

    def sample(
        self,
        params: base.Params,
        tokens: Tokens,
        z_t: Embeddings,
        keys: ExampleKeys,
        *,
        negative: tuple[Tokens, Embeddings] | None = None,
    ) -> Embeddings:
        """Returns one normalised z_i per caption: of `sampling.candidates` draws, the one nearest to z_t (2.2).

        `negative` is the tokens and z_t of captions to steer away from, in place of the dropped condition.

        Raises:
          InputError: a negative caption, but guidance_scale 1.
        """
        n, d = z_t.shape
        candidates = self.sampling.candidates
        if negative is not None:
            check_negative(self.sampling.guidance_scale)

        def prefix(tokens: Tokens, z_t: Embeddings, *, dropped: bool = False):
            flags = jnp.full((n,), dropped)
            return self.network.apply(params, tokens, self.scale * z_t, flags, method="prefix")

        def denoise(x_t, t, condition):
            return self.network.apply(params, condition, x_t, t, method="denoise")

        null = prefix(tokens, z_t, dropped=True) if negative is None else prefix(*negative)
        denoiser = classifier_free(denoise, prefix(tokens, z_t), null, scale=self.sampling.guidance_scale)

        def draw(candidate):
            candidate_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, candidate)
            return self.sampler(denoiser, samplers.initial_noise(candidate_keys, (d,)), candidate_keys)

        drawn = base.normalize(jax.lax.map(draw, jnp.arange(candidates)))
        best = jnp.argmax(jnp.einsum("cbd,bd->cb", drawn, z_t), 0)
        return drawn[best, jnp.arange(n)]

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def sample_z_i(params, frozen, batch, rng):
            z_t = base.embed_tokens(self.clip, frozen["clip"], batch["clip_tokens"])
            negative = base.negative(self.clip, frozen["clip"], batch)
            return self.sample(params, batch["tokens"], z_t, base.example_keys(rng, batch), negative=negative)

        def z_i(params, frozen, batch, rng):
            return base.embed_images(self.clip, frozen["clip"], batch["clip_image"])

        return {"loss": loss, "sample_z_i": sample_z_i, "z_i": z_i}
