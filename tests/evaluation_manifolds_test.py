"""Precision, recall, density and coverage against loops over all pairs, and against what they are in the mean."""

import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.evaluation import manifolds, uncertainty


def by_hand(reference, samples, k):
    def squared(a, b):
        return float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum())

    def radii(rows):
        return [sorted(squared(a, b) for j, b in enumerate(rows) if j != i)[k - 1] for i, a in enumerate(rows)]

    real, made = radii(reference), radii(samples)
    inside = [[squared(y, x) <= r for x, r in zip(reference, real, strict=True)] for y in samples]
    recalled = [any(squared(y, x) <= r for y, r in zip(samples, made, strict=True)) for x in reference]
    return {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean(recalled),
        "density": np.sum(inside) / (k * len(samples)),
        "coverage": np.mean([any(column) for column in zip(*inside, strict=True)]),
    }


@pytest.mark.parametrize("pairs", [1, 37 * 5, 1 << 24])
@pytest.mark.parametrize(("k", "shift"), [(1, 0.0), (3, 0.5), (3, 100.0)])
def test_they_are_what_loops_find(monkeypatch, pairs, k, shift):
    monkeypatch.setattr(manifolds, "_PAIRS", pairs)
    rng = np.random.default_rng(k)
    reference = (rng.standard_normal((37, 4)) + shift).astype(np.float32)
    samples = (0.8 * rng.standard_normal((29, 4)) + shift + 0.3).astype(np.float32)
    found = manifolds.measures(reference, samples, k)
    assert found == pytest.approx(by_hand(reference, samples, k))
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1 and 0 < found["coverage"] < 1


def test_a_distance_equal_to_the_radius_is_inside():
    """Whole numbers on a line: ADM compares by <=, and by < hardly a sample would lie in any ball."""
    reference, samples = np.arange(0.0, 12.0, 2)[:, None], np.array([[-2.0], [12.0], [14.0], [30.0]])
    found = manifolds.measures(reference, samples, 1)
    assert found == pytest.approx(by_hand(reference, samples, 1))
    assert found == {"precision": 0.5, "recall": 1.0, "density": 0.5, "coverage": pytest.approx(2 / 6)}


def test_precision_and_recall_are_not_swapped():
    """A model that makes one of the real images again and again: all of it is real, hardly anything real is made."""
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((50, 64)).astype(np.float32) + 3
    found = manifolds.measures(reference, np.repeat(reference[7:8], 40, axis=0))
    assert found["precision"] == 1 and found["recall"] == 1 / 50 and found["coverage"] < 0.2
    # And one that makes much that is not real: the other way around.
    wide = np.concatenate([reference, 20 * rng.standard_normal((50, 64))])
    found = manifolds.measures(reference, wide)
    assert found["precision"] == 0.5 and found["recall"] == 1 and found["coverage"] == 1
    same = manifolds.measures(reference, reference.copy())
    assert same["precision"] == same["recall"] == same["coverage"] == 1


@pytest.mark.parametrize("k", [1, 3])
def test_two_sets_of_one_law_have_known_means(k):
    """For a row, its n - 1 others and the m samples are exchangeable: ranks alone say what to expect."""
    n, m, draws = 30, 20, 150
    rng = np.random.default_rng(3)
    found = [manifolds.measures(rng.standard_normal((n, 2)), rng.standard_normal((m, 2)), k) for _ in range(draws)]
    missed = np.prod([(n - 1 - i) / (n - 1 + m - i) for i in range(k)])  # the k nearest of all are references
    for name, expected in (("density", 1.0), ("coverage", 1 - missed)):
        values = np.array([one[name] for one in found])
        assert abs(values.mean() - expected) < 3.5 * values.std() / np.sqrt(draws)


def test_rows_order_turns_and_shifts_change_nothing():
    rng = np.random.default_rng(4)
    reference, samples = rng.standard_normal((40, 6)), 0.9 * rng.standard_normal((30, 6))
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    found = manifolds.measures(reference, samples)
    assert manifolds.measures(rng.permutation(reference), rng.permutation(samples)) == found
    assert manifolds.measures(reference @ turn + 50, samples @ turn + 50) == pytest.approx(found)


@pytest.mark.parametrize(("count", "groups", "pairs"), [(60, 6, 1 << 24), (60, 6, 40), (7, 2, 1 << 24)])
def test_error_bars_are_the_jackknifes(monkeypatch, count, groups, pairs):
    """Distances are computed once, and yet it is as if all had been measured anew without each group."""
    monkeypatch.setattr(manifolds, "_PAIRS", pairs)
    rng = np.random.default_rng(5)
    reference, samples = rng.standard_normal((40, 3)), 0.9 * rng.standard_normal((count, 3)) + 0.4
    found = manifolds.measured(reference, samples, 2, seed=3, groups=groups)
    names = list(found)

    def statistic(rows):
        measures = manifolds.measures(reference, rows, 2)
        return np.array([measures[name] for name in names])

    value, error = uncertainty.of(statistic, samples, 3, groups=groups)
    for place, name in enumerate(names):
        assert found[name] == (pytest.approx(value[place]), pytest.approx(error[place]))
        assert found[name].standard_error > 0


def test_error_bars_are_those_of_new_draws():
    rng = np.random.default_rng(6)
    reference = rng.standard_normal((100, 2))
    draws = [manifolds.measured(reference, 0.7 * rng.standard_normal((120, 2)) + 0.5) for _ in range(60)]
    for name in draws[0]:
        values, errors = zip(*(draw[name] for draw in draws), strict=True)
        assert 0.7 < np.mean(errors) / np.std(values) < 1.4, name  # the jackknife is not sharp for k-th neighbours


@pytest.mark.parametrize(
    ("reference", "samples", "k", "says"),
    [
        (np.ones((9, 2)), np.ones((3, 2)), 3, "samples' features are 3 rows of features; this needs at least 4"),
        (np.ones((3, 2)), np.ones((9, 2)), 3, "reference's features are 3 rows"),
        (np.ones((9, 2)), np.ones((9, 3)), 3, "have 3 dimensions, the reference's 2"),
        (np.ones((9, 2)), np.full((9, 2), np.nan), 3, "samples' features are not finite, first in row 0"),
        (np.ones((9, 2)), np.ones((9, 2)), 0, "k=0 is no neighbour"),
    ],
)
def test_bad_input_gets_a_sentence(reference, samples, k, says):
    with pytest.raises(InputError, match=says):
        manifolds.measures(reference, samples, k)


def test_too_few_samples_to_leave_a_group_out():
    with pytest.raises(InputError, match="5 samples less one of 2 groups have no 3 neighbours each"):
        manifolds.measured(np.ones((9, 2)), np.ones((5, 2)), groups=2)
