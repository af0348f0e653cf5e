"""Finds reference images that are nearly among a model's training images, so that a protocol can leave them out.

DALL-E's authors took about a fifth of COCO's validation images out of its reference because training data held nearly
the same pictures, by a list that nobody else has. So a filtered protocol is about one's own training set: this looks
for every reference image's nearest neighbour by CLIP's embeddings, and the ids of those above a threshold are published
in a file, which the protocol reads and whose digest stands in its results.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from unclip_jax.data import sealed
from unclip_jax.errors import InputError

_FORMAT = 1
_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Removed:
    """Images that are left out of a reference.

    Attributes:
      ids: of the images, ascending.
      digest: of the file that names them.
      protocol: name of the protocol that it was made for.
    """

    ids: tuple[int, ...]
    digest: str
    protocol: str


def nearest(
    queries: Float[np.ndarray, "n d"], blocks: Iterator[Float[np.ndarray, "_ d"]]
) -> tuple[Float[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Returns the cosine to each query's nearest neighbour, and its index, in float32.

    Args:
      queries: embeddings of any length but 0.
      blocks: the training set's embeddings, a few thousand rows at a time, in order.
    """
    unit = _unit(queries)
    best, index = np.full(len(unit), -np.inf, np.float32), np.full(len(unit), -1, np.int64)
    start = 0
    for block in blocks:
        trained = _unit(block)
        for first in range(0, len(unit), _BLOCK):
            rows = slice(first, first + _BLOCK)
            cosines = unit[rows] @ trained.T
            place = cosines.argmax(1)
            found = cosines[np.arange(len(place)), place]
            better = found > best[rows]
            best[rows][better] = found[better]
            index[rows][better] = start + place[better]
        start += len(block)
    return best, index


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    wide = np.asarray(rows, np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def write(
    path: pathlib.Path,
    *,
    protocol: str,
    threshold: float,
    clip: str,
    training: Sequence[Any],
    image_ids: Sequence[int],
    cosines: Float[np.ndarray, " n"],
    neighbours: Int64[np.ndarray, " n"],
) -> Removed:
    """Writes the file that names the images whose nearest neighbour is at least as near as a threshold.

    Args:
      path: of the file.
      protocol: its name.
      threshold: the smallest cosine that counts as nearly the same.
      clip: fingerprint of the CLIP that embedded both sides.
      training: fingerprints of the training set's splits.
      image_ids, cosines, neighbours: of each reference image the nearest cosine and the training example's index.
    """
    chosen = np.flatnonzero(np.asarray(cosines) >= threshold).tolist()
    listed = sorted((int(image_ids[n]), round(float(cosines[n]), 6), int(neighbours[n])) for n in chosen)
    value = {
        "format": _FORMAT,
        "protocol": protocol,
        "threshold": threshold,
        "clip": clip,
        "training": json.loads(json.dumps(training)),
        "of": len(image_ids),
        "columns": ["image_id", "cosine", "training_index"],
        "removed": [list(row) for row in listed],
    }
    sealed.write(path, sealed.sealed(value))
    return read(str(path), protocol=protocol)


def read(path: str, *, protocol: str) -> Removed:
    """Reads such a file.

    Raises:
      InputError: there is none, it was changed since, or it was made for another protocol.
    """
    found = sealed.read(pathlib.Path(path).expanduser())
    if found is None or found.get("format") != _FORMAT:
        raise InputError(
            f"{path!r} is no file of near-duplicates, or was changed; make it: python -m unclip_jax.evaluate "
            "near_duplicates"
        )
    if found["protocol"] != protocol:
        raise InputError(f"{path!r} names what {found['protocol']} leaves out, not {protocol}")
    ids = tuple(int(row[0]) for row in found["removed"])
    return Removed(ids, sealed.sealed(found)["seal"][:16], protocol)
