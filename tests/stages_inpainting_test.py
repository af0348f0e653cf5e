"""What is left of an image when a box is taken out of it, and which networks may be told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.stages import inpainting


def test_a_box_is_taken_out_of_each_image():
    images = jax.random.uniform(jax.random.key(1), (64, 16, 24, 3), minval=0.1)
    known = inpainting.erased(jax.random.key(0), images)
    mask = np.asarray(known.mask)[..., 0]
    assert set(np.unique(mask)) == {0, 1}
    for hole in 1 - mask:
        rows, columns = hole.any(1), hole.any(0)
        assert np.array_equal(hole, np.outer(rows, columns)), "no box"
        for line in (rows, columns):
            places = np.flatnonzero(line)
            assert len(places) == places[-1] - places[0] + 1 and len(places) >= len(line) // 4
    assert np.array_equal(np.asarray(known.image), np.where(mask[..., None] > 0, images, 0))
    assert 0.2 < mask.mean() < 0.9 and len(np.unique(mask.sum((1, 2)))) > 20


def test_known_pixels_come_with_their_mask():
    with pytest.raises(InputError, match="two fields"):
        inpainting.given({"known": jnp.zeros((1, 4, 4, 3), jnp.uint8)}, 1, 4)
    nothing = inpainting.given({}, 2, 4)
    assert not nothing.mask.any() and nothing.beside(jnp.ones((2, 4, 4, 3))).shape == (2, 4, 4, 7)


def test_the_network_must_read_four_channels_more():
    inpainting.check(10, 6, inpaints=True)
    with pytest.raises(InputError, match="in_channels is 3; with inpaint=True it must be 7"):
        inpainting.check(3, 3, inpaints=True)
