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


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_attends_at_once(platform):
    lowered = jax.jit(attend).trace(Q, K, V, SEEN).lower(lowering_platforms=(platform,))
    assert "stablehlo.while" not in lowered.as_text()


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


@pytest.mark.parametrize("count, keys, calls", [(1024, 1284, 1), (260, 260, 1), (64, 324, 0), (3, 260, 0)])
def test_a_tpu_takes_the_kernel_where_logits_are_many(count, keys, calls):
    q = jnp.zeros((1, count, 1, 64), jnp.bfloat16)
    k = jnp.zeros((1, keys, 1, 64), jnp.bfloat16)
    lowered = jax.jit(attend).trace(q, k, k).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == calls
