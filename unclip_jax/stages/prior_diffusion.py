"""Stage "prior_diffusion": the diffusion prior p(z_i | caption), section 2.2.

The units of its embeddings are those of `embedding_space`. Sampling with the method "analytic", the paper's, needs the
variance of the network's predictions: `python -m unclip_jax.statistics` measures it on trained weights.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from unclip_jax.arrays import Embeddings, Tokens
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.guidance import check_negative, classifier_free
from unclip_jax.errors import InputError
from unclip_jax.models.captions import EncodedCaption, empty_caption, valid_tokens
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.stages import base, denoising
from unclip_jax.stages.embedding_space import EmbeddingSpace


class Condition(NamedTuple):
    """What the network reads beside the noised z_i.

    Attributes:
      caption: token ids, or CLIP's reading of them where the network has `caption="clip"`.
      z_t: embeddings of the captions, unscaled.
    """

    caption: Any
    z_t: Any


class DiffusionPriorStage:
    """Trains p(z_i | caption, z_t); predicts `z_i` from captions, and x_start, all candidates as they were drawn."""

    splits_batch = True

    def __init__(self, config: ConfigDict):
        self.network = base.network(DiffusionPrior, config.model, base.compute_dtype(config), where="config.model")
        self.clip = base.clip_network(config)
        self.diffusion = denoising.process(config.diffusion)
        self.sampling = config.sampling
        # Embeddings are not pixels: what exceeds a range says nothing of how to rescale the rest.
        self.sampler = denoising.sampler(
            self.diffusion, config.sampling, thresholds=("static", "none"), measures_variance=True
        )
        self.drop = config.drop
        self.space = EmbeddingSpace.of(config, self.clip)
        self.context_length = config.model.context_length
        self.precomputed = base.precomputed(config)
        # Whether captions are read by the frozen CLIP, as in Karlo; else by the network itself.
        self.clip_reads = self.network.caption == "clip"
        self.vocab_size = self.clip.vocab_size if self.clip_reads else config.model.vocab_size
        if self.clip_reads and self.context_length != self.clip.context_length:
            raise InputError(
                f"config.model.context_length={self.context_length}: a prior with caption='clip' reads all of CLIP's "
                f"positions, {self.clip.context_length}"
            )

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = self._spec(batch_size)
        # Of captions that CLIP reads more than z_t is wanted.
        return base.with_embeddings(spec, self.clip.embed_dim, texts=not self.clip_reads) if self.precomputed else spec

    def _spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        own = {} if self.clip_reads else {"tokens": base.token_ids(batch_size, self.context_length)}
        return {
            "clip_image": base.pixels(batch_size, self.clip.image_size),
            "clip_tokens": base.token_ids(batch_size, self.clip.context_length),
            **own,
            "id": base.ids(batch_size),
        }

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        spec = self._spec(batch_size)
        sample = {name: spec[name] for name in spec if name != "clip_image"}
        z_i = {"clip_image": spec["clip_image"]}
        return {"loss": spec, "sample_z_i": sample, "sample_x_start": sample, "z_i": z_i}

    def init(self, rng: jax.Array) -> base.Params:
        z = jnp.zeros((1, self.network.embed_dim))
        t = jnp.zeros((1,), jnp.int32)
        if self.clip_reads:
            shape = (1, self.context_length)
            states = EncodedCaption(jnp.zeros((*shape, self.clip.text_width)), jnp.ones(shape, bool))
            return self.network.init(rng, z, t, states, z)
        return self.network.init(rng, z, t, jnp.zeros((1, self.context_length), jnp.int32), z, jnp.zeros((1,), bool))

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        variance = jnp.zeros((self.diffusion.num_timesteps,))
        statistics = {"x_start_variance": variance, **self.space.statistics()}
        return {"clip": denoising.init_clip(self.clip, rng), "statistics": statistics}

    def fit_statistics(self, over_data: base.OverData) -> tuple[dict[str, Any], dict[str, float]]:
        return self.space.fit(over_data)

    def condition(self, frozen: Any, batch: base.Batch) -> Condition:
        """Returns what the network reads of a batch's captions."""
        if self.clip_reads:
            return self._read_by_clip(frozen, batch["clip_tokens"])
        return Condition(batch["tokens"], self.space.of_texts(frozen, batch))

    def null(self, frozen: Any, n: int) -> Condition | None:
        """Returns what hides n captions: CLIP's reading of empty ones; None for a network that has its own null."""
        if not self.clip_reads:
            return None
        empty = self._read_by_clip(frozen, empty_caption(self.context_length, self.clip.vocab_size)[None])
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape[1:])), empty)

    def _negative(self, frozen, batch) -> Condition | None:
        """Returns the negative captions of a batch, which come in optional fields; None where it has none.

        Raises:
          InputError: a negative caption, but guidance_scale 1.
        """
        fields = {name.removeprefix("negative_"): x for name, x in batch.items() if name.startswith("negative_")}
        if not fields:
            return None
        check_negative(self.sampling.guidance_scale)
        return self.condition(frozen, fields)

    def _read_by_clip(self, frozen, tokens: Tokens) -> Condition:
        z_t, states = self.space.texts_and_states(frozen["clip"], tokens)
        return Condition(EncodedCaption(states, valid_tokens(tokens, eot=self.clip.vocab_size - 1)), z_t)

    def _x_start(self, frozen, batch) -> Embeddings:
        return self.space.enter(self.space.of_images(frozen, batch), frozen["statistics"])

    def _dropped(
        self, condition: Condition, null: Condition | None, dropped: Bool[Array, "b"]
    ) -> tuple[Any, Embeddings, Bool[Array, "b"] | None]:
        """Returns caption, scaled z_t and the `drop` that the network is to be given to hide both where `dropped`."""
        drop: Any = dropped
        if null is not None:
            each = functools.partial(_where, dropped)
            condition, drop = jax.tree.map(each, null, condition), None
        return condition.caption, self.space.factor * condition.z_t, drop

    def loss(self, params, frozen, batch, rng, *, train):
        drop_rng, noise_rng = jax.random.split(rng)
        x_start = self._x_start(frozen, batch)
        n = x_start.shape[0]
        dropped = base.drop(drop_rng, self.drop.text, n)
        caption, z_t, drop = self._dropped(self.condition(frozen, batch), self.null(frozen, n), dropped)

        def denoise(x_t, t):
            return self.network.apply(params, x_t, t, caption, z_t, drop)

        return denoising.loss(self.diffusion, denoise, x_start, noise_rng)

    def _prefix(self, params, condition: Condition, *, dropped: bool = False) -> Any:
        """What the network reads once per caption, or, `dropped`, of its own null in their place."""
        drop = jnp.ones((condition.z_t.shape[0],), bool) if dropped else None
        return self.network.apply(params, condition.caption, self.space.factor * condition.z_t, drop, method="prefix")

    def _denoise(self, params, x_t, t, prefix) -> Any:
        return self.network.apply(params, prefix, x_t, t, method="denoise")

    def sample(
        self,
        params: base.Params,
        statistics: Any,
        condition: Condition,
        null: Condition | None,
        keys: samplers.NoiseSource,
    ) -> Embeddings:
        """Returns one z_i per caption: of `sampling.candidates` draws, the one whose direction is nearest to z_t's.

        Guidance leads away from `null`: a negative caption, or what `null` returns.

        Raises:
          InputError: noise is given, which is that of one draw, but there are several candidates.
        """
        drawn = self.space.leave(self.draw(params, statistics, condition, null, keys), statistics)
        best = jnp.argmax(jnp.einsum("cbd,bd->cb", base.normalize(drawn), condition.z_t), 0)
        return drawn[best, jnp.arange(best.shape[0])]

    def draw(
        self,
        params: base.Params,
        statistics: Any,
        condition: Condition,
        null: Condition | None,
        keys: samplers.NoiseSource,
    ) -> Float[Array, "c b d"]:
        """Returns `sampling.candidates` draws of x_start for each caption, as the sampler leaves them."""
        d = condition.z_t.shape[1]
        given = isinstance(keys, samplers.GivenNoise)
        if given and self.sampling.candidates != 1:
            raise InputError(
                f"noise is given, which is that of one draw, but sampling.candidates={self.sampling.candidates}; set 1"
            )
        denoiser = classifier_free(
            functools.partial(self._denoise, params),
            self._prefix(params, condition),
            self._prefix(params, condition, dropped=True) if null is None else self._prefix(params, null),
            scale=self.sampling.guidance_scale,
        )

        def one(candidate):
            own = keys if given else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, candidate)
            x_T = samplers.initial_noise(own, (d,))
            return self.sampler(denoiser, x_T, own, x_start_variance=statistics["x_start_variance"])

        return jax.lax.map(one, jnp.arange(self.sampling.candidates))

    def x_start_errors(self, params, frozen, batch, rng) -> tuple[Float[Array, "T b"], Float[Array, "b"]]:
        """See `base.MeasuresVariance`. The caption is read once, as in sampling."""
        x_start = self._x_start(frozen, batch)
        prefix = self._prefix(params, self.condition(frozen, batch))
        errors = denoising.x_start_errors(
            self.diffusion,
            lambda x_t, t: self._denoise(params, x_t, t, prefix),
            x_start,
            base.example_keys(rng, batch),
        )
        return errors, jnp.square(x_start).mean(-1)

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def given(frozen, batch, rng):
            condition = self.condition(frozen, batch)
            null = self._negative(frozen, batch) or self.null(frozen, condition.z_t.shape[0])
            return frozen["statistics"], condition, null, base.noise(rng, batch)

        def sample_z_i(params, frozen, batch, rng):
            return self.sample(params, *given(frozen, batch, rng))

        def sample_x_start(params, frozen, batch, rng):
            return jnp.swapaxes(self.draw(params, *given(frozen, batch, rng)), 0, 1)

        def z_i(params, frozen, batch, rng):
            return self.space.images(frozen["clip"], batch["clip_image"])

        return {"loss": loss, "sample_z_i": sample_z_i, "sample_x_start": sample_x_start, "z_i": z_i}


def _where(chosen: Bool[Array, "b"], yes: Array, no: Array) -> Array:
    return jnp.where(chosen.reshape(-1, *[1] * (no.ndim - 1)), yes, no)
