"""Whole ancestral sampling runs against diffusers' UnCLIPScheduler, from the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UnCLIPScheduler
from diffusers.schedulers import scheduling_unclip
from parity import comparison

from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.gaussian import GaussianDiffusion

SHAPE = (2, 6, 6, 3)
KEYS = jax.random.split(jax.random.key(0), SHAPE[0])
# Our process and their scheduler for each of Karlo's networks.
KINDS = {
    "prior": (
        dict(prediction="x_start", variance="fixed_small", clip_x_start=(-5.0, 5.0)),
        dict(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0),
    ),
    "decoder": (
        dict(prediction="eps", variance="learned_range"),
        dict(prediction_type="epsilon", variance_type="learned_range"),
    ),
    "super-resolution": (
        dict(prediction="eps", variance="fixed_small"),
        dict(prediction_type="epsilon", variance_type="fixed_small_log"),
    ),
}
# In float64 what remains is their own rounding, of which the last step's is the largest: 5.3e-4 of x_start.
ROUNDING = 5.5e-4


def network(x: np.ndarray, t: int, channels: int) -> np.ndarray:
    """Stands for a network. Some predictions have to be clipped; a steep one would make any rounding grow."""
    phase = np.arange(x[0].size).reshape(x.shape[1:])
    values = np.concatenate([6 * np.sin(phase + x / 10 + t / 300), np.cos(phase - x + t / 500)], -1)
    return values[..., :channels].astype(np.float32)


def of_theirs(options, steps, x, channels, monkeypatch):
    scheduler = UnCLIPScheduler(**options)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    drawn = iter(range(steps))

    def noise(shape, **_):
        return nchw(samplers.draw_noise(KEYS, SHAPE[1:], step=next(drawn)))

    monkeypatch.setattr(scheduling_unclip, "randn_tensor", noise)
    for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
        output = nchw(network(x, t, channels))
        x = scheduler.step(output, t, nchw(x), prev_timestep=previous).prev_sample.permute(0, 2, 3, 1).numpy()
    assert next(drawn) == steps - 1  # none was drawn after the last step
    return timesteps, x


def nchw(array):
    return torch.tensor(np.array(array)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("tables", ["float32", "float64"])
@pytest.mark.parametrize("steps", [7, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_the_schedulers(kind, steps, tables, monkeypatch):
    fields, options = KINDS[kind]
    process = GaussianDiffusion.create(tables=tables, **fields)
    channels = SHAPE[-1] * (2 if process.variance == "learned_range" else 1)
    x_T = samplers.initial_noise(KEYS, SHAPE[1:])
    out = jax.ShapeDtypeStruct((*SHAPE[:-1], channels), jnp.float32)

    def denoise(x, t):
        return jax.pure_callback(lambda x, t: network(np.asarray(x), int(t[0]), channels), out, x, t)

    ours = jax.jit(lambda x: samplers.sample(process, denoise, x, KEYS, timesteps=steps))(x_T)
    timesteps, theirs = of_theirs(options, steps, np.asarray(x_T), channels, monkeypatch)
    assert timesteps == process.respaced(steps).timesteps[::-1].tolist()
    bound = comparison.FORWARD if tables == "float32" else ROUNDING * process.clip_x_start[1]
    comparison.agree("UnCLIPScheduler", f"{kind}, {steps} steps, {tables}", "forward", ours, theirs, bound)


@pytest.mark.parametrize("steps", [2, 50, 64, 250, 1000])
def test_timesteps_are_the_schedulers(steps):
    scheduler = UnCLIPScheduler()
    scheduler.set_timesteps(steps)
    ours = GaussianDiffusion.create().respaced(steps).timesteps[::-1]
    assert scheduler.timesteps.tolist() == ours.tolist()
