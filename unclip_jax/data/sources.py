"""Random access to records: one data set, or several mixed by weights.

A mixture lays its members end to end, so that an index, and with it a batch's `id`, names one example of one member.
Training draws from them in the proportion of their weights: exactly in every block of `order.BLOCK` positions of the
endless stream, and in random order within. Each member keeps an endless stream of its own, one shuffle of its examples
after another. Where a position leads is computed, never stored, so hosts, workers and resumed runs agree.

Grain can mix too (`MapDataset.mix`), but takes turns in a fixed pattern rather than at random, cuts weights to
hundredths of the smallest, and does not promise the pattern to later versions, which exact resume would need.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from unclip_jax.data import order
from unclip_jax.errors import InputError

# Batches count examples in uint32.
_MOST_EXAMPLES = 2**32


@runtime_checkable
class Source(Protocol):
    """Random access to records that hold `image` (encoded bytes), `caption` (text) and `id`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Member:
    """One data set of a mixture.

    Attributes:
      name: what messages call it.
      source: its records.
      weight: above 0; its share of the training examples is this over the sum of all weights.
    """

    name: str
    source: Source
    weight: float


class Mixture:
    """Several sources as one; the ids of its records begin with the member's name.

    Attributes:
      members: in the order of their indices.
      quotas: how many of every `order.BLOCK` training examples each member gives.
    """

    def __init__(self, members: Sequence[Member]):
        """Mixes sources.

        Raises:
          InputError: no member, an empty one, one twice, a weight that is not above 0 or too small beside the others,
            or more examples than can be numbered.
        """
        self.members = tuple(members)
        for member in self.members:
            if len(member.source) == 0:
                raise InputError(f"{member.name} is empty: there is no example to mix in")
        self.quotas = quotas([(member.name, member.weight) for member in self.members])
        # Where each member's indices end.
        self._ends = np.cumsum([len(member.source) for member in self.members]).tolist()
        if len(self) > _MOST_EXAMPLES:
            raise InputError(f"the mixture has {len(self)} examples; at most {_MOST_EXAMPLES} can be numbered")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number = bisect.bisect_right(self._ends, index)
        member, place = self.members[number], index - self.indices_of(number).start
        record = member.source[place]
        own = record.get("id", place)
        return {**record, "id": f"{member.name}/{own.decode() if isinstance(own, bytes) else own}"}

    def indices_of(self, number: int) -> range:
        """Indices of a member's examples."""
        return range(self._ends[number - 1] if number else 0, self._ends[number])

    def member_of(self, index: int) -> int:
        """Number of the member that an example belongs to."""
        return bisect.bisect_right(self._ends, index)


def peers(source: Source, index: int) -> range:
    """Indices of the data set that an example belongs to, from which it may be replaced."""
    return source.indices_of(source.member_of(index)) if isinstance(source, Mixture) else range(len(source))


def shuffled(
    source: Source, positions: Int64[np.ndarray, " n"], *, seed: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Returns (epoch, index) of positions in the endless stream of training examples, as `order.shuffled` does.

    In a mixture the epoch is that of the member: how often all of its examples came before.
    """
    if not isinstance(source, Mixture):
        return order.shuffled(positions, count=len(source), seed=seed)
    numbers, places = order.mixed(positions, quotas=source.quotas, seed=seed)
    epochs, indices = np.empty_like(places), np.empty_like(places)
    for number in range(len(source.members)):
        here = numbers == number
        own = source.indices_of(number)
        epochs[here], drawn = order.shuffled(places[here], count=len(own), seed=order.member_seed(seed, number))
        indices[here] = drawn + own.start
    return epochs, indices


def quotas(weights: Sequence[tuple[str, float]]) -> tuple[int, ...]:
    """Shares `order.BLOCK` out by weight: rounded down, and what is left to the largest remainders.

    Args:
      weights: (name, weight) of each data set.

    Raises:
      InputError: no data set, one twice, or a weight that is not above 0 or would round to no share.
    """
    if not weights:
        raise InputError("a mixture needs a data set")
    names = [name for name, _ in weights]
    for name, weight in weights:
        if names.count(name) > 1:
            raise InputError(f"{name} is in the mixture twice; give it one weight")
        if not 0 < weight < float("inf"):
            raise InputError(f"the weight of {name} is {weight}; it must be a number above 0")
    exact = np.array([weight for _, weight in weights], np.float64)
    exact *= order.BLOCK / exact.sum()
    shares = np.floor(exact).astype(np.int64)
    left = order.BLOCK - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    for name, share in zip(names, shares, strict=True):
        if not share:
            raise InputError(f"the weight of {name} is below one in {order.BLOCK} of all: it would never be drawn")
    return tuple(shares.tolist())
