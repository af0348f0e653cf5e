"""Stage "prior_ar": the autoregressive prior, which writes z_i as a sentence of codes (section 2.2).

PCA of z_i over the data gives the components, ordered by eigenvalue, and each coefficient is quantised; those
statistics are measured before the first step and kept in the checkpoint. A token of the quantised z_i.z_t stands in
front; sampling draws it from the top half of its distribution.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from unclip_jax.arrays import Embeddings, ExampleKeys, Tokens
from unclip_jax.diffusion.guidance import check_negative
from unclip_jax.models import quantizer
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.stages import base, denoising

_JUDGED = 4096  # examples on which a fitted quantizer is judged


class ARPriorStage:
    """Trains p(codes of z_i | caption, z_t, z_i.z_t); predicts `z_i` from captions."""

    splits_batch = True

    def __init__(self, config: ConfigDict):
        self.network = base.network(ARPrior, config.model, base.compute_dtype(config), where="config.model")
        self.clip = base.clip_network(config)
        self.sampling = config.sampling
        self.drop = config.drop
        self.dot_top = config.dot_top
        self.context_length = config.model.context_length
        self.vocab_size = config.model.vocab_size
        self.precomputed = base.precomputed(config)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = self._spec(batch_size)
        return base.with_embeddings(spec, self.clip.embed_dim) if self.precomputed else spec

    def _spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "clip_image": base.pixels(batch_size, self.clip.image_size),
            "clip_tokens": base.token_ids(batch_size, self.clip.context_length),
            "tokens": base.token_ids(batch_size, self.context_length),
            "id": base.ids(batch_size),
        }

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        spec = self._spec(batch_size)
        sample = {name: spec[name] for name in ("clip_tokens", "tokens", "id")}
        return {"loss": spec, "sample_z_i": sample, "z_i": {"clip_image": spec["clip_image"]}}

    def init(self, rng: jax.Array) -> base.Params:
        n = self.network
        codes, dot = jnp.zeros((1, n.components), jnp.int32), jnp.zeros((1,), jnp.int32)
        tokens = jnp.zeros((1, self.context_length), jnp.int32)
        return n.init(rng, codes, dot, tokens, jnp.zeros((1, n.embed_dim)), jnp.zeros((1,), bool))

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        n = self.network
        # The statistics of unit vectors that point anywhere: a quantizer that works before it is fitted.
        d = n.embed_dim
        reach = 3 / np.sqrt(d)
        edges = jnp.linspace(-reach, reach, n.buckets + 1)
        values = (edges[1:] + edges[:-1]) / 2
        statistics = {
            "mean": jnp.zeros((d,)),
            "basis": jnp.eye(d)[:, : n.components],
            "variances": jnp.full((d,), 1 / d),
            "edges": jnp.tile(edges[1:-1], (n.components, 1)),
            "values": jnp.tile(values, (n.components, 1)),
            "dot_edges": jnp.linspace(-1, 1, n.dot_buckets + 1)[1:-1],
            "dot_probabilities": jnp.full((n.dot_buckets,), 1 / n.dot_buckets),
        }
        return {"clip": denoising.init_clip(self.clip, rng), "statistics": statistics}

    def fit_statistics(self, over_data: base.OverData) -> tuple[dict[str, Any], dict[str, float]]:
        """Fits PCA and the buckets; tells what share of the variance codes lose, on the first of the examples."""
        n, embed = self.network, self._embed
        fitted = quantizer.fit(
            lambda measure: over_data(embed, measure),
            components=n.components,
            buckets=n.buckets,
            dot_buckets=n.dot_buckets,
        )

        def lost(frozen, batch):
            return quantizer.lost_variance(fitted, embed(frozen, batch)[0])

        def add_up(lost, there):
            return lost.sum(dtype=np.float64), there.sum(dtype=np.float64)

        lost_sum, there_sum = over_data(lost, add_up, limit=_JUDGED)
        return fitted, {"reconstruction_error": float(lost_sum / there_sum), **quantizer.describe(fitted)}

    def _embed(self, frozen, batch) -> tuple[Embeddings, Embeddings]:
        return base.image_embeddings(self.clip, frozen, batch), base.text_embeddings(self.clip, frozen, batch)

    def loss(self, params, frozen, batch, rng, *, train):
        z_i, z_t = self._embed(frozen, batch)
        statistics = frozen["statistics"]
        codes = quantizer.encode(statistics, z_i)
        dot = quantizer.encode_dot(statistics, z_i, z_t)
        dropped = base.drop(rng, self.drop.text, z_i.shape[0])
        logits = self.network.apply(params, codes, dot, batch["tokens"], z_t, dropped)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
        return losses.mean(), {
            "accuracy": (logits.argmax(-1) == codes).mean(dtype=jnp.float32),
            "first_code_loss": losses[:, 0].mean(),
            "reconstruction_error": quantizer.reconstruction_error(statistics, z_i),
        }

    def sample(
        self,
        params: base.Params,
        statistics: Any,
        tokens: Tokens,
        z_t: Embeddings,
        keys: ExampleKeys,
        *,
        negative: tuple[Tokens, Embeddings] | None = None,
    ) -> Embeddings:
        """Returns one normalised z_i per caption: of `sampling.candidates` draws, the one nearest to z_t.

        `negative` is the tokens and z_t of captions to steer away from, in place of the dropped condition.

        Raises:
          InputError: a negative caption, but guidance_scale 1.
        """
        n = z_t.shape[0]
        if negative is not None:
            check_negative(self.sampling.guidance_scale)

        def draw(candidate):
            candidate_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, candidate)
            codes = self._sample_codes(params, statistics, tokens, z_t, candidate_keys, negative)
            return base.normalize(quantizer.decode(statistics, codes))

        drawn = jax.lax.map(draw, jnp.arange(self.sampling.candidates))
        best = jnp.argmax(jnp.einsum("cbd,bd->cb", drawn, z_t), 0)
        return drawn[best, jnp.arange(n)]

    def _sample_codes(self, params, statistics, tokens, z_t, keys, negative) -> Int[Array, "b k"]:
        """Draws the dot-product token, then one code after another; guidance runs both branches as one batch."""
        n, scale = z_t.shape[0], self.sampling.guidance_scale
        guided = scale != 1
        dot = jax.vmap(lambda key: quantizer.sample_dot(key, statistics, top=self.dot_top))(keys)
        away_tokens, away_z_t = (tokens, z_t) if negative is None else negative
        dropped, away_dropped = jnp.zeros((n,), bool), jnp.full((n,), negative is None)

        def both(x, away):
            return jnp.concatenate([x, away]) if guided else x

        def draw(logits, position):
            if guided:
                conditional, null = jnp.split(logits, 2)
                logits = null + scale * (conditional - null)
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
            temperature = max(self.sampling.temperature, 1e-6)
            return jax.vmap(jax.random.categorical)(step_keys, logits / temperature).astype(jnp.int32)

        def step(carry, position):
            code, state = carry
            logits, state = self.network.apply(params, state, both(code, code), position, method="step")
            code = draw(logits, position + 1)
            return (code, state), code

        captions = both(tokens, away_tokens), both(z_t, away_z_t), both(dropped, away_dropped)
        logits, state = self.network.apply(params, both(dot, dot), *captions, method="prefix")
        first = draw(logits, 0)
        _, rest = jax.lax.scan(step, (first, state), jnp.arange(self.network.components - 1))
        return jnp.concatenate([first[:, None], rest.T], 1)

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def sample_z_i(params, frozen, batch, rng):
            z_t = base.embed_tokens(self.clip, frozen["clip"], batch["clip_tokens"])
            keys = base.example_keys(rng, batch)
            negative = base.negative(self.clip, frozen["clip"], batch)
            return self.sample(params, frozen["statistics"], batch["tokens"], z_t, keys, negative=negative)

        def z_i(params, frozen, batch, rng):
            return base.embed_images(self.clip, frozen["clip"], batch["clip_image"])

        return {"loss": loss, "sample_z_i": sample_z_i, "z_i": z_i}
