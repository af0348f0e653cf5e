"""Classifier-free guidance: its formula, its cost, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import guidance

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

