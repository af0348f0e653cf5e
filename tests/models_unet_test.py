"""The U-Net against one written here in float64 NumPy, published parameter counts, and invariances."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


# The oracle: plain float64, one function per layer.


def silu(x):
    return x / (1 + np.exp(-x))


def conv(w, x):
    kernel = w["kernel"]
    side = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    out = np.zeros(x.shape[:3] + kernel.shape[-1:]) + w["bias"]
    for i in range(side):
        for j in range(side):
            out += padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
    return out


def dense(w, x):
    return x @ w["kernel"] + w["bias"]


def group_norm(w, x, groups=32):
    split = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    split = (split - split.mean((1, 3), keepdims=True)) / np.sqrt(split.var((1, 3), keepdims=True) + 1e-5)
    return split.reshape(x.shape) * w["scale"] + w["bias"]


def resampled(x, how):
    if how == "up":
        return x.repeat(2, 1).repeat(2, 2)
    if how == "down":
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    return x


def res_block(w, x, emb, how="none", scale_shift="film", groups=32):
    h = conv(w["conv_1"], resampled(silu(group_norm(w["norm_1"], x, groups)), how))
    e = dense(w["emb"], silu(emb))[:, None, None]
    if scale_shift == "film":
        half = e.shape[-1] // 2
        h = group_norm(w["norm_2"], h, groups) * (1 + e[..., :half]) + e[..., half:]
    else:
        h = group_norm(w["norm_2"], h + e, groups)
    x = resampled(x, how)
    return (conv(w["skip"], x) if "skip" in w else x) + conv(w["conv_2"], silu(h))


def attention_block(w, x, context, groups=32):
    y = group_norm(w["norm"], x, groups).reshape(x.shape[0], -1, x.shape[-1])
    a = w["attention"]
    q, k, v = np.moveaxis(np.einsum("bnd,djhk->bnjhk", y, a["qkv"]["kernel"]) + a["qkv"]["bias"], 2, 0)
    if context is not None:
        kv = np.einsum("bnd,djhk->bnjhk", context, a["context_kv"]["kernel"]) + a["context_kv"]["bias"]
        k, v = (np.concatenate([kv[:, :, j], own], 1) for j, own in enumerate((k, v)))
    weights = np.exp(np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(q.shape[-1]))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhnm,bmhk,hkd->bnd", weights, v, a["out"]["kernel"]) + a["out"]["bias"]
    return x + out.reshape(x.shape)


def unet(w, x, t, emb, context):
    """Two levels, one block each, attention at the second and in the middle."""
    half = 16
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / half)
    emb = emb + dense(w["time_2"], silu(dense(w["time_1"], np.concatenate([np.cos(angles), np.sin(angles)], 1))))
    a = conv(w["in_conv"], x)
    b = res_block(w["down_0_0"], a, emb)
    c = res_block(w["down_0"], b, emb, "down")
    d = attention_block(w["down_1_0_attention"], res_block(w["down_1_0"], c, emb), context)
    h = attention_block(w["middle_attention"], res_block(w["middle_0"], d, emb), context)
    h = res_block(w["middle_1"], h, emb)
    for i, skip in enumerate((d, c)):
        h = res_block(w[f"up_1_{i}"], np.concatenate([h, skip], -1), emb)
        h = attention_block(w[f"up_1_{i}_attention"], h, context)
    h = res_block(w["up_1"], h, emb, "up")
    for i, skip in enumerate((b, a)):
        h = res_block(w[f"up_0_{i}"], np.concatenate([h, skip], -1), emb)
    return conv(w["out_conv"], silu(group_norm(w["out_norm"], h)))


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
    expected = unet(jax.tree.map(np.float64, params["params"]), *inputs)
    np.testing.assert_allclose(y, expected, atol=5e-5)


def test_remat_changes_no_gradient():
    module = UNet(**{**TINY, "channel_mult": (1,)}, attention_resolutions=(8,))
    args = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3, 900], jnp.int32)
    params = random_params(module, *args)

    def gradient(module):
        return jax.jit(jax.grad(lambda p: jnp.square(module.apply(p, *args)).mean()))(params)

    pairs = zip(*(jax.tree.leaves(gradient(m)) for m in (module, module.clone(remat=True))), strict=True)
    for plain, recomputed in pairs:
        np.testing.assert_allclose(plain, recomputed, rtol=1e-3, atol=1e-5)


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
