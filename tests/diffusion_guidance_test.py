"""Guidance: its formulas, their cost, what they leave alone, and what they draw where that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_samplers_test import exact_denoiser, keys_of, process_of, response

from unclip_jax.diffusion import guidance, samplers

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 6))
T = jnp.asarray([5, 5, 7], jnp.int32)
COND = {"z_i": jax.random.normal(jax.random.key(1), (3, 6)), "mask": jnp.asarray([[True], [False], [True]])}
NULL = {"z_i": jnp.zeros((3, 6)), "mask": jnp.zeros((3, 1), bool)}


def recording_denoiser():
    """A denoiser that mixes every input of an example, and the batch size of each call made to it."""
    sizes = []

    def denoise(x_t, t, cond):
        sizes.append(x_t.shape[0])
        shift = cond["z_i"] * (1 + cond["mask"]) + t[:, None]
        return jnp.sin(x_t + shift[:, None, None, :])

    return denoise, sizes


@pytest.mark.parametrize("scale", [0.0, 1.25, 3, -1.0])
def test_guidance_is_the_formula_from_one_doubled_batch(scale):
    denoise, sizes = recording_denoiser()
    cond, null = denoise(X, T, COND), denoise(X, T, NULL)
    got = guidance.classifier_free(denoise, COND, NULL, scale=scale)(X, T)
    np.testing.assert_allclose(got, null + scale * (cond - null), atol=1e-5)
    assert sizes == [3, 3, 6]


@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_one_costs_no_second_branch(scale):
    denoise, sizes = recording_denoiser()
    got = guidance.classifier_free(denoise, COND, NULL, scale=scale, guided_channels=3)(X, T)
    assert sizes == [3]
    np.testing.assert_array_equal(got, denoise(X, T, COND))


def test_variance_channels_are_the_conditional_branchs_own():
    denoise, _ = recording_denoiser()
    cond, null = denoise(X, T, COND), denoise(X, T, NULL)
    got = guidance.classifier_free(denoise, COND, NULL, scale=4.0, guided_channels=3)(X, T)
    np.testing.assert_allclose(got[..., :3], (null + 4 * (cond - null))[..., :3], atol=1e-5)
    np.testing.assert_array_equal(got[..., 3:], cond[..., 3:])


def test_scale_may_differ_by_example_and_be_traced():
    denoise, _ = recording_denoiser()
    cond, null = denoise(X, T, COND), denoise(X, T, NULL)
    scale = jnp.asarray([0.0, 1.0, 2.0])
    got = jax.jit(lambda s: guidance.classifier_free(denoise, COND, NULL, scale=s)(X, T))(scale)
    np.testing.assert_allclose(got, null + scale[:, None, None, None] * (cond - null), atol=1e-5)
    got = jax.jit(lambda s: guidance.classifier_free(denoise, COND, NULL, scale=s)(X, T))(jnp.asarray(2.0))
    np.testing.assert_allclose(got, null + 2 * (cond - null), atol=1e-5)


# Gaussian data, and an observation y of it with noise: what guidance by y should draw has a closed form.
MEAN, VARIANCE, SEEN, UNSEEN = 0.3, 0.289, 1.0, 0.4


def observing(process):
    """The gradient by x_t of log p(y | x_t), y = x_start + noise of variance UNSEEN, at y = SEEN."""
    alpha_bars = jnp.asarray(process.alpha_bars, jnp.float32)

    def gradient(x_t, t):
        ab = alpha_bars[t][:, None]
        total = ab * VARIANCE + 1 - ab
        guess = MEAN + jnp.sqrt(ab) * VARIANCE / total * (x_t - jnp.sqrt(ab) * MEAN)
        unknown = VARIANCE * (1 - ab) / total
        return (SEEN - guess) / (unknown + UNSEEN) * jnp.sqrt(ab) * VARIANCE / total

    return gradient


@pytest.mark.parametrize("prediction", ["eps", "x_start"])
@pytest.mark.parametrize("method", ["ddpm_small", "ddpm_large", "ddim", "dpmpp_2m"])
def test_guided_by_a_likelihood_samplers_draw_bayes_posterior(monkeypatch, method, prediction):
    process = process_of(prediction)
    heard, silence = response(
        monkeypatch, process, exact_denoiser(process, MEAN, VARIANCE), timesteps=200, method=method,
        guide=observing(process),
    )  # fmt: skip
    mean = MEAN + VARIANCE / (VARIANCE + UNSEEN) * (SEEN - MEAN)
    variance = VARIANCE * UNSEEN / (VARIANCE + UNSEEN)
    np.testing.assert_allclose(silence, mean, rtol=0.03)
    np.testing.assert_allclose(np.square(heard).sum(), variance, rtol=0.06)


def test_ancestral_steps_move_their_mean_by_the_variance_times_the_gradient():
    process = process_of("x_start", variance="learned_range")
    share = np.linspace(-1, 1, 1000)
    keys = keys_of(2)
    x_T = jax.random.normal(jax.random.key(5), (2, 3))

    def end(guide, timesteps):
        denoise = exact_denoiser(process, v_range=share)
        return samplers.sample(process, denoise, x_T, keys, timesteps=np.asarray(timesteps), guide=guide)

    # One step from t = 600 alone, of which the variance is beta: 1 - alpha_bar, interpolated with beta~_1.
    t, slope = 600, jnp.asarray([[1.0, -2.0, 0.5]])
    moved = end(lambda x_t, t: slope * (1 + 0 * x_t), [t]) - end(None, [t])
    np.testing.assert_allclose(moved / slope, 1 - process.alpha_bars[t], rtol=1e-4)
    np.testing.assert_array_equal(end(lambda x_t, t: 0 * x_t, [t, 100]), end(None, [t, 100]))


def test_the_gradient_is_asked_at_original_timesteps_and_a_known_region_has_the_last_word():
    process = process_of("eps", clip_x_start=(-1, 1))
    asked = []

    def guide(x_t, t):
        jax.debug.callback(lambda t: asked.append(int(t[0])), t, ordered=True)
        return 50.0 + 0 * x_t

    keys = keys_of(1)
    x_0 = samplers.sample(
        process, exact_denoiser(process), samplers.initial_noise(keys, (4,)), keys, method="ddim", timesteps=5,
        guide=guide, process_x_start=lambda x, t: jnp.where(jnp.arange(4) < 2, -0.25, x),
    )  # fmt: skip
    jax.effects_barrier()
    assert asked == [999, 749, 500, 250, 0]
    np.testing.assert_allclose(x_0[0, :2], -0.25, atol=1e-6)
    assert x_0[0, 2:].min() > 0.5  # pushed upwards, and kept in range
    assert x_0.max() <= 1
