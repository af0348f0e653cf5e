"""Where captions end, by hand."""

import jax.numpy as jnp
import numpy as np

from unclip_jax.models import captions


def test_valid_tokens_end_with_the_first_end_token():
    tokens = jnp.array([[8, 3, 9, 0, 9, 0], [8, 9, 9, 0, 0, 0], [8, 1, 2, 3, 4, 5]], jnp.int32)
    expected = [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert np.array_equal(captions.valid_tokens(tokens, eot=9), np.array(expected, bool))


def test_empty_caption_is_start_and_end():
    assert captions.empty_caption(5, 49408).tolist() == [49406, 49407, 0, 0, 0]
