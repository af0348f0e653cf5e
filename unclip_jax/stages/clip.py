"""Stage "clip": contrastive training of the image and text towers (Radford et al., 2021).

With `model.noised` images are noised as `config.diffusion` says, and the image tower is told how much: such a CLIP can
guide a diffusion model, whose images are noisy until the end (Nichol et al., 2021, sections 2.4 and 4.3).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from unclip_jax import replicas
from unclip_jax.arrays import Embeddings, Timesteps, from_uint8
from unclip_jax.errors import InputError
from unclip_jax.models.clip import CLIP
from unclip_jax.stages import base, denoising


def contrastive_loss(
    z_i: Embeddings, z_t: Embeddings, scale: Float[Array, ""], *, level: Float[Array, "b"] | None = None
) -> tuple[Float[Array, ""], base.Metrics]:
    """Symmetric cross-entropy of matching each image to its caption and back, over the global batch.

    A replica compares its own b pairs with those of all replicas and so holds b rows of logits each way, never the
    whole square.

    Args:
      z_i, z_t: normalised embeddings of this replica's b pairs.
      scale: the logits' factor, 1 / temperature.
      level: of each image's noise, in [0, 1).

    Returns:
      The mean over this replica's rows of both directions, and the share of images whose own caption is the nearest;
      of each quarter of the levels, too, where they are given.
    """
    labels = replicas.first_row(len(z_i)) + jnp.arange(len(z_i))
    by_image = scale * z_i @ replicas.gather(z_t).T
    by_caption = scale * z_t @ replicas.gather(z_i).T
    image_to_text = optax.softmax_cross_entropy_with_integer_labels(by_image, labels)
    text_to_image = optax.softmax_cross_entropy_with_integer_labels(by_caption, labels)
    hits = jnp.argmax(by_image, -1) == labels
    metrics: base.Metrics = {"accuracy": hits.mean(dtype=jnp.float32)}
    if level is not None:
        quarters = base.by_quartile(hits.astype(jnp.float32), (4 * level).astype(jnp.int32), 4)
        metrics |= {name.replace("loss", "accuracy"): pair for name, pair in quarters.items()}
    return (image_to_text.mean() + text_to_image.mean()) / 2, metrics


class CLIPStage:
    """Trains CLIP; predicts `z_i` of images and `z_t` of captions, of length 1, or `raw_…` as its heads return them.

    One of noised images predicts those of clean ones, at the cleanest timestep.
    """

    splits_batch = False  # every other pair of the batch is a negative

    def __init__(self, config: ConfigDict):
        if config.model.get("noised", False) != ("diffusion" in config):
            raise InputError("config.model.noised and config.diffusion, which says how images are noised, go together")
        fields = dict(config.model)
        self.logit_scale_max = fields.pop("logit_scale_max")
        self.network = base.network(CLIP, fields, base.compute_dtype(config), where="config.model")
        self.vocab_size = config.model.vocab_size
        self.diffusion = denoising.process(config.diffusion) if self.network.noised else None

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "clip_image": base.pixels(batch_size, self.network.image_size),
            "clip_tokens": base.token_ids(batch_size, self.network.context_length),
            "id": base.ids(batch_size),
        }

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        spec = self.batch_spec(batch_size)
        image, tokens = ({name: spec[name]} for name in ("clip_image", "clip_tokens"))
        return {"loss": spec, "z_i": image, "z_t": tokens, "raw_z_i": image, "raw_z_t": tokens}

    def init(self, rng: jax.Array) -> base.Params:
        n = self.network
        images = jnp.zeros((1, n.image_size, n.image_size, 3))
        return n.init(rng, images, jnp.zeros((1, n.context_length), jnp.int32), method="read_all")

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        return {}

    def fit_statistics(self, over_data: base.OverData) -> tuple[dict[str, Any], dict[str, float]]:
        return {}, {}

    def loss(self, params, frozen, batch, rng, *, train):
        images = from_uint8(batch["clip_image"])
        t, levels = None, ()
        if self.diffusion is not None:
            t_rng, eps_rng = jax.random.split(rng)
            t = base.draw_timesteps(t_rng, self.diffusion.num_timesteps, len(images))
            images = self.diffusion.q_sample(x_start=images, t=t, eps=jax.random.normal(eps_rng, images.shape))
            levels = (t / self.diffusion.num_timesteps,)
        z_i, z_t, _ = self.network.apply(params, images, batch["clip_tokens"], t)
        scale = self._scale(params)

        def of_rows(z_i, z_t, *rest):
            *level, scale = rest
            return contrastive_loss(z_i, z_t, scale, level=level[0] if level else None)

        embeddings = base.normalize(z_i), base.normalize(z_t)
        loss, metrics = replicas.by_rows(of_rows, *embeddings, *levels, whole=scale)
        return loss, {**metrics, "logit_scale": scale}

    def _scale(self, params: base.Params) -> Float[Array, ""]:
        return jnp.exp(jnp.minimum(params["params"]["logit_scale"], jnp.log(self.logit_scale_max)))

    def logits(
        self, params: base.Params, x_t: Float[Array, "b h w 3"], t: Timesteps, toward: Embeddings
    ) -> Float[Array, "b"]:
        """Returns how much noised images look like what these embeddings are of: the cosine times the logit scale.

        Args:
          params: weights of a CLIP of noised images.
          x_t: images in [-1, 1] at the noise of `t`, timesteps of the process it was trained on.
          t: one for each.
          toward: embeddings of captions, or of clean images, by this CLIP; of any length.
        """
        z_i: Any = self.network.apply(params, x_t, t, method="encode_image")
        return self._scale(params) * jnp.sum(base.normalize(z_i) * base.normalize(toward), -1)

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def z_i(params, frozen, batch, rng, *, unit=True):
            return base.embed_images(self.network, params, batch["clip_image"], unit=unit)

        def z_t(params, frozen, batch, rng, *, unit=True):
            return base.embed_tokens(self.network, params, batch["clip_tokens"], unit=unit)

        raw = {f"raw_{fn.__name__}": functools.partial(fn, unit=False) for fn in (z_i, z_t)}
        return {"loss": loss, "z_i": z_i, "z_t": z_t, **raw}
