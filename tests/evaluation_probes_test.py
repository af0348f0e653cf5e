"""The linear probe's solver against Newton's method and the conditions of a minimum; its choices, on known data."""

import numpy as np
import pytest
from evaluated import Examples, run, unit

from unclip_jax.evaluation import probes


def gradient(x, y, weights, biases, strength):
    """Of the penalised sum of -log softmax, by its textbook form."""
    logits = x @ weights + biases
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = p - np.eye(p.shape[1])[y]
    return x.T @ error + strength * weights, error.sum(0), p


def newton(x, y, classes, strength):
    """The minimum, by Newton steps with the whole Hessian over weights and biases."""
    width = x.shape[1]
    one = np.concatenate([x, np.ones((len(x), 1))], 1)
    affine = np.zeros((width + 1, classes))
    ridge = np.diag([strength] * width + [0.0])
    for _ in range(60):
        by_weight, by_bias, p = gradient(x, y, affine[:-1], affine[-1], strength)
        flat = np.concatenate([by_weight, by_bias[None]]).ravel()
        hessian = np.einsum("na,nb,nj,jk->ajbk", one, one, p, np.eye(classes))
        hessian -= np.einsum("na,nb,nj,nk->ajbk", one, one, p, p)
        hessian += np.einsum("ab,jk->ajbk", ridge, np.eye(classes))
        # Biases may move together: the smallest step is one of the solutions.
        step = np.linalg.lstsq(hessian.reshape(flat.size, -1), flat, rcond=1e-12)[0]
        affine -= step.reshape(affine.shape)
    return affine[:-1], affine[-1]


def clusters(seed, count=60, width=4, classes=3, spread=1.0, cone=0.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) + cone
    y = rng.integers(0, classes, count)
    return (centres[y] + spread * rng.normal(size=(count, width))).astype(np.float32), y


@pytest.mark.parametrize("strength", [1e-3, 0.3, 10.0, 1e4])
@pytest.mark.parametrize("cone", [0.0, 30.0])
def test_the_solution_is_newtons(strength, cone):
    x, y = clusters(0, cone=cone)
    weights, biases = probes.fit(x, y, classes=3, strength=strength)
    expected, offsets = newton(x.astype(np.float64), y, 3, strength)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(biases - biases.mean(), offsets - offsets.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e6])
def test_the_gradient_vanishes_for_embeddings_in_a_cone(strength):
    rng = np.random.default_rng(1)
    x, y = clusters(1, count=400, width=24, classes=5, cone=8.0)
    x = x * np.exp(rng.normal(size=24))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    weights, biases = probes.fit(x, y, classes=5, strength=strength)
    by_weight, by_bias, p = gradient(x.astype(np.float64), y, weights, biases, strength)
    at_zero, _, _ = gradient(x.astype(np.float64), y, np.zeros_like(weights), np.zeros(5), strength)
    assert np.abs(by_weight).max() < 1e-4 * np.abs(at_zero).max() and np.abs(by_bias).max() < 1e-3
    # Biases are free: classes are predicted as often as they occur.
    np.testing.assert_allclose(p.sum(0), np.bincount(y), atol=1e-3)


def test_separable_classes_are_separated_and_a_strong_penalty_leaves_the_frequencies():
    x, y = clusters(2, spread=0.01)
    weights, biases = probes.fit(x, y, classes=3, strength=1e-6)
    assert ((x @ weights + biases).argmax(1) == y).all()
    weights, biases = probes.fit(x, y, classes=3, strength=1e12)
    assert np.abs(weights).max() < 1e-9
    np.testing.assert_allclose(np.exp(biases) / np.exp(biases).sum(), np.bincount(y) / len(y), atol=1e-6)
    # Features that say nothing, of a model that says always the same.
    weights, biases = probes.fit(np.ones((60, 4), np.float32), y, classes=3, strength=1.0)
    assert np.abs(weights).max() < 1e-9 and np.isfinite(biases).all()


@pytest.mark.parametrize("peak", [-6.0, -3.1, 0.0, 1.88, 6.0])
def test_the_sweep_finds_a_peak_to_an_eighth_of_a_decade(peak):
    asked = []

    def score(strength):
        asked.append(np.log10(strength))
        return -abs(np.log10(strength) - peak)

    assert abs(np.log10(probes.sweep(score)) - peak) <= 1 / 16 + 1e-9
    np.testing.assert_allclose(asked[:7], [-6, -4, -2, 0, 2, 4, 6])
    assert len(asked) <= 7 + 2 * 4 and min(asked) >= -6 and max(asked) <= 6
    assert np.allclose(np.array(asked) * 8, np.round(np.array(asked) * 8))


def test_of_equal_strengths_the_sweep_takes_the_strongest():
    assert np.log10(probes.sweep(lambda strength: float(strength < 3))) == pytest.approx(0.375)


def test_the_probe_trains_on_one_split_and_measures_on_another():
    rng = np.random.default_rng(4)
    centres = unit(rng, 3)

    def source(count, labels):
        z = centres[np.maximum(labels, 0)] + 0.15 * rng.normal(size=(count, 3)).astype(np.float32)
        return {"picture": z / np.linalg.norm(z, axis=1, keepdims=True), "label": labels}

    training = source(60, rng.integers(0, 3, 60))
    training["label"][::7] = -1
    test = source(40, rng.integers(0, 3, 40))
    test["label"][:30:4] = -1
    data = Examples(labelled=test, labelled_training=training, names="abc", masked=(5, 6))
    scores = run("linear_probe", data, examples=40, probe_examples=57)

    def kept(fields, count):
        rows = [i for i in range(count) if fields["label"][i] >= 0 and i not in (5, 6)]
        return fields["picture"][rows].astype(np.float64), fields["label"][rows]

    (x, y), (test_x, test_y) = kept(training, 57), kept(test, 40)
    weights, biases = newton(x, y, 3, scores["probe_strength"])
    right = (test_x @ weights + biases).argmax(1) == test_y
    assert scores["probe_top1"] == pytest.approx(right.mean()) and 0.5 < right.mean() <= 1
    shares = [right[test_y == label].mean() for label in range(3)]
    assert scores["probe_mean_per_class"] == pytest.approx(np.mean(shares))
    # The strength is the best on the last fifth, which took no part in training.
    fold = len(y) - len(y) // 5

    def held_out(strength):
        weights, biases = newton(x[:fold], y[:fold], 3, strength)
        return ((x[fold:] @ weights + biases).argmax(1) == y[fold:]).mean()

    assert held_out(scores["probe_strength"]) >= max(held_out(10.0**exponent) for exponent in (-4, -2, 0, 2, 4, 6))


def test_too_few_labels_are_said_and_give_no_score(caplog):
    z = unit(np.random.default_rng(0), 8)
    data = Examples(picture=z, label=np.array([0, 1, 0, 1, -1, -1, -1, -1]), names="ab")
    assert run("linear_probe", data, probe_examples=8) == {}
    assert "4 examples have labels to train on, 4 to measure on" in caplog.text
