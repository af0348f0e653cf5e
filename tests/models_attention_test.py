"""Attention in chunks, which CPUs take, and by TPUs' kernel, against attention at once, and where each is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import sharding
from unclip_jax.models import attention
from unclip_jax.models.attention import attend

RNG = np.random.default_rng(0)
# 128 queries are two chunks; 140 keys, as of 12 vectors of a context and 128 pixels.
Q, K, V, TOWARD = (
    jnp.asarray(RNG.standard_normal((2, count, 3, 8)), jnp.float32) for count in (128, 140, 140, 128)
)
SEEN = jnp.asarray(RNG.random((2, 1, 1, 140)) > 0.4)


def by_hand(q, k, v, mask):
    """One query after the other, float64; [b, n, h, k]."""
    q, k, v = (np.float64(part) for part in (q, k, v))
    y = np.zeros_like(q)
    for b, n, h in np.ndindex(y.shape[:3]):
        keys = np.flatnonzero(mask[b, 0, 0]) if mask is not None else np.arange(k.shape[1])
        weights = np.exp(k[b, keys, h] @ q[b, n, h] / np.sqrt(q.shape[-1]))
        y[b, n, h] = weights @ v[b, keys, h] / weights.sum()
    return y


@pytest.mark.parametrize("mask", [None, SEEN], ids=["all", "some"])
def test_attention_in_chunks_is_softmax_attention(mask):
    assert "stablehlo.while" in jax.jit(attend).lower(Q, K, V, mask).as_text()  # it is the chunked form that runs here
    np.testing.assert_allclose(jax.jit(attend)(Q, K, V, mask), by_hand(Q, K, V, mask), atol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 0.03)])
def test_both_forms_have_the_same_gradients(dtype, tolerance):
    args = [part.astype(dtype) for part in (Q, K, V)]

    def gradients(function):
        return jax.jit(jax.grad(lambda *args: (function(*args) * TOWARD).sum(), (0, 1, 2)))(*args)

    at_once = gradients(lambda *args: jax.nn.dot_product_attention(*args, mask=SEEN))
    for ours, wanted in zip(gradients(lambda *args: attend(*args, SEEN)), at_once, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(wanted), atol=tolerance)


def test_a_query_that_may_look_at_nothing_gives_no_nan():
    y = attend(Q, K, V, jnp.zeros((2, 1, 1, 140), bool))
    assert np.isfinite(y).all()


@pytest.mark.parametrize("count", [64, 100])
def test_few_queries_and_those_that_make_no_whole_chunks_go_at_once(count):
    assert "stablehlo.while" not in jax.jit(attend).lower(Q[:, :count], K, V).as_text()
    np.testing.assert_allclose(attend(Q[:, :count], K, V), attend(Q, K, V)[:, :count], atol=2e-6)


def plain(q, k, v, mask, causal):
    """By JAX's own attention, with the past written out as a mask."""
    queries, keys = q.shape[1], k.shape[1]
    if causal:
        past = np.arange(keys) <= np.arange(queries)[:, None] + keys - queries
        mask = past[None, None] if mask is None else past & mask
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("count, keys", [(128, 140), (128, 2100), (150, 150)], ids=["context", "blocks", "filled up"])
def test_the_kernel_of_a_tpu_is_softmax_attention_with_its_gradients(count, keys, masked, causal):
    q, k, v = (jnp.asarray(RNG.standard_normal((2, n, 2, 8)), jnp.float32) for n in (count, keys, keys))
    toward = jnp.asarray(RNG.standard_normal(q.shape), jnp.float32)
    # Every query sees the first key, as in a caption; a query that sees nothing has no answer to compare.
    mask = jnp.asarray(RNG.random((2, 1, 1, keys)) > 0.4).at[..., 0].set(True) if masked else None

    def kernel(q, k, v):  # interpreted: there is no TPU
        return (attention._attend_by_kernel(q, k, v, mask, causal=causal, interpret=True) * toward).sum()

    def wanted(q, k, v):
        return (plain(q, k, v, mask, causal) * toward).sum()

    found, expected = (jax.value_and_grad(function, (0, 1, 2))(q, k, v) for function in (kernel, wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-6), found, expected)


@pytest.mark.parametrize("mask", [None, SEEN.at[..., 0].set(True)], ids=["all", "some"])
def test_a_causal_query_sees_nothing_past_itself(mask):
    np.testing.assert_allclose(attend(Q, K, V, mask, causal=True), plain(Q, K, V, mask, True), atol=2e-6)
    later = K.at[:, 100:].add(1.0)  # past query 87, for the last 128 of 140 positions are the queries'
    before, after = (attend(Q, keys, V, mask, causal=True) for keys in (K, later))
    np.testing.assert_array_equal(before[:, :88], after[:, :88])
    assert not np.allclose(before[:, 88:], after[:, 88:])


def test_on_a_mesh_each_device_runs_the_kernel_on_its_own_examples_and_heads():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "model": 2}, jax.devices()[:4])
    q, k, v = (part[:, :, :2] for part in (Q, K, V))

    def kernel(q, k, v):
        with sharding.on(mesh, (("heads", "model"),)):
            return attention._attend_by_kernel(q, k, v, SEEN, interpret=True)

    text = jax.jit(kernel).lower(q, k, v).as_text()
    assert "tensor<1x128x1x8xf32>" in text  # of 2 examples and 2 heads
    np.testing.assert_allclose(jax.jit(kernel)(q, k, v), by_hand(q, k, v, SEEN), atol=2e-6)


# Tokens, those of a context, heads, their width, causal: with a context and without, queries in two blocks, heads of 32
# and of a whole register, and sizes that fill nothing up.
PACKED = [
    (37, 0, 2, 64, True), (40, 13, 2, 64, False), (21, 9, 2, 64, True), (512, 5, 1, 128, False), (17, 0, 4, 32, False),
]  # fmt: skip


def packed(count, context, heads, head_dim, *, batch=2):
    """Queries, keys and values as one product makes them, a context's keys and values, and which keys are seen."""
    qkv = jnp.asarray(RNG.standard_normal((batch, count, 3, heads, head_dim)), jnp.float32)
    of_context = jnp.asarray(RNG.standard_normal((batch, context, 2, heads, head_dim)), jnp.float32)
    seen = jnp.asarray(RNG.random((batch, 1, 1, context + count)) > 0.4).at[..., 0].set(True)
    return qkv, of_context if context else None, seen


def apart(qkv, context):
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    if context is not None:
        k, v = jnp.concatenate([context[:, :, 0], k], 1), jnp.concatenate([context[:, :, 1], v], 1)
    return q, k, v


@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("count, context, heads, head_dim, causal", PACKED)
def test_the_kernel_of_packed_heads_is_softmax_attention_with_its_gradients(
    count, context, heads, head_dim, causal, masked
):
    qkv, of_context, mask = packed(count, context, heads, head_dim)
    mask = mask if masked else None
    toward = jnp.asarray(RNG.standard_normal((2, count, heads, head_dim)), jnp.float32)

    def kernel(qkv, context):  # interpreted: there is no TPU
        y = attention._attend_packed_by_kernel(qkv, context, mask, causal=causal, interpret=True)
        return (y * toward).sum(), y

    def wanted(qkv, context):
        y = plain(*apart(qkv, context), mask, causal)
        return (y * toward).sum(), y

    of = (0, 1) if context else 0
    found, expected = (
        jax.jit(jax.value_and_grad(function, of, has_aux=True))(qkv, of_context) for function in (kernel, wanted)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found[0][1], expected[0][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found[1], expected[1])


def test_packed_heads_of_which_a_query_sees_nothing_give_no_nan():
    qkv, context, _ = packed(17, 5, 2, 64)
    nothing = jnp.zeros((2, 1, 1, 22), bool)

    def total(qkv, context):
        return attention._attend_packed_by_kernel(qkv, context, nothing, interpret=True).sum()

    found = jax.value_and_grad(total, (0, 1))(qkv, context)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("heads", ["whole", "split"])
def test_on_a_mesh_each_device_runs_the_kernel_of_packed_heads_on_its_own(heads):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "model": 2}, jax.devices()[:4])
    qkv, context, mask = packed(24, 6, 4, 64)

    def kernel(qkv, context):
        with sharding.on(mesh, (("heads", "model"),) if heads == "split" else ()):
            return attention._attend_packed_by_kernel(qkv, context, mask, interpret=True)

    size = 2 if heads == "split" else 4
    assert f"tensor<1x24x3x{size}x64xf32>" in jax.jit(kernel).lower(qkv, context).as_text()
    np.testing.assert_allclose(jax.jit(kernel)(qkv, context), plain(*apart(qkv, context), mask, False), atol=1e-5)


@pytest.mark.parametrize("platform, count, context, head_dim, packed_way, way", [
    ("tpu", 1024, 260, 64, "packed kernel", "splash kernel"),
    ("tpu", 260, 0, 64, "packed kernel", "splash kernel"),
    ("tpu", 77, 0, 64, "packed kernel", "at once"),  # few logits
    ("tpu", 64, 260, 64, "packed kernel", "at once"),
    ("tpu", 1024, 260, 40, "splash kernel", "splash kernel"),  # heads that fill no register
    ("tpu", 4096, 0, 64, "splash kernel", "splash kernel"),  # more keys than vector memory holds
    ("tpu", 3, 260, 64, "at once", "at once"),
    ("gpu", 1024, 260, 64, "at once", "at once"),
    ("cpu", 1024, 260, 64, "chunks", "chunks"),
    ("cpu", 260, 0, 64, "at once", "at once"),
])  # fmt: skip
def test_each_device_attends_in_its_way(monkeypatch, platform, count, context, head_dim, packed_way, way):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    # Whether there is cuDNN is asked for as it is traced.
    monkeypatch.setattr(attention, "_cudnn_takes", lambda q: False)
    qkv = jax.ShapeDtypeStruct((1, count, 3, 2, head_dim), jnp.bfloat16)
    of_context = jax.ShapeDtypeStruct((1, context, 2, 2, head_dim), jnp.bfloat16) if context else None

    def taken(function):
        # A function of its own each time, for traces are remembered.
        text = str(jax.make_jaxpr(lambda *arrays: function(*arrays))(qkv, of_context))
        ways = {"splash": "splash kernel", "name=attention\n": "packed kernel", "scan[": "chunks"}
        return next((found for sign, found in ways.items() if sign in text), "at once")

    assert taken(attention.attend_packed) == packed_way
    assert taken(lambda qkv, context: attend(*apart(qkv, context))) == way
