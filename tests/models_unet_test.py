"""The U-Net against float64 NumPy, published parameter counts, and invariances."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unet_oracle import attention_block, res_block, unet

from unclip_jax.errors import InputError
from unclip_jax.models.unet import AttentionBlock, ResBlock, UNet

TINY = dict(in_channels=3, out_channels=6, channels=32, channel_mult=(1, 2), depth=1, image_size=8, head_channels=16)


def random_params(module, *args):
    """Parameters with every tensor random, those that start at zero or one included."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
    rng = np.random.default_rng(0)

    def drawn(leaf):
        fan_in = max(1, leaf.size // leaf.shape[-1])
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(drawn, shapes)


def single(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def count(module, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) > 1 else jnp.int32) for shape in shapes]
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), *args)))


@pytest.mark.parametrize("scale_shift, groups", [("film", 32), ("add", 32), ("film", 4)])
@pytest.mark.parametrize("how, channels", [("none", 32), ("none", 64), ("up", 32), ("down", 32)])
def test_res_block_is_the_oracle(how, channels, scale_shift, groups):
    rng = np.random.default_rng(0)
    x, emb = rng.normal(size=(2, 4, 6, 32)), rng.normal(size=(2, 12))
    module = ResBlock(channels, how, scale_shift=scale_shift, norm_groups=groups)
    params = random_params(module, *single(x, emb))
    assert ("skip" in params["params"]) == (channels != 32)
    y = jax.jit(module.apply)(params, *single(x, emb))
    expected = res_block(jax.tree.map(np.float64, params["params"]), x, emb, how, scale_shift, groups)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("with_context", ["context", "none"])
def test_attention_block_is_the_oracle(with_context):
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(2, 4, 6, 32)), rng.normal(size=(2, 5, 12))
    args = single(x, context) if with_context == "context" else single(x)
    module = AttentionBlock(8)
    params = random_params(module, *args)
    y = jax.jit(module.apply)(params, *args)
    weights = jax.tree.map(np.float64, params["params"])
    np.testing.assert_allclose(y, attention_block(weights, x, context if len(args) == 2 else None), atol=2e-5)


@pytest.fixture(scope="module")
def conditioned():
    """A tiny U-Net that attends, with random weights and inputs."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 8, 8, 3)), np.array([3, 900]), rng.normal(size=(2, 128)), rng.normal(size=(2, 5, 12))
    x, t, emb, context = inputs
    args = (*single(x), jnp.asarray(t), *single(emb, context))
    module = UNet(**TINY, attention_resolutions=(4,))
    return module, random_params(module, *args), args, inputs


def test_unet_is_the_oracle(conditioned):
    module, params, args, inputs = conditioned
    y = jax.jit(module.apply)(params, *args)
    assert y.dtype == jnp.float32
    weights = jax.tree.map(np.float64, params["params"])
    expected = unet(weights, *inputs, channel_mult=(1, 2), depth=1, attends=(False, True))
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_remat_changes_no_gradient():
    module = UNet(**{**TINY, "channel_mult": (1,)}, attention_resolutions=(8,))
    args = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3, 900], jnp.int32)
    params = random_params(module, *args)

    def gradient(module):
        return jax.jit(jax.grad(lambda p: jnp.square(module.apply(p, *args)).mean()))(params)

    gradients = [jax.tree.leaves(gradient(module.clone(remat=policy))) for policy in ("none", "products", "full")]
    for plain, *recomputed in zip(*gradients, strict=True):
        for one in recomputed:
            np.testing.assert_allclose(plain, one, rtol=1e-3, atol=1e-5)


def test_bfloat16_stays_near_float32_and_returns_float32(conditioned):
    module, params, args, _ = conditioned
    exact = jax.jit(module.apply)(params, *args)
    rounded = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(params, *args)
    assert rounded.dtype == jnp.float32
    assert np.std(rounded - exact) < 0.03 * np.std(exact)


def test_blocks_start_as_their_residual_and_the_network_at_zero():
    x, emb = jax.random.normal(jax.random.key(0), (1, 4, 4, 32)), jnp.ones((1, 8))
    for module, args in ((ResBlock(32), (x, emb)), (AttentionBlock(8), (x,))):
        assert np.array_equal(jax.jit(lambda *a, m=module: m.init_with_output(jax.random.key(1), *a)[0])(*args), x)
    network = UNet(**{**TINY, "in_channels": 32, "channel_mult": (1,)}, attention_resolutions=())
    y = jax.jit(lambda *a: network.init_with_output(jax.random.key(1), *a)[0])(x, jnp.array([5], jnp.int32))
    assert not np.asarray(y).any()


def test_dropout_is_drawn_from_its_key_only():
    module = ResBlock(32, dropout=0.5)
    x, emb = jax.random.normal(jax.random.key(0), (1, 4, 4, 32)), jnp.ones((1, 8))
    params = random_params(module, x, emb)
    one, same, other = (module.apply(params, x, emb, False, rngs={"dropout": jax.random.key(k)}) for k in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_upsampler_runs_at_any_size_and_treats_rows_as_columns():
    module = UNet(**{**TINY, "in_channels": 6}, attention_resolutions=())
    x, t = jax.random.normal(jax.random.key(0), (1, 12, 20, 6)), jnp.array([7], jnp.int32)
    params = random_params(module, x[:, :8, :8], t)
    flipped = jax.tree.map(lambda w: w.swapaxes(0, 1) if w.ndim == 4 else w, params)
    y = jax.jit(module.apply)(params, x, t)
    assert y.shape == (1, 12, 20, 6)
    turned = jax.jit(module.apply)(flipped, x.swapaxes(1, 2), t)
    np.testing.assert_allclose(turned.swapaxes(1, 2), y, atol=2e-5)


# ADM's published networks have a class embedding besides, 1,000 rows of 4 * 192, which unCLIP has not.
CLASSES = 1000 * 768


@pytest.mark.parametrize(
    "fields, inputs, published",
    [
        (dict(channels=192), [(1, 64, 64, 3), (1,)], 295.90e6 - CLASSES),
        (
            dict(in_channels=6, channels=192, depth=2, channel_mult=(1, 1, 2, 2, 4, 4), image_size=256),
            [(1, 256, 256, 6), (1,)],
            311.80e6 - CLASSES,
        ),
        (dict(), [(1, 64, 64, 3), (1,), (1, 2048), (1, 260, 2048)], 2.242e9),
        (dict(in_channels=6, channels=320, attention_resolutions=()), [(1, 64, 64, 6), (1,)], 0.730e9),
        (
            dict(in_channels=6, channels=192, depth=2, channel_mult=(1, 1, 2, 2, 4, 4), image_size=256)
            | dict(attention_resolutions=()),
            [(1, 256, 256, 6), (1,)],
            0.282e9,
        ),
        (dict(channels=320), [(1, 64, 64, 3), (1,), (1, 1280), (1, 81, 1536)], 885_439_686),
        (
            dict(in_channels=6, out_channels=3, channels=320, attention_resolutions=(), scale_shift="add"),
            [(1, 64, 64, 6), (1,)],
            691_579_523,
        ),
    ],
    ids=["adm_64", "adm_upsampler", "decoder", "to_256", "to_1024", "karlo_decoder", "karlo_upsampler"],
)
def test_parameter_counts_are_the_published_ones(fields, inputs, published):
    tolerance = 0 if isinstance(published, int) else 0.005
    assert count(UNet(**fields), *inputs) == pytest.approx(published, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(channels=48), "head_channels 64 does not divide"),
        (dict(attention_resolutions=(24,)), "attention resolution 24 is never reached"),
        (dict(image_size=36), "multiple of 8"),
        (dict(scale_shift="yes"), "'film' or 'add'"),
        (dict(depth=0), "1 or more"),
    ],
)
def test_a_shape_that_is_no_network_is_refused(fields, said):
    with pytest.raises(InputError, match=said):
        UNet(**fields)


def test_an_image_that_does_not_halve_is_refused():
    module = UNet(**TINY, attention_resolutions=())
    with pytest.raises(InputError, match="not multiples of 2"):
        count(module, (1, 9, 8, 3), (1,))
