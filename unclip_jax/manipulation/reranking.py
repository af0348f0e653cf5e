"""Images in the order in which CLIP finds them like a caption (Ramesh et al., 2021; Nichol et al., 2021)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from unclip_jax import unclip
from unclip_jax.data import resize
from unclip_jax.errors import InputError


class Ranking(NamedTuple):
    """n images in order.

    Attributes:
      order: numbers of the images, the best first; of equals the first.
      similarity: cosine of each image, in the images' own order, with its caption.
    """

    order: Int[np.ndarray, "n"]
    similarity: Float[np.ndarray, "n"]


def rank(z_i: Float[np.ndarray, "n d"], z_t: Float[np.ndarray, "#n d"]) -> Ranking:
    """Ranks embeddings of n images by their cosine with that of one caption, [1, d], or with one caption's each."""
    unit_i, unit_t = (z / np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True) for z in (z_i, z_t))
    similarity = np.sum(unit_i * unit_t, axis=1)
    return Ranking(np.argsort(-similarity, kind="stable"), similarity)


def rerank(model: unclip.UnCLIP, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], caption: str) -> Ranking:
    """Ranks images of any sizes by what the model's CLIP says of their central squares and a caption.

    Raises:
      InputError: there is no image, or no CLIP.
    """
    if not len(images):
        raise InputError("there is no image to rank; give at least one")
    size = model.part("clip").config.model.image_size
    return rank(
        model.embed_images(np.stack([resize.square(x, size=size) for x in images])), model.embed_text([caption])
    )
