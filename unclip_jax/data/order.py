"""The order of training: position in the endless stream -> (epoch, example index), computed and never stored.

Each epoch is a pseudo-random permutation of the data set, keyed by (seed, epoch): a Feistel network (Luby and Rackoff,
1988) on the smallest even number of bits that holds all indices, applied again while it leads outside the data set
(cycle walking; Black and Rogaway, 2002). So step 10,000,000 costs what step 0 costs, and nothing has to be saved.

Grain's own shuffle is of the same kind, but it changed between Grain's versions, which would silently break exact
resume; and it works on 2^16 indices at least, which made it cost 0.4 ms an example on a set of 96.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

# Four rounds suffice in Luby and Rackoff's proof, for large halves; small data sets have halves of a few bits.
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15

_Words = UInt64[np.ndarray, " n"]

# Positions of the stream over which data sets are mixed in exact proportion.
BLOCK = 1000
# Seeds of training runs lie below this; beyond it begin those that are derived from them.
_SEEDS = 2**32


def shuffled(
    positions: Int64[np.ndarray, " n"], *, count: int, seed: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Returns (epoch, example index) of positions in the stream.

    Args:
      positions: int64 [n], from 0.
      count: examples in the data set, in [1, 2**62].
      seed: in [0, 2**64); another seed gives unrelated orders.

    Returns:
      Two int64 [n]; indices are in [0, count), and each occurs once among the `count` positions of an epoch.
    """
    epochs, places = np.divmod(positions, count)
    keys = _mix(_mix(np.full(positions.shape, seed, np.uint64)) + epochs.astype(np.uint64) * np.uint64(_GOLDEN))
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    indices = _permute(places.astype(np.uint64), keys, half)
    while (outside := np.flatnonzero(indices >= count)).size:
        indices[outside] = _permute(indices[outside], keys[outside], half)
    return epochs, indices.astype(np.int64)


def mixed(
    positions: Int64[np.ndarray, " n"], *, quotas: Sequence[int], seed: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Returns (data set, position in that data set's own stream) of positions in a stream mixed of several.

    Every `BLOCK` positions are dealt to the data sets in an order of their own, which is `shuffled` with the block as
    the epoch; each takes the next `quota` positions of its own stream.

    Args:
      positions: int64 [n], from 0.
      quotas: how many positions of a block each data set gets; all of them make `BLOCK`.
      seed: in [0, 2**32).
    """
    ends = np.cumsum(quotas)
    blocks, slots = shuffled(positions, count=BLOCK, seed=member_seed(seed, len(quotas)))
    numbers = np.searchsorted(ends, slots, side="right")
    sizes = np.asarray(quotas, np.int64)
    return numbers, blocks * sizes[numbers] + slots - (ends - sizes)[numbers]


def member_seed(seed: int, number: int) -> int:
    """Seed of the shuffles of a mixture's data set: two of one size do not keep step with each other."""
    return seed + number * _SEEDS


def _permute(values: _Words, keys: _Words, half: int) -> _Words:
    """One keyed permutation of [0, 4**half)."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for number in range(1, _ROUNDS + 1):
        round_key = np.uint64(number * _GOLDEN % 2**64)
        left, right = right, left ^ (_mix(_mix(keys + round_key) ^ right) & mask)
    return (left << shift) | right


def _mix(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of a word depends on all of them."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
