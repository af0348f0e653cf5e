"""Filling a part of images, which keep the rest to the last bit (Nichol et al., 2021, section 4.2).

Every part of the chain is told what is known at its own size: the decoder, and each upsampler beside what the part
before it drew. A part that was fine-tuned for it (`config.inpaint`) reads that; any other has it put back at each step.
What is known is pasted over the result at the end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8

from unclip_jax import unclip
from unclip_jax.arrays import to_uint8
from unclip_jax.errors import InputError
from unclip_jax.manipulation import masks as masks_lib
from unclip_jax.predictor import Drawing, Extra

Pixels = UInt8[np.ndarray, "n _ _ 3"]
Masks = Bool[np.ndarray, "n _ _"]


@dataclasses.dataclass(frozen=True)
class Inpainting:
    """n images with a part of them filled.

    Attributes:
      z_i: what the decoder was given, float32 [n, d]; None where it was dropped.
      images: part -> uint8 [n, s, s, 3], the decoder's and every upsampler's, in that order.
    """

    z_i: unclip.Vectors | None
    images: dict[str, Pixels]

    @property
    def last(self) -> Pixels:
        """The largest, which hold what was known bit for bit."""
        return list(self.images.values())[-1]


def side(model: unclip.UnCLIP) -> int:
    """Returns the pixels a side of the images that a model makes in the end, and in which masks are given."""
    return sides(model)[-1]


def sides(model: unclip.UnCLIP) -> list[int]:
    """Returns those of the decoder and of every upsampler."""
    drawers: list[Any] = [model.part(name).stage for name in ("decoder", *model.upsamplers)]
    return [stage.side for stage in drawers]


def inpaint(
    model: unclip.UnCLIP,
    images: Pixels,
    masks: Masks,
    captions: Sequence[str],
    *,
    z_i: unclip.Vectors | None = None,
    prior: str = "diffusion",
    negative: str | None = None,
    **drawing: Unpack[Drawing],
) -> Inpainting:
    """Fills a part of images; one image for each caption.

    Args:
      model: a decoder and its upsamplers, fine-tuned for it or not, and what else the arguments need.
      images: uint8 [n, s, s, 3], as large as the model's (`side`).
      masks: bool [n, s, s], True where they are to be filled.
      captions: n; what the whole image is to show. "" is none.
      z_i: embeddings to decode, float32 [n, d], such as `model.embed_images(images)`; by default those that the prior
        makes of the captions.
      prior: a key of `unclip.PRIORS`, where there is no z_i.
      negative: a caption to steer away from.
      drawing: see Drawing.

    Raises:
      InputError: images, masks and captions do not fit each other or the model, a mask is empty or full, a part is
        missing, or the model cannot read what is given.
    """
    check(model, images, masks, captions)
    drawers = ("decoder", *model.upsamplers)
    told = {name: masks_lib.known(images, masks, side=size) for name, size in zip(drawers, sides(model), strict=True)}
    given: Drawing = {**drawing, "extra": _joined(drawing.get("extra") or {}, told)}
    if z_i is None:
        made = model.generate(captions, prior=prior, negative=negative, **given)
        z_i, drawn = made.z_i, made.images
    else:
        small = model.decode(z_i, captions, negative=negative, **given)
        rounded = small if small.dtype == np.uint8 else np.asarray(to_uint8(jnp.asarray(small)))
        drawn = {"decoder": rounded, **model.upsample(small, captions, **given)}
    kept = {
        name: np.where(told[name]["known_mask"][..., None] > 0, told[name]["known"], pixels)
        for name, pixels in drawn.items()
    }
    return Inpainting(z_i, kept)


def check(model: unclip.UnCLIP, images: Pixels, masks: Masks, captions: Sequence[str]) -> None:
    """Raises what `inpaint` would for its images, masks and captions, before anything is computed."""
    size = side(model)
    if images.shape[1:3] != (size, size):
        raise InputError(
            f"the images have {images.shape[2]} x {images.shape[1]} pixels, the model fills those of {size} x {size}; "
            "resize them"
        )
    if masks.shape[1:] != images.shape[1:3]:
        raise InputError(
            f"the masks have {masks.shape[2]} x {masks.shape[1]} pixels, their images {size} x {size}; make both alike"
        )
    if not len(images) == len(masks) == len(captions):
        raise InputError(
            f"{len(images)} images, {len(masks)} masks and {len(captions)} captions were given; give one each"
        )
    for number, mask in enumerate(masks):
        masks_lib.check(mask, f"mask {number}")


def _joined(extra: Extra, told: Extra) -> Extra:
    return {name: {**extra.get(name, {}), **told.get(name, {})} for name in {**extra, **told}}
