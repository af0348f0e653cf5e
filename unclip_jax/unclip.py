"""Text to image: prior, decoder and upsamplers as one chain of the stages' predict functions (Ramesh et al., 2022).

    model = unclip.UnCLIP.load("runs/quickstart")
    made = model.generate(["a small red star on a white background"], seed=0)
    made.images["upsampler_2"]      # uint8 [1, 64, 64, 3]

The parts are the workdirs of training runs. All must have been trained on one CLIP, and each must take the size that
the one before it makes; that is checked before anything is computed.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax import parts as parts_lib
from unclip_jax import sharding
from unclip_jax.arrays import to_uint8
from unclip_jax.data import resize
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError, nearest
from unclip_jax.parts import STAGES, Part
from unclip_jax.predictor import Drawing, Predictor

# What turns a caption into z_i: a prior, or nothing. "none" puts z_t itself in z_i's place (section 5.1), and "dropped"
# drops the embedding as training does, so that the caption alone is left (figure 8, first row).
PRIORS = {"diffusion": "prior_diffusion", "ar": "prior_ar", "none": None, "dropped": None}

Vectors = Float[np.ndarray, "b d"]
# Sides are free, for what comes out of a stage is larger than what goes in.
Pixels = UInt8[np.ndarray, "b _ _ 3"]
# What a decoder that rounds nothing hands on, in [-1, 1].
Exact = Float[np.ndarray, "b _ _ 3"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` made of n captions.

    Attributes:
      z_i: the embeddings that were decoded, float32 [n, d]; None where they were dropped.
      images: part -> uint8 [n, s, s, 3], the decoder's and every upsampler's, in that order.
      seconds: part -> seconds that this call spent in it, without compilation.
    """

    z_i: Vectors | None
    images: dict[str, Pixels]
    seconds: dict[str, float]


def image_id(prompt: str, seed: int) -> int:
    """Returns the id, uint32, that numbers the noise of a prompt's image: a function of prompt and seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:4], "little")


def names_for(models: str, *, priors: Sequence[str]) -> list[str]:
    """Returns the parts that images by these priors need: clip, the priors, the decoder and what upsamplers there are.

    What is no key of PRIORS, such as the embedding of a picture, needs none of its own. A decoder of captions alone
    needs no clip.

    Raises:
      InputError: there is no such folder.
    """
    there = parts_lib.folders(models)
    clip = ["clip"] if "clip" in there or set(priors) != {"dropped"} else []
    upsamplers = [name for name in there if STAGES[name] == "upsampler"]
    return [*clip, *(name for prior in priors if (name := PRIORS.get(prior))), "decoder", *upsamplers]


def _mesh(devices_per_image: int) -> jax.sharding.Mesh:
    here = jax.local_devices()
    if devices_per_image < 1 or len(here) % devices_per_image:
        known = ", ".join(str(n) for n in range(1, len(here) + 1) if len(here) % n == 0)
        raise InputError(f"{devices_per_image} devices per image do not divide this host's {len(here)}; {known} do")
    return sharding.make_mesh({"data": -1, "model": devices_per_image}, here)


class UnCLIP:
    """The trained parts of one unCLIP; make it with `load`."""

    def __init__(
        self, parts: Mapping[str, Part], *, models: str = "", microbatch: int = 32, devices_per_image: int = 1
    ):
        """Takes parts that fit each other.

        Args:
          parts: by name, keys of STAGES.
          models: the folder they come from, for error messages.
          microbatch: images per call of a network; the last call is filled up, so that each network is compiled once.
          devices_per_image: as the parts were placed for.

        `predictor` calls what the parts can predict besides.

        Raises:
          InputError: the parts do not fit each other; the first that does not is named.
        """
        self.parts = {name: parts[name] for name in STAGES if name in parts}
        self.models, self.devices_per_image = models, devices_per_image
        self.predictor = Predictor(self.parts, microbatch=microbatch, mesh=_mesh(devices_per_image))
        self.timings, self.microbatch = self.predictor.timings, self.predictor.microbatch
        self._tokenizers: dict[str, Tokenizer] = {}
        parts_lib.check_clip(self.parts)
        parts_lib.check_sizes(self.parts)
        parts_lib.check_units(self.parts)
        for part in self.parts.values():
            parts_lib.frozen_of(part, self.parts)

    @classmethod
    def load(
        cls,
        models: str | Mapping[str, str],
        *,
        only: Sequence[str] | None = None,
        sampling: Mapping[str, Mapping[str, Any]] | None = None,
        weights: str = "ema",
        microbatch: int = 32,
        devices_per_image: int = 1,
    ) -> "UnCLIP":
        """Reads the parts from a folder, or from the workdirs given by name.

        Args:
          models: a folder with sub-folders named as STAGES, each the workdir of a training run; or name -> workdir.
          only: the parts to read; by default all that are there.
          sampling: part -> {key of `config.sampling`: value}, in place of what the run's config says.
          weights: "ema", the moving average, or "params", the last weights.
          microbatch: images per call of a network.
          devices_per_image: devices that share each image, for those that one cannot hold: an upsampler's has its
            rows split over them, and networks that attend have their heads split. It divides this host's devices.

        Raises:
          InputError: no such folder or part, an unknown sampling key, a damaged checkpoint, or parts that do not fit.
        """
        folders = parts_lib.folders(models)
        sampling = dict(sampling or {})
        for name in [*(only or ()), *sampling]:
            if name not in STAGES:
                raise InputError(f"there is no part {name!r}; {nearest(name, STAGES)}")
        if weights not in ("ema", "params"):
            raise InputError(f"weights={weights!r}; they are 'ema' (the moving average) or 'params' (the last weights)")
        where = models if isinstance(models, str) else ""
        for name in only or ():
            if name not in folders:
                raise InputError(parts_lib.missing(name, where))
        chosen = {name: folder for name, folder in folders.items() if only is None or name in only}
        mesh = _mesh(devices_per_image)
        parts = {
            name: parts_lib.read(name, folder, mesh, weights=weights, sampling=sampling.get(name, {}))
            for name, folder in chosen.items()
        }
        return cls(parts, models=where, microbatch=microbatch, devices_per_image=devices_per_image)

    @property
    def upsamplers(self) -> list[str]:
        """Names of the upsamplers that are there, in the order of the cascade."""
        last = parts_lib.LAST.values()
        return [name for name in self.parts if STAGES[name] == "upsampler" and name not in last]

    @property
    def _raw(self) -> str:
        """Prefix of CLIP's functions that return embeddings of the length that the other parts know."""
        return "raw_" if any(parts_lib.raw_embeddings(part) for part in self.parts.values()) else ""

    def part(self, name: str) -> Part:
        """Returns a part.

        Raises:
          InputError: it is not there; the command that trains it is named.
        """
        if name not in self.parts:
            raise InputError(parts_lib.missing(name, self.models))
        return self.parts[name]

    def check(self, *, prior: str, negative: str | None = None) -> None:
        """Raises what `generate` would for its arguments, before anything is computed.

        Raises:
          InputError: an unknown prior, one that makes what the decoder was not trained on, or a negative prompt that
            no part would read.
        """
        if prior not in PRIORS:
            raise InputError(f"there is no prior {prior!r}; {nearest(prior, PRIORS)}")
        part = self.part("decoder")
        stage: Any = part.stage
        if not stage.embed_dim and prior != "dropped":
            raise InputError(
                f"the decoder in {part.workdir} reads captions and no embedding: use the prior 'dropped', not {prior!r}"
            )
        if stage.embed_dim and stage.condition == "text" and PRIORS[prior]:
            raise InputError(
                f"the decoder in {part.workdir} was trained on embeddings of texts, the prior {prior!r} makes those of "
                "images: use the prior 'none', which gives it z_t"
            )
        if negative is not None and not self.steered(prior):
            raise InputError(
                "guidance steers away from the negative prompt, but no part that reads captions is guided: set another "
                "guidance_scale than 1 for the decoder or the prior"
            )

    def steered(self, prior: str) -> list[str]:
        """Returns the parts that read a negative prompt: those that read captions and are guided."""
        decoder: Any = self.part("decoder").stage
        names = [name for name in (PRIORS[prior],) if name] + (["decoder"] if decoder.reads_captions else [])
        stages: dict[str, Any] = {name: self.part(name).stage for name in names}
        return [name for name, stage in stages.items() if stage.sampling.guidance_scale != 1]

    def tokenize(self, captions: Sequence[str], name: str, *, context_length: int) -> np.ndarray:
        """Returns token ids int32 [n, context_length] in the vocabulary that a part was trained with."""
        part = self.part(name)
        vocabulary = part.config.data.vocabulary
        if vocabulary not in self._tokenizers:
            self._tokenizers[vocabulary] = Tokenizer(vocabulary)
        tokenizer = self._tokenizers[vocabulary]
        if tokenizer.vocab_size != part.stage.vocab_size:
            raise InputError(
                f"the vocabulary {vocabulary!r} has {tokenizer.vocab_size} entries, {name} was trained with "
                f"{part.stage.vocab_size}; put back the vocabulary of the training run"
            )
        return tokenizer.encode(captions, context_length)

    def words(self, name: str, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """What a decoder or an upsampler reads of captions: the field `tokens`, or nothing."""
        length = cast(Any, self.part(name).stage).context_length
        return {"tokens": self.tokenize(captions, name, context_length=length)} if length else {}

    def embed_text(self, captions: Sequence[str]) -> Vectors:
        """Returns z_t, float32 [n, d]; of length 1, or as CLIP returns it where the other parts have it so."""
        stage: Any = self.part("clip").stage
        tokens = self.tokenize(captions, "clip", context_length=stage.network.context_length)
        return self.predictor.run("clip", f"{self._raw}z_t", {"clip_tokens": tokens})

    def embed_images(self, images: Pixels) -> Vectors:
        """Returns z_i, long as `embed_text`'s, float32 [n, d], of images: their central squares, at CLIP's size."""
        stage: Any = self.part("clip").stage
        small = [resize.square(image, size=stage.network.image_size) for image in images]
        return self.predictor.run("clip", f"{self._raw}z_i", {"clip_image": np.stack(small)})

    def prior_fields(self, captions: Sequence[str], name: str) -> dict[str, np.ndarray]:
        """Returns what a prior, named as in STAGES, reads of captions: token ids, int32 [n, …]."""
        stage: Any = self.part(name).stage
        return {
            "clip_tokens": self.tokenize(captions, "clip", context_length=stage.clip.context_length),
            "tokens": self.tokenize(captions, name, context_length=stage.context_length),
        }

    def sample_prior(
        self,
        captions: Sequence[str],
        *,
        prior: str = "diffusion",
        negative: str | None = None,
        **drawing: Unpack[Drawing],
    ) -> Vectors:
        """Returns one z_i per caption, float32 [n, d].

        Args:
          captions: n captions.
          prior: a key of PRIORS but "dropped"; "none" returns z_t.
          negative: a caption to steer away from, in place of the empty one.
          drawing: see Drawing.

        Raises:
          InputError: unknown prior, or it is not there; or a negative prompt for a prior that is not guided.
        """
        if prior not in PRIORS or prior == "dropped":
            raise InputError(f"there is no prior {prior!r}; {nearest(prior, PRIORS)}")
        name = PRIORS[prior]
        if name is None:
            return self.embed_text(captions)
        fields = self.prior_fields(captions, name)
        if negative is not None:
            away = self.prior_fields([negative] * len(captions), name)
            fields |= {f"negative_{field}": tokens for field, tokens in away.items()}
        return self.predictor.run(name, "sample_z_i", fields, **drawing)

    def decode(
        self,
        z_i: Vectors | None,
        captions: Sequence[str],
        *,
        negative: str | None = None,
        **drawing: Unpack[Drawing],
    ) -> Pixels | Exact:
        """Returns the decoder's images of embeddings and captions, uint8 [n, s, s, 3].

        A decoder that does not round (`config.round_pixels`) returns them float32 in [-1, 1].

        Args:
          z_i: embeddings, float32 [n, d]; None drops them.
          captions: n captions; a decoder trained without captions ignores them.
          negative: a caption to steer away from, in place of the empty one.
          drawing: see Drawing.

        Raises:
          InputError: embeddings of another width or number, or a negative prompt that an unguided decoder ignores.
        """
        stage: Any = self.part("decoder").stage
        fields = self.words("decoder", captions)
        if z_i is not None and len(z_i) != len(captions):
            raise InputError(f"{len(z_i)} embeddings were given for {len(captions)} captions; give one for each")
        if z_i is not None and stage.embed_dim:
            if z_i.shape[1] != stage.embed_dim:
                raise InputError(f"embeddings have {z_i.shape[1]} numbers, the decoder takes {stage.embed_dim}")
            fields["z_i"] = np.asarray(z_i, np.float32)
        if negative is not None:
            fields |= self._negative_fields(negative, len(captions))
        if not fields and drawing.get("ids") is None:  # an unconditional decoder still has to know how many images
            drawing["ids"] = range(len(captions))
        return self.predictor.run("decoder", "sample" if stage.rounds else "pixels", fields, **drawing)

    def _negative_fields(self, negative: str, count: int) -> dict[str, np.ndarray]:
        """What the decoder's null branch reads of a negative prompt: all that a caption gives it."""
        part = self.part("decoder")
        stage: Any = part.stage
        if not stage.reads_captions:
            raise InputError(f"a negative prompt is a caption, and the decoder in {part.workdir} reads none")
        fields = {f"negative_{field}": x.repeat(count, 0) for field, x in self.words("decoder", [negative]).items()}
        if stage.embed_dim and stage.condition == "text":
            fields["negative_z_t"] = np.repeat(self.embed_text([negative]), count, axis=0)
        return fields

    def upsample(
        self, images: Pixels | Exact, captions: Sequence[str] | None = None, **drawing: Unpack[Drawing]
    ) -> dict[str, Pixels]:
        """Returns upsampler -> uint8 images of its size, in the cascade's order. Few read captions; "" by default."""
        made = {}
        for name in self.upsamplers:
            fields = {"low_res": images, **self.words(name, captions or [""] * len(images))}
            images = self.predictor.run(name, "sample", fields, **drawing)
            made[name] = images
        return made

    def generate(
        self,
        captions: Sequence[str],
        *,
        prior: str = "diffusion",
        negative: str | None = None,
        **drawing: Unpack[Drawing],
    ) -> Generation:
        """Returns one image per caption, of every stage.

        The noise of an image is a function of seed, its id and the stage, so it does not depend on what else is made.

        Args:
          captions: n captions.
          prior: a key of PRIORS.
          negative: a caption to steer away from, in place of the empty one; read by the parts that `steered` names.
          drawing: see Drawing.

        Raises:
          InputError: a part is missing, or the arguments do not fit each other.
        """
        before = {name: timing.seconds for name, timing in self.timings.items()}
        self.check(prior=prior, negative=negative)
        said = dict.fromkeys(self.steered(prior), negative)
        z_i = None
        if prior != "dropped":
            away = said.get(PRIORS[prior] or "")
            z_i = self.sample_prior(captions, prior=prior, negative=away, **drawing)
        return self._drawn(z_i, captions, before, said.get("decoder"), drawing)

    def vary(self, images: Pixels, captions: Sequence[str] | None = None, **drawing: Unpack[Drawing]) -> Generation:
        """Returns variations: for each of these images one that shares its z_i (section 3.1), of every stage.

        Args:
          images: uint8 [n, h, w, 3]; their central squares are embedded.
          captions: what the decoder reads beside; by default the empty one.
          drawing: see Drawing.

        Raises:
          InputError: the decoder draws from no embeddings of images, or CLIP has no image tower.
        """
        before = {name: timing.seconds for name, timing in self.timings.items()}
        part = self.part("decoder")
        stage: Any = part.stage
        if not stage.embed_dim or stage.condition == "text":
            raise InputError(f"the decoder in {part.workdir} draws from no embeddings of images, so it varies none")
        said = [""] * len(images) if captions is None else captions
        return self._drawn(self.embed_images(images), said, before, None, drawing)

    def _drawn(
        self,
        z_i: Vectors | None,
        captions: Sequence[str],
        before: Mapping[str, float],
        negative: str | None,
        drawing: Drawing,
    ) -> Generation:
        """Decoder and upsamplers; `before` is what the parts had taken when the caller began."""
        small = self.decode(z_i, captions, negative=negative, **drawing)
        rounded = small if small.dtype == np.uint8 else np.asarray(to_uint8(jnp.asarray(small)))
        images = {"decoder": rounded, **self.upsample(small, captions, **drawing)}
        spent = {name: timing.seconds - before[name] for name, timing in self.timings.items()}
        return Generation(z_i, images, {name: seconds for name, seconds in spent.items() if seconds})
