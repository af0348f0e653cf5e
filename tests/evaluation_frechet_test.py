"""The Fréchet distance against closed forms and others' formulas; its error bars against derivatives and simulation."""

import numpy as np
import pytest
from scipy import linalg

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets, frechet, uncertainty


def rotation(rng, width):
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


def features(rng, count, width, *, shift=0.0):
    """Rows with a spectrum that falls off, as an image network's do, in directions of their own."""
    scales = np.arange(1, width + 1) ** -0.7
    return rng.standard_normal((count, width)) * scales @ rotation(rng, width) + shift


def pytorch_fid(x, y):
    """Its formula: the square root of the product of covariances, imaginary parts dropped where they are rounding."""
    shift, first, second = x.mean(0) - y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    product = linalg.sqrtm(first.dot(second))
    if np.iscomplexobj(product):
        assert np.abs(np.diagonal(product).imag).max() < 1e-3
        product = product.real
    return shift.dot(shift) + np.trace(first) + np.trace(second) - 2 * np.trace(product)


def adm(x, y):
    """ADM's: as the above, with a little of the identity added to both where the product is nearly singular."""
    shift, offset = x.mean(0) - y.mean(0), np.eye(x.shape[1]) * 1e-6
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    product = linalg.sqrtm((first + offset).dot(second + offset)).real
    plain = linalg.sqrtm(first.dot(second)).real
    trace = np.trace(plain if np.isfinite(plain).all() else product)
    return np.sum(shift**2) + np.trace(first) + np.trace(second) - 2 * trace


def by_eigenvalues(x, y):
    """The trace as the sum of roots of the eigenvalues of the product, which is not symmetric."""
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values = linalg.eigvals(first @ second)
    trace = np.sqrt(np.maximum(values.real, 0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * trace


@pytest.mark.parametrize(("count", "other", "width"), [(400, 500, 24), (90, 30, 24), (50, 60, 1), (300, 40, 33)])
def test_it_is_what_others_compute_of_the_same_features(count, other, width):
    rng = np.random.default_rng(count)
    x, y = features(rng, count, width, shift=0.1), features(rng, other, width)
    found = frechet.distance_of_features(x, y)
    assert found == pytest.approx(frechet.distance(frechet.moments(x), frechet.moments(y)), rel=1e-12)
    assert found == pytest.approx(frechet.distance_of_features(y, x), rel=1e-12)
    # np.cov of one column is a number, not a matrix
    if width > 1:
        for formula in (pytorch_fid, adm, by_eigenvalues):
            assert found == pytest.approx(formula(x, y), rel=1e-6), formula.__name__
        # A known wrong short cut, which these features tell from the right one.
        product = np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)
        wrong = found - by_eigenvalues(x, y) + 2 * np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0)).sum()
        assert abs(wrong) > 1e-2
    else:
        expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
        assert found == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    turn, shift = rotation(rng, 16), rng.standard_normal(16)
    first, second = rng.uniform(0, 2, (2, 16))
    first[:3], second[2:5] = 0, 0  # neither has full rank
    a = frechet.Moments(0, shift, turn * first @ turn.T)
    b = frechet.Moments(0, np.zeros(16), turn * second @ turn.T)
    expected = (shift**2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_sets_smaller_than_their_dimensions():
    """Two rows at +-a on an axis have the variance 2 a^2 there and none elsewhere."""

    def pair(size, axis):
        return np.stack([size * np.eye(7)[axis], -size * np.eye(7)[axis]])

    near = frechet.distance_of_features(pair(3.0, 0), pair(1.0, 0))
    assert near == pytest.approx(2 * (3 - 1) ** 2, rel=1e-14)
    assert frechet.distance_of_features(pair(3.0, 0), pair(1.0, 1)) == pytest.approx(2 * (9 + 1), rel=1e-14)
    assert frechet.moments(pair(3.0, 0)).deficient and not frechet.moments(np.ones((8, 7))).deficient
    rng = np.random.default_rng(1)
    x, y = features(rng, 20, 48, shift=0.2), features(rng, 30, 48)
    found = frechet.distance_of_features(x, y)
    assert found == pytest.approx(by_eigenvalues(x, y), rel=1e-5)  # which is good to the root of its rounding
    assert found == pytest.approx(frechet.distance(frechet.moments(x), frechet.moments(y)), rel=1e-10)


@pytest.mark.parametrize("count", [20, 200])
def test_equal_sets_are_at_distance_0(count):
    x = features(np.random.default_rng(2), count, 32).astype(np.float32)
    assert frechet.distance_of_features(x, x.copy()) == 0.0
    assert frechet.distance(frechet.moments(x), frechet.moments(x.copy())) == 0.0
    assert frechet.measured(x, frechet.moments(x)).value == 0.0
    turned = frechet.distance_of_features(x, x[::-1].copy())
    assert 0 <= turned < 1e-13 * np.trace(np.cov(x, rowvar=False))


def test_rows_order_and_common_turns_change_nothing():
    rng = np.random.default_rng(3)
    x, y = features(rng, 60, 12, shift=0.3), features(rng, 40, 12)
    found = frechet.distance_of_features(x, y)
    turn, shift = rotation(rng, 12), rng.standard_normal(12)
    assert frechet.distance_of_features(rng.permutation(x), y) == pytest.approx(found, rel=1e-12)
    assert frechet.distance_of_features(x @ turn + shift, y @ turn + shift) == pytest.approx(found, rel=1e-11)
    assert frechet.distance_of_features(3 * x, 3 * y) == pytest.approx(9 * found, rel=1e-12)


def test_moments_are_those_of_the_textbook(monkeypatch, tmp_path):
    monkeypatch.setattr(feature_sets, "BLOCK", 7)
    rng = np.random.default_rng(4)
    x = (100 + 0.01 * rng.standard_normal((31, 5))).astype(np.float32)  # a collapsed model's: far from 0, and narrow
    before, exact = x.copy(), x.astype(np.float64)
    np.save(tmp_path / "x.npy", x)
    for found in (
        frechet.moments(x),
        frechet.moments(exact),
        frechet.moments(np.load(tmp_path / "x.npy", mmap_mode="r")),
        frechet.streamed(np.split(x, [1, 2, 15])),
        frechet.merged(frechet.moments(x[:20]), frechet.moments(x[20:])),
    ):
        assert found.count == 31
        np.testing.assert_allclose(found.mu, exact.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.sigma, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-16)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(exact, before)


@pytest.mark.parametrize(("count", "width"), [(40, 6), (9, 20)])
def test_influences_are_the_derivative_by_rows_weights(count, width):
    rng = np.random.default_rng(5)
    x, reference = features(rng, count, width, shift=0.2), frechet.moments(features(rng, 100, width))
    found = frechet.measured(x, reference)
    assert found.value == pytest.approx(frechet.distance(frechet.moments(x), reference), rel=1e-10)

    def weighted(row, step):
        weights = np.full(count, 1.0)
        weights[row] += step
        weights /= weights.sum()
        mu = weights @ x
        sigma = (x - mu).T @ ((x - mu) * weights[:, None]) * count / (count - 1)
        return frechet.distance(frechet.Moments(0, mu, sigma), reference)

    step = 1e-4
    slopes = [count * (weighted(row, step) - weighted(row, -step)) / (2 * step) for row in range(count)]
    np.testing.assert_allclose(found.influences, slopes, atol=1e-5 * np.abs(slopes).max())
    assert abs(found.influences.mean()) < 1e-12


def test_error_bars_cover_the_known_distance():
    """Of 300 draws of Gaussians with a known distance, about 95% have it within 1.96 standard errors."""
    rng = np.random.default_rng(6)
    scales = np.array([1.0, 0.7, 0.5])
    reference = frechet.Moments(0, np.zeros(3), np.diag([1.5, 0.3, 0.5]))
    shift = np.array([0.5, 0.0, 0.2])
    true = (shift**2).sum() + ((scales - np.sqrt(np.diag(reference.sigma))) ** 2).sum()
    draws = [frechet.measured(rng.standard_normal((400, 3)) * scales + shift, reference) for _ in range(300)]
    errors = np.array([draw.value - true for draw in draws])
    bars = np.array([draw.standard_error for draw in draws])
    assert 0.92 < np.mean(np.abs(errors) < 1.96 * bars) < 0.98
    assert bars.mean() == pytest.approx(errors.std(), rel=0.12)


@pytest.mark.parametrize("count", [16, 40, 200])
def test_both_kinds_of_error_bars_agree_with_each_other_and_with_new_draws(count):
    rng = np.random.default_rng(7)
    turn = rotation(rng, 20) * np.arange(1, 21) ** -0.5
    reference = frechet.moments(features(rng, 300, 20, shift=0.1))
    draws = [rng.standard_normal((count, 20)) @ turn for _ in range(60)]
    values = np.array([frechet.distance(frechet.moments(x), reference) for x in draws])
    linear = np.mean([frechet.measured(x, reference).standard_error for x in draws])
    groups = [
        uncertainty.of(lambda rows: frechet.distance(frechet.moments(rows), reference), x, seed, groups=8)
        for seed, x in enumerate(draws[:20])
    ]
    assert linear == pytest.approx(values.std(), rel=0.25)
    assert np.mean([estimate.standard_error for estimate in groups]) == pytest.approx(linear, rel=0.15)


def test_a_sweeps_differences_are_more_certain_than_its_points():
    rng = np.random.default_rng(8)
    noise, reference = rng.standard_normal((300, 6)), frechet.moments(rng.standard_normal((400, 6)) + 0.5)
    a, b = frechet.measured(noise, reference), frechet.measured(1.05 * noise + 0.02, reference)
    apart = b.minus(a)
    assert apart.value == b.value - a.value
    assert 0 < apart.standard_error < 0.3 * np.hypot(a.standard_error, b.standard_error)
    again = uncertainty.difference(
        lambda rows: frechet.distance(frechet.moments(rows), reference), 1.05 * noise + 0.02, noise, 0
    )
    assert again.value == pytest.approx(apart.value)
    assert again.standard_error == pytest.approx(apart.standard_error, rel=0.5)


def test_at_infinity_the_bias_is_gone():
    rng = np.random.default_rng(9)
    reference = frechet.Moments(0, np.zeros(12), np.eye(12))
    true = 12 * 0.2**2
    plain, extrapolated = [], []
    for seed in range(24):
        x = 0.8 * rng.standard_normal((300, 12))
        found = frechet.at_infinity(x, reference, seed, points=5)
        assert found.counts[0] == 50 and found.counts[-1] == 300 and len(found.counts) == 5
        plain.append(frechet.distance(frechet.moments(x), reference))
        assert found.distances[-1] == pytest.approx(plain[-1], rel=1e-12)
        fit = np.polynomial.Polynomial.fit(1 / np.array(found.counts), found.distances, 1).convert().coef
        np.testing.assert_allclose([found.value, found.slope], fit, rtol=1e-9)
        extrapolated.append(found.value)
    bias, error = np.mean(plain) - true, np.std(extrapolated) / np.sqrt(24)
    assert bias > 7 * error and abs(np.mean(extrapolated) - true) < 3 * error
    assert frechet.at_infinity(x, reference, 23, points=5) == found
    by_rows = frechet.at_infinity(x, x[:200], 0, points=2, smallest=150)
    assert by_rows == frechet.at_infinity(x, frechet.moments(x[:200]), 0, points=2, smallest=150)
    assert len(frechet.at_infinity(x[:40], reference, 0).counts) == 15


def nan_in(x, row):
    x = x.copy()
    x[row, 1] = np.nan
    return x


GOOD = np.random.default_rng(0).standard_normal((10, 4))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: frechet.moments(nan_in(GOOD, 7)), "not finite, first in row 7"),
        (lambda: frechet.moments(GOOD[:1]), "1 rows of features; this needs at least 2"),
        (lambda: frechet.moments(GOOD[:, :0]), r"shape \[10, 0\]"),
        (lambda: feature_sets.check(GOOD[0], what="features"), r"shape \[4\]; a row of features for each image"),
        (lambda: frechet.distance_of_features(GOOD, GOOD[:, :3]), "samples' features have 4 dimensions.*reference's 3"),
        (lambda: frechet.distance_of_features(GOOD, nan_in(GOOD, 2)), "reference's features are not finite.*row 2"),
        (lambda: frechet.distance(frechet.moments(GOOD), frechet.moments(GOOD[:, :3])), "4 dimensions.*reference's 3"),
        (
            lambda: frechet.distance(frechet.moments(GOOD), frechet.Moments(0, np.full(4, np.inf), np.eye(4))),
            "moments of the reference are not finite",
        ),
        (lambda: frechet.measured(GOOD, frechet.moments(GOOD[:, :3])), "4 dimensions.*reference's 3"),
        (lambda: frechet.merged(frechet.moments(GOOD), frechet.Moments(0, np.zeros(4), np.eye(4))), "how many rows"),
        (lambda: frechet.streamed([GOOD[:1]]), "at least 2 rows"),
        (lambda: frechet.streamed([GOOD, GOOD[:, :3]]), "4 dimensions.*reference's 3"),
        (lambda: frechet.at_infinity(GOOD, GOOD, 0, smallest=10), "from 10 to 10 samples give no line"),
        (lambda: frechet.at_infinity(GOOD, GOOD, 0, points=1), "1 points"),
        (lambda: frechet.at_infinity(GOOD, GOOD[:, :3], 0), "4 dimensions.*reference's 3"),
    ],
)
def test_bad_input_gets_a_sentence(call, says):
    with pytest.raises(InputError, match=says):
        call()
