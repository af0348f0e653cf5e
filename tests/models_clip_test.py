"""CLIP's towers against their equations in float64 NumPy, the sizes of published ones, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_oracle as oracle
from flax.core import meta
from ml_collections import ConfigDict
from published_clips import OPENAI, OPENCLIP

from unclip_jax import optim
from unclip_jax.errors import InputError
from unclip_jax.models.clip import CLIP
from unclip_jax.models.clip_resnet import ModifiedResNet

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

    for policy in ("products", "full"):
        recomputed = gradient(policy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient("none"), recomputed)


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


def _counts(fields):
    """Parameters of each tower and of all, and the ResNet's statistics apart, on abstract shapes."""
    clip = CLIP(**fields)
    images = jnp.zeros((1, clip.image_size, clip.image_size, 3))
    tokens = jnp.zeros((1, clip.context_length), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(clip.init, jax.random.key(0), images, tokens))["params"]
    count = {"vision": 0, "text": 0, "logit_scale": 0, "statistics": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        statistic = path[-1].key in ("running_mean", "running_var")
        count["statistics" if statistic else path[0].key] += math.prod(leaf.shape)
    return count


@pytest.mark.parametrize("vision_heads", [16, 20])
def test_the_papers_sizes(vision_heads):
    count = _counts(
        {
            "image_size": 256,
            "patch_size": 16,
            "vision_width": 1280,
            "vision_depth": 32,
            "vision_heads": vision_heads,
            "context_length": 77,
            "vocab_size": 49408,
            "text_width": 1024,
            "text_depth": 24,
            "text_heads": 16,
            "embed_dim": 1024,
        }
    )
    assert math.isclose(count["vision"], 632.31e6, rel_tol=1e-4)
    assert math.isclose(count["text"], 354.03e6, rel_tol=1e-4)


@pytest.mark.parametrize("name", OPENAI)
def test_openais_encoders_have_their_published_numbers_of_parameters(name):
    fields, total, vision = OPENAI[name]
    count = _counts(fields)
    assert (count["vision"], count["vision"] + count["text"] + count["logit_scale"]) == (vision, total)
    # Running means and variances: 53,248 "non-trainable" numbers in Keras' summary of RN50.
    assert count["statistics"] == (53_248 if name == "RN50" else count["statistics"])
    assert (count["statistics"] > 0) == name.startswith("RN")


@pytest.mark.parametrize("name", OPENCLIP)
def test_openclips_encoders_have_their_published_numbers_of_parameters(name):
    fields, vision, text = OPENCLIP[name]
    count = _counts(fields)
    np.testing.assert_allclose([count["vision"] / 1e6, count["text"] / 1e6], [vision, text], atol=0.0051)


RESNET = {"image_size": 16, "vision_layers": (1, 2), "vision_width": 8, "vision_heads": 4}
VIT_KEYS = ("patch_size", "vision_depth")


def _resnet(**more):
    return {key: value for key, value in TINY.items() if key not in VIT_KEYS} | RESNET | more


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (TINY | {"patch_size": 5}, "patch_size 5 does not divide image_size 16"),
        (TINY | {"vision_heads": 5}, "vision_heads 5 does not divide the width 24 that they share; 4 or 6 would"),
        (TINY | {"text_heads": 3}, "text_heads 3 does not divide the width 16 that they share; 2 or 4 would"),
        (TINY | {"vision_stem": (8,)}, "makes patches of 2 pixels; patch_size is 4"),
        (TINY | {"vision_pool": "averge"}, "vision_pool='averge' is unknown; did you mean 'average'"),
        (
            TINY | {"vision_pool": "attention", "vision_pool_heads": 5},
            "vision_pool_heads 5 .* 12 that they share; 4 or",
        ),
        (TINY | {"text_pool": "eos"}, "text_pool='eos' is unknown; known are argmax"),
        (TINY | {"text_end_id": 20}, "text_end_id 20 is no token; its vocab_size is 20"),
        (TINY | {"text_projection": "none"}, "embed_dim is 12; a tower without a projection makes it 16"),
        (TINY | {"activation": "quickgelu"}, "activation='quickgelu' is unknown; did you mean 'quick_gelu'"),
        (TINY | {"mean": (0.5,)}, "of red, green and blue"),
        (TINY | {"vision_layers": (1, 2)}, "ResNet, which takes no patch_size, vision_depth; leave out either"),
        (_resnet(vision_layers=()), "needs patch_size and vision_depth, a ResNet vision_layers"),
        (_resnet(vision_pool="average"), "takes no vision_pool"),
        (_resnet(vision_heads=5), "vision_heads 5 does not divide the width 64 that they share; 4 or 2 would"),
        (_resnet(image_size=20), "shrink images by 8, which does not divide image_size 20"),
        (_resnet(vision_width=9), "vision_width 9 is odd"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, says):
    side = fields["image_size"]
    with pytest.raises(InputError, match=says):
        jax.eval_shape(
            lambda key: CLIP(**fields).init(key, jnp.zeros((1, side, side, 3)), jnp.zeros((1, 9), jnp.int32)),
            jax.random.key(0),
        )


def test_reading_gives_the_embedding_and_the_features_of_every_place():
    clip, params, images, tokens = _small("gelu")
    read = [
        jax.jit(clip.apply, static_argnames="method")(params, x, method=m)
        for x, m in ((images, "read_image"), (tokens, "read_text"))
    ]
    (z_i, patches), (z_t, words) = read
    assert patches.shape == (3, 17, 24) and words.shape == (3, 9, 16)
    assert patches.dtype == words.dtype == jnp.float32
    # What is projected is the class token's vector, normed, and the normed vector of the first end token.
    vision, text = params["params"]["vision"], params["params"]["text"]
    first = oracle.layer_norm(np.float64(patches[:, 0]), vision["ln_post"])
    np.testing.assert_allclose(z_i, first @ vision["projection"]["kernel"], atol=2e-5)
    ends = words[jnp.arange(3), jnp.array([3, 8, 1])]
    np.testing.assert_allclose(z_t, ends @ text["projection"]["kernel"], atol=2e-5)
    # A tower without a projection gives that vector itself.
    bare = CLIP(**TINY | {"embed_dim": 16, "text_projection": "none"})
    own = {"params": {**params["params"], "text": {k: v for k, v in text.items() if k != "projection"}}}
    np.testing.assert_allclose(jax.jit(lambda p: bare.apply(p, tokens, method="encode_text"))(own), ends, atol=1e-6)


@pytest.fixture(scope="module")
def resnet():
    """A small CLIP with a ResNet, freshly initialised, and images."""
    clip = CLIP(**_resnet())
    images = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3), minval=-1, maxval=1)
    tokens = jnp.asarray(CAPTIONS, jnp.int32)
    return meta.unbox(jax.jit(clip.init)(jax.random.key(0), images, tokens))["params"]["vision"], images


def _tower(layers=(1, 2), **more):
    return ModifiedResNet(image_size=16, layers=layers, width=8, heads=4, embed_dim=12, **more)


@jax.jit(static_argnums=0)
def _squares(tower, params, images):
    def total(params):
        embeddings, _ = tower.apply({"params": params}, images)
        return jnp.square(embeddings).sum(), embeddings

    (_, embeddings), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return embeddings, gradients


def test_a_resnet_begins_with_blocks_that_pass_their_input_on(resnet):
    """The scale of each block's last norm is zero, so a stage's later blocks are the identity on what is positive."""
    params, images = resnet
    fewer = {name: weights for name, weights in params.items() if name != "stage_1_rest"}
    assert len(fewer) == len(params) - 1
    read = [_squares(_tower(layers), p, images)[0] for layers, p in (((1, 2), params), ((1, 1), fewer))]
    np.testing.assert_allclose(*read, atol=1e-6)
    assert jnp.abs(read[0]).max() > 0.01


def test_a_resnets_statistics_have_no_gradient_but_count(resnet):
    params, images = resnet
    embeddings, gradients = _squares(_tower(), params, images)
    for norm in ("stem_norm_0", "stem_norm_2"):
        assert jnp.abs(gradients[norm]["scale"]).max() > 0
        assert not gradients[norm]["running_mean"].any() and not gradients[norm]["running_var"].any()
    # Weight decay, which needs no gradient, leaves them alone too.
    decayed = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.5, "decay": "all", "grad_clip": 0.0}
    optimizer = optim.create(ConfigDict(decayed), lambda step: 0.1)
    updates = jax.jit(lambda p: optimizer.update(gradients, optimizer.init(p), p)[0])(params)["stem_norm_0"]
    assert {name for name, update in updates.items() if update.any()} == {"scale", "bias"}
    wider = jax.tree_util.tree_map_with_path(lambda path, x: x * (1 + (path[-1].key == "running_var")), params)
    assert jnp.abs(_squares(_tower(), wider, images)[0] - embeddings).max() > 0.1 * jnp.abs(embeddings).max()


def test_a_resnet_is_the_same_in_bfloat16_and_with_remat(resnet):
    params, images = resnet
    embeddings, gradients = _squares(_tower(), params, images)
    low, _ = _squares(_tower(dtype=jnp.bfloat16), params, images)
    assert low.dtype == jnp.float32 and jnp.abs(low - embeddings).max() < 0.05 * jnp.abs(embeddings).max()
    _, again = _squares(_tower(remat="full"), params, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, again)


def test_images_and_captions_of_another_size_are_refused():
    clip, params, images, tokens = _small("gelu")
    with pytest.raises(InputError, match="16x16"):
        clip.apply(params, images[:, :8], method="encode_image")
    with pytest.raises(InputError, match="9 tokens"):
        clip.apply(params, jnp.tile(tokens, (1, 2)), method="encode_text")
