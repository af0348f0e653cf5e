"""A model that draws as well as it is told to: experiments on it must find what was planted, without any network."""

import types

import numpy as np
from small_configs import small

from unclip_jax import unclip
from unclip_jax.data import resize, scene_rendering, scenes
from unclip_jax.manipulation.latents import Latents
from unclip_jax.predictor import Timing

SIDE, WIDTH = 16, 48
# First number of what a prior draws, by which the decoder knows it.
MARKS = {"diffusion": 2.0, "ar": 3.0}


class HandMade(unclip.UnCLIP):
    """Draws scenes of captions, and the pictures whose embeddings it is given.

    Attributes:
      right: (decoder, what it reads: "diffusion", "ar", "z_t" or "caption", guidance scale) -> probability that an
        image shows its caption; the others are white.
      exchanged: decoder -> probability that two objects are in each other's place.
      spread: (decoder, guidance scale) -> how far the colours of two draws of a caption lie apart.
      seen: (embedding, picture) of all that was ever embedded, which several models share.
    """

    def __init__(self, names, sampling, *, right, exchanged, spread, seen):
        self.decoder = next((name for name in names if name.startswith("decoder")), "")
        self.scale = sampling.get("decoder", {}).get("guidance_scale", 1.0)
        self.right, self.exchanged, self.spread, self.seen = right, exchanged, spread, seen
        self.rank = 2 if "clip_sam" in names else 12
        self.timings = {name: Timing(seconds=1.0) for name in names}

    def part(self, name):
        changes = {"model__embed_dim": 0} if self.decoder == "decoder_glide" else {}
        config = small(name, **(changes if name == "decoder" else {}))
        return types.SimpleNamespace(config=config, workdir=name, name=name)

    def embed_images(self, images):
        coarse = np.stack([resize.square(image, size=4) for image in images]).reshape(len(images), -1) / 127.5 - 1
        z = coarse @ np.random.default_rng(0).normal(size=(coarse.shape[1], WIDTH))
        z[:, self.rank :] *= 1e-3
        z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
        self.seen.extend(zip(z, images, strict=True))
        return z

    def embed_text(self, captions):
        z = np.stack([np.random.default_rng(sum(text.encode())).normal(size=WIDTH) for text in captions])
        return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

    def sample_prior(self, captions, *, prior, **drawing):
        for timing in self.timings.values():
            timing.seconds += 0.5
        z = self.embed_text(captions)
        z[:, 0] = MARKS.get(prior, z[:, 0])
        return z

    def decode(self, z_i, captions, *, seed=0, **drawing):
        made = []
        for row, caption in enumerate(captions):
            rng = np.random.default_rng([seed, row])
            image = self._said(caption, z_i, row, rng) if caption else self._again(z_i[row])
            made.append(image[::-1, ::-1] if rng.random() < self.exchanged.get(self.decoder, 0.0) else image)
        drawn = np.random.default_rng([seed, 1]).uniform(-1, 1, (len(made), 1, 1, 3))
        return np.clip(np.stack(made) + drawn * self.spread(self.decoder, self.scale), 0, 255).astype(np.uint8)

    def _said(self, caption, z_i, row, rng):
        marks = {mark: prior for prior, mark in MARKS.items()}
        reads = "caption" if z_i is None else marks.get(float(z_i[row, 0]), "z_t")
        if rng.random() >= self.right(self.decoder, reads, self.scale):
            return np.full((SIDE, SIDE, 3), 250, np.uint8)
        said = scenes.parse_caption(caption)
        return scene_rendering.render(scenes.placed(said, rng, spread=0.2), SIDE)

    def _again(self, z):
        near = int((np.stack([known for known, _ in self.seen]) @ z).argmax())
        return resize.square(self.seen[near][1], size=SIDE)

    def upsample(self, images, captions=None, **drawing):
        return {}


class HandMadeCodec:
    """Draws a picture again, with as much noise as eta says."""

    def __init__(self, *, noisy=True):
        self.sides, self._noisy = {"decoder": SIDE}, noisy

    def encode(self, images):
        x_T = np.stack(images).astype(np.float32)
        return types.SimpleNamespace(
            latents=Latents(np.zeros((len(x_T), 4), np.float32), {"decoder": x_T}, ("",) * len(x_T))
        )

    def draw(self, latents, *, eta, seed):
        noise = np.random.default_rng(seed).normal(size=latents.x_T["decoder"].shape) * 12 * eta * self._noisy
        return {"decoder": np.clip(latents.x_T["decoder"] + noise, 0, 255).astype(np.uint8)}
