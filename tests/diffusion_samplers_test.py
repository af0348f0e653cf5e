"""Samplers against closed forms of Gaussian data, for which the best denoiser is known and every sampler is linear."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.gaussian import GaussianDiffusion
from unclip_jax.errors import InputError

# Per-coordinate variance of a unit-norm embedding of 1024 dimensions, scaled by 17.2.
VARIANCE = 17.2**2 / 1024
MEAN = 0.3


def process_of(prediction="x_start", variance="fixed_small", **changes):
    changes = {"schedule": "cosine", "num_timesteps": 1000, "clip_x_start": None, **changes}
    return GaussianDiffusion.create(prediction=prediction, variance=variance, **changes)


def exact_denoiser(process, mean=MEAN, variance=VARIANCE, v_range=None):
    """The conditional expectation for data N(mean, variance), as the process's network would return it."""
    alpha_bars = jnp.asarray(process.alpha_bars, jnp.float32)

    def denoise(x_t, t):
        ab = alpha_bars[t].reshape(t.shape + (1,) * (x_t.ndim - 1))
        residual = (x_t - jnp.sqrt(ab) * mean) / (ab * variance + 1 - ab)
        x_start, eps = mean + jnp.sqrt(ab) * variance * residual, jnp.sqrt(1 - ab) * residual
        v = jnp.sqrt(ab) * eps - jnp.sqrt(1 - ab) * x_start
        predicted = {"x_start": x_start, "eps": eps, "v": v}[process.prediction]
        if v_range is None:
            return predicted
        share = jnp.asarray(v_range, jnp.float32)
        share = share[t].reshape(ab.shape) if share.ndim else share
        return jnp.concatenate([predicted, jnp.broadcast_to(share, predicted.shape)], axis=-1)

    return denoise


def unknown_of_x_start(process):
    ab = process.alpha_bars
    return jnp.asarray(VARIANCE * (1 - ab) / (ab * VARIANCE + 1 - ab), jnp.float32)


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def response(monkeypatch, process, denoise, *, timesteps, **settings):
    """What x_0 takes from each source: dimension k of x hears step k's noise alone, the last one x_T alone.

    A sampler on an affine denoiser is affine, so this and x_0 with no noise at all describe it completely.
    """
    count = len(process.respaced(timesteps).timesteps)
    monkeypatch.setattr(samplers, "draw_noise", lambda keys, shape, *, step: jax.nn.one_hot(step, count + 1)[None])
    x_T = jax.nn.one_hot(count, count + 1)[None]
    heard = samplers.sample(process, denoise, x_T, keys_of(1), timesteps=timesteps, **settings)[0]
    monkeypatch.setattr(samplers, "draw_noise", lambda keys, shape, *, step: jnp.zeros((1, count + 1)))
    silence = samplers.sample(process, denoise, jnp.zeros_like(x_T), keys_of(1), timesteps=timesteps, **settings)[0]
    return np.asarray(heard - silence, np.float64), np.asarray(silence, np.float64)


@pytest.mark.parametrize("prediction", ["x_start", "v", "eps"])
@pytest.mark.parametrize(
    ("method", "variance", "ratio"),
    [
        ("ddpm", "fixed_large", 1.0259),
        ("ddpm", "fixed_small", 0.9021),
        ("ddpm_large", "fixed_small", 1.0259),
        ("ddpm_small", "fixed_large", 0.9021),
        ("ddim", "fixed_small", 0.9542),
        ("analytic", "fixed_small", 0.9999),
    ],
)
def test_variance_of_gaussian_data_at_64_cosine_steps(monkeypatch, method, variance, ratio, prediction):
    process = process_of(prediction, variance)
    weights, mean = response(
        monkeypatch, process, exact_denoiser(process), method=method, timesteps=64,
        x_start_variance=unknown_of_x_start(process),
    )
    # x_0's variance is the sum of squares over independent unit sources.
    np.testing.assert_allclose(np.sum(weights**2) / VARIANCE, ratio, atol=1e-4)
    np.testing.assert_allclose(mean, MEAN, atol=0.01)


@pytest.mark.parametrize("prediction", ["x_start", "v", "eps"])
def test_the_right_share_of_a_learned_range_gives_the_variance_of_the_data(monkeypatch, prediction):
    """The optimal variance lies between beta~ and beta, so that a network can learn to name it."""
    process = process_of(prediction, "learned_range")
    ab = process.alpha_bars[process.respaced(64).timesteps]
    before = ab[:-1]
    beta = 1 - ab[1:] / before
    tilde = beta * (1 - before) / (1 - ab[1:])
    unknown = VARIANCE * (1 - ab[1:]) / (ab[1:] * VARIANCE + 1 - ab[1:])
    best = tilde + before * (beta / (1 - ab[1:])) ** 2 * unknown
    share = np.zeros(1000)
    share[process.respaced(64).timesteps[1:]] = 2 * np.log(best / tilde) / np.log(beta / tilde) - 1
    assert np.abs(share).max() < 1
    weights, mean = response(
        monkeypatch, process, exact_denoiser(process, v_range=share), method="ddpm", timesteps=64
    )
    np.testing.assert_allclose(np.sum(weights**2) / VARIANCE, 0.9999, atol=1e-4)
    np.testing.assert_allclose(mean, MEAN, atol=0.01)


# First order in the step for all but DPM-Solver++ (whose last step is) and the optimal variance.
TOLERANCE = {"ddpm": 0.01, "ddpm_small": 0.01, "ddpm_large": 0.01, "ddim": 0.005, "dpmpp_2m": 0.005, "analytic": 0.001}


def test_every_sampler_has_its_tolerance():
    assert set(TOLERANCE) == set(samplers.METHODS)


@pytest.mark.parametrize("prediction", ["x_start", "v", "eps"])
@pytest.mark.parametrize(("method", "tolerance"), TOLERANCE.items())
def test_every_sampler_nears_the_data_with_many_steps(monkeypatch, method, tolerance, prediction):
    process = process_of(prediction)
    weights, mean = response(
        monkeypatch, process, exact_denoiser(process), method=method, timesteps=1000,
        x_start_variance=unknown_of_x_start(process),
    )
    np.testing.assert_allclose(np.sum(weights**2) / VARIANCE, 1, atol=tolerance)
    np.testing.assert_allclose(mean, MEAN, atol=0.002)


@pytest.mark.parametrize("method", list(samplers.METHODS))
@pytest.mark.parametrize("timesteps", [1, 3, "fast27"])
def test_n_timesteps_are_n_calls_at_original_timesteps_and_end_at_zero_noise(method, timesteps):
    process = process_of()
    seen = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        # The last prediction is all that may be left at the end.
        return jnp.where(t[:, None] == process.respaced(timesteps).timesteps[0], 0.25, x_t)

    x_0 = samplers.sample(
        process, denoise, jnp.ones((2, 3)), keys_of(2), method=method, timesteps=timesteps,
        x_start_variance=unknown_of_x_start(process),
    )
    jax.effects_barrier()
    expected = process.respaced(timesteps).timesteps[::-1].tolist()
    assert seen == [[step, step] for step in expected]
    np.testing.assert_allclose(x_0, 0.25, atol=1e-5)


@pytest.mark.parametrize("method", list(samplers.METHODS))
def test_one_scan_drives_the_sampler(method):
    process = process_of()
    jaxpr = jax.make_jaxpr(
        lambda x, k: samplers.sample(
            process, exact_denoiser(process), x, k, method=method, timesteps=250,
            x_start_variance=unknown_of_x_start(process),
        )
    )(jnp.ones((1, 2)), keys_of(1))
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [250]


@pytest.mark.parametrize("method", list(samplers.METHODS))
def test_an_example_does_not_depend_on_its_batch(method):
    process = process_of()
    keys = keys_of(4)
    settings = {"method": method, "timesteps": 8, "x_start_variance": unknown_of_x_start(process)}
    if method == "ddim":
        settings["eta"] = 0.5

    @jax.jit
    def draw(keys):
        x_T = samplers.initial_noise(keys, (2, 2, 3))
        return samplers.sample(process, exact_denoiser(process), x_T, keys, **settings)

    together = draw(keys)
    np.testing.assert_allclose(draw(keys[2:3])[0], together[2], atol=1e-6)
    np.testing.assert_allclose(draw(keys[::-1])[::-1], together, atol=1e-6)
    assert len(np.unique(np.asarray(together)[:, 0, 0, 0])) == 4


def test_each_step_and_the_start_draw_their_own_noise():
    keys = keys_of(3)
    draws = [samplers.initial_noise(keys, (1000,)), *(samplers.draw_noise(keys, (1000,), step=k) for k in range(3))]
    rows = np.concatenate(draws)
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 0.15
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05


@pytest.mark.parametrize(("v_range", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_the_learned_range_are_the_fixed_variances(v_range, variance):
    learned, fixed = process_of(variance="learned_range"), process_of(variance=variance)
    keys = keys_of(2)
    x_T = samplers.initial_noise(keys, (6,))
    drawn = [
        samplers.sample(process, denoise, x_T, keys, method="ddpm", timesteps=10)
        for process, denoise in (
            (learned, exact_denoiser(learned, v_range=v_range)),
            (fixed, exact_denoiser(fixed)),
        )
    ]
    np.testing.assert_allclose(*drawn, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_network_with_variance_channels_may_be_sampled_with_a_fixed_variance(variance):
    learned, fixed = process_of("eps", "learned_range"), process_of("eps", variance)
    keys = keys_of(2)
    x_T = samplers.initial_noise(keys, (6,))
    wild = exact_denoiser(learned, v_range=7.0)
    method = variance.replace("fixed", "ddpm")
    chosen = samplers.sample(learned, wild, x_T, keys, method=method, timesteps=10)
    trained = samplers.sample(fixed, exact_denoiser(fixed), x_T, keys, method="ddpm", timesteps=10)
    np.testing.assert_allclose(chosen, trained, atol=1e-5)


def test_ddim_with_eta_one_is_ancestral_sampling():
    process = process_of()
    keys = keys_of(2)
    x_T = samplers.initial_noise(keys, (6,))
    denoise = exact_denoiser(process)
    ddim = samplers.sample(process, denoise, x_T, keys, method="ddim", eta=1.0, timesteps=20)
    ddpm = samplers.sample(process, denoise, x_T, keys, method="ddpm", timesteps=20)
    np.testing.assert_allclose(ddim, ddpm, atol=1e-5)


def test_order_of_the_deterministic_samplers():
    """The exact flow keeps (x - sqrt(ab) mean) / std, and steps even in log-SNR let the error's order be measured."""
    process = process_of(schedule="linear", num_timesteps=100_000)
    start = 60_000
    log_snr = np.log(process.alpha_bars / (1 - process.alpha_bars))
    ab = process.alpha_bars[start]
    x = jnp.linspace(-2.0, 2.0, 9)[None]
    exact = MEAN + np.sqrt(VARIANCE / (ab * VARIANCE + 1 - ab)) * (np.asarray(x) - np.sqrt(ab) * MEAN)

    def error(method, count):
        even = np.linspace(log_snr[start], log_snr[0], count)
        steps = np.searchsorted(-log_snr, -even).astype(np.int32)
        got = samplers.sample(process, exact_denoiser(process), x, keys_of(1), method=method, timesteps=steps)
        return np.abs(np.asarray(got) - exact).max()

    coarse, fine = error("ddim", 16), error("ddim", 32)
    assert 1.8 < coarse / fine < 2.4
    coarse, second_order = error("dpmpp_2m", 16), error("dpmpp_2m", 32)
    assert 3.2 < coarse / second_order < 5.5
    assert second_order < 0.2 * fine


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_inversion_then_sampling_returns_the_data(prediction):
    process = process_of(prediction)
    denoise = exact_denoiser(process)
    keys = keys_of(2)
    x = MEAN + np.sqrt(VARIANCE) * jax.random.normal(jax.random.key(3), (2, 500))

    def there_and_back(timesteps):
        x_T = samplers.ddim_invert(process, denoise, x, timesteps=timesteps)
        return x_T, samplers.sample(process, denoise, x_T, keys, method="ddim", timesteps=timesteps)

    # As the paper advises, the noisiest step is left out.
    x_T, again = there_and_back(np.arange(996, -1, -4, dtype=np.int32)[1:])
    assert np.abs(again - x).max() < 0.05
    assert abs(float(x_T.std()) - 1) < 0.05
    _, coarse = there_and_back(np.arange(980, -1, -20, dtype=np.int32)[1:])
    assert np.abs(again - x).max() < 0.5 * np.abs(coarse - x).max()


def test_inversion_calls_the_network_once_per_timestep():
    process = process_of()
    seen = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: seen.append(int(t[0])), t, ordered=True)
        return x_t

    samplers.ddim_invert(process, denoise, jnp.ones((1, 2)), timesteps="ddim5")
    jax.effects_barrier()
    assert seen == [0, 0, 200, 400, 600]


@pytest.mark.parametrize("method", list(samplers.METHODS))
def test_predictions_are_clipped(method):
    process = dataclasses.replace(process_of(), clip_x_start=(-1.0, 0.5))
    x_0 = samplers.sample(
        process, lambda x, t: 3 * jnp.ones_like(x), jnp.ones((2, 4)), keys_of(2), method=method, timesteps=5,
        x_start_variance=unknown_of_x_start(process),
    )
    np.testing.assert_allclose(x_0, 0.5, atol=1e-5)


def test_ddim_takes_its_noise_from_the_clipped_prediction():
    process = dataclasses.replace(process_of("eps"), clip_x_start=(-1.0, 0.5))
    seen = []

    def denoise(x_t, t):
        jax.debug.callback(lambda x: seen.append(float(x[0, 0])), x_t, ordered=True)
        return jnp.full_like(x_t, -10.0)

    steps = np.asarray([600, 100], np.int32)
    samplers.sample(process, denoise, jnp.ones((1, 1)), keys_of(1), method="ddim", timesteps=steps)
    jax.effects_barrier()
    start, end = process.alpha_bars[600], process.alpha_bars[100]
    eps = (1 - np.sqrt(start) * 0.5) / np.sqrt(1 - start)
    np.testing.assert_allclose(seen, [1, np.sqrt(end) * 0.5 + np.sqrt(1 - end) * eps], rtol=1e-5)


def test_a_processor_of_x_start_has_the_last_word_on_a_known_region():
    process = process_of()
    known = jnp.asarray([1.0, 0.0, 1.0, 0.0])
    keys = keys_of(2)
    x_0 = samplers.sample(
        process, exact_denoiser(process), samplers.initial_noise(keys, (4,)), keys, method="ddpm", timesteps=10,
        process_x_start=lambda x_start, t: jnp.where(known == 1, 0.75, x_start),
    )
    np.testing.assert_allclose(x_0[:, ::2], 0.75, atol=1e-5)
    assert np.abs(x_0[:, 1::2] - 0.75).min() > 1e-3


@pytest.mark.parametrize(("quantile", "bound"), [(0.9, 1.0), (0.995, 1.0), (0.5, 2.5)])
def test_dynamic_threshold_rescales_only_what_exceeds_the_range(quantile, bound):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 6, 3)) * np.asarray([0.2, 1.0, 5.0, 20.0])[:, None, None, None]
    got = samplers.dynamic_threshold(quantile, bound=bound)(jnp.asarray(x, jnp.float32), jnp.zeros(4, jnp.int32))
    for image, expected in zip(got, x, strict=True):
        limit = max(np.quantile(np.abs(expected), quantile), bound)
        np.testing.assert_allclose(image, np.clip(expected, -limit, limit) * bound / limit, rtol=1e-5)


@pytest.mark.parametrize(("threshold", "seen"), [("static", [0.5, 1.0, -1.0]), ("dynamic", [0.125, 1.0, -0.5]),
                                                 ("none", [0.5, 4.0, -2.0])])
def test_a_threshold_keeps_predictions_in_range_in_its_own_way(threshold, seen):
    process = process_of(clip_x_start=(-1.0, 1.0))
    process, process_x_start = samplers.thresholded(process, threshold, quantile=1.0)
    x_0 = samplers.sample(
        process, lambda x, t: jnp.asarray([[0.5, 4.0, -2.0]]), jnp.ones((1, 3)), keys_of(1), method="ddim",
        timesteps=3, process_x_start=process_x_start,
    )
    np.testing.assert_allclose(x_0[0], seen, atol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "clip", "sentence"),
    [
        ("dynamik", (-1, 1), "did you mean 'dynamic'"),
        ("dynamic", None, "clip_x_start is None"),
        ("dynamic", (0, 1), "into a range"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused(threshold, clip, sentence):
    with pytest.raises(InputError, match=sentence):
        samplers.thresholded(process_of(clip_x_start=clip), threshold)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "ddmp"}, "did you mean 'ddpm'|did you mean 'ddim'"),
        ({"method": "ddim", "eta": 1.5}, r"must be in \[0, 1\]"),
        ({"method": "ddpm", "eta": 0.5}, "method 'ddim'"),
        ({"method": "analytic"}, "needs x_start_variance"),
        ({"method": "analytic", "x_start_variance": jnp.ones(64)}, "1000 timesteps"),
        ({"timesteps": 1001}, "from 1 to 1000"),
    ],
)
def test_a_wrong_setting_is_refused(settings, sentence):
    process = process_of()
    with pytest.raises(InputError, match=sentence):
        samplers.sample(process, exact_denoiser(process), jnp.ones((1, 2)), keys_of(1), **{"timesteps": 4, **settings})
    with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
        samplers.dynamic_threshold(0.0)
