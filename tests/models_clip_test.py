"""CLIP's towers against their equations in float64 NumPy, and the paper's sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_oracle as oracle

from unclip_jax.errors import InputError
from unclip_jax.models.clip import CLIP

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 3,
    "context_length": 9,
    "vocab_size": 20,
    "text_width": 16,
    "text_depth": 2,
    "text_heads": 2,
    "embed_dim": 12,
}
EOT = 19
CAPTIONS = np.array([[18, 3, 5, EOT, 0, 0, 0, 0, 0], [18, 7, 1, 2, 4, 6, 8, 9, EOT], [18, EOT, 3, EOT, 7, 7, 7, 7, 7]])


def _small(activation):
    clip = CLIP(**TINY, activation=activation)
    images = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3), minval=-1, maxval=1)
    tokens = jnp.asarray(CAPTIONS, jnp.int32)
    params = oracle.random_weights(clip.init, images, tokens)
    return clip, params, images, tokens


def _image_oracle(image, p, activation):
    """One image [-1, 1]: [16, 16, 3]."""
    rgb = (np.asarray(image, np.float64) + 1) / 2
    rgb = (rgb - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    patches = [
        np.einsum("hwc,hwcd->d", rgb[row : row + 4, column : column + 4], p["patches"]["kernel"])
        for row in range(0, 16, 4)
        for column in range(0, 16, 4)
    ]
    x = oracle.layer_norm(np.stack([p["class"], *patches]) + p["positions"], p["ln_pre"])
    x = oracle.transformer(x, p["stack"], causal=False, activation=activation)
    return oracle.layer_norm(x[0], p["ln_post"]) @ p["projection"]["kernel"]


def _text_oracle(caption, p, activation):
    x = np.asarray(p["tokens"]["embedding"], np.float64)[caption] + p["positions"]
    x = oracle.transformer(x, p["stack"], causal=True, activation=activation)
    return oracle.layer_norm(x[list(caption).index(EOT)], p["ln_final"]) @ p["projection"]["kernel"]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_both_towers_follow_the_equations(activation):
    clip, params, images, tokens = _small(activation)
    z_i, z_t, _ = jax.jit(clip.apply)(params, images, tokens)
    expected_i = [_image_oracle(image, params["params"]["vision"], activation) for image in images]
    expected_t = [_text_oracle(caption, params["params"]["text"], activation) for caption in CAPTIONS]
    np.testing.assert_allclose(z_i, expected_i, atol=2e-5)
    np.testing.assert_allclose(z_t, expected_t, atol=2e-5)


def test_text_after_the_first_end_token_changes_nothing():
    clip, params, _, tokens = _small("gelu")
    encode = jax.jit(lambda tokens: clip.apply(params, tokens, method="encode_text"))
    changed = tokens.at[0, 5:].set(jnp.array([EOT, 11, 12, 13])).at[2, 3:].set(0)
    np.testing.assert_array_equal(encode(changed), encode(tokens))
    np.testing.assert_allclose(encode(tokens[:1, :4])[0], encode(tokens)[0], atol=1e-5)


def test_remat_changes_no_gradient():
    _, params, _, tokens = _small("gelu")

    def gradient(remat):
        def loss(p):
            return CLIP(**TINY, remat=remat).apply(p, tokens, method="encode_text").sum()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient(False), gradient(True))


def test_bfloat16_towers_return_float32_near_the_float32_ones():
    clip, params, images, tokens = _small("gelu")
    z_i, z_t, _ = jax.jit(clip.apply)(params, images, tokens)
    low_i, low_t, _ = jax.jit(CLIP(**TINY, dtype=jnp.bfloat16).apply)(params, images, tokens)
    assert low_i.dtype == low_t.dtype == jnp.float32
    for low, full in ((low_i, z_i), (low_t, z_t)):
        assert jnp.abs(low - full).max() < 0.05 * jnp.abs(full).max()


def test_temperature_starts_at_that_of_radford_et_al():
    clip = CLIP(**TINY)
    images, tokens = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 9), jnp.int32)
    scale = jax.jit(lambda key: clip.init(key, images, tokens)["params"]["logit_scale"])(jax.random.key(0))
    assert math.isclose(math.exp(-scale), 0.07, rel_tol=1e-6)


@pytest.mark.parametrize("vision_heads", [16, 20])
def test_the_papers_sizes(vision_heads):
    clip = CLIP(
        image_size=256,
        patch_size=16,
        vision_width=1280,
        vision_depth=32,
        vision_heads=vision_heads,
        context_length=77,
        vocab_size=49408,
        text_width=1024,
        text_depth=24,
        text_heads=16,
        embed_dim=1024,
    )
    images, tokens = jnp.zeros((1, 256, 256, 3)), jnp.zeros((1, 77), jnp.int32)
    shapes = jax.eval_shape(clip.init, jax.random.key(0), images, tokens)["params"]
    count = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tower)) for name, tower in shapes.items()}
    assert math.isclose(count["vision"], 632.31e6, rel_tol=1e-4)
    assert math.isclose(count["text"], 354.03e6, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"patch_size": 5}, "patch_size"), ({"vision_heads": 5}, "vision_heads"), ({"text_heads": 3}, "text_heads")],
)
def test_sizes_that_do_not_divide_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        jax.eval_shape(
            CLIP(**(TINY | wrong)).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 9), jnp.int32)
        )


def test_images_and_captions_of_another_size_are_refused():
    clip, params, images, tokens = _small("gelu")
    with pytest.raises(InputError, match="16x16"):
        clip.apply(params, images[:, :8], method="encode_image")
    with pytest.raises(InputError, match="9 tokens"):
        clip.apply(params, jnp.tile(tokens, (1, 2)), method="encode_text")
