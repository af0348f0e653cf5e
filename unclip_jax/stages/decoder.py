"""Stage "decoder": the diffusion model that turns a CLIP image embedding into an image (section 2.1).

The paper's ablations are configs of this stage: without captions (no `model.text`), without CLIP embeddings
(`model.embed_dim` 0, which is GLIDE), or on text embeddings in place of image embeddings, in training (`condition`) or
only when sampled. Karlo's decoder is one, too: with `model.caption` "clip" captions are read by the frozen CLIP.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from unclip_jax.arrays import Embeddings, Tokens, from_uint8, to_uint8
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.guidance import check_negative, classifier_free
from unclip_jax.errors import InputError
from unclip_jax.models.captions import EncodedCaption, empty_caption, valid_tokens
from unclip_jax.models.decoder import Decoder
from unclip_jax.stages import base, denoising, inpainting


class DecoderStage:
    """Trains p(x | z_i, caption); predicts images from `z_i` and captions.

    `config.condition` "text" is the text-embedding decoder of section 5.1: it is trained on z_t, and sampled with z_t
    in the field `z_i`. Two fields of "sample" are optional: without `z_i` the embedding is dropped, as in training;
    `negative_tokens`, and `negative_z_t` if it reads text embeddings, are what guidance steers away from. Noise may be
    given, see `base.noise`. With `config.round_pixels` False "pixels" is there too: "sample" before it is rounded to
    8 bits, which diffusers' pipelines never do between their stages. "sample" may be given a part of the image, see
    `inpainting.given`; with `config.inpaint` the network has learned to read it. "x_T" is the noise from
    which "sample" would draw `image`, float32.
    """

    splits_batch = True

    def __init__(self, config: ConfigDict):
        self.network = base.network(Decoder, config.model, base.compute_dtype(config), where="config.model")
        self.diffusion = denoising.process(config.diffusion)
        self.sampling = config.sampling
        self.sampler = denoising.sampler(self.diffusion, config.sampling)
        self.invert = denoising.inverter(self.diffusion, config.sampling)
        self.drop = config.drop
        self.side, self.inpaints = config.model.unet.image_size, config.get("inpaint", False)
        inpainting.check(config.model.unet.get("in_channels", 3), 3, inpaints=self.inpaints)
        self.embed_dim = config.model.embed_dim
        self.condition = config.get("condition", "image")
        if self.condition not in ("image", "text"):
            raise InputError(
                f"config.condition={self.condition!r}, but a decoder is conditioned on CLIP's embedding of the 'image' "
                "or of the 'text'; on neither with config.model.embed_dim=0"
            )
        text = config.model.get("text")
        self.context_length = text.context_length if text else 0
        self.vocab_size = text.vocab_size if text else 0
        self.clip_reads = self.network.caption == "clip"
        self.rounds = config.get("round_pixels", True)
        self.precomputed = base.precomputed(config)
        self.unit = config.get("embedding", {}).get("norm", "unit") == "unit"
        if self.embed_dim or self.clip_reads:
            self.clip = base.clip_network(config)
        if self.embed_dim and self.condition == "text":
            self.vocab_size = self._shared_vocabulary()
        if self.clip_reads:
            self.context_length, self.vocab_size = self.clip.context_length, self.clip.vocab_size

    def _shared_vocabulary(self) -> int:
        """Captions reach CLIP and the text encoder by one tokenizer."""
        sizes = {self.clip.vocab_size, self.vocab_size} - {0}
        if len(sizes) > 1:
            raise InputError(
                f"config.clip.vocab_size={self.clip.vocab_size}, config.model.text.vocab_size={self.vocab_size}: a "
                "decoder that reads text embeddings needs one vocabulary for both"
            )
        return sizes.pop()

    @property
    def reads_captions(self) -> bool:
        """Whether what it draws depends on a caption other than through an image embedding."""
        return bool(self.context_length) or (bool(self.embed_dim) and self.condition == "text")

    def _conditions(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"tokens": base.token_ids(batch_size, self.context_length)} if self.context_length else {}

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = self._spec(batch_size)
        return base.with_embeddings(spec, self.embed_dim) if self.precomputed else spec

    def _spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = {"image": base.pixels(batch_size, self.side), **self._conditions(batch_size), "id": base.ids(batch_size)}
        if self.embed_dim and self.condition == "image":
            spec["clip_image"] = base.pixels(batch_size, self.clip.image_size)
        elif self.embed_dim:
            spec["clip_tokens"] = base.token_ids(batch_size, self.clip.context_length)
        return spec

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        sample = {**self._conditions(batch_size), "id": base.ids(batch_size)}
        if self.embed_dim:
            sample["z_i"] = base.vectors(batch_size, self.embed_dim)
        spec = self._spec(batch_size)
        reconstruct = {name: spec[name] for name in spec if name != "image"}
        exact = {} if self.rounds else {"pixels": sample}
        inverted = {"image": spec["image"], **{name: x for name, x in sample.items() if name != "id"}}
        return {"loss": spec, "sample": sample, "reconstruct": reconstruct, "x_T": inverted, **exact}

    def init(self, rng: jax.Array) -> base.Params:
        image = jnp.zeros((1, self.side, self.side, 3 + inpainting.CHANNELS * self.inpaints))
        caption: Any = jnp.zeros((1, self.context_length), jnp.int32) if self.context_length else None
        z_i, z_t = jnp.zeros((1, self.embed_dim)) if self.embed_dim else None, None
        if self.clip_reads:
            shape = (1, self.context_length)
            caption = EncodedCaption(jnp.zeros((*shape, self.clip.text_width)), jnp.ones(shape, bool))
            z_t = jnp.zeros((1, self.clip.embed_dim))
        return self.network.init(rng, image, jnp.zeros((1,), jnp.int32), caption, z_i, z_t=z_t)

    def init_frozen(self, rng: jax.Array) -> dict[str, Any]:
        return {"clip": denoising.init_clip(self.clip, rng)} if self.embed_dim or self.clip_reads else {}

    def fit_statistics(self, over_data: base.OverData) -> tuple[dict[str, Any], dict[str, float]]:
        return {}, {}

    def _embed(self, frozen: Any, batch: base.Batch) -> Embeddings | None:
        """The CLIP embedding that is there of an example: the decoder's condition in training."""
        if not self.embed_dim:
            return None
        if self.condition == "text":
            return base.text_embeddings(self.clip, frozen, batch, unit=self.unit)
        return base.image_embeddings(self.clip, frozen, batch, unit=self.unit)

    def _caption(self, frozen: Any, tokens: Any, dropped: Bool[Array, "b"]) -> tuple[Any, Any, Any]:
        """Returns caption, `drop_text` and z_t that the network is to be given, to hide captions where `dropped`."""
        if not self.clip_reads:
            return tokens, dropped if self.context_length else None, None
        tokens = jnp.where(dropped[:, None], empty_caption(self.context_length, self.vocab_size), tokens)
        read: Any = self.clip.apply(frozen["clip"], tokens, method="read_text")
        z_t, states = jax.lax.stop_gradient(read)
        seen = valid_tokens(tokens, eot=self.vocab_size - 1)
        return EncodedCaption(states, seen), None, base.normalize(z_t) if self.unit else z_t

    def loss(self, params, frozen, batch, rng, *, train):
        drop_rng, noise_rng, dropout_rng = jax.random.split(rng, 3)
        x_start = from_uint8(batch["image"])
        n = x_start.shape[0]
        z_i = self._embed(frozen, batch)
        # Independent drops: 10% of the embeddings, 50% of the captions (section 2.1).
        text_rng, clip_rng = jax.random.split(drop_rng)
        drop_text, drop_clip = base.drop(text_rng, self.drop.text, n), base.drop(clip_rng, self.drop.clip, n)
        caption, drop_text, z_t = self._caption(frozen, batch.get("tokens"), drop_text)

        known = inpainting.erased(jax.random.fold_in(rng, 3), x_start) if self.inpaints else None

        def denoise(x_t, t):
            return self.network.apply(
                params,
                x_t if known is None else known.beside(x_t),
                t,
                caption,
                z_i,
                drop_text,
                drop_clip if self.embed_dim else None,
                deterministic=not train,
                z_t=z_t,
                rngs={"dropout": dropout_rng},
            )

        return denoising.loss(self.diffusion, denoise, x_start, noise_rng)

    def sample(
        self,
        params: base.Params,
        frozen: Any,
        z_i: Embeddings | None,
        tokens: Tokens | None,
        keys: samplers.NoiseSource,
        *,
        negative_tokens: Tokens | None = None,
        negative_z_t: Embeddings | None = None,
        x_T: Float[Array, "b s s 3"] | None = None,
        known: inpainting.Known | None = None,
        guide: samplers.Guide | None = None,
    ) -> Float[Array, "b s s 3"]:
        """Returns float images in [-1, 1] from embeddings and captions; of these, None is one that is dropped.

        Args:
          params: weights.
          frozen: the CLIP that reads captions, where one does.
          z_i: CLIP embeddings, of images, or of texts where `condition` says so.
          tokens: captions.
          keys: one per example, or the noise itself.
          negative_tokens: captions to steer away from, in place of the empty one.
          negative_z_t: their embeddings, in place of the null one; for a decoder that reads text embeddings. Of an
            image there is none: what the negative caption would look like is for a prior to say.
          x_T: initial noise, by default that of the keys.
          known: a part of the images, which they keep; by default nothing is known.
          guide: what sampling is guided by besides, see `samplers.sample`.

        Raises:
          InputError: a negative prompt, but guidance_scale 1.
        """
        n = (keys.x_T if isinstance(keys, samplers.GivenNoise) else keys).shape[0]
        guided = self._guided(params, frozen, n, (tokens, z_i), (negative_tokens, negative_z_t))
        part = inpainting.nothing(n, self.side) if known is None else known
        sampler = self.sampler if known is None else known.keeping(self.sampler)
        if guide is not None:
            sampler = functools.partial(sampler, guide=part.elsewhere(guide))
        return sampler(
            (lambda x_t, t: guided(part.beside(x_t), t)) if self.inpaints else guided,
            samplers.initial_noise(keys, (self.side, self.side, 3)) if x_T is None else x_T,
            keys,
        )

    def _guided(
        self,
        params: base.Params,
        frozen: Any,
        n: int,
        given: tuple[Tokens | None, Embeddings | None],
        null: tuple[Tokens | None, Embeddings | None],
    ) -> samplers.Denoiser:
        """Returns the network of n examples as samplers call it: guided from the null captions and embeddings."""
        if any(x is not None for x in null):
            check_negative(self.sampling.guidance_scale)

        def condition(words, z):
            blank = jnp.zeros((n, self.context_length), jnp.int32)
            no_words, no_z = jnp.full((n,), words is None), jnp.full((n,), z is None)
            caption, drop_text, z_t = self._caption(frozen, blank if words is None else words, no_words)
            embedding = jnp.zeros((n, self.embed_dim)) if z is None else z
            return self.network.apply(params, caption, embedding, drop_text, no_z, z_t, method="condition")

        def denoise(x_t, t, conditioning):
            return self.network.apply(params, x_t, t, conditioning, method="denoise")

        scale = self.sampling.guidance_scale
        return classifier_free(denoise, condition(*given), condition(*null), scale=scale, guided_channels=3)

    def guide(self, frozen: Any, batch: base.Batch) -> samplers.Guide | None:
        """What "sample" is guided by besides, of a batch's fields: nothing here, see `clip_guidance`."""
        del frozen, batch
        return None

    def predict_fns(self) -> dict[str, base.Predict]:
        def loss(params, frozen, batch, rng):
            return self.loss(params, frozen, batch, rng, train=False)

        def pixels(params, frozen, batch, rng):
            images = self.sample(
                params,
                frozen,
                batch.get("z_i"),
                batch.get("tokens"),
                base.noise(rng, batch),
                negative_tokens=batch.get("negative_tokens"),
                negative_z_t=batch.get("negative_z_t"),
                known=inpainting.given(batch),
                guide=self.guide(frozen, batch),
            )
            return jnp.clip(images, -1, 1)

        def sample(params, frozen, batch, rng):
            return to_uint8(pixels(params, frozen, batch, rng))

        def reconstruct(params, frozen, batch, rng):
            z_i = self._embed(frozen, batch)
            return to_uint8(self.sample(params, frozen, z_i, batch.get("tokens"), base.example_keys(rng, batch)))

        def x_T(params, frozen, batch, rng):
            n = len(batch["image"])
            guided = self._guided(params, frozen, n, (batch.get("tokens"), batch.get("z_i")), (None, None))
            nothing = inpainting.nothing(n, self.side)
            denoise = (lambda x_t, t: guided(nothing.beside(x_t), t)) if self.inpaints else guided
            return self.invert(denoise, from_uint8(batch["image"]))

        exact = {} if self.rounds else {"pixels": pixels}
        return {"loss": loss, "sample": sample, "reconstruct": reconstruct, "x_T": x_T, **exact}
