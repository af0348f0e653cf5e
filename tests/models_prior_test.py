"""Both priors: equations, causality, cached against uncached, dropped against explicit nulls, the paper's sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_oracle as oracle

from unclip_jax.errors import InputError
from unclip_jax.models.captions import EncodedCaption
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.models.prior_ar import ARPrior

DIFFUSION = DiffusionPrior(embed_dim=10, context_length=6, vocab_size=20, width=24, depth=3, heads=3)
AR = ARPrior(
    embed_dim=10,
    components=7,
    buckets=11,
    dot_buckets=5,
    context_length=6,
    vocab_size=20,
    text_width=16,
    text_depth=2,
    text_heads=2,
    width=24,
    depth=3,
    heads=3,
)
# The same prior on captions that a CLIP has read: hidden states of width 9, up to the end.
ON_CLIP = DIFFUSION.clone(caption="clip")
SEEN = jnp.arange(6) < jnp.array([[4], [6], [3], [2]])
READ = EncodedCaption(jax.random.normal(jax.random.key(10), (4, 6, 9)), SEEN)
EMPTY = [18, 19, 0, 0, 0, 0]
TOKENS = jnp.array([[18, 3, 4, 19, 0, 0], [18, 5, 6, 7, 8, 19], [18, 2, 19, 0, 0, 0], EMPTY], jnp.int32)
Z_T = jax.random.normal(jax.random.key(7), (4, 10))
X_T = jax.random.normal(jax.random.key(8), (4, 10))
T = jnp.array([0, 17, 500, 999])
CODES = jax.random.randint(jax.random.key(9), (4, 7), 0, 11)
DOT = jnp.array([0, 4, 2, 2])
DROP = jnp.array([True, False, True, False])


@pytest.fixture(scope="module")
def diffusion():
    return oracle.random_weights(DIFFUSION.init, X_T, T, TOKENS, Z_T)


@pytest.fixture(scope="module")
def autoregressive():
    return oracle.random_weights(AR.init, CODES, DOT, TOKENS, Z_T)


def _caption(tokens, p, length):
    return np.stack(
        [p["tokens"]["embedding"][i] if n < length else p["padding"] for n, i in enumerate(np.asarray(tokens))]
    )


def test_diffusion_prior_follows_the_equations(diffusion):
    p = diffusion["params"]
    frequencies = 10000.0 ** -(np.arange(12) / 12)
    expected = []
    for b, length in enumerate([4, 6, 3, 2]):
        dropped = bool(DROP[b])
        caption = _caption(EMPTY if dropped else TOKENS[b], p, 2 if dropped else length)
        z = p["null_text_embedding"] if dropped else oracle.linear(np.asarray(Z_T[b]), p["text_embedding"])
        angles = float(T[b]) * frequencies
        time = oracle.linear(np.concatenate([np.cos(angles), np.sin(angles)]), p["time_1"])
        time = oracle.linear(time / (1 + np.exp(-time)), p["time_2"])
        image = oracle.linear(np.asarray(X_T[b]), p["image_embedding"])
        x = np.stack([*caption, z, time, image, p["query"]]) + p["positions"]
        x = oracle.transformer(x, p["stack"], causal=True)
        expected.append(oracle.linear(oracle.layer_norm(x[-1], p["norm"]), p["readout"]))
    actual = jax.jit(DIFFUSION.apply)(diffusion, X_T, T, TOKENS, Z_T, DROP)
    # Angles of t = 999 in float32 are off by up to 6e-5.
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_autoregressive_prior_follows_the_equations(autoregressive):
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), autoregressive["params"])
    text = p["text_encoder"]
    expected = []
    for b, length in enumerate([4, 6, 3, 2]):
        dropped = bool(DROP[b])
        tokens, length = (EMPTY, 2) if dropped else (np.asarray(TOKENS[b]), length)
        read = text["token"]["embedding"][np.array(tokens)] + text["position"]
        x = np.where(np.arange(6)[:, None] < length, read, text["padding"])
        x = oracle.transformer(x, text["transformer"], causal=False)
        context = oracle.linear(oracle.layer_norm(x, text["final_norm"]), p["context"])
        z = p["null_text_embedding"] if dropped else oracle.linear(np.asarray(Z_T[b]), p["text_embedding"])
        codes = p["codes"]["embedding"][np.asarray(CODES[b, :-1])]
        x = np.stack([p["dots"]["embedding"][int(DOT[b])], z, *codes]) + p["positions"]
        x = oracle.transformer(x, p["decoder"], causal=True, context=context)
        expected.append(oracle.linear(oracle.layer_norm(x[1:], p["norm"]), p["readout"]))
    actual = jax.jit(AR.apply)(autoregressive, CODES, DOT, TOKENS, Z_T, DROP)
    np.testing.assert_allclose(actual, expected, atol=5e-5)


def test_diffusion_prior_from_its_prefix_equals_the_whole(diffusion):
    whole = jax.jit(DIFFUSION.apply)(diffusion, X_T, T, TOKENS, Z_T, DROP)
    cache = jax.jit(lambda: DIFFUSION.apply(diffusion, TOKENS, Z_T, DROP, method="prefix"))()
    denoise = jax.jit(lambda x, t: DIFFUSION.apply(diffusion, cache, x, t, method="denoise"))
    np.testing.assert_allclose(denoise(X_T, T), whole, atol=1e-5)
    # The same prefix serves another step, and the prediction does depend on the step.
    later = jax.jit(DIFFUSION.apply)(diffusion, X_T + 1, T // 2, TOKENS, Z_T, DROP)
    np.testing.assert_allclose(denoise(X_T + 1, T // 2), later, atol=1e-5)
    assert jnp.abs(later - whole).min(0).max() > 1e-2


@pytest.fixture(scope="module")
def on_clip():
    return oracle.random_weights(ON_CLIP.init, X_T, T, READ, Z_T)


def test_prior_on_clips_states_from_its_prefix_equals_the_whole(on_clip):
    whole = jax.jit(ON_CLIP.apply)(on_clip, X_T, T, READ, Z_T)
    prefix = jax.jit(lambda: ON_CLIP.apply(on_clip, READ, Z_T, method="prefix"))()
    denoised = jax.jit(lambda: ON_CLIP.apply(on_clip, prefix, X_T, T, method="denoise"))()
    np.testing.assert_allclose(denoised, whole, atol=1e-5)


def test_hidden_states_change_nothing_and_seen_ones_do(on_clip):
    run = jax.jit(lambda states: ON_CLIP.apply(on_clip, X_T, T, EncodedCaption(states, SEEN), Z_T))
    hidden = jnp.where(SEEN[..., None], READ.states, 7.0)
    np.testing.assert_array_equal(run(hidden), run(READ.states))
    assert jnp.abs(run(READ.states.at[:, 1].add(1.0)) - run(READ.states)).min(0).max() > 1e-3


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_caption_tokens_after_the_end_change_nothing(prior, diffusion, autoregressive):
    other = TOKENS.at[0, 4:].set(jnp.array([7, 19])).at[2, 3:].set(jnp.array([18, 1, 1]))
    if prior == "diffusion":
        run = jax.jit(lambda tokens: DIFFUSION.apply(diffusion, X_T, T, tokens, Z_T))
    else:
        run = jax.jit(lambda tokens: AR.apply(autoregressive, CODES, DOT, tokens, Z_T))
    np.testing.assert_array_equal(run(other), run(TOKENS))
    assert jnp.abs(run(TOKENS.at[:, 1].set(9)) - run(TOKENS)).max() > 1e-3


def test_dropping_hides_caption_and_text_embedding_together_and_nothing_else(diffusion, autoregressive):
    other_text, other_z = jnp.roll(TOKENS, 1, axis=0), Z_T + 3.0

    def outputs(tokens, z_t, drop, x_t, dot):
        return (
            DIFFUSION.apply(diffusion, x_t, T, tokens, z_t, drop),
            AR.apply(autoregressive, CODES, dot, tokens, z_t, drop),
        )

    run = jax.jit(outputs)
    reference = run(TOKENS, Z_T, DROP, X_T, DOT)
    for changed, original in zip(run(other_text, other_z, DROP, X_T, DOT), reference, strict=True):
        np.testing.assert_array_equal(changed[DROP], original[DROP])
        assert jnp.abs(changed[~DROP] - original[~DROP]).max() > 1e-3
    kept = run(TOKENS, Z_T, ~DROP & DROP, X_T, DOT)
    for none, plain in zip(kept, jax.jit(outputs, static_argnums=2)(TOKENS, Z_T, None, X_T, DOT), strict=True):
        np.testing.assert_allclose(none, plain, atol=1e-6)
    # The noised embedding and the dot-product token stay.
    for changed, original in zip(run(TOKENS, Z_T, DROP, X_T + 1, 4 - DOT), reference, strict=True):
        assert jnp.abs(changed[0] - original[0]).max() > 1e-3


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_dropping_equals_the_empty_caption_with_the_null_embedding(prior, diffusion, autoregressive):
    """A text embedding that projects onto the null embedding, given with the empty caption, is the dropped one."""
    weights = diffusion if prior == "diffusion" else autoregressive
    p = dict(weights["params"])
    p["text_embedding"] = {**p["text_embedding"], "kernel": np.zeros_like(p["text_embedding"]["kernel"])}
    p["text_embedding"]["bias"] = p["null_text_embedding"]
    empty = jnp.tile(jnp.array(EMPTY, jnp.int32), (4, 1))
    everywhere = jnp.ones(4, bool)
    if prior == "diffusion":
        dropped = jax.jit(DIFFUSION.apply)(weights, X_T, T, TOKENS, Z_T, everywhere)
        explicit = jax.jit(DIFFUSION.apply)({"params": p}, X_T, T, empty, Z_T)
    else:
        dropped = jax.jit(AR.apply)(weights, CODES, DOT, TOKENS, Z_T, everywhere)
        explicit = jax.jit(AR.apply)({"params": p}, CODES, DOT, empty, Z_T)
    np.testing.assert_allclose(dropped, explicit, atol=1e-6)


def test_autoregressive_logits_see_only_earlier_codes(autoregressive):
    run = jax.jit(lambda codes: AR.apply(autoregressive, codes, DOT, TOKENS, Z_T))
    reference = run(CODES)
    for i in range(7):
        changed = run(CODES.at[:, i].set((CODES[:, i] + 1) % 11))
        np.testing.assert_allclose(changed[:, : i + 1], reference[:, : i + 1], atol=1e-6)
        if i < 6:
            assert jnp.abs(changed[:, i + 1] - reference[:, i + 1]).max() > 1e-3


def test_autoregressive_decoding_from_the_cache_equals_the_whole(autoregressive):
    @jax.jit
    def decode():
        first, state = AR.apply(autoregressive, DOT, TOKENS, Z_T, DROP, method="prefix")

        def step(state, position):
            logits, state = AR.apply(autoregressive, state, CODES[:, position], position, method="step")
            return state, logits

        _, rest = jax.lax.scan(step, state, jnp.arange(6))
        return jnp.concatenate([first[None], rest]).swapaxes(0, 1)

    whole = jax.jit(AR.apply)(autoregressive, CODES, DOT, TOKENS, Z_T, DROP)
    np.testing.assert_allclose(decode(), whole, atol=1e-5)


def _count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_the_papers_sizes():
    key, tokens, z = jax.random.key(0), jnp.zeros((1, 256), jnp.int32), jnp.zeros((1, 1024))
    ids = jnp.zeros((1,), jnp.int32)
    text = {"context_length": 256, "vocab_size": 49408}
    prior = DiffusionPrior(embed_dim=1024, width=2048, depth=24, heads=32, **text)
    assert math.isclose(_count(jax.eval_shape(prior.init, key, z, ids, tokens, z)), 1.33e9, rel_tol=5e-3)
    prior_ar = ARPrior(
        embed_dim=1024,
        components=319,
        buckets=1024,
        dot_buckets=1024,
        text_width=2048,
        text_depth=24,
        text_heads=32,
        width=1664,
        depth=24,
        heads=26,
        **text,
    )
    codes = jnp.zeros((1, 319), jnp.int32)
    shapes = jax.eval_shape(prior_ar.init, key, codes, ids, tokens, z)["params"]
    encoder = _count(shapes["text_encoder"])
    assert math.isclose(encoder, 1.31e9, rel_tol=5e-3)
    assert math.isclose(_count(shapes) - encoder, 0.81e9, rel_tol=5e-3)


@pytest.mark.parametrize(
    "prior, caption, drop, said",
    [
        (DIFFUSION, READ, None, "reads token ids"),
        (ON_CLIP, TOKENS, None, "reads CLIP's states"),
        (ON_CLIP, READ, DROP, "drops nothing by itself"),
        (ON_CLIP, EncodedCaption(READ.states[:, :4], SEEN[:, :4]), None, "6 tokens, not 4"),
        (DIFFUSION.clone(caption="both"), TOKENS, None, "'tokens' or 'clip'"),
    ],
)
def test_captions_of_another_kind_are_refused(prior, caption, drop, said):
    with pytest.raises(InputError, match=said):
        jax.eval_shape(prior.init, jax.random.key(0), X_T, T, caption, Z_T, drop)


def test_inputs_of_another_length_are_refused(diffusion, autoregressive):
    with pytest.raises(InputError, match="6 tokens, not 4"):
        DIFFUSION.apply(diffusion, X_T, T, TOKENS[:, :4], Z_T)
    with pytest.raises(InputError, match="7 codes, not 5"):
        AR.apply(autoregressive, CODES[:, :5], DOT, TOKENS, Z_T)
    with pytest.raises(InputError, match="5 heads"):
        jax.eval_shape(DIFFUSION.clone(heads=5).init, jax.random.key(0), X_T, T, TOKENS, Z_T)
    with pytest.raises(InputError, match="5 heads"):
        jax.eval_shape(AR.clone(heads=5).init, jax.random.key(0), CODES, DOT, TOKENS, Z_T)
