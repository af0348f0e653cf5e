"""Stage "clip": contrastive training of the image and text towers (Radford et al., 2021)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from unclip_jax import replicas
from unclip_jax.arrays import Embeddings, from_uint8
from unclip_jax.models.clip import CLIP
from unclip_jax.stages import base


def contrastive_loss(
    z_i: Embeddings, z_t: Embeddings, scale: Float[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Symmetric cross-entropy of matching each image to its caption and back, over the global batch.

    A replica compares its own b pairs with those of all replicas and so holds b rows of logits each way, never the
    whole square.

    Args:
      z_i, z_t: normalised embeddings of this replica's b pairs.
      scale: the logits' factor, 1 / temperature.

    Returns:
      The mean over this replica's rows of both directions, and the share of images whose own caption is the nearest.
    """
    labels = replicas.first_row(len(z_i)) + jnp.arange(len(z_i))
    by_image = scale * z_i @ replicas.gather(z_t).T
    by_caption = scale * z_t @ replicas.gather(z_i).T
    image_to_text = optax.softmax_cross_entropy_with_integer_labels(by_image, labels)
    text_to_image = optax.softmax_cross_entropy_with_integer_labels(by_caption, labels)
    hits = jnp.argmax(by_image, -1) == labels
    return (image_to_text.mean() + text_to_image.mean()) / 2, {"accuracy": hits.mean(dtype=jnp.float32)}


class CLIPStage:
    """Trains CLIP; predicts `z_i` of images and `z_t` of captions, of length 1, or `raw_…` as its heads return them."""

    splits_batch = False  # every other pair of the batch is a negative

    def __init__(self, config: ConfigDict):
        fields = dict(config.model)
        self.logit_scale_max = fields.pop("logit_scale_max")
        self.network = base.network(CLIP, fields, base.compute_dtype(config), where="config.model")
        self.vocab_size = config.model.vocab_size

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
        z_i, z_t, log_scale = self.network.apply(params, from_uint8(batch["clip_image"]), batch["clip_tokens"])
        scale = jnp.exp(jnp.minimum(log_scale, jnp.log(self.logit_scale_max)))
        loss, metrics = replicas.by_rows(contrastive_loss, base.normalize(z_i), base.normalize(z_t), whole=scale)
        return loss, {**metrics, "logit_scale": scale}

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def z_i(params, frozen, batch, rng, *, unit=True):
            return base.embed_images(self.network, params, batch["clip_image"], unit=unit)

        def z_t(params, frozen, batch, rng, *, unit=True):
            return base.embed_tokens(self.network, params, batch["clip_tokens"], unit=unit)

        raw = {f"raw_{fn.__name__}": functools.partial(fn, unit=False) for fn in (z_i, z_t)}
        return {"loss": loss, "z_i": z_i, "z_t": z_t, **raw}
