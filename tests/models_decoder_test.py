"""The decoder's conditioning: what is dropped, what is read, and what cannot matter."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.models.captions import EncodedCaption
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.text_encoder import TextEncoder

# One level: the U-Net has tests of its own.
UNET = dict(channels=32, channel_mult=(1,), depth=1, attention_resolutions=(4,), image_size=4, head_channels=32)
TEXT: dict[str, Any] = dict(context_length=7, vocab_size=20, width=16, depth=2, heads=2)
SOT, EOT = 18, 19
CAPTIONS = jnp.array([[SOT, 3, 4, EOT, 0, 0, 0], [SOT, 5, EOT, 0, 0, 0, 0]], jnp.int32)
EMPTY = jnp.array([[SOT, EOT, 0, 0, 0, 0, 0]] * 2, jnp.int32)
# Captions that a CLIP has read: hidden states of width 9 up to the end.
SEEN = jnp.arange(7) < jnp.array([[4], [3]])
READ = EncodedCaption(jax.random.normal(jax.random.key(2), (2, 7, 9)), SEEN)
ON_CLIP: dict[str, Any] = dict(text=None, caption="clip", context_width=16)
YES, NO = jnp.ones(2, bool), jnp.zeros(2, bool)
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
T = jnp.array([10, 800], jnp.int32)
Z = jax.random.normal(jax.random.key(1), (2, 12)) / np.sqrt(12)


def random_params(module, *args, **kwargs):
    """Parameters with every tensor random, those that start at zero or one included."""
    shapes = nn.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs)))
    rng = np.random.default_rng(0)

    def drawn(leaf):
        fan_in = max(1, leaf.size // leaf.shape[-1])
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(drawn, shapes)


def made(**fields):
    module = Decoder(**{**dict(unet=UNET, text=TEXT, embed_dim=12), **fields})
    params = random_params(module, X, T, CAPTIONS, Z)
    return module, params


@pytest.fixture(scope="module")
def decoder():
    module, params = made(null_clip="learned")
    return params, jax.jit(module.apply), jax.jit(lambda p, *a: module.apply(p, *a, method=module.condition))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.allclose(x, y, atol=2e-5), a, b))


def test_condition_then_denoise_is_the_call(decoder):
    params, apply, condition = decoder
    module, _ = made(null_clip="learned")
    conditioning = condition(params, CAPTIONS, Z, NO, NO)
    assert conditioning.emb.shape == (2, 128) and conditioning.context.shape == (2, 7 + 4, 16)
    denoised = jax.jit(lambda p, *a: module.apply(p, *a, method=module.denoise))(params, X, T, conditioning)
    assert denoised.shape == (2, 4, 4, 6)
    assert same(denoised, apply(params, X, T, CAPTIONS, Z))


def test_dropped_text_is_the_empty_caption_and_drops_are_per_example(decoder):
    params, _, condition = decoder
    kept, empty = condition(params, CAPTIONS, Z, NO, NO), condition(params, EMPTY, Z, NO, NO)
    assert same(condition(params, CAPTIONS, Z, YES, NO), empty)
    mixed = condition(params, CAPTIONS, Z, jnp.array([True, False]), NO)
    assert same([mixed.emb[0], mixed.context[1]], [empty.emb[0], kept.context[1]])
    assert not same(kept, empty)


def test_dropped_embedding_is_the_learned_one_and_leaves_the_text(decoder):
    params, _, condition = decoder
    null = jnp.broadcast_to(params["params"]["null_embedding"], Z.shape)
    dropped = condition(params, CAPTIONS, Z, NO, YES)
    assert same(dropped, condition(params, CAPTIONS, null, NO, NO))
    kept = condition(params, CAPTIONS, Z, NO, NO)
    assert same(dropped.context[:, :7], kept.context[:, :7]) and not same(dropped.context, kept.context)


def test_dropped_embedding_is_zero_by_default():
    module, params = made()
    condition = jax.jit(lambda *a: module.apply(params, *a, method=module.condition))
    assert same(condition(CAPTIONS, Z, NO, YES), condition(CAPTIONS, jnp.zeros_like(Z), NO, NO))


def test_clip_scale_multiplies_the_embedding():
    (plain, params), (scaled, _) = made(text=None), made(text=None, clip_scale=3.0)
    pairs = ((plain, 3.0 * Z), (scaled, Z))
    conditions = [module.apply(params, None, z, method=module.condition) for module, z in pairs]
    assert same(*conditions)


def test_states_of_clip_are_read_up_to_the_end_of_the_caption():
    module = Decoder(unet=UNET, embed_dim=12, **ON_CLIP)
    z_t = Z[::-1]
    params = random_params(module, X, T, READ, Z, z_t=z_t)
    condition = jax.jit(lambda *a: module.apply(params, *a, method=module.condition))
    conditioning = condition(READ, Z, None, NO, z_t)
    assert conditioning.context.shape == (2, 7 + 4, 16)
    np.testing.assert_array_equal(conditioning.seen, np.append(SEEN, np.ones((2, 4), bool), 1))
    denoise = jax.jit(lambda c: module.apply(params, X, T, c, method=module.denoise))
    whole = jax.jit(lambda: module.apply(params, X, T, READ, Z, None, NO, z_t=z_t))()
    assert same(denoise(conditioning), whole)
    hidden = EncodedCaption(jnp.where(SEEN[..., None], READ.states, 7.0), SEEN)
    assert same(denoise(condition(hidden, Z, None, NO, z_t)), whole)
    for other in (condition(EncodedCaption(READ.states + 1, SEEN), Z, None, NO, z_t), condition(READ, Z, None, NO, Z)):
        assert not same(denoise(other), whole)


def test_what_stands_past_the_end_of_a_caption_is_never_read(decoder):
    params, _, condition = decoder
    noisy = CAPTIONS.at[0, 4:].set(jnp.array([7, EOT, 3])).at[1, 3:].set(9)
    assert same(condition(params, noisy, Z, NO, NO), condition(params, CAPTIONS, Z, NO, NO))


def test_last_position_reads_every_word():
    module = TextEncoder(**TEXT)
    params = random_params(module, CAPTIONS)
    apply = jax.jit(module.apply)
    last = apply(params, CAPTIONS)[0, -1]
    for position in (1, 2):
        assert not np.allclose(apply(params, CAPTIONS.at[0, position].set(11))[0, -1], last, atol=1e-4)


@pytest.mark.parametrize(
    "fields, length",
    [
        (dict(embed_dim=0, clip_tokens=0), 7),  # GLIDE
        (dict(clip_tokens=0), 7),
        (dict(text=None), 4),
        (dict(text=None, embed_dim=0), None),
    ],
    ids=["glide", "no_tokens", "no_text", "unconditional"],
)
def test_a_part_can_be_left_out(fields, length):
    module, params = made(**fields)
    y = jax.eval_shape(module.apply, params, X, T, CAPTIONS, Z, NO, YES)
    assert y.shape == (2, 4, 4, 6)
    conditioning = jax.eval_shape(lambda: module.apply(params, CAPTIONS, Z, method=module.condition))
    assert (conditioning.context is None) if length is None else conditioning.context.shape[1] == length


def test_gradient_reaches_every_parameter(decoder):
    params, apply, _ = decoder
    drop = jnp.array([True, False])
    gradient = jax.jit(jax.grad(lambda p: jnp.square(apply(p, X, T, CAPTIONS, Z, ~drop, drop)).mean()))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_bfloat16_decoder_conditions_in_bfloat16_and_returns_float32():
    (half, params), (exact, _) = made(dtype=jnp.bfloat16), made()
    rounded, wanted = (jax.jit(lambda m=m: m.apply(params, CAPTIONS, Z, method=m.condition))() for m in (half, exact))
    assert rounded.context.dtype == jnp.bfloat16
    for a, b in zip(rounded[:2], wanted[:2], strict=True):
        assert np.std(np.float32(a) - b) < 0.03 * np.std(b)
    assert jax.eval_shape(half.apply, params, X, T, CAPTIONS, Z).dtype == jnp.float32


def test_the_paper_s_decoder_has_its_parameters():
    text = dict(context_length=256, vocab_size=50257, width=2048, depth=24, heads=32)
    decoder = Decoder(unet={}, text=text, embed_dim=1024)
    f32, i32 = (lambda *shape, d=d: jax.ShapeDtypeStruct(shape, d) for d in (jnp.float32, jnp.int32))
    tree = jax.eval_shape(decoder.init, jax.random.key(0), f32(1, 64, 64, 3), i32(1), i32(1, 256), f32(1, 1024))
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in tree["params"].items()}
    assert sum(sizes.values()) == pytest.approx(3.565e9, rel=0.005)
    assert sizes["text_encoder"] == pytest.approx(1.313e9, rel=0.005)
    assert sizes["clip_emb"] + sizes["clip_context"] == pytest.approx(10.5e6, rel=0.005)


def shapes(*args):
    return jax.eval_shape(Decoder(unet=UNET, text=TEXT, embed_dim=12).init, jax.random.key(0), *args)


def on_clip(*args, z_t=None):
    module = Decoder(unet=UNET, embed_dim=12, **ON_CLIP)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args, z_t=z_t))


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Decoder(unet=UNET, text=TEXT, embed_dim=12, null_clip="none"), "'zeros' or 'learned'"),
        (lambda: Decoder(unet=UNET, text=None, embed_dim=12, caption="states"), "'tokens' or 'clip'"),
        (lambda: Decoder(unet=UNET, text=TEXT, embed_dim=12, caption="clip"), "text must be None"),
        (lambda: on_clip(X, T, CAPTIONS, Z, z_t=Z), "reads a caption as CLIP's states"),
        (lambda: on_clip(X, T, READ, Z), "and its z_t"),
        (lambda: on_clip(X, T, READ, Z, NO, z_t=Z), "drops no text by itself"),
        (lambda: shapes(X, T, READ, Z), "needs tokens"),
        (lambda: TextEncoder(**(TEXT | {"heads": 3})), "does not split into 3 heads"),
        (lambda: shapes(X, T, None, Z), "needs tokens"),
        (lambda: shapes(X, T, CAPTIONS, Z[:, :5]), "embedding of 12 numbers, not one of 5"),
        (lambda: shapes(X, T, CAPTIONS[:, :5], Z), "reads 7 tokens, not 5"),
    ],
    ids=["null", "caption", "text", "ids", "z_t", "drop", "states", "heads", "tokens", "embedding", "length"],
)
def test_wrong_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
