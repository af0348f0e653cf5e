"""The upsampler stage: what it starts from, and how it sees the smaller image."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_configs import small

from unclip_jax import config as configs
from unclip_jax.diffusion import samplers
from unclip_jax.stages import base

KEYS = jax.random.split(jax.random.key(0), 2)
LOW_RES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("temperature", [1.0, 0.997])
def test_sampling_starts_from_noise_times_the_temperature(temperature):
    stage = base.create(small("upsampler", sampling__temperature=temperature))
    stage.sampler = lambda denoise, x_T, keys: x_T
    x_T = stage.sample({}, LOW_RES, KEYS)
    np.testing.assert_allclose(x_T, temperature * samplers.initial_noise(KEYS, (32, 32, 3)), rtol=1e-6)


def test_the_network_sees_the_8_bit_low_res_enlarged_bilinearly_beside_x_t():
    stage = base.create(small("upsampler"))
    seen = []

    class Network:
        def apply(self, params, x, t, **options):
            seen.append(x)
            return jnp.concatenate([jnp.zeros_like(x)], -1)

    stage.network = Network()
    stage.sampler = lambda denoise, x_T, keys: denoise(x_T, jnp.zeros(2, jnp.int32))[..., :3]
    stage.sample({}, LOW_RES, KEYS)
    for pixels, low_res in zip(seen[0], np.asarray(LOW_RES), strict=True):
        enlarged = cv2.resize(low_res.astype(np.float32) / 127.5 - 1, (32, 32), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(pixels[..., 3:], enlarged, atol=1e-5)
    np.testing.assert_allclose(seen[0][..., :3], samplers.initial_noise(KEYS, (32, 32, 3)), rtol=1e-6)


@pytest.mark.parametrize(("threshold", "seen"), [("static", [0.5, 1]), ("dynamic", [0.125, 1]), ("none", [0.5, 4])])
def test_the_threshold_is_the_configs(threshold, seen):
    values = {"sampling__threshold": threshold, "sampling__quantile": 1.0, "diffusion__prediction": "x_start"}
    stage = base.create(small("upsampler", **values))
    output = jnp.asarray([[[[0.5, 4.0, 0, 0]]]])  # two channels, and their variances
    x_0 = stage.sampler(lambda x_t, t: output, jnp.ones((1, 1, 1, 2)), KEYS[:1])
    np.testing.assert_allclose(x_0[0, 0, 0], seen, atol=1e-5)


# Table 3, and GLIDE's for what it leaves open: steps, evenly spaced but for fast27, and the upsampler's cooler start.
SAMPLING = {
    "decoder.py:paper": ("ddpm", 250, 1.0),
    "upsampler.py:paper_1": ("ddim", 27, 0.997),
    "upsampler.py:paper_2": ("ddim", 15, 1.0),
}


@pytest.mark.parametrize("spec", SAMPLING)
def test_the_papers_stages_are_sampled_in_as_many_steps_as_table_3_says(spec):
    method, count, temperature = SAMPLING[spec]
    config = configs.load(f"configs/{spec}")
    stage = base.create(config)
    assert (config.sampling.method, config.sampling.eta, config.diffusion.variance) == (method, 0.0, "learned_range")
    assert config.sampling.get("temperature", 1.0) == temperature
    seen = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: seen.append(int(t[0])), t, ordered=True)
        return jnp.concatenate([x_t, x_t], -1)

    stage.sampler(denoise, jnp.ones((1, 1, 1, 3)), KEYS[:1])
    jax.effects_barrier()
    assert len(seen) == count and seen == sorted(set(seen), reverse=True)
    if count != 27:
        assert seen == [int(np.round(k * 999 / (count - 1))) for k in range(count - 1, -1, -1)]
