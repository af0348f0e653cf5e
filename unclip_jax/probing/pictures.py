"""Pictures to probe with: examples of a prepared data set, their embeddings, and what is drawn of embeddings."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from unclip_jax import unclip
from unclip_jax.arrays import to_uint8
from unclip_jax.data import datasets, images, resize
from unclip_jax.errors import InputError
from unclip_jax.predictor import Drawing
from unclip_jax.unclip import Vectors


class Example(NamedTuple):
    """A picture of a data set.

    Attributes:
      caption: its words.
      image: its pixels as stored, uint8 [h, w, 3].
    """

    caption: str
    image: UInt8[np.ndarray, "_ _ 3"]


def examples(directory: str, split: str, *, limit: int = 0) -> Iterator[Example]:
    """Yields the examples of a split in its order, or the first `limit`; pictures that cannot be decoded are left out.

    Raises:
      InputError: no such directory or split.
    """
    source = datasets.open_source(directory, split)
    for index in range(min(limit or len(source), len(source))):
        record = source[index]
        try:
            image = images.decode(bytes(record["image"]))
        except InputError:
            continue
        yield Example(bytes(record["caption"]).decode(), image)


def embedded(model: unclip.UnCLIP, found: Iterator[Example], *, batch: int = 512) -> Iterator[Vectors]:
    """Yields z_i of examples, float32 [n, d], `batch` of them at a time: a split need not fit into memory."""
    part = model.part("clip")
    size = part.config.model.image_size
    while chosen := list(itertools.islice(found, batch)):
        yield model.embed_images(np.stack([resize.square(example.image, size=size) for example in chosen]))


def drawn(
    model: unclip.UnCLIP, z_i: Vectors | None, captions: Sequence[str] | None = None, **drawing: Unpack[Drawing]
) -> UInt8[np.ndarray, "n s s 3"]:
    """Returns what the decoder and all upsamplers that are there make of embeddings, and of captions ("" by default).

    Raises:
      InputError: neither is given; or embeddings, and the decoder draws from none of images.
    """
    part = model.part("decoder")
    if z_i is None and captions is None:
        raise InputError("there is nothing to draw: give embeddings, or captions")
    if z_i is not None and (not part.config.model.embed_dim or part.config.get("condition", "image") != "image"):
        raise InputError(f"the decoder in {part.workdir} draws from no embeddings of images, so it shows none of z_i")
    said = [""] * len(z_i) if captions is None and z_i is not None else list(captions or ())
    small = model.decode(z_i, said, **drawing)
    rounded = small if small.dtype == np.uint8 else np.asarray(to_uint8(jnp.asarray(small)))
    return list({"decoder": rounded, **model.upsample(small, said, **drawing)}.values())[-1]
