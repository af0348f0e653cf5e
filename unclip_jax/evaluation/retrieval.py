"""Retrieval: where a query finds its own among all candidates, by the dot product of embeddings."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int, UInt32

from unclip_jax.errors import InputError
from unclip_jax.evaluation.base import Evaluator

RECALL_AT = (1, 5, 10)
_LOG = logging.getLogger(__name__)
# Products that are held at once: 64 MB of float32.
_BLOCK = 1 << 24


def ranks(
    queries: Float[np.ndarray, "q d"], candidates: Float[np.ndarray, "c d"], pairs: Int[np.ndarray, "p 2"]
) -> Int[np.ndarray, "q"]:
    """Returns how many candidates come before the first of each query's own.

    Candidates are ordered by their dot product with the query; equal ones, which a model that says always the same
    makes of all, keep their order, so that such a model is at chance. What is not a number comes before everything.

    Args:
      queries, candidates: embeddings.
      pairs: (query, candidate) for each that is the query's own; one or more for every query, in any order.

    Returns:
      int [q], 0 where an own one is the first.
    """
    found = np.empty(len(queries), np.int64)
    places = np.arange(len(candidates))
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    size = max(1, _BLOCK // len(candidates))
    for start in range(0, len(queries), size):
        likeness = queries[start : start + size] @ candidates.T
        low, high = np.searchsorted(pairs[:, 0], [start, start + size])
        rows, columns = pairs[low:high, 0] - start, pairs[low:high, 1]
        own = likeness[rows, columns]
        order = np.lexsort((columns, -own, rows))
        _, first = np.unique(rows[order], return_index=True)
        best, place = own[order[first], None], columns[order[first], None]
        after = (likeness < best) | ((likeness == best) & (places >= place))
        found[start : start + size] = (~after).sum(1)
    return found


def distinct(
    digests: UInt32[np.ndarray, "r w"],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "r"]]:
    """Returns the first occurrence of every distinct row, in their order, and which of them each row is."""
    _, first, which = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return first[order], number[which.reshape(-1)]


def digests(batch: Mapping[str, np.ndarray], fields: Iterable[str]) -> UInt32[np.ndarray, "b 4"]:
    """Returns 128 bits of each example that are equal where all these fields are."""
    rows = [np.ascontiguousarray(batch[field]) for field in sorted(fields)]
    made = [
        hashlib.blake2b(b"".join(row[number].tobytes() for row in rows), digest_size=16).digest()
        for number in range(len(batch["mask"]))
    ]
    return np.frombuffer(b"".join(made), np.uint32).reshape(-1, 4)


class Retrieval(Evaluator):
    """CLIP: R@k, the share of queries that find one of their own among the first k, and the median rank, from 1.

    Both ways between the distinct images and the distinct captions of the split, where an image's own captions are
    all that any of its pairs has, and a caption's own images likewise. So a caption that several images share is
    right for all of them, and several captions of one image are one image's. Equal is what the model reads: pixels
    and tokens.
    """

    needs = ("z_i", "z_t")

    def check(self):
        pairs = min(self.data.count("evaluation"), self.config.examples)
        for k in self.config.get("recall_at", RECALL_AT):
            if k > pairs:
                raise InputError(
                    f"config.evaluation.recall_at has {k}, but retrieval is among {pairs} pairs (config.evaluation."
                    "examples, or all of the split): lower the one or raise the other"
                )

    def run(self, params, frozen):
        z: dict[str, list[np.ndarray]] = {"z_i": [], "z_t": []}
        same: dict[str, list[np.ndarray]] = {"z_i": [], "z_t": []}
        for batch in self.host_batches(*self.needs):
            # Placed and gathered as the embeddings are, so that rows belong together on any number of hosts.
            marks = {f"same_{name}": digests(batch, self.specs[name]) for name in self.needs}
            placed = self.put({**batch, **marks})
            mask = self.get(placed["mask"])
            for name in self.needs:
                z[name].append(self.get(self.call(name, params, frozen, placed))[mask])
                same[name].append(self.get(placed[f"same_{name}"])[mask])
        images, image = distinct(np.concatenate(same["z_i"]))
        captions, caption = distinct(np.concatenate(same["z_t"]))
        z_i, z_t = np.concatenate(z["z_i"])[images], np.concatenate(z["z_t"])[captions]
        yield from self._scores("image_to_text", z_i, z_t, np.stack([image, caption], 1))
        yield from self._scores("text_to_image", z_t, z_i, np.stack([caption, image], 1))

    def _scores(
        self, name: str, queries: np.ndarray, candidates: np.ndarray, pairs: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        before = ranks(queries, candidates, pairs)
        for k in self.config.get("recall_at", RECALL_AT):
            if k > len(candidates):
                _LOG.warning("%s: no R@%d, for the split has %d different ones", name, k, len(candidates))
                continue
            yield f"{name}_r{k}", float((before < k).mean())
        yield f"{name}_median_rank", float(np.median(before)) + 1
