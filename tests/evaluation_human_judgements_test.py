"""Probes of what people said: planted weights come back, minima are minima, and sides may be swapped."""

import json

import numpy as np
import pytest
from scipy import optimize, special

from unclip_jax.errors import InputError
from unclip_jax.evaluation import affine_probes, feature_sets, pairwise, probes, ratings


def unit(rng, count, width):
    """Directions in a narrow cone, as CLIP's are."""
    z = rng.standard_normal((count, width)) + 2
    return z / np.linalg.norm(z, axis=1, keepdims=True)


# ---------------------------------------------------------------- ratings


@pytest.mark.parametrize("block", [7, 2048])
def test_planted_weights_come_back(monkeypatch, block):
    monkeypatch.setattr(feature_sets, "BLOCK", block)
    rng = np.random.default_rng(0)
    z, planted = unit(rng, 50, 12), rng.standard_normal(12)
    lengths = rng.uniform(0.5, 20, (50, 1))  # which the probe does not see
    weights, bias = ratings.fit((lengths * z).astype(np.float64), z @ planted + 5.5)
    np.testing.assert_allclose(weights, planted, atol=1e-10)
    assert bias == pytest.approx(5.5, abs=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_it_is_the_minimum_of_the_penalised_squares(ridge):
    rng = np.random.default_rng(1)
    z, y = unit(rng, 40, 5), rng.uniform(1, 10, 40)
    weights, bias = ratings.fit(z, y, ridge=ridge)
    # The normal equations, with the bias as a column that has no penalty.
    columns = np.concatenate([z, np.ones((40, 1))], 1)
    expected = np.linalg.solve(columns.T @ columns + np.diag([ridge] * 5 + [0]), columns.T @ y)
    np.testing.assert_allclose([*weights, bias], expected, rtol=1e-8)
    noisy = np.corrcoef(z @ weights + bias, y)[0, 1]
    assert 0 < noisy < 1


def test_a_ridge_allows_for_few_ratings():
    rng = np.random.default_rng(2)
    z, y = unit(rng, 6, 20), rng.uniform(1, 10, 6)
    weights, bias = ratings.fit(z, y, ridge=1e-10)
    np.testing.assert_allclose(z @ weights + bias, y, atol=1e-5)
    strong, _ = ratings.fit(z, y, ridge=1e6)
    assert np.abs(strong).max() < 1e-4


def laion(rng, *, width=10):
    """A file of the published form: five affine layers, in a sequence in which the other places are dropout."""
    widths = [width, 8, 6, 4, 3, 1]
    tensors = {}
    for number, (ins, outs) in zip((0, 2, 4, 6, 7), zip(widths, widths[1:], strict=False), strict=True):
        tensors[f"layers.{number}.weight"] = rng.standard_normal((outs, ins)).astype(np.float32)
        tensors[f"layers.{number}.bias"] = rng.standard_normal(outs).astype(np.float32)
    return tensors


def test_laions_layers_fold_to_one_vector():
    rng = np.random.default_rng(3)
    tensors = laion(rng)
    weights, bias = ratings.folded(tensors)
    x = rng.standard_normal((7, 10))
    layer = x
    for number in (0, 2, 4, 6, 7):
        layer = layer @ tensors[f"layers.{number}.weight"].astype(np.float64).T + tensors[f"layers.{number}.bias"]
    np.testing.assert_allclose(x @ weights + bias, layer[:, 0], rtol=1e-10)
    one = {"weight": np.array([[1.0, 2.0, 3.0]]), "bias": np.array([4.0])}
    assert ratings.folded(one)[0].tolist() == [1, 2, 3] and ratings.folded(one)[1] == 4


def changed(**tensors):
    return {**laion(np.random.default_rng(3)), **{name.replace("_", "."): x for name, x in tensors.items()}}


def without(name):
    tensors = laion(np.random.default_rng(3))
    del tensors[name]
    return tensors


Z = unit(np.random.default_rng(4), 9, 4)
Y = np.arange(9.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ratings.fit(Z, Y[:8]), "9 embeddings and 8 ratings are no pairs"),
        (lambda: ratings.fit(Z, np.where(Y == 3, np.nan, Y)), "rating in row 3 is not finite"),
        (lambda: ratings.fit(Z[:4], Y[:4]), "4 ratings leave 4 weights and a bias open; give more than 4, or a ridge"),
        (lambda: ratings.fit(Z, Y, ridge=-1.0), "ridge=-1.0 is no penalty"),
        (lambda: ratings.fit(0 * Z, Y), "embeddings are zeros in row 0"),
        # The variants with activations between the layers number them otherwise; folded, they would say nonsense.
        (lambda: ratings.folded(changed(layers_1_weight=np.ones((2, 2)))), "no predictor of affine layers.*layers.1"),
        (lambda: ratings.folded(without("layers.4.bias")), "no predictor of affine layers alone"),
        (lambda: ratings.folded(changed(layers_2_weight=np.ones((5, 8)))), r"layers.2.weight \[5, 8\] and .*takes 6"),
        (
            lambda: ratings.folded(changed(layers_2_bias=np.full(6, np.inf))),
            "layers.2.bias is not finite; the file is damaged",
        ),
    ],
)
def test_bad_ratings_get_a_sentence(call, says):
    with pytest.raises(InputError, match=says):
        call()


# ---------------------------------------------------------------- pairs


def answers(rng, read, planted):
    """What people say whose preference is logistic, some of them undecided."""
    said = (rng.uniform(size=len(read)) < special.expit(read @ planted)).astype(np.float64)
    said[rng.uniform(size=len(read)) < 0.1] = 0.5
    return said


def test_a_planted_preference_comes_back():
    rng = np.random.default_rng(5)
    planted = 6 * rng.standard_normal(4)
    read = pairwise.differences(unit(rng, 4000, 4), 3 * unit(rng, 4000, 4))
    said = (rng.uniform(size=4000) < special.expit(read @ planted)).astype(np.float64)
    found = pairwise.fit(read, said, strength=1e-3)
    assert found @ planted / np.linalg.norm(found) / np.linalg.norm(planted) > 0.98
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(planted), rel=0.1)
    assert pairwise.log_likelihood(read, said, found) > pairwise.log_likelihood(read, said, planted) > -np.log(2)
    # Expected answers in the place of drawn ones: the planted weights are then the minimum itself.
    exact = pairwise.fit(read, special.expit(read @ planted), strength=1e-9)
    np.testing.assert_allclose(exact, planted, rtol=1e-6)


@pytest.mark.parametrize("strength", [1e-4, 3.0])
def test_it_is_the_minimum(strength):
    rng = np.random.default_rng(6)
    read = pairwise.differences(unit(rng, 60, 5), unit(rng, 60, 5))
    said = answers(rng, read, 9 * rng.standard_normal(5))

    def loss(w):
        logits = read @ w
        return np.sum(np.log1p(np.exp(-logits)) * said + np.log1p(np.exp(logits)) * (1 - said)) + strength / 2 * w @ w

    found = pairwise.fit(read, said, strength=strength)
    expected = optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(optimize.approx_fprime(found, loss, 1e-7)).max() < 1e-4 * max(1, strength)


def test_it_is_the_two_class_probe_of_both_orders():
    """Pairs and their mirror images, given to the solver of linear probes, leave no bias and half the weights each."""
    rng = np.random.default_rng(7)
    read = pairwise.differences(unit(rng, 50, 4), unit(rng, 50, 4))
    said = (rng.uniform(size=50) < 0.5).astype(np.float64)
    both, labels = np.concatenate([read, -read]), np.concatenate([said, 1 - said]).astype(int)
    weights, biases = probes.fit(both, labels, classes=2, strength=0.4)
    np.testing.assert_allclose(biases, 0, atol=1e-6)
    # Twice the pairs, and |w0|^2 + |w1|^2 = |w|^2 / 2: strength / 4 of the penalty for the pairs once.
    found = pairwise.fit(read, said, strength=0.1)
    np.testing.assert_allclose(found, weights[:, 1] - weights[:, 0], rtol=1e-4, atol=1e-5)


def test_sides_may_be_swapped():
    rng = np.random.default_rng(8)
    first, second = unit(rng, 80, 6), unit(rng, 80, 6)
    read = pairwise.differences(first, second)
    said = answers(rng, read, 9 * rng.standard_normal(6))
    found = pairwise.fit(read, said, strength=0.1)
    swapped = rng.uniform(size=80) < 0.5
    turned = pairwise.differences(np.where(swapped[:, None], second, first), np.where(swapped[:, None], first, second))
    again = pairwise.fit(turned, np.where(swapped, 1 - said, said), strength=0.1)
    np.testing.assert_allclose(again, found, rtol=1e-9, atol=1e-9)
    probe = affine_probes.AffineProbe("pairs", found, 0.0, "clip", {})
    apart = probe.scores(first) - probe.scores(second)
    np.testing.assert_allclose(special.expit(apart) + special.expit(-apart), 1, rtol=1e-15)
    np.testing.assert_allclose(apart, read @ found, atol=1e-12)


def test_separable_answers_have_a_minimum_all_the_same():
    rng = np.random.default_rng(9)
    read = pairwise.differences(unit(rng, 30, 4), unit(rng, 30, 4))
    said = (read[:, 0] > 0).astype(np.float64)
    found = pairwise.fit(read, said, strength=1e-6)
    assert np.all((read @ found > 0) == (said > 0.5))
    residual = read.T @ (special.expit(read @ found) - said) + 1e-6 * found
    assert np.abs(residual).max() < 1e-7


READ = pairwise.differences(Z[:4], Z[4:8])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pairwise.differences(Z, Z[:4]), r"shapes \[9, 4\] and \[4, 4\]; give both images"),
        (lambda: pairwise.differences(Z, Z * np.nan), "second images' embeddings are not finite"),
        (lambda: pairwise.fit(READ, np.ones(3), strength=1.0), "4 pairs and 3 answers"),
        (lambda: pairwise.fit(READ, np.array([1, 0, 2, 0.5]), strength=1.0), "answer in row 2 is 2; it has to be 1"),
        (lambda: pairwise.fit(READ, np.array([1, np.nan, 0, 0.5]), strength=1.0), "answer in row 1 is nan"),
        (lambda: pairwise.fit(READ, np.ones(4), strength=0.0), "strength=0.0 is no penalty"),
        (lambda: pairwise.fit(READ[:0], np.ones(0), strength=1.0), "there are no pairs"),
    ],
)
def test_bad_pairs_get_a_sentence(call, says):
    with pytest.raises(InputError, match=says):
        call()


# ---------------------------------------------------------------- files


def test_a_probe_is_read_as_it_was_written(tmp_path):
    rng = np.random.default_rng(10)
    probe = affine_probes.AffineProbe("ratings", rng.standard_normal(5), 0.1 + 0.2, "7f3a", {"examples": 9})
    probe.write(tmp_path / "probe.json")
    again = affine_probes.read(tmp_path / "probe.json")
    np.testing.assert_array_equal(again.weights, probe.weights)
    assert (again.kind, again.bias, again.clip, again.about) == ("ratings", 0.1 + 0.2, "7f3a", {"examples": 9})
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]
    z = rng.standard_normal((3, 5))
    np.testing.assert_allclose(again.scores(7 * z), probe.scores(z))
    with pytest.raises(InputError, match="reads embeddings of 5 numbers, not of 4"):
        again.scores(z[:, :4])
    with pytest.raises(InputError, match="embeddings of the CLIP '7f3a', and these are of 'another'"):
        again.check_clip("another")
    again.check_clip("7f3a")


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"kind": "other"}, {"weights": []}, {"weights": [1, "a"]}, {"bias": None}, {"about": 3},
     {"weights": [1.0, float("nan")]}],
)  # fmt: skip
def test_what_is_no_probe_is_refused(change, tmp_path):
    path = tmp_path / "probe.json"
    affine_probes.AffineProbe("pairs", np.ones(2), 0.0, "c", {}).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match="probe.json' is no probe"):
        affine_probes.read(path)


def test_a_file_that_is_not_there_or_cut_short(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        affine_probes.read(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"format": ')
    with pytest.raises(InputError, match="cannot be read"):
        affine_probes.read(tmp_path / "cut.json")
