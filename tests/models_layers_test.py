"""Shared layers against float64 NumPy, loops written from the definitions, and invariances."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import sharding
from unclip_jax.models import layers, transformer


def random_params(module, *args, seed=0):
    """Parameters with every tensor random, those that start at zero or one included."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


@pytest.mark.parametrize("channels, groups", [(64, 32), (48, 16), (6, 2)])
def test_group_norm_is_the_definition(channels, groups):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (2, 4, 6, channels))
    scale, shift = rng.normal(size=(2, 2, channels))
    module = layers.GroupNorm()
    params = random_params(module, jnp.zeros((2, 4, 6, channels)))
    y = module.apply(params, *(jnp.asarray(a, jnp.float32) for a in (x, scale, shift)))
    split = x.reshape(2, 24, groups, -1).transpose(0, 2, 1, 3).reshape(2, groups, -1)
    normed = (split - split.mean(-1, keepdims=True)) / np.sqrt(split.var(-1, keepdims=True) + 1e-5)
    normed = normed.reshape(2, groups, 24, -1).transpose(0, 2, 1, 3).reshape(x.shape)
    weights = {k: np.float64(v) for k, v in params["params"].items()}
    expected = (normed * weights["scale"] + weights["bias"]) * (1 + scale)[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_group_norm_of_bfloat16_has_float32_statistics():
    x = jnp.asarray(np.random.default_rng(0).normal(100.0, 1.0, (1, 32, 32, 32)), jnp.bfloat16)
    module = layers.GroupNorm(dtype=jnp.bfloat16)
    params = nn.unbox(module.init(jax.random.key(0), x))
    y = np.float64(module.apply(params, x))
    exact = np.float64(x)
    exact = (exact - exact.mean((1, 2))) / np.sqrt(exact.var((1, 2)) + 1e-5)
    np.testing.assert_allclose(y, exact, atol=0.02)


@pytest.mark.parametrize("width", [16, 7])
def test_timestep_embedding_is_cosines_then_sines(width):
    t = np.array([0, 1, 500, 999])
    y = layers.timestep_embedding(jnp.asarray(t), width)
    half = width // 2
    for row, step in zip(np.asarray(y), t, strict=True):
        for i in range(half):
            angle = step * 10000.0 ** (-i / half)
            np.testing.assert_allclose(row[i], np.cos(angle), atol=1e-4)
            np.testing.assert_allclose(row[half + i], np.sin(angle), atol=1e-4)
        assert (row[2 * half :] == 0).all()


def attention_by_hand(params, x, context, heads):
    """One softmax over the context's and the tokens' keys, query by query."""
    w = jax.tree.map(np.float64, params["params"])
    head_dim = x.shape[-1] // heads
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(heads):
            q, k, v = (x[b] @ w["qkv"]["kernel"][:, j, h] + w["qkv"]["bias"][j, h] for j in range(3))
            if context is not None:
                kv = w["context_kv"]
                k = np.concatenate([context[b] @ kv["kernel"][:, 0, h] + kv["bias"][0, h], k])
                v = np.concatenate([context[b] @ kv["kernel"][:, 1, h] + kv["bias"][1, h], v])
            for n in range(x.shape[1]):
                out[b, n] += softmax(k @ q[n] / np.sqrt(head_dim)) @ v @ w["out"]["kernel"][h]
    return out + w["out"]["bias"]


@pytest.mark.parametrize("with_context", ["context", "none"])
def test_attention_is_one_softmax_over_context_and_tokens(with_context):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 8))
    context = rng.normal(size=(2, 3, 6)) if with_context == "context" else None
    args = [None if a is None else jnp.asarray(a, jnp.float32) for a in (x, context)]
    module = transformer.Attention(2)
    params = random_params(module, *args)
    y, cache = module.apply(params, *args)
    assert cache is None
    np.testing.assert_allclose(y, attention_by_hand(params, x, context, 2), atol=1e-5)


def test_cached_tokens_equal_a_causal_pass():
    module = transformer.Transformer(depth=3, heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    params = random_params(module, x)
    whole, _ = jax.jit(module.apply)(params, x, mask=transformer.causal_mask(7))
    apply = jax.jit(lambda x, cache: module.apply(params, x, cache=cache))
    cache = transformer.empty_cache(depth=3, batch=2, length=9, heads=2, head_dim=8, dtype=jnp.float32)
    parts = []
    for start, stop in [(0, 4), (4, 5), (5, 7)]:
        y, cache = apply(x[:, start:stop], cache)
        parts.append(y)
    assert int(cache.filled) == 7
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [False, True], ids=["as one matrix", "heads over a mesh"])
def test_layers_of_heads_are_products_over_their_axes(split):
    rng = np.random.default_rng(0)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    rules = (("embed", "fsdp"), ("heads", "model")) if split else (("embed", "fsdp"),)
    x = jnp.asarray(rng.standard_normal((4, 5, 8)), jnp.float32)
    apart, joined = layers.SplitHeads(3, 2, 6), layers.JoinHeads(8)
    weights = [
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 3, 2, 6), (3, 2, 6), (2, 6, 8), (8,))
    ]

    def through(x, weights):
        kernel, bias, back, offset = weights
        with sharding.on(mesh, rules):
            y = apart.apply({"params": {"kernel": kernel, "bias": bias}}, x)
            return joined.apply({"params": {"kernel": back, "bias": offset}}, y[:, :, 1])

    def by_hand(x, weights):
        kernel, bias, back, offset = weights
        y = jnp.einsum("bnd,dchk->bnchk", x, kernel) + bias
        return jnp.einsum("bnhk,hkd->bnd", y[:, :, 1], back) + offset

    np.testing.assert_allclose(jax.jit(through)(x, weights), by_hand(x, weights), atol=1e-5)
    found, wanted = (jax.jit(jax.grad(lambda w, f=f: jnp.square(f(x, w)).sum()))(weights) for f in (through, by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_a_weights_gradient_is_scattered_over_fsdp_and_its_pieces_summed_over_the_rest():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "model": 1})
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((16, 6, 6, 4), (3, 3, 4, 8)))
    layer = layers.conv(8, use_bias=False)

    def loss(kernel, x):
        with sharding.on(mesh, (("conv_out", "fsdp"),)):
            return jnp.square(layer.apply({"params": {"kernel": kernel}}, x)).sum()

    gradient = jax.jit(jax.grad(loss))
    text = gradient.lower(kernel, x).as_text()
    # Of a device's own part of the gradient, whole, to half of it; then between the four that hold this half. The
    # halves, four channels wide each, stand one behind the other.
    (scattered,) = re.findall(r"reduce_scatter.*?: \((tensor<[^>]*>)\) -> (tensor<[^>]*>)", text, re.DOTALL)
    assert scattered == ("tensor<2x36x4xf32>", "tensor<1x36x4xf32>")

    def plainly(kernel):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.square(y).sum()

    np.testing.assert_allclose(gradient(kernel, x), jax.grad(plainly)(kernel), rtol=2e-5, atol=1e-4)
