"""The decoder stage: what it drops, what it is trained on under each config, and what its null branch reads."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_models
from small_configs import small

from unclip_jax import config as configs
from unclip_jax.data import fake
from unclip_jax.diffusion import samplers
from unclip_jax.errors import InputError
from unclip_jax.stages import base, denoising

# One level in the U-Net, for networks have tests of their own.
SIDE = 4
TINY: dict[str, Any] = {
    "model__unet__image_size": SIDE, "model__unet__channel_mult": (1,), "model__unet__attention_resolutions": (SIDE,),
    "sampling__timesteps": "2",
}  # fmt: skip
# What a config makes of the stage.
KINDS: dict[str, dict] = {
    "unclip": {},
    "glide": {"model__embed_dim": 0},
    "text": {"condition": "text"},
    "text_alone": {"condition": "text", "model__text": None},
    "image_alone": {"model__text": None},
    "karlo": {"model__text": None, "model__caption": "clip", "model__null_clip": "learned"},
}


def stage_of(kind, **overrides):
    return base.create(small("decoder", **{**TINY, **KINDS[kind], **overrides}))


def batch_of(stage, name=None, count=4):
    spec = stage.predict_specs(count)[name] if name else stage.batch_spec(count)
    return jax.tree.map(jnp.asarray, fake.batch(spec, seed=0, vocab_size=max(stage.vocab_size, 4)))


def frozen_of(stage):
    return {"clip": untrained_models.drawn(base.create(small("clip")), 1)}


@pytest.fixture
def conditions(monkeypatch):
    """What a stage's loss gives the network that it is made to ask once: (tokens, z_i, drop_text, drop_clip)."""

    def read(stage, frozen, batch, *, seed=0):
        stage.network = types.SimpleNamespace(apply=lambda params, x_t, t, *conditions, **options: conditions)
        return stage.loss({}, frozen, batch, jax.random.key(seed), train=True)

    monkeypatch.setattr(denoising, "loss", lambda diffusion, denoise, x_start, rng: denoise(x_start, None))
    return read


def test_captions_and_embeddings_are_dropped_independently_half_and_a_tenth_of_the_time(monkeypatch, conditions):
    stage = stage_of("unclip", drop__text=0.5, drop__clip=0.1)
    monkeypatch.setattr(base, "embed_images", lambda clip, params, images, unit: jnp.zeros((len(images), 16)))
    count = 4000
    image = jnp.zeros((count, SIDE, SIDE, 3), jnp.uint8)
    batch = {"image": image, "clip_image": image, "tokens": jnp.zeros((count, 24), jnp.int32)}
    (_, _, text, clip), (_, _, other, _) = (conditions(stage, {"clip": {}}, batch, seed=seed) for seed in (0, 1))
    # Five standard errors of a share are 0.04 at most.
    np.testing.assert_allclose(
        [text.mean(), clip.mean(), (text & clip).mean(), (text & other).mean()], [0.5, 0.1, 0.05, 0.25], atol=0.04
    )


@pytest.mark.parametrize("variant", ["tiny", "tiny_glide", "tiny_text"])
def test_shares_that_the_configs_drop(variant):
    config = configs.load(f"configs/decoder.py:{variant}")
    # GLIDE's own fifth where there is nothing but captions (Nichol et al. 2021), else section 2.1.
    glide = variant == "tiny_glide"
    assert config.drop.to_dict() == ({"text": 0.2, "clip": 0.0} if glide else {"text": 0.5, "clip": 0.1})
    assert ("clip" in config) != glide
    stage = base.create(config)
    assert stage.condition == ("text" if variant == "tiny_text" else "image") and stage.reads_captions


@pytest.mark.parametrize("kind", ["text", "text_alone"])
def test_a_text_embedding_decoder_is_trained_on_z_t_and_reconstructs_from_it(kind, monkeypatch, conditions):
    stage = stage_of(kind)
    assert {"clip_image"}.isdisjoint(stage.batch_spec(1)) and {"clip_tokens"} <= set(stage.batch_spec(1))
    assert set(stage.predict_specs(1)["reconstruct"]) == set(stage.batch_spec(1)) - {"image"}
    frozen, batch = frozen_of(stage), batch_of(stage)
    z_t = base.embed_tokens(stage.clip, frozen["clip"], batch["clip_tokens"])
    np.testing.assert_allclose(conditions(stage, frozen, batch)[1], z_t, atol=1e-6)
    read: list = []
    monkeypatch.setattr(stage, "sample", lambda p, f, z_i, *others: read.append(z_i) or jnp.zeros((4, SIDE, SIDE, 3)))
    stage.predict_fns()["reconstruct"]({}, frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(read[0], z_t, atol=1e-6)


def test_glide_needs_no_clip():
    stage = base.create(_without_clip())
    assert stage.init_frozen(jax.random.key(0)) == {} and set(stage.batch_spec(1)) == {"image", "tokens", "id"}
    loss, _ = jax.jit(lambda p, b: stage.loss(p, {}, b, jax.random.key(0), train=True))(
        untrained_models.drawn(stage, 0), batch_of(stage)
    )
    assert np.isfinite(loss)


def _without_clip():
    values = small("decoder", model__embed_dim=0, model__clip_tokens=0).to_dict()
    del values["clip"], values["frozen"]
    return configs.from_json_value(values)


@pytest.mark.parametrize("kind", ["unclip", "text"])
def test_the_conditioning_is_the_caption_and_four_tokens_and_joins_the_timestep(kind):
    config = configs.load(f"configs/decoder.py:{'tiny' if kind == 'unclip' else 'tiny_text'}")
    stage = base.create(config)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    made = jax.eval_shape(
        lambda p: stage.network.apply(p, jnp.zeros((2, 24), jnp.int32), jnp.zeros((2, 64)), method="condition"), params
    )
    assert made.context.shape == (2, 24 + 4, 96) and made.emb.shape == (2, 4 * config.model.unet.channels)


def once(stage, *, channels=slice(0, 3)):
    """Puts a single call of the guided denoiser in the sampler's place: what `sample` returns is of its output."""
    stage.sampler = lambda denoise, x_T, keys: denoise(x_T, jnp.full(x_T.shape[:1], 500, jnp.int32))[..., channels]
    return stage


def inputs(count=3):
    rng = np.random.default_rng(0)
    batch = fake.batch({"tokens": base.token_ids(2 * count, 24)}, seed=1, vocab_size=2048)["tokens"]
    z = base.normalize(jnp.asarray(rng.normal(size=(2 * count, 16)), jnp.float32))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count))
    return jnp.asarray(batch[:count]), jnp.asarray(batch[count:]), z[:count], z[count:], keys


def test_guidance_leaves_embedding_and_caption_and_steers_eps_alone():
    stage = stage_of("unclip", sampling__guidance_scale=2.5)
    params = untrained_models.drawn(stage, 0)
    tokens, _, z_i, _, keys = inputs()
    eps, v_range = (
        jax.jit(lambda c=channels: once(stage, channels=c).sample(params, {}, z_i, tokens, keys))()
        for channels in (slice(0, 3), slice(3, 6))
    )
    x_T = samplers.initial_noise(keys, (SIDE, SIDE, 3))
    t = jnp.full((3,), 500, jnp.int32)
    full, none = jnp.ones(3, bool), jnp.zeros(3, bool)
    plain = jax.jit(lambda drop: stage.network.apply(params, x_T, t, tokens, z_i, drop, drop))
    given, null = plain(none), plain(full)
    assert np.abs(given - null).max() > 0.01
    np.testing.assert_allclose(eps, (null + 2.5 * (given - null))[..., :3], atol=2e-4)
    np.testing.assert_allclose(v_range, given[..., 3:], atol=2e-4)


@pytest.mark.parametrize("kind", ["unclip", "text"])
def test_to_swap_prompt_and_negative_prompt_is_to_mirror_the_scale(kind):
    """away + s (to - away) = to + (1 - s) (away - to)."""
    made = []
    for scale, order in ((1.75, 1), (-0.75, -1)):
        stage = once(stage_of(kind, sampling__guidance_scale=scale))
        params = untrained_models.drawn(stage, 0)
        to, away, z_to, z_away, keys = inputs()
        words = (to, away)[::order] if stage.context_length else (None, None)
        # The null branch has an embedding only where embeddings are of texts.
        z = (z_to, z_away)[::order] if stage.embed_dim and stage.condition == "text" else (None, None)
        out = jax.jit(lambda s=stage, p=params, z=z, w=words, k=keys: s.sample(
            p, {}, z[0], w[0], k, negative_tokens=w[1], negative_z_t=z[1]
        ))()  # fmt: skip
        made.append(out)
    np.testing.assert_allclose(*made, atol=2e-4)
    assert np.ptp(made[0]) > 0.1


def test_the_empty_caption_as_negative_prompt_changes_no_bit():
    stage = stage_of("unclip", sampling__guidance_scale=2.0)
    params, sample = untrained_models.drawn(stage, 0), jax.jit(stage.predict_fns()["sample"])
    batch = batch_of(stage, "sample")
    empty = jnp.zeros_like(batch["tokens"]).at[:, :2].set(jnp.array([stage.vocab_size - 2, stage.vocab_size - 1]))
    plain = sample(params, {}, batch, jax.random.key(0))
    np.testing.assert_array_equal(sample(params, {}, {**batch, "negative_tokens": empty}, jax.random.key(0)), plain)
    other = sample(params, {}, {**batch, "negative_tokens": batch["tokens"][::-1]}, jax.random.key(0))
    assert (other != plain).any()


def test_without_an_embedding_it_is_dropped_from_the_conditional_branch_too():
    stage = once(stage_of("unclip", sampling__guidance_scale=1.0))
    params = untrained_models.drawn(stage, 0)
    tokens, _, z_i, _, keys = inputs()
    alone = jax.jit(lambda: stage.sample(params, {}, None, tokens, keys))()
    x_T, t = samplers.initial_noise(keys, (SIDE, SIDE, 3)), jnp.full((3,), 500, jnp.int32)
    wanted = jax.jit(stage.network.apply)(params, x_T, t, tokens, z_i, jnp.zeros(3, bool), jnp.ones(3, bool))
    np.testing.assert_allclose(alone, wanted[..., :3], atol=2e-4)


def test_an_unguided_decoder_refuses_a_negative_prompt():
    stage = stage_of("glide", sampling__guidance_scale=1.0)
    batch = batch_of(stage, "sample")
    with pytest.raises(InputError, match="guidance_scale 1"):
        stage.predict_fns()["sample"]({}, {}, {**batch, "negative_tokens": batch["tokens"]}, jax.random.key(0))


@pytest.mark.parametrize(("threshold", "seen"), [("static", [0.5, 1]), ("dynamic", [0.125, 1]), ("none", [0.5, 4])])
def test_the_threshold_is_the_configs(threshold, seen):
    stage = stage_of("glide", sampling__threshold=threshold, sampling__quantile=1.0, diffusion__prediction="x_start")
    output = jnp.asarray([[[[0.5, 4.0, 0, 0]]]])  # two channels, and their variances
    keys = jax.random.split(jax.random.key(0), 1)
    x_0 = stage.sampler(lambda x_t, t: output, jnp.ones((1, 1, 1, 2)), keys)
    np.testing.assert_allclose(x_0[0, 0, 0], seen, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"condition": "txt"}, "'image' or of the 'text'"),
        ({"condition": "text", "clip__vocab_size": 1024}, "one vocabulary for both"),
        ({"sampling__threshold": "dynamik"}, "did you mean 'dynamic'"),
        ({"sampling__quantile": 0.0, "sampling__threshold": "dynamic"}, r"in \(0, 1\]"),
        ({"diffusion__clip_x_start": None, "sampling__threshold": "dynamic"}, "clip_x_start is None"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        base.create(small("decoder", **changes))
    with pytest.raises(InputError, match="'dynamic'.* is not one of this stage"):
        base.create(small("prior_diffusion", sampling__threshold="dynamic"))


def test_a_caption_that_clip_reads_is_its_states_and_a_dropped_one_those_of_the_empty_caption(conditions):
    stage = stage_of("karlo", drop__text=0.5)
    frozen, batch = frozen_of(stage), batch_of(stage, count=16)
    caption, _, drop_text, _ = conditions(stage, frozen, batch)
    empty = jnp.zeros_like(batch["tokens"]).at[:, :2].set(jnp.array([stage.vocab_size - 2, stage.vocab_size - 1]))
    _, read = stage.clip.apply(frozen["clip"], batch["tokens"], method="read_text")
    _, nothing = stage.clip.apply(frozen["clip"], empty, method="read_text")
    own = [bool(jnp.array_equal(states, mine)) for states, mine in zip(caption.states, read, strict=True)]
    hidden = [bool(jnp.array_equal(states, none)) for states, none in zip(caption.states, nothing, strict=True)]
    assert drop_text is None and 0 < sum(hidden) < 16
    assert np.logical_or(own, hidden).all() and 0 < sum(own) < 16
    # [start] words [end] may be looked at, padding may not.
    lengths = 1 + np.argmax(np.asarray(batch["tokens"]) == stage.vocab_size - 1, axis=1)
    np.testing.assert_array_equal(caption.seen.sum(1), np.where(hidden, 2, lengths))


def test_karlos_decoder_samples_from_captions_that_clip_reads():
    stage = stage_of("karlo", sampling__guidance_scale=2.0)
    frozen, params = frozen_of(stage), untrained_models.drawn(stage, 0)
    batch = batch_of(stage, "sample")
    sample = jax.jit(stage.predict_fns()["sample"])
    plain = sample(params, frozen, batch, jax.random.key(0))
    other = sample(params, frozen, {**batch, "tokens": batch["tokens"][::-1]}, jax.random.key(0))
    assert plain.shape == (4, SIDE, SIDE, 3) and (plain != other).any()
    empty = jnp.zeros_like(batch["tokens"]).at[:, :2].set(jnp.array([stage.vocab_size - 2, stage.vocab_size - 1]))
    negative = sample(params, frozen, {**batch, "negative_tokens": empty}, jax.random.key(0))
    np.testing.assert_array_equal(plain, negative)
