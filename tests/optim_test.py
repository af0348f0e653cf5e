"""Schedules against closed forms, AdamW against its paper's equations in float64, and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from unclip_jax import optim
from unclip_jax.errors import InputError

BASE = {
    "learning_rate": 0.1, "schedule": "constant", "final_fraction": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6,
    "weight_decay": 0.2, "decay": "matrices", "grad_clip": 0.0, "ema_decay": 0.9, "ema_warmup": False,
}  # fmt: skip


def config(**changes):
    return ConfigDict({**BASE, **changes})


def rates(**changes) -> np.ndarray:
    schedule = optim.learning_rate(config(**changes), total_steps=100, warmup_steps=20)
    return np.array([float(schedule(step)) for step in range(121)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_rises_linearly_from_zero_to_the_peak(schedule):
    np.testing.assert_allclose(rates(schedule=schedule)[:21], 0.1 * np.arange(21) / 20, rtol=1e-6)


def test_decays_follow_their_formulas_and_stay_at_the_end():
    progress = np.clip((np.arange(20, 121) - 20) / 80, 0, 1)
    np.testing.assert_allclose(rates()[20:], 0.1, rtol=1e-6)
    linear = 0.1 * (1 - 0.9 * progress)
    np.testing.assert_allclose(rates(schedule="linear", final_fraction=0.1)[20:], linear, rtol=1e-5)
    cosine = 0.1 * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(rates(schedule="cosine", final_fraction=0.1)[20:], cosine, rtol=1e-5)
    np.testing.assert_allclose(rates(schedule="cosine")[100:], 0, atol=1e-8)


def test_without_warmup_the_first_step_has_the_peak():
    schedule = optim.learning_rate(config(), total_steps=10, warmup_steps=0)
    assert float(schedule(0)) == pytest.approx(0.1)


def adamw(params, gradients, *, decayed, clip=0.0):
    """Loshchilov and Hutter, 2019, Algorithm 2, in float64; the step size multiplies the decay too."""
    c = BASE
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        for name, g in gradient.items():
            g = g * scale
            m[name] = c["beta1"] * m[name] + (1 - c["beta1"]) * g
            v[name] = c["beta2"] * v[name] + (1 - c["beta2"]) * g**2
            step = m[name] / (1 - c["beta1"] ** t) / (np.sqrt(v[name] / (1 - c["beta2"] ** t)) + c["eps"])
            decay = c["weight_decay"] * params[name] if name in decayed else 0
            params = {**params, name: params[name] - c["learning_rate"] * (step + decay)}
    return params


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize(
    ("decay", "decayed"), [("all", ("kernel", "embedding", "bias", "scale")), ("matrices", ("kernel", "embedding"))]
)
def test_adamw_follows_the_equations(decay, decayed, clip):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "embedding": (5, 2), "bias": (4,), "scale": (3,), "running_var": (3,)}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(4)]
    expected = adamw(start, gradients, decayed=decayed, clip=clip)
    optimizer = optim.create(config(decay=decay, grad_clip=clip), lambda step: jnp.float32(0.1))
    # Weights of a network are nested; the last key is what tells a matrix from a vector.
    params = {"layer": {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        tree = {"layer": {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}}
        updates, state = update(tree, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(params["layer"][name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        optim.learning_rate(config(schedule="cosin"), total_steps=1, warmup_steps=0)
    with pytest.raises(InputError, match="did you mean 'matrices'"):
        optim.create(config(decay="matrix"), lambda step: 0.1)


def test_the_average_is_the_weighted_sum_of_all_weights():
    history = np.random.default_rng(0).normal(size=(6, 3))
    average = {"w": jnp.asarray(history[0], jnp.float32)}
    for weights in history[1:]:
        average = optim.ema_update(average, {"w": jnp.asarray(weights, jnp.float32)}, jnp.float32(0.9))
    shares = np.array([0.9**5, *(0.1 * 0.9**age for age in (4, 3, 2, 1, 0))])
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(average["w"], shares @ history, rtol=1e-5)


def test_the_average_warms_up_to_its_decay():
    steps = [jnp.int32(step) for step in (0, 1, 8, 10**6)]
    assert [float(optim.ema_decay(config(), step)) for step in steps] == pytest.approx([0.9] * 4)
    warm = [float(optim.ema_decay(config(ema_warmup=True), step)) for step in steps]
    assert warm == pytest.approx([1 / 10, 2 / 11, 0.5, 0.9])
