"""Noise that is given in place of keys, and what parts read beside their own networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_configs import small

from unclip_jax import parts
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.gaussian import GaussianDiffusion
from unclip_jax.errors import InputError
from unclip_jax.stages import base

SHAPE, STEPS = (3,), 4
KEYS = jax.random.split(jax.random.key(0), 2)
PROCESS = GaussianDiffusion.create(prediction="x_start", variance="fixed_small")


def drawn():
    """The noise that the keys would be asked for."""
    steps = [samplers.draw_noise(KEYS, SHAPE, step=step) for step in range(STEPS - 1)]
    return samplers.GivenNoise(samplers.initial_noise(KEYS, SHAPE), jnp.stack(steps, 1))


def sampled(source):
    x_T = samplers.initial_noise(source, SHAPE)
    return samplers.sample(PROCESS, lambda x, t: jnp.tanh(x), x_T, source, timesteps=STEPS)


def test_the_keys_own_noise_given_makes_the_same_sample():
    given = drawn()
    np.testing.assert_allclose(sampled(given), sampled(KEYS), rtol=1e-5, atol=1e-6)
    # The noise of each step counts.
    for step in range(STEPS - 1):
        other = given._replace(steps=given.steps.at[:, step].add(1.0))
        assert np.abs(sampled(other) - sampled(given)).min() > 0


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda g: g._replace(x_T=g.x_T[:, :2]), r"starts from noise of shape \(3,\); given is \(2,\)"),
    (lambda g: g._replace(steps=g.steps[..., :2]), r"noise of shape \(3,\); given is \(2,\)"),
    (lambda g: g._replace(steps=g.steps[:, :2]), "4 steps add noise 3 times; given is that of 2"),
    (lambda g: g._replace(steps=None), "given is none"),
])  # fmt: skip
def test_noise_of_another_shape_is_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        sampled(change(drawn()))


def test_a_batch_may_hold_its_noise():
    batch = {"id": jnp.arange(2), "x_T": jnp.zeros((2, 3)), "noise": jnp.ones((2, 3, 3))}
    given = base.noise(jax.random.key(0), batch)
    assert isinstance(given, samplers.GivenNoise) and given.x_T is batch["x_T"] and given.steps is batch["noise"]
    assert base.noise(jax.random.key(0), {"id": jnp.arange(2)}).shape == (2,)


def part(name, case, **overrides):
    config = small(case, **overrides)
    return parts.Part(name, f"runs/{name}", base.create(config), config, {}, {}, 0)


def test_priors_and_decoder_must_know_embeddings_of_one_length():
    raw = {"scaling": "whiten", "scale": 1.0, "norm": "raw"}
    prior, decoder = part("prior_diffusion", "prior_diffusion", embedding=raw), part("decoder", "decoder")
    parts.check_units({"prior_diffusion": prior})
    parts.check_units({"decoder": decoder})
    with pytest.raises(InputError, match="runs/prior_diffusion.* as CLIP returns them.*runs/decoder.*of length 1"):
        parts.check_units({"prior_diffusion": prior, "decoder": decoder})
    parts.check_units({"prior_diffusion": prior, "decoder": part("decoder", "decoder", embedding=raw)})


def test_last_steps_are_another_parts():
    first = part("upsampler_1", "upsampler", sampling__last_steps=1)
    there = {"upsampler_1": first, "upsampler_1_last": part("upsampler_1_last", "upsampler")}
    assert parts.frozen_of(first, there) == {"last": "upsampler_1_last"}
    assert parts.frozen_of(there["upsampler_1_last"], there) == {}
    with pytest.raises(InputError, match="the last 1 steps of upsampler_1 .* upsampler_1_last is not there"):
        parts.frozen_of(first, {"upsampler_1": first})
    parts.check_sizes({"decoder": part("decoder", "decoder"), **there})  # it has no place in the cascade


@pytest.mark.parametrize(("steps", "by_last"), [(0, []), (1, [0]), (2, [500, 0])])
def test_the_last_network_is_called_at_the_last_steps_only(steps, by_last):
    """Networks that only say who was called, and when, by what they predict."""
    values = {"sampling__last_steps": steps, "sampling__method": "ddim", "diffusion__variance": "fixed_small"}
    stage = base.create(small("upsampler", sampling__timesteps="3", **values))
    called = []

    class Network:
        def apply(self, params, x, t, **_):
            jax.debug.callback(lambda t: called.append((params["who"], int(t[0]))), t, ordered=True)
            return x[..., :3]

    stage.network = Network()
    frozen = {"last": {"who": "last"}} if steps else {}
    batch = {"low_res": jnp.zeros((1, 16, 16, 3), jnp.uint8), "id": jnp.zeros((1,), jnp.uint32)}
    stage.predict_fns()["sample"]({"who": "first"}, frozen, batch, jax.random.key(0))
    jax.effects_barrier()
    assert called == [("last" if t in by_last else "first", t) for t in (999, 500, 0)]
