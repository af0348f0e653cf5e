"""The two pixel conversions, against arithmetic on whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from unclip_jax import arrays, sharding

EVERY_PIXEL = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def test_every_pixel_value_comes_back():
    images = arrays.from_uint8(EVERY_PIXEL)
    assert images.dtype == jnp.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(arrays.to_uint8(images), EVERY_PIXEL)
    np.testing.assert_array_equal(arrays.to_uint8(arrays.from_uint8(jnp.asarray(EVERY_PIXEL))), EVERY_PIXEL)


def test_pixels_map_linearly():
    expected = (EVERY_PIXEL.astype(np.float64) * 2 - 255) / 255
    np.testing.assert_allclose(arrays.from_uint8(EVERY_PIXEL), expected, atol=1e-7)


def test_values_outside_are_clipped_and_others_rounded_to_the_nearest():
    given = jnp.array([-7.0, -1.0001, 1.0001, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(arrays.to_uint8(given), [0, 0, 255, 255, 0])
    values = np.random.default_rng(0).uniform(-1, 1, 1000)
    levels = np.linspace(-1, 1, 256)
    nearest = np.abs(values[:, None] - levels).argmin(axis=1)
    np.testing.assert_array_equal(arrays.to_uint8(jnp.asarray(values)), nearest)


def test_bfloat16_images_are_converted_in_float32():
    images = arrays.from_uint8(EVERY_PIXEL).astype(jnp.bfloat16)
    exact = np.round((np.asarray(images, np.float64) + 1) * 127.5)
    np.testing.assert_array_equal(arrays.to_uint8(images), exact)


def test_the_types_in_signatures_are_enforced_in_tests():
    with pytest.raises(TypeCheckError):
        arrays.from_uint8(EVERY_PIXEL.astype(np.float32))
    with pytest.raises(TypeCheckError):
        arrays.to_uint8(jnp.asarray(EVERY_PIXEL))


def test_tests_run_on_eight_devices():
    assert jax.device_count() == 8 and jax.default_backend() == "cpu"
    assert sharding.make_mesh({"data": -1}).shape == {"slice": 1, "data": 8, "fsdp": 1, "model": 1}
