"""The quantizer of z_i: principal components against an SVD, buckets against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.models import quantizer
from unclip_jax.models.quantizer import Bins, Distributions, Moments, PrincipalComponents

DIMENSIONS, RANK = 20, 6


def _planted(n, *, seed=0):
    """Unit-scale embeddings in a subspace of RANK dimensions through a mean, with text embeddings near them."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).standard_normal((DIMENSIONS, DIMENSIONS)))[0]
    coefficients = rng.standard_normal((n, RANK)) * np.array([0.3, 0.25, 0.2, 0.1, 0.08, 0.05])
    z_i = 0.1 * directions[:, -1] + coefficients @ directions[:, :RANK].T
    z_t = 0.7 * z_i + 0.05 * rng.standard_normal(z_i.shape)
    return z_i, z_t


Z_I, Z_T = _planted(3000)
BATCHES = [(Z_I[:1000], Z_T[:1000]), (Z_I[1000:1100], Z_T[1000:1100]), (Z_I[1100:], Z_T[1100:])]


def total(measure):
    """The sum of `measure` over the batches."""
    return functools.reduce(add, (measure(*pair) for pair in BATCHES))


def add(a, b):
    return jax.tree.map(np.add, a, b)


@pytest.fixture(scope="module")
def fitted():
    return quantizer.fit(total, components=RANK, buckets=64, dot_buckets=16)


def test_principal_components_are_those_of_an_svd():
    components = PrincipalComponents.of(Moments.of(Z_I), components=RANK)
    _, singular, rows = np.linalg.svd(Z_I - Z_I.mean(0), full_matrices=False)
    np.testing.assert_allclose(components.mean, Z_I.mean(0), atol=1e-14)
    np.testing.assert_allclose(components.variances, singular**2 / len(Z_I), atol=1e-14)
    np.testing.assert_allclose(np.abs((components.basis * rows[:RANK].T).sum(0)), 1, atol=1e-10)
    np.testing.assert_allclose(components.basis.T @ components.basis, np.eye(RANK), atol=1e-12)
    assert (components.basis[np.abs(components.basis).argmax(0), range(RANK)] > 0).all()


def test_planted_rank_is_found_and_that_many_components_lose_nothing():
    moments = Moments.of(Z_I)
    components = PrincipalComponents.of(moments, components=RANK)
    restored = components.mean + components.project(Z_I) @ components.basis.T
    np.testing.assert_allclose(restored, Z_I, atol=1e-12)


def test_sums_over_parts_are_those_over_all_and_no_examples_add_nothing():
    whole = PrincipalComponents.of(Moments.of(Z_I), components=RANK)
    moments = functools.reduce(add, [Moments.of(Z_I[host::3]) for host in range(3)], Moments.of(Z_I[:0]))
    shared = PrincipalComponents.of(moments, components=RANK)
    np.testing.assert_allclose(shared.basis, whole.basis, atol=1e-10)
    rows = np.column_stack([whole.project(Z_I), (Z_I * Z_T).sum(1)])
    bins = Bins.over(whole)
    histogram = functools.reduce(add, [bins.count(rows[host::3]) for host in range(3)], bins.count(rows[:0]))
    np.testing.assert_array_equal(histogram.counts, bins.count(rows).counts)
    assert histogram.counts.sum(1).tolist() == [len(Z_I)] * (RANK + 1)
    options = {"buckets": 64, "dot_buckets": 16}
    one = quantizer.statistics(whole, Distributions(bins, bins.count(rows)), **options)
    many = quantizer.statistics(shared, Distributions(bins, histogram), **options)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], atol=1e-6, err_msg=name)


def test_a_fit_tells_the_rank_and_the_share_of_the_variance_that_is_kept():
    variances = np.sort(np.linalg.eigvalsh(np.cov(Z_I.T)))[::-1]
    for components in (2, RANK):
        found = quantizer.describe(quantizer.fit(total, components=components, buckets=8, dot_buckets=8))
        assert found["rank"] == RANK
        assert found["variance_kept"] == pytest.approx(variances[:components].sum() / variances.sum(), abs=1e-6)


@pytest.mark.parametrize("spacing", ["uniform", "quantile"])
@pytest.mark.parametrize("reconstruction", ["mean", "centre"])
def test_error_of_a_coefficient_stays_within_its_bucket(spacing, reconstruction):
    fitted = quantizer.fit(
        total, components=RANK, buckets=64, dot_buckets=16, spacing=spacing, reconstruction=reconstruction
    )
    edges = np.asarray(fitted["edges"], np.float64)
    assert (np.diff(edges, axis=1) > 0).all() and (np.diff(fitted["values"], axis=1) > 0).all()
    # Codes by definition: how many edges lie below the coefficient.
    coefficients = (Z_I - np.asarray(fitted["mean"], np.float64)) @ np.asarray(fitted["basis"], np.float64)
    codes = np.asarray(quantizer.encode(fitted, jnp.asarray(Z_I, jnp.float32)))
    by_definition = (coefficients[:, :, None] > edges).sum(-1)
    assert (codes != by_definition).mean() < 1e-4  # float32 may fall on the other side of an edge
    inner = (codes > 0) & (codes < 63)
    restored = quantizer.decode(fitted, jnp.asarray(codes))
    error = np.abs((np.asarray(restored, np.float64) - Z_I) @ np.asarray(fitted["basis"], np.float64))
    column = np.broadcast_to(np.arange(RANK), codes.shape)
    width = np.where(inner, edges[column, codes.clip(1, 62)] - edges[column, codes.clip(1, 62) - 1], np.inf)
    part = 0.5 if reconstruction == "centre" else 1.0
    assert (error <= part * width + 1e-6).all()


def test_reconstruction_error_is_the_lost_share_of_variance_and_falls_with_components_and_buckets():
    errors = {}
    for components, buckets in [(2, 64), (4, 64), (RANK, 64), (RANK, 16), (RANK, 512)]:
        fitted = quantizer.fit(total, components=components, buckets=buckets, dot_buckets=16)
        errors[components, buckets] = float(quantizer.reconstruction_error(fitted, jnp.asarray(Z_I, jnp.float32)))
    variances = np.sort(np.linalg.eigvalsh(np.cov(Z_I.T)))[::-1]
    for components in (2, 4):
        assert errors[components, 64] == pytest.approx(variances[components:].sum() / variances.sum(), abs=5e-3)
    assert errors[2, 64] > errors[4, 64] > errors[RANK, 64] > errors[RANK, 512]
    assert errors[RANK, 16] > errors[RANK, 64]
    assert errors[RANK, 512] < 1e-4


def test_decoded_bucket_means_beat_centres_and_keep_the_mean():
    options = {"components": RANK, "buckets": 8, "dot_buckets": 16}
    mean = quantizer.fit(total, reconstruction="mean", **options)
    centre = quantizer.fit(total, reconstruction="centre", **options)
    z = jnp.asarray(Z_I, jnp.float32)
    assert quantizer.reconstruction_error(mean, z) < quantizer.reconstruction_error(centre, z)
    decoded = quantizer.decode(mean, quantizer.encode(mean, z))
    np.testing.assert_allclose(decoded.mean(0), Z_I.mean(0), atol=2e-4)


def test_quantile_buckets_hold_equal_shares():
    fitted = quantizer.fit(total, components=RANK, buckets=10, dot_buckets=16, spacing="quantile")
    codes = np.asarray(quantizer.encode(fitted, jnp.asarray(Z_I, jnp.float32)))
    shares = np.stack([np.bincount(codes[:, i], minlength=10) for i in range(RANK)]) / len(Z_I)
    np.testing.assert_allclose(shares, 0.1, atol=0.005)


def test_encoding_what_was_decoded_gives_the_same_codes(fitted):
    codes = jax.random.randint(jax.random.key(0), (200, RANK), 0, 64)
    np.testing.assert_array_equal(quantizer.encode(fitted, quantizer.decode(fitted, codes)), codes)


def test_values_beyond_all_data_fall_in_the_outermost_buckets(fitted):
    far = fitted["mean"] + 100.0 * fitted["basis"][:, 0]
    assert quantizer.encode(fitted, far[None])[0, 0] == 63
    assert quantizer.encode(fitted, 2 * fitted["mean"][None] - far[None])[0, 0] == 0


def test_dot_product_token_counts_its_edges_and_its_shares_are_those_of_the_data(fitted):
    tokens = np.asarray(quantizer.encode_dot(fitted, jnp.asarray(Z_I, jnp.float32), jnp.asarray(Z_T, jnp.float32)))
    dots = (Z_I * Z_T).sum(1)
    edges = np.asarray(fitted["dot_edges"], np.float64)
    assert (tokens != (dots[:, None] > edges).sum(1)).mean() < 1e-3
    shares = np.bincount(tokens, minlength=16) / len(dots)
    np.testing.assert_allclose(fitted["dot_probabilities"], shares, atol=2e-3)
    assert fitted["dot_probabilities"].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("top", [0.5, 0.3, 1.0])
def test_sampled_dot_products_are_the_top_of_their_distribution(top):
    statistics = {"dot_probabilities": jnp.array([0.1, 0.3, 0.3, 0.2, 0.1])}
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = np.asarray(jax.vmap(lambda key: quantizer.sample_dot(key, statistics, top=top))(keys))
    kept = {0.5: [0, 0, 0.2, 0.2, 0.1], 0.3: [0, 0, 0, 0.2, 0.1], 1.0: [0.1, 0.3, 0.3, 0.2, 0.1]}[top]
    shares = np.bincount(draws, minlength=5) / len(draws)
    np.testing.assert_allclose(shares, np.array(kept) / top, atol=0.012)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"components": DIMENSIONS + 1}, "components must be between"),
        ({"buckets": 1}, "at least 2 buckets"),
        ({"spacing": "log"}, "'uniform' or 'quantile'"),
        ({"reconstruction": "median"}, "'mean' or 'centre'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        quantizer.fit(total, **({"components": RANK, "buckets": 8, "dot_buckets": 8} | options))


def test_embeddings_that_cannot_be_fitted_are_refused():
    options = {"components": RANK, "buckets": 8, "dot_buckets": 8}
    with pytest.raises(InputError, match="at least 2 embeddings"):
        quantizer.fit(lambda measure: measure(Z_I[:1], Z_T[:1]), **options)
    with pytest.raises(InputError, match="not finite"):
        quantizer.fit(lambda measure: measure(Z_I * np.inf, Z_T), **options)
