"""The process, its parameterisations and losses against float64 oracles written from the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from unclip_jax.diffusion.gaussian import GaussianDiffusion
from unclip_jax.errors import InputError

PREDICTIONS = ("eps", "x_start", "v")


def create(**changes):
    return GaussianDiffusion.create(**{"num_timesteps": 1000, **changes})


def batch_of_noised(process, shape, t, seed=0):
    rng = np.random.default_rng(seed)
    x_start = np.round(rng.uniform(0, 255, (len(t), *shape))) / 127.5 - 1
    x_start.flat[:8] = [-1, 1, -1, 1, -1, 1, -1, 1]
    eps = rng.standard_normal(x_start.shape)
    x_start, eps = jnp.asarray(x_start, jnp.float32), jnp.asarray(eps, jnp.float32)
    t = jnp.asarray(t, jnp.int32)
    return x_start, eps, t, process.q_sample(x_start=x_start, t=t, eps=eps)


def hybrid_loss_oracle(betas, prediction, model_output, x_start, x_t, t, eps):
    """One example, float64: Nichol & Dhariwal 2021, equations 9-11, 15 and 16; Ho et al. 2020, equation 13."""
    alpha_bars = np.cumprod(1 - betas)
    ab, before, beta = alpha_bars[t], (alpha_bars[t - 1] if t else 1.0), betas[t]
    predicted, v = np.split(model_output, 2, axis=-1)
    if prediction == "eps":
        target, x_hat = eps, (x_t - np.sqrt(1 - ab) * predicted) / np.sqrt(ab)
    elif prediction == "x_start":
        target, x_hat = x_start, predicted
    else:
        target = np.sqrt(ab) * eps - np.sqrt(1 - ab) * x_start
        x_hat = np.sqrt(ab) * x_t - np.sqrt(1 - ab) * predicted
    mse = np.mean((target - predicted) ** 2)

    def posterior_mean(x0):
        return np.sqrt(before) * beta / (1 - ab) * x0 + np.sqrt(1 - beta) * (1 - before) / (1 - ab) * x_t

    at = max(t, 1)
    tilde = betas[at] * (1 - alpha_bars[at - 1]) / (1 - alpha_bars[at])
    share = (v + 1) / 2
    log_variance = share * np.log(beta) + (1 - share) * np.log(tilde)
    mean = posterior_mean(x_hat)
    if t > 0:
        nats = 0.5 * (log_variance - np.log(tilde) - 1 + np.exp(np.log(tilde) - log_variance)
                      + (posterior_mean(x_start) - mean) ** 2 * np.exp(-log_variance))
    else:
        std = np.exp(0.5 * log_variance)
        upper = np.where(x_start > 0.999, np.inf, (x_start + 1 / 255 - mean) / std)
        lower = np.where(x_start < -0.999, -np.inf, (x_start - 1 / 255 - mean) / std)
        flip = lower > 0  # in the lower tail a difference keeps its digits
        upper, lower = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
        nats = -np.log(np.maximum(ndtr(upper) - ndtr(lower), 1e-12))
    vb = np.mean(nats) / np.log(2)
    return mse + vb * len(betas) / 1000, mse, vb


@pytest.mark.parametrize("shape", [(4, 4, 3), (64,)], ids=["images", "embeddings"])
@pytest.mark.parametrize("num_timesteps", [1000, 250])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss_is_the_papers(prediction, num_timesteps, shape):
    process = create(prediction=prediction, num_timesteps=num_timesteps)
    last = num_timesteps - 1
    x_start, eps, t, x_t = batch_of_noised(process, shape, [0, 0, 1, 2, 20, 100, last - 1, last])
    rng = np.random.default_rng(1)
    target = process.target(x_start=x_start, t=t, eps=eps)
    predicted = np.asarray(target) + 0.1 * rng.standard_normal(x_start.shape)
    output = np.concatenate([predicted, rng.uniform(-2, 2, x_start.shape)], axis=-1).astype(np.float32)
    loss, parts = jax.jit(process.training_loss)(jnp.asarray(output), x_start=x_start, x_t=x_t, t=t, eps=eps)
    f64 = [np.asarray(array, np.float64) for array in (output, x_start, x_t, eps)]
    for i, level in enumerate(np.asarray(t)):
        o, x, xt, e = (array[i] for array in f64)
        expected = hybrid_loss_oracle(process.betas, prediction, o, x, xt, level, e)
        got = (loss[i], parts["mse"][i], parts["vb"][i])
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5, err_msg=f"t = {level}")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_learned_range_stays_finite_for_wild_variance_channels(prediction, schedule):
    process = create(prediction=prediction, schedule=schedule)
    t = np.repeat([0, 1, 2, 500, 998, 999], 5)
    wild = np.tile([-40.0, -10.0, 0.0, 10.0, 40.0], 6)
    x_start, eps, t, x_t = batch_of_noised(process, (2, 2, 3), t)
    v = jnp.broadcast_to(jnp.asarray(wild, jnp.float32)[:, None, None, None], x_start.shape)
    output = jnp.concatenate([jnp.ones_like(x_start), v], axis=-1)

    def total(output):
        return process.training_loss(output, x_start=x_start, x_t=x_t, t=t, eps=eps)[0].sum()

    loss, gradient = jax.jit(jax.value_and_grad(total))(output)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    moments = process.p_mean_variance(output, x_t=x_t, t=t)
    assert np.isfinite(moments.mean).all() and np.isfinite(moments.log_variance).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_teaches_the_variance_channels_only(prediction):
    process = create(prediction=prediction)
    x_start, eps, t, x_t = batch_of_noised(process, (4, 4, 3), [0, 1, 300, 999])
    output = jax.random.normal(jax.random.key(0), (4, 4, 4, 6))

    def part(name):
        def total(output):
            return process.training_loss(output, x_start=x_start, x_t=x_t, t=t, eps=eps)[1][name].sum()

        return jax.jit(jax.grad(total))

    of_mse, of_bound = part("mse")(output), part("vb")(output)
    assert np.all(of_bound[..., :3] == 0) and np.any(of_bound[..., 3:] != 0)
    assert np.any(of_mse[..., :3] != 0) and np.all(of_mse[..., 3:] == 0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_fixed_variance_trains_on_plain_mean_squared_error(prediction, variance):
    process = create(prediction=prediction, variance=variance)
    x_start, eps, t, x_t = batch_of_noised(process, (16,), [0, 10, 999])
    target = process.target(x_start=x_start, t=t, eps=eps)
    loss, parts = process.training_loss(target + 0.5, x_start=x_start, x_t=x_t, t=t, eps=eps)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-5)
    assert set(parts) == {"mse"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_right_prediction_gives_back_x_start_and_eps(prediction):
    process = create(prediction=prediction)
    x_start, eps, t, x_t = batch_of_noised(process, (4, 4, 3), [0, 1, 10, 500, 800])
    target = process.target(x_start=x_start, t=t, eps=eps)
    # Signal or noise is small at the ends: there float32 keeps fewer digits of it.
    np.testing.assert_allclose(process.predict_x_start(target, x_t=x_t, t=t), x_start, atol=2e-5)
    np.testing.assert_allclose(process.predict_eps(target, x_t=x_t, t=t), eps, atol=2e-4)
    np.testing.assert_allclose(process.eps_from_x_start(x_start, x_t=x_t, t=t), eps, atol=2e-4)


@pytest.mark.parametrize("timesteps", [1000, 64, "fast27"])
def test_the_posterior_is_bayes_rule_at_any_stride(timesteps):
    process = create(schedule="linear").respaced(timesteps)
    full = np.cumprod(1 - (1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999))
    level = len(process.timesteps) // 2
    ab, before = full[process.timesteps[level]], full[process.timesteps[level - 1]]
    step = ab / before
    # q(x_s) from x_start, times q(x_t | x_s), as precisions.
    precision = 1 / (1 - before) + step / (1 - step)
    x_start, x_t = 0.7, -1.3
    mean = (np.sqrt(before) * x_start / (1 - before) + np.sqrt(step) * x_t / (1 - step)) / precision
    q = process.q_posterior(x_start=jnp.full((1, 2), x_start), x_t=jnp.full((1, 2), x_t), t=jnp.asarray([level]))
    np.testing.assert_allclose(q.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(q.log_variance, -np.log(precision), rtol=1e-5)
    np.testing.assert_allclose(process.betas[level], 1 - step, rtol=1e-10)


def test_float32_tables_are_float32_throughout_and_near_the_others():
    single, double = (create(tables=tables).respaced(50) for tables in ("float32", "float64"))
    names = "alpha_bars", "alpha_bars_before", "betas", "posterior_variance", "posterior_log_variance"
    for name in (*names, "posterior_x_start_weight", "posterior_x_t_weight"):
        theirs, ours = getattr(single, name), getattr(double, name)
        assert (theirs.dtype, ours.dtype) == (np.float32, np.float64)
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-6)


def test_neighbouring_timesteps_keep_their_betas_exactly():
    process = create(tables="float32")
    chosen = process.respaced(np.array([900, 501, 500, 499, 1, 0], np.int32))
    np.testing.assert_array_equal(chosen.betas[[0, 1, 3, 4]], process.betas[[0, 1, 500, 501]])
    again = chosen.respaced(np.array([900, 501, 0], np.int32))
    assert again.betas[2] == chosen.betas[5] and again.betas[1] > chosen.betas[4]


@pytest.mark.parametrize("timesteps", [1000, 27])
def test_the_learned_range_runs_from_posterior_to_forward_variance(timesteps):
    process = create().respaced(timesteps)
    t = jnp.asarray([0, 1, 13, 26], jnp.int32)
    like = jnp.zeros((4, 3))
    low = process.log_variance(jnp.full_like(like, -1.0), t=t, like=like)
    high = process.log_variance(jnp.full_like(like, 1.0), t=t, like=like)
    ab = np.append(1.0, process.alpha_bars)
    beta = 1 - ab[1:] / ab[:-1]
    tilde = beta[1:] * (1 - ab[1:-1]) / (1 - ab[2:])
    np.testing.assert_allclose(high[:, 0], np.log(beta[t]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(low[1:, 0], np.log(tilde[np.asarray(t[1:]) - 1]), rtol=1e-5)
    np.testing.assert_allclose(low[0], low[1], rtol=1e-6)  # at t = 0, where beta~ is zero, that of t = 1


def test_probabilities_of_all_pixel_values_sum_to_one():
    process = create(prediction="x_start")
    values = jnp.arange(256, dtype=jnp.float32)[:, None] / 127.5 - 1
    t = jnp.zeros(256, jnp.int32)
    for mean, v in ((0.1, 1.0), (-0.98, 8.0), (0.999, 12.0)):
        output = jnp.broadcast_to(jnp.asarray([mean, v]), (256, 2))
        bits = jax.jit(process.variational_bound)(output, x_start=values, x_t=values, t=t)
        np.testing.assert_allclose(np.sum(2.0 ** -np.asarray(bits, np.float64)), 1, rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_one_step_process_is_finite(variance):
    process = create(variance=variance).respaced(1)
    output = jnp.ones((2, 6 if variance == "learned_range" else 3))
    moments = process.p_mean_variance(output, x_t=jnp.ones((2, 3)), t=jnp.zeros(2, jnp.int32))
    assert np.isfinite(moments.mean).all() and np.isfinite(moments.log_variance).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prediction": "epsilon"}, "diffusion prediction 'epsilon'"),
        ({"variance": "learned_rang"}, "did you mean 'learned_range'"),
        ({"tables": "float16"}, "diffusion tables 'float16'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"clip_x_start": (1.0, -1.0)}, "first number must be below"),
    ],
)
def test_a_wrong_setting_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        create(**changes)


@pytest.mark.parametrize("timesteps", [[3, 5], [5, 5], [1000], [-1], []])
def test_timesteps_outside_the_process_are_refused(timesteps):
    with pytest.raises(InputError, match="must descend strictly"):
        create().respaced(np.asarray(timesteps, np.int32))
