"""The captions that a protocol draws from, as numbered rows: the same everywhere, whatever library is installed.

Choices are made by the order of SHA-256 digests of ids, or by a generator whose stream its authors have frozen, and by
nothing that a version of NumPy or Python might change.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from unclip_jax.errors import InputError
from unclip_jax.evaluation import protocols

# Part of what is hashed, so that this order is no other one's: "seed" of the list of ids.
_SEED = "unclip_jax coco30k 2014"


@dataclasses.dataclass(frozen=True)
class Row:
    """A caption to be drawn.

    Attributes:
      row: its number in the protocol, from 0.
      image_id: of the image that it describes.
      caption_id: what numbers its noise, below 2^32.
      caption: the text.
    """

    row: int
    image_id: int
    caption_id: int
    caption: str


@runtime_checkable
class Pool(Protocol):
    """Captioned images: COCO's, rendered scenes, emoji.

    Attributes:
      fingerprint: what tells these from others, JSON.
      image_ids: of all images, in ascending order.
      captions: (caption id, image id, text), in the order of the source.
    """

    @property
    def fingerprint(self) -> Mapping[str, Any]: ...

    @property
    def image_ids(self) -> Sequence[int]: ...

    @property
    def captions(self) -> Sequence[tuple[int, int, str]]: ...

    def image(self, image_id: int) -> UInt8[np.ndarray, "_ _ 3"]:
        """Returns an image's pixels; raises InputError, which names it, where it cannot be read."""


def _rank(kind: str, number: int) -> bytes:
    return hashlib.sha256(f"{_SEED}/{kind}/{number}".encode()).digest()


def _one_an_image(pool: Pool, count: int) -> list[tuple[int, int, str]]:
    """Images in the order of SHA-256 of their ids, of each the caption whose id's SHA-256 is the smallest.

    So the first n rows of a protocol are a random sample of it, for every n.
    """
    first: dict[int, tuple[bytes, tuple[int, int, str]]] = {}
    for caption in pool.captions:
        rank = _rank("caption", caption[0])
        if caption[1] not in first or rank < first[caption[1]][0]:
            first[caption[1]] = rank, caption
    images = sorted(first, key=lambda image_id: _rank("image", image_id))
    return [first[image_id][1] for image_id in images[:count]]


def _pandas_2023(pool: Pool, count: int) -> list[tuple[int, int, str]]:
    """What `DataFrame.sample(frac=1, random_state=2023)` of the annotations keeps as the first of each image.

    pandas shuffles by NumPy's RandomState, whose stream is frozen. Rows are in the order of caption ids.
    """
    order = np.random.RandomState(2023).permutation(len(pool.captions))
    chosen: dict[int, tuple[int, int, str]] = {}
    for place in order.tolist():
        caption = pool.captions[place]
        chosen.setdefault(caption[1], caption)
        if len(chosen) == count:
            break
    return sorted(chosen.values())


def _in_order(pool: Pool, count: int) -> list[tuple[int, int, str]]:
    return list(pool.captions[: count or None])


CHOICES: dict[str, Callable[[Pool, int], list[tuple[int, int, str]]]] = {
    "one-an-image": _one_an_image,
    "pandas-2023": _pandas_2023,
    "in-order": _in_order,
}


def chosen(protocol: protocols.Protocol, pool: Pool) -> list[Row]:
    """Returns the rows of a protocol.

    Raises:
      InputError: the pool has fewer captions or images than the protocol wants.
    """
    wanted = protocol.images
    if len(pool.image_ids) < wanted:
        raise InputError(
            f"{protocol.name} wants {wanted} reference images, {_called(pool)} has {len(pool.image_ids)}; "
            "give the whole set"
        )
    found = CHOICES[protocol.captions](pool, protocol.count)
    if len(found) < max(protocol.count, 1):
        raise InputError(
            f"{protocol.name} wants {protocol.count} captions, {_called(pool)} has {len(found)}; give the whole set"
        )
    return [Row(number, image, caption, text) for number, (caption, image, text) in enumerate(found)]


def references(protocol: protocols.Protocol, pool: Pool, rows: Sequence[Row], removed: Sequence[int]) -> list[int]:
    """Returns the ids of the reference images, ascending.

    Args:
      protocol: what is measured.
      pool: all images.
      rows: of the protocol, whose own images are the reference where it wants no more than those.
      removed: ids that are left out (`near_duplicates`).
    """
    own = protocol.captions == "pandas-2023"
    ids = sorted({row.image_id for row in rows}) if own else list(pool.image_ids)[: protocol.images or None]
    unknown = sorted(set(removed) - set(pool.image_ids))
    if unknown:
        raise InputError(f"the images that are to be left out are not of this set, such as {unknown[0]}")
    left_out = set(removed)
    return [image_id for image_id in ids if image_id not in left_out]


def digest(rows: Sequence[Row]) -> str:
    """Returns the SHA-256 of all rows."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(row) for row in rows]).encode()).hexdigest()


def _called(pool: Pool) -> str:
    return str(pool.fingerprint.get("name", "the data"))
