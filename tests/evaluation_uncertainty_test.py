"""Error bars against what is known of means and variances, and in simulation."""

import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets, uncertainty


def test_of_a_mean_it_is_the_textbooks():
    values = np.random.default_rng(0).exponential(size=30)
    expected = values.std(ddof=1) / np.sqrt(30)
    found = uncertainty.mean(values)
    assert found.value == values.mean() and found.standard_error == pytest.approx(expected, rel=1e-12)
    # Every row a group of its own: the delete-one jackknife, which is exact for a mean.
    value, error = uncertainty.of(np.mean, values, 5, groups=30)
    assert value == values.mean() and error == pytest.approx(expected, rel=1e-12)


def test_several_statistics_at_once_are_each_its_own():
    values = np.random.default_rng(1).standard_normal((50, 3))
    both = uncertainty.of(lambda rows: rows.mean(0), values, 2, groups=10)
    for column in range(3):
        alone = uncertainty.of(lambda rows, column=column: rows[:, column].mean(), values, 2, groups=10)
        assert alone == (pytest.approx(both.value[column]), pytest.approx(both.standard_error[column]))
    assert uncertainty.of(np.mean, values, 3) == uncertainty.of(np.mean, values, 3)
    assert uncertainty.of(np.mean, values, 3).standard_error != uncertainty.of(np.mean, values, 4).standard_error


def test_groups_cover_all_rows_once():
    left = []

    def statistic(rows):
        left.append(set(range(23)) - set(rows.tolist()))
        return 0.0

    uncertainty.of(statistic, np.arange(23), 0, groups=5)
    *groups, none = left
    assert none == set() and sorted(len(group) for group in groups) == [4, 4, 5, 5, 5]
    assert set.union(*groups) == set(range(23))
    assert max(groups, key=len) != set(range(5))  # dealt at random, for rows that follow each other may be alike


def test_the_jackknifes_interval_covers():
    """Of a skew law's variance, which is no mean: 95% intervals by 20 groups, with Student's 2.093 for 19 degrees."""
    rng = np.random.default_rng(3)
    hits = []
    for seed in range(200):
        value, error = uncertainty.of(np.var, rng.uniform(size=200), seed)
        hits.append(abs(value - 1 / 12) < 2.093 * error)
    assert 0.9 < np.mean(hits) < 0.99


def test_what_both_sides_share_cancels():
    rng = np.random.default_rng(4)
    values = 10 * rng.standard_normal(80)
    other = values - 1.0
    assert uncertainty.mean(values).minus(uncertainty.mean(other)) == (pytest.approx(1.0), pytest.approx(0, abs=1e-14))
    assert uncertainty.difference(np.mean, values, other, 0) == (pytest.approx(1.0), pytest.approx(0, abs=1e-14))
    apart = uncertainty.mean(values).minus(uncertainty.mean(values - rng.standard_normal(80)))
    assert apart.standard_error == pytest.approx(1 / np.sqrt(80), rel=0.3)


def test_drawn_rows_are_different_and_stay_the_same():
    for number in range(20):
        rows = feature_sets.drawn(50, 20, seed=3, number=number)
        assert len(set(rows.tolist())) == 20 and rows.min() >= 0 and rows.max() < 50
    assert feature_sets.drawn(10, 4, seed=1).tolist() == feature_sets.drawn(10, 4, seed=1, number=0).tolist()
    counts = np.bincount(np.concatenate([feature_sets.drawn(50, 20, seed=3, number=k) for k in range(200)]))
    assert len(counts) == 50 and np.abs(counts - 80).max() < 5 * np.sqrt(80 * 0.6)  # all rows equally often


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: uncertainty.mean(np.ones(1)), "two finite values or more; 1 were given"),
        (lambda: uncertainty.mean(np.array([1.0, np.inf])), "two finite values"),
        (lambda: uncertainty.of(np.mean, np.ones(5), 0), "5 rows cannot be dealt into 20 groups"),
        (lambda: uncertainty.of(np.mean, np.ones(5), 0, groups=1), "into 1 groups"),
        (lambda: uncertainty.difference(np.mean, np.ones(5), np.ones(4), 0), "same rows on both sides, not 5 and 4"),
        (lambda: uncertainty.mean(np.ones(5)).minus(uncertainty.mean(np.ones(4))), "same rows.*not 5 and 4"),
    ],
)
def test_bad_input_gets_a_sentence(call, says):
    with pytest.raises(InputError, match=says):
        call()
