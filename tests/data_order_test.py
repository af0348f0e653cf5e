"""The order of training: permutations, unrelated from epoch to epoch and seed to seed, and the same for ever."""

import time

import numpy as np
import pytest

from unclip_jax.data import order

WORD = 2**64


def indices(begin, end, *, count, seed=0):
    return order.shuffled(np.arange(begin, end, dtype=np.int64), count=count, seed=seed)[1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 37, 255, 256, 257, 1160, 8000])
def test_every_epoch_is_a_permutation(count):
    for epoch in (0, 1, 2, 10**9):
        positions = np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64)
        epochs, drawn = order.shuffled(positions, count=count, seed=7)
        assert (epochs == epoch).all()
        np.testing.assert_array_equal(np.sort(drawn), np.arange(count))


def mix(word):
    """SplitMix64's step, in Python's integers."""
    word = (word + 0x9E3779B97F4A7C15) % WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def test_the_mixer_is_splitmix64():
    # The first two outputs of the published generator from state 1234567.
    assert [mix(1234567), mix(1234567 + 0x9E3779B97F4A7C15)] == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize(("count", "seed"), [(5, 0), (1000, 1), (250_000_000, 2**32 - 1)])
def test_the_order_is_that_of_a_feistel_network_in_plain_integers(count, seed):
    def permute(value, key, half):
        left, right = value >> half, value % 2**half
        for number in range(1, 9):
            left, right = right, left ^ mix(mix((key + number * 0x9E3779B97F4A7C15) % WORD) ^ right) % 2**half
        return left * 2**half + right

    half = 1
    while 4**half < count:
        half += 1
    for position in (*range(20), 10**12 + 3):
        epoch, value = divmod(position, count)
        key = mix((mix(seed) + epoch * 0x9E3779B97F4A7C15) % WORD)
        value = permute(value, key, half)
        while value >= count:
            value = permute(value, key, half)
        assert indices(position, position + 1, count=count, seed=seed).tolist() == [value]


@pytest.mark.parametrize("count", [5, 12])
def test_every_index_is_equally_likely_at_every_place(count):
    epochs = 20_000
    drawn = indices(0, epochs * count, count=count).reshape(epochs, count)
    for place in range(count):
        seen = np.bincount(drawn[:, place], minlength=count)
        # Chi-square with count - 1 degrees of freedom; 45 is beyond the 1e-5 quantile of 11.
        assert ((seen - epochs / count) ** 2 / (epochs / count)).sum() < 45
    # Neighbours too: all ordered pairs of different indices.
    pairs = np.bincount(drawn[:, 0] * count + drawn[:, 1], minlength=count * count)
    expected = epochs / (count * (count - 1))
    different = pairs[~np.eye(count, dtype=bool).ravel()]
    assert ((different - expected) ** 2 / expected).sum() < 1.6 * different.size + 30


def test_orders_are_unrelated():
    count = 5000
    orders = [indices(0, count, count=count, seed=seed) for seed in (0, 1, 2**31)]
    orders += [indices(count, 2 * count, count=count), np.arange(count)]
    for number, one in enumerate(orders):
        # Within an order: neighbours do not go together.
        if number < 4:
            assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.06
        for other in orders[:number]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
            assert np.sum(one == other) < 12  # one is expected


def test_far_positions_of_large_sets_cost_nothing_more():
    begin = time.perf_counter()
    drawn = indices(10**15, 10**15 + 4096, count=650_000_000)
    assert time.perf_counter() - begin < 0.1
    assert drawn.min() >= 0 and drawn.max() < 650_000_000 and len(np.unique(drawn)) == 4096
