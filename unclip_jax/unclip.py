"""Text to image: prior, decoder and upsamplers as one chain of the stages' predict functions (Ramesh et al., 2022).

    model = unclip.UnCLIP.load("runs/quickstart")
    made = model.generate(["a small red star on a white background"], seed=0)
    made.images["upsampler_2"]      # uint8 [1, 64, 64, 3]

The parts are the workdirs of training runs. All must have been trained on one CLIP, and each must take the size that
the one before it makes; that is checked before anything is computed.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax import parts as parts_lib
from unclip_jax import sharding
from unclip_jax.data import resize
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError, nearest
from unclip_jax.parts import STAGES, Part

# What turns a caption into z_i: a prior, or nothing, which puts z_t itself in z_i's place (section 5.1).
PRIORS = {"diffusion": "prior_diffusion", "ar": "prior_ar", "none": None}

Vectors = Float[np.ndarray, "b d"]
# Sides are free, for what comes out of a stage is larger than what goes in.
Pixels = UInt8[np.ndarray, "b _ _ 3"]
# Called after each batch with (part, images done, images in all).
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Timing:
    """What one part has taken so far: compilation apart, then seconds of work for that many images."""

    compile_seconds: float = 0.0
    seconds: float = 0.0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` made of n captions.

    Attributes:
      z_i: the embeddings that were decoded, normalised, float32 [n, d].
      images: part -> uint8 [n, s, s, 3], the decoder's and every upsampler's, in that order.
      seconds: part -> seconds that this call spent in it, without compilation.
    """

    z_i: Vectors
    images: dict[str, Pixels]
    seconds: dict[str, float]


def image_id(prompt: str, seed: int) -> int:
    """Returns the id, uint32, that numbers the noise of a prompt's image: a function of prompt and seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:4], "little")


def names_for(models: str, *, priors: Sequence[str]) -> list[str]:
    """Returns the parts that images by these priors need: clip, the priors, the decoder and what upsamplers there are.

    Raises:
      InputError: there is no such folder.
    """
    upsamplers = [name for name in parts_lib.folders(models) if STAGES[name] == "upsampler"]
    return ["clip", *(name for prior in priors if (name := PRIORS[prior])), "decoder", *upsamplers]


class UnCLIP:
    """The trained parts of one unCLIP; make it with `load`."""

    def __init__(self, parts: Mapping[str, Part], *, models: str = "", microbatch: int = 32):
        """Takes parts that fit each other.

        Args:
          parts: by name, keys of STAGES.
          models: the folder they come from, for error messages.
          microbatch: images per call of a network; the last call is filled up, so that each network is compiled once.

        Raises:
          InputError: the parts do not fit each other; the first that does not is named.
        """
        self.parts = {name: parts[name] for name in STAGES if name in parts}
        self.models = models
        self.timings = {name: Timing() for name in self.parts}
        self._mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
        replicas = math.prod(self._mesh.shape.values())
        self.microbatch = math.ceil(microbatch / replicas) * replicas
        self._programs: dict[tuple[str, str, Any], Any] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        parts_lib.check_clip(self.parts)
        parts_lib.check_sizes(self.parts)

    @classmethod
    def load(
        cls,
        models: str | Mapping[str, str],
        *,
        only: Sequence[str] | None = None,
        sampling: Mapping[str, Mapping[str, Any]] | None = None,
        weights: str = "ema",
        microbatch: int = 32,
    ) -> "UnCLIP":
        """Reads the parts from a folder, or from the workdirs given by name.

        Args:
          models: a folder with sub-folders named as STAGES, each the workdir of a training run; or name -> workdir.
          only: the parts to read; by default all that are there.
          sampling: part -> {key of `config.sampling`: value}, in place of what the run's config says.
          weights: "ema", the moving average, or "params", the last weights.
          microbatch: images per call of a network.

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
        mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
        parts = {
            name: parts_lib.read(name, folder, mesh, weights=weights, sampling=sampling.get(name, {}))
            for name, folder in chosen.items()
        }
        return cls(parts, models=where, microbatch=microbatch)

    @property
    def upsamplers(self) -> list[str]:
        """Names of the upsamplers that are there, in the order of the cascade."""
        return [name for name in self.parts if STAGES[name] == "upsampler"]

    def part(self, name: str) -> Part:
        """Returns a part.

        Raises:
          InputError: it is not there; the command that trains it is named.
        """
        if name not in self.parts:
            raise InputError(parts_lib.missing(name, self.models))
        return self.parts[name]

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

    def embed_text(self, captions: Sequence[str]) -> Vectors:
        """Returns z_t, normalised, float32 [n, d]."""
        stage: Any = self.part("clip").stage
        tokens = self.tokenize(captions, "clip", context_length=stage.network.context_length)
        return self._predict("clip", "z_t", {"clip_tokens": tokens})

    def embed_images(self, images: Pixels) -> Vectors:
        """Returns z_i, normalised, float32 [n, d], of images of any size: their central squares, at CLIP's size."""
        stage: Any = self.part("clip").stage
        small = [resize.square(image, size=stage.network.image_size) for image in images]
        return self._predict("clip", "z_i", {"clip_image": np.stack(small)})

    def sample_prior(
        self,
        captions: Sequence[str],
        *,
        prior: str = "diffusion",
        seed: int = 0,
        ids: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Vectors:
        """Returns one z_i per caption, normalised, float32 [n, d].

        Args:
          captions: n captions.
          prior: a key of PRIORS; "none" returns z_t.
          seed, ids: name the noise; ids are 0 … n - 1 by default.
          progress: told after each batch.

        Raises:
          InputError: unknown prior, or it is not there.
        """
        if prior not in PRIORS:
            raise InputError(f"there is no prior {prior!r}; {nearest(prior, PRIORS)}")
        name = PRIORS[prior]
        if name is None:
            return self.embed_text(captions)
        stage: Any = self.part(name).stage
        fields = {
            "clip_tokens": self.tokenize(captions, "clip", context_length=stage.clip.context_length),
            "tokens": self.tokenize(captions, name, context_length=stage.context_length),
        }
        return self._predict(name, "sample_z_i", fields, seed=seed, ids=ids, progress=progress)

    def decode(
        self,
        z_i: Vectors,
        captions: Sequence[str],
        *,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Pixels:
        """Returns the decoder's images of embeddings and captions, uint8 [n, s, s, 3].

        Args:
          z_i: normalised embeddings, float32 [n, d].
          captions: n captions; a decoder trained without captions ignores them.
          seed, ids, progress: as in `sample_prior`.

        Raises:
          InputError: embeddings of another width, or not as many as captions.
        """
        stage: Any = self.part("decoder").stage
        if len(z_i) != len(captions):
            raise InputError(f"{len(z_i)} embeddings were given for {len(captions)} captions; give one for each")
        fields: dict[str, np.ndarray] = {}
        if stage.embed_dim:
            if z_i.shape[1] != stage.embed_dim:
                raise InputError(f"embeddings have {z_i.shape[1]} numbers, the decoder takes {stage.embed_dim}")
            fields["z_i"] = np.asarray(z_i, np.float32)
        if stage.context_length:
            fields["tokens"] = self.tokenize(captions, "decoder", context_length=stage.context_length)
        if not fields:  # an unconditional decoder still has to know how many images
            return self._predict("decoder", "sample", {}, seed=seed, ids=ids or range(len(z_i)), progress=progress)
        return self._predict("decoder", "sample", fields, seed=seed, ids=ids, progress=progress)

    def upsample(
        self, images: Pixels, *, seed: int = 0, ids: Sequence[int] | None = None, progress: Progress | None = None
    ) -> dict[str, Pixels]:
        """Returns upsampler -> uint8 images of its size, for each upsampler that is there, in the cascade's order."""
        made = {}
        for name in self.upsamplers:
            images = self._predict(name, "sample", {"low_res": images}, seed=seed, ids=ids, progress=progress)
            made[name] = images
        return made

    def generate(
        self,
        captions: Sequence[str],
        *,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        prior: str = "diffusion",
        progress: Progress | None = None,
    ) -> Generation:
        """Returns one image per caption, of every stage.

        The noise of an image is a function of seed, its id and the stage, so it does not depend on what else is made.

        Args:
          captions: n captions.
          seed: any integer from 0 to 2^32 - 1.
          ids: n integers, uint32; 0 … n - 1 by default.
          prior: a key of PRIORS.
          progress: called with (part, images done, n) after each batch.

        Raises:
          InputError: a part is missing, or the arguments do not fit each other.
        """
        before = {name: timing.seconds for name, timing in self.timings.items()}
        z_i = self.sample_prior(captions, prior=prior, seed=seed, ids=ids, progress=progress)
        images = {"decoder": self.decode(z_i, captions, seed=seed, ids=ids, progress=progress)}
        images |= self.upsample(images["decoder"], seed=seed, ids=ids, progress=progress)
        spent = {name: timing.seconds - before[name] for name, timing in self.timings.items()}
        return Generation(z_i, images, {name: seconds for name, seconds in spent.items() if seconds})

    def _predict(
        self,
        name: str,
        function: str,
        fields: Mapping[str, np.ndarray],
        *,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Runs one predict function over n examples in microbatches, the last one filled up."""
        part, timing = self.part(name), self.timings[name]
        count = len(next(iter(fields.values()))) if fields else len(ids or ())
        numbers = np.asarray(range(count) if ids is None else ids, np.uint32)
        if len(numbers) != count:
            raise InputError(f"{len(numbers)} ids were given for {count} examples; give one for each")
        if not count:
            raise InputError("there is nothing to make: give at least one caption, embedding or image")
        whole = {**fields, "id": numbers}
        spec = part.stage.predict_specs(self.microbatch)[function]
        rng = jax.random.fold_in(jax.random.key(seed), list(STAGES).index(name))
        made = []
        for start in range(0, count, self.microbatch):
            rows = np.minimum(np.arange(start, start + self.microbatch), count - 1)
            batch = {field: np.ascontiguousarray(whole[field][rows]) for field in whole if field in spec}
            program = self._program(part, function, batch, rng)
            began = time.monotonic()
            result = np.asarray(program(batch, rng))
            done = min(self.microbatch, count - start)
            made.append(result[:done])
            timing.seconds += time.monotonic() - began
            timing.images += done
            if progress:
                progress(name, start + done, count)
        return np.concatenate(made)

    def _program(
        self, part: Part, function: str, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> Callable[[Mapping[str, np.ndarray], jax.Array], jax.Array]:
        """Returns the compiled predict function as fn(batch, rng); compiled once for each shape of batch."""
        placed = sharding.batch_sharding(self._mesh)
        same = sharding.replicated(self._mesh)
        frozen = {"clip": self.parts["clip"].params} if "clip" in self.parts and part.name != "clip" else {}
        frozen["statistics"] = part.statistics
        key = (part.name, function, tuple((field, x.shape) for field, x in batch.items()))
        if key not in self._programs:
            began = time.monotonic()
            fn = jax.jit(part.stage.predict_fns()[function])
            abstract = {f: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for f, x in batch.items()}
            rng_like = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=same)
            self._programs[key] = fn.lower(part.params, frozen, abstract, rng_like).compile()
            self.timings[part.name].compile_seconds += time.monotonic() - began
        program = self._programs[key]
        return lambda batch, rng: program(
            part.params, frozen, sharding.put_batch(batch, placed), jax.device_put(rng, same)
        )
