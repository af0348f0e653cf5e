"""The inception score against its definition written out, closed forms, and the jackknife."""

import math

import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.evaluation import inception_score, uncertainty


def by_hand(logits):
    rows = []
    for row in logits:
        exps = [math.exp(x - max(row)) for x in row]
        rows.append([x / sum(exps) for x in exps])
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    divergences = [sum(p * math.log(p / q) for p, q in zip(row, mean, strict=True) if p) for row in rows]
    return math.exp(sum(divergences) / len(rows))


def test_it_is_its_definition_over_splits(monkeypatch):
    logits = 2 * np.random.default_rng(0).standard_normal((23, 7))
    assert inception_score.score(logits) == (pytest.approx(by_hand(logits), rel=1e-12), 0)
    assert inception_score.score(logits.astype(np.float32)).value == pytest.approx(by_hand(logits), rel=1e-6)
    halves = [by_hand(logits[:11]), by_hand(logits[11:])]
    assert inception_score.score(logits, 2) == (pytest.approx(np.mean(halves)), pytest.approx(np.std(halves)))
    monkeypatch.setattr(inception_score, "SPLIT", 10)  # ADM's splits: two whole ones and a rest
    parts = [by_hand(logits[:10]), by_hand(logits[10:20]), by_hand(logits[20:])]
    assert inception_score.score(logits) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts)))
    assert inception_score.measured(logits).value == pytest.approx(np.mean(parts))


def test_extremes():
    assert inception_score.score(np.ones((6, 9))).value == pytest.approx(1, rel=1e-14)
    sure = 5000.0 * np.eye(9)[np.arange(36) % 9]  # so sure that other classes' p is 0
    assert inception_score.score(sure).value == pytest.approx(9, rel=1e-12)
    mixed = np.random.default_rng(1).standard_normal((20, 5))
    shifted = inception_score.score(mixed + np.arange(20)[:, None]).value
    assert shifted == pytest.approx(inception_score.score(mixed).value, rel=1e-12)


@pytest.mark.parametrize("splits", [1, 3])
def test_influences_give_the_error_of_new_draws(splits):
    def draw(seed):
        return 2 * np.random.default_rng(seed).standard_normal((150, 5))

    found = inception_score.measured(draw(0), splits)
    assert len(found.influences) == 150 and abs(found.influences.mean()) < 1e-12
    values = [inception_score.score(draw(seed), splits).value for seed in range(100)]
    assert found.standard_error == pytest.approx(np.std(values), rel=0.2)
    if splits == 1:
        _, error = uncertainty.of(lambda rows: inception_score.score(rows, 1).value, draw(0), 0, groups=150)
        assert found.standard_error == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(
    ("logits", "splits", "says"),
    [
        (np.array([[1.0, np.inf], [0.0, 1.0]]), None, "the logits are not finite, first in row 0"),
        (np.ones((1, 4)), None, "the logits are 1 rows"),
        (np.ones((4, 4)), 5, "4 rows of logits cannot be cut into 5 splits"),
        (np.ones((4, 4)), 0, "into 0 splits"),
    ],
)
def test_bad_input_gets_a_sentence(logits, splits, says):
    with pytest.raises(InputError, match=says):
        inception_score.score(logits, splits)
