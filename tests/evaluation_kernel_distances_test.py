"""Kernel distances against loops over all pairs, closed forms, and what they are in the mean."""

import math

import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets, kernel_distances, uncertainty


def sets(seed, count, other, width, *, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) + shift, rng.standard_normal((other, width))


def kid_by_hand(x, y):
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    others = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + others - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def cmmd_by_hand(x, y):
    x, y = ([row / math.sqrt(sum(row**2)) for row in rows] for rows in (x, y))

    def k(a, b):
        return math.exp(-sum((a - b) ** 2) / (2 * 10**2))

    def mean(first, second):
        return sum(k(a, b) for a in first for b in second) / (len(first) * len(second))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("block", [1, 5, 2048])
def test_they_are_the_sums_over_all_pairs(monkeypatch, block):
    monkeypatch.setattr(feature_sets, "BLOCK", block)
    x, y = sets(0, 17, 12, 6, shift=0.4)
    assert kernel_distances.kid(x, y) == pytest.approx(kid_by_hand(x, y), rel=1e-12)
    assert kernel_distances.cmmd(x, y) == pytest.approx(cmmd_by_hand(x, y), rel=1e-10)
    stored = x.astype(np.float32)
    assert kernel_distances.kid(stored, y) == pytest.approx(kid_by_hand(stored.astype(np.float64), y), rel=1e-12)


def test_two_points_have_a_closed_form():
    first, second = np.full((3, 1), 2.0), np.full((4, 1), -1.0)
    assert kernel_distances.kid(first, second) == pytest.approx(5**3 + 2**3 - 2 * (-1) ** 3, rel=1e-14)
    axes = np.eye(3)
    expected = 1000 * 2 * (1 - math.exp(-2 / 200))
    assert kernel_distances.cmmd(axes[[0, 0]], 7 * axes[[1, 1, 1]]) == pytest.approx(expected, rel=1e-12)


def test_rows_order_and_turns_change_nothing():
    x, y = sets(1, 30, 20, 5, shift=0.3)
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    for distance in (kernel_distances.kid, kernel_distances.cmmd):
        found = distance(x, y)
        assert distance(rng.permutation(x), rng.permutation(y)) == pytest.approx(found, rel=1e-11)
        assert distance(x @ turn, y @ turn) == pytest.approx(found, rel=1e-9)
    scaled = x * rng.uniform(0.1, 10, (30, 1))
    assert kernel_distances.cmmd(scaled, y) == pytest.approx(kernel_distances.cmmd(x, y), rel=1e-9)


def test_kid_is_unbiased_and_cmmd_is_not():
    values = [kernel_distances.kid(*sets(seed, 20, 30, 4)) for seed in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)
    assert 0.2 < np.mean(np.array(values) < 0) < 0.8
    x, _ = sets(3, 25, 2, 4)
    assert 0 <= kernel_distances.cmmd(x, x.copy()) < 1e-9
    assert all(kernel_distances.cmmd(*sets(seed, 20, 30, 4)) > 0 for seed in range(5))


@pytest.mark.parametrize("name", ["kid", "cmmd"])
def test_influences_give_the_jackknifes_error(name):
    """Leaving out one row at a time measures the same in another way, and new draws in a third."""
    distance, measured = getattr(kernel_distances, name), getattr(kernel_distances, f"measured_{name}")
    x, y = sets(4, 40, 60, 4, shift=0.7)
    found = measured(x, y)
    assert found.value == distance(x, y) and abs(found.influences.mean()) < 1e-12
    value, error = uncertainty.of(lambda rows: distance(rows, y), x, 0, groups=40)
    assert value == found.value and found.standard_error == pytest.approx(error, rel=0.05)
    without = np.array([distance(np.delete(x, row, 0), y) for row in range(40)])
    pseudo = 39 * (without.mean() - without)
    assert np.corrcoef(found.influences, pseudo)[0, 1] > 0.99
    draws = [measured(sets(seed, 40, 2, 4, shift=0.7)[0], y) for seed in range(100)]
    bars = np.mean([draw.standard_error for draw in draws])
    assert bars == pytest.approx(np.std([draw.value for draw in draws]), rel=0.2)


def test_subsets_are_a_functions_of_the_seed():
    x, y = sets(5, 60, 50, 3, shift=0.5)
    found = kernel_distances.kid_of_subsets(x, y, subsets=30, size=20, seed=1)
    assert found == kernel_distances.kid_of_subsets(x, y, subsets=30, size=20, seed=1)
    assert found != kernel_distances.kid_of_subsets(x, y, subsets=30, size=20, seed=2)
    exact = kernel_distances.kid(x, y)
    assert abs(found[0] - exact) < 4 * found[1] / math.sqrt(30) and found[1] > 0
    # Of all rows there is one subset, but for their order.
    whole = kernel_distances.kid_of_subsets(x[:50], y, subsets=3, size=50)
    assert whole == (pytest.approx(kernel_distances.kid(x[:50], y)), pytest.approx(0, abs=1e-12))


X, Y = sets(6, 8, 9, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kernel_distances.kid(X[:1], Y), "samples' features are 1 rows"),
        (lambda: kernel_distances.kid(X, np.where(np.arange(9)[:, None] == 4, np.inf, Y)), "reference.*row 4"),
        (lambda: kernel_distances.kid(X, Y[:, :2]), "have 3 dimensions, the reference's 2"),
        (lambda: kernel_distances.cmmd(X, Y[:, :2]), "have 3 dimensions, the reference's 2"),
        (lambda: kernel_distances.cmmd(X * (np.arange(8) != 5)[:, None], Y), "samples' embeddings are zeros in row 5"),
        (lambda: kernel_distances.kid_of_subsets(X, Y), "100 subsets of 1000 rows.*size from 2 to 8"),
        (lambda: kernel_distances.kid_of_subsets(X, Y, subsets=0, size=4), "0 subsets"),
    ],
)
def test_bad_input_gets_a_sentence(call, says):
    with pytest.raises(InputError, match=says):
        call()
