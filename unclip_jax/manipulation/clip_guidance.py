"""Images that a CLIP of noised images leads towards a caption while they are drawn (GLIDE, section 2.4).

    model = clip_guidance.guided(unclip.UnCLIP.load("runs/mine"))
    made = model.generate(captions, extra=clip_guidance.towards(model, captions, scale=100.0))

The part `clip_noised` is trained by configs/clip.py:tiny_noised. A guided model inpaints and outpaints, too: what it is
guided by goes wherever a Drawing goes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip_jax import parts, unclip
from unclip_jax.data import resize
from unclip_jax.errors import InputError
from unclip_jax.predictor import Extra
from unclip_jax.stages.clip_guidance import GuidedDecoderStage


def guided(model: unclip.UnCLIP) -> unclip.UnCLIP:
    """Returns the model with a decoder that can be guided; weights are shared.

    Raises:
      InputError: there is no noised CLIP, with the command that trains it, or it is none for this decoder.
    """
    noised, decoder = model.part(parts.NOISED), model.part("decoder")
    clip: Any = noised.stage
    stage = GuidedDecoderStage(decoder.config, clip)
    return unclip.UnCLIP(
        {**model.parts, "decoder": dataclasses.replace(decoder, stage=stage)},
        models=model.models,
        microbatch=model.microbatch,
    )


def towards(model: unclip.UnCLIP, captions: Sequence[str], *, scale: float | Sequence[float]) -> Extra:
    """Returns what leads n images towards n captions, for `extra` of a Drawing.

    Args:
      model: with a noised CLIP, whose own text tower reads the captions.
      captions: n.
      scale: s, one for all or n; 0 guides nowhere. Similarities are in CLIP's logits.

    Raises:
      InputError: there is no noised CLIP, or other than n scales.
    """
    stage: Any = model.part(parts.NOISED).stage
    tokens = model.tokenize(captions, parts.NOISED, context_length=stage.network.context_length)
    return to_embeddings(model.predictor.run(parts.NOISED, "z_t", {"clip_tokens": tokens}), scale=scale)


def towards_images(model: unclip.UnCLIP, images: Sequence[np.ndarray], *, scale: float | Sequence[float]) -> Extra:
    """Returns what leads n images towards n others, uint8 [h, w, 3] of any sizes: as `towards`."""
    stage: Any = model.part(parts.NOISED).stage
    small = np.stack([resize.square(image, size=stage.network.image_size) for image in images])
    return to_embeddings(model.predictor.run(parts.NOISED, "z_i", {"clip_image": small}), scale=scale)


def to_embeddings(z: unclip.Vectors, *, scale: float | Sequence[float]) -> Extra:
    """Returns what leads n images towards embeddings of the noised CLIP, float32 [n, d]: as `towards`."""
    scales = np.asarray(scale, np.float32)
    scales = scales if scales.ndim else np.full(len(z), scales)
    if len(scales) != len(z):
        raise InputError(f"{len(scales)} scales of guidance were given for {len(z)} images; give one, or one for each")
    return {"decoder": {"toward": np.asarray(z, np.float32), "clip_guidance_scale": scales}}
