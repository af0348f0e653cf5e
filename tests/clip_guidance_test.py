"""A CLIP of noised images: what it reads, and where it leads a decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_models
from small_configs import small

from unclip_jax.data import fake
from unclip_jax.errors import InputError
from unclip_jax.stages import base
from unclip_jax.stages.clip_guidance import GuidedDecoderStage

ONE_LEVEL = {
    "model__unet__channel_mult": (1,),
    "model__unet__attention_resolutions": (),
    "sampling__guidance_scale": 1.0,
}


# No convolutions before CLIP's patches, for the same reason.
PLAIN = {"model__vision_stem": ()}


@pytest.fixture(scope="module")
def noised():
    stage = base.create(small("clip_noised", **PLAIN))
    return stage, untrained_models.drawn(stage, 0)


def images_of(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, 16, 16, 3)), jnp.float32)


def test_it_begins_as_the_clip_of_clean_images_that_it_goes_on_from_at_every_timestep(noised):
    stage, params = noised
    clean = base.create(small("clip", model__image_size=16, **PLAIN)).network
    tower = params["params"]["vision"]
    untold = {name: tree for name, tree in tower.items() if not name.startswith("time_")}
    plain = jax.jit(lambda p: clean.apply({"params": p}, images_of(3), method="encode_image"))(
        {**params["params"], "vision": untold}
    )
    begun = {**params["params"], "vision": {**tower, "time_2": jax.tree.map(jnp.zeros_like, tower["time_2"])}}
    encode = jax.jit(lambda p, t: stage.network.apply({"params": p}, images_of(3), t, method="encode_image"))
    np.testing.assert_allclose(encode(begun, jnp.array([0, 500, 999])), plain, atol=1e-5)
    told = encode(params["params"], jnp.array([0, 500, 999]))
    assert np.abs(told - encode(params["params"], jnp.array([999, 0, 500]))).max() > 1e-2
    with pytest.raises(InputError, match="reads noised images, with their timesteps"):
        stage.network.apply(params, images_of(1), method="encode_image")
    with pytest.raises(InputError, match="reads clean images"):
        clean.apply(params, images_of(1), jnp.zeros(1, jnp.int32), method="encode_image")


def test_its_loss_is_of_images_noised_by_the_process_and_tells_quarters_apart(noised, monkeypatch):
    stage, params = noised
    batch = jax.tree.map(jnp.asarray, fake.batch(stage.batch_spec(16), seed=0, vocab_size=stage.vocab_size))
    seen = {}

    def apply(params, images, tokens, t):
        seen.update(images=images, t=t)
        return jnp.eye(16), jnp.eye(16), jnp.float32(0)

    monkeypatch.setattr(type(stage.network), "apply", lambda self, *args: apply(*args))
    told = jax.jit(lambda: (stage.loss(params, {}, batch, jax.random.key(3), train=True), dict(seen)))
    (loss, metrics), seen = told()
    assert loss.shape == () and float(metrics["accuracy"]) == 1
    quarters = np.bincount(4 * np.asarray(seen["t"]) // 1000, minlength=4)
    assert [tuple(float(x) for x in metrics[f"accuracy_q{i}"]) for i in range(4)] == [(n, n) for n in quarters]
    # What is left when the image is taken out is standard normal noise.
    ab = stage.diffusion.alpha_bars[np.asarray(seen["t"])][:, None, None, None]
    clean = np.asarray(batch["clip_image"]) / 127.5 - 1
    eps = (np.asarray(seen["images"]) - np.sqrt(ab) * clean) / np.sqrt(1 - ab)
    np.testing.assert_allclose([eps.mean(), eps.std()], [0, 1], atol=0.05)


@pytest.fixture(scope="module")
def guided(noised):
    config = small("decoder", **ONE_LEVEL)
    stage = GuidedDecoderStage(config, noised[0])
    batch = jax.tree.map(jnp.asarray, fake.batch(stage.predict_specs(3)["sample"], seed=0, vocab_size=2048))
    toward = jnp.asarray(np.random.default_rng(5).normal(size=(3, 16)), jnp.float32)
    return stage, untrained_models.drawn(stage, 1), {"clip_noised": noised[1]}, batch, toward


SCALE = jnp.array([1.0, 3.0, 0.0])
X_T, T = images_of(3, 1), jnp.array([10, 400, 700])


@pytest.fixture(scope="module")
def gradient(guided):
    stage, _, frozen, _, toward = guided
    return jax.jit(stage.guide(frozen, {"toward": toward, "clip_guidance_scale": SCALE}))(X_T, T)


def test_the_gradient_is_that_of_the_similarity_by_finite_differences(guided, gradient):
    stage, _, frozen, _, toward = guided
    scale, x, t = SCALE, X_T, T

    @jax.jit
    def logits(x, toward=toward):
        return stage.noised.logits(frozen["clip_noised"], x, t, toward)

    towards = gradient / jnp.maximum(jnp.linalg.norm(gradient.reshape(3, -1), axis=1)[:, None, None, None], 1e-9)
    step = 0.02
    slope = (logits(x + step * towards) - logits(x - step * towards)) / (2 * step)
    np.testing.assert_allclose(scale * slope, jnp.sum(gradient * towards, (1, 2, 3)), rtol=0.02, atol=1e-5)
    assert np.all(np.abs(slope[:2]) > 1e-3) and not np.any(gradient[2])
    # In the CLIP's logits: a cosine of one is its logit scale, or the config's largest.
    weights = frozen["clip_noised"]
    z_i = jax.jit(lambda x: stage.noised.network.apply(weights, x, t, method="encode_image"))(x)
    own = logits(x, 7 * z_i)
    largest = jnp.minimum(jnp.exp(weights["params"]["logit_scale"]), stage.noised.logit_scale_max)
    np.testing.assert_allclose(own, largest, rtol=1e-5)


def test_sampling_is_guided_where_nothing_is_known(guided, gradient):
    stage, params, frozen, batch, toward = guided
    fields = {"toward": toward, "clip_guidance_scale": SCALE}
    known = {"known": jnp.full((3, 16, 16, 3), 77, jnp.uint8), "known_mask": jnp.zeros((3, 16, 16)).at[:, :4].set(1)}
    stage = GuidedDecoderStage(small("decoder", **ONE_LEVEL), stage.noised)
    stage.sampler = functools.partial(lambda denoise, x_T, keys, *, guide, **_: 100 * guide(X_T, T))
    made = jax.jit(stage.predict_fns()["sample"])(params, frozen, {**batch, **fields, **known}, jax.random.key(0))
    wanted = np.clip(np.round((100 * gradient.at[:, :4].set(0) + 1) * 127.5), 0, 255)
    np.testing.assert_allclose(made, wanted, atol=1)
    assert np.ptp(made[:, 4:]) > 10
    assert stage.guide(frozen, {}) is None


def test_a_clip_that_cannot_guide_this_decoder_is_refused():
    config = small("decoder")
    for clip, says in (
        (small("clip"), "trained on clean images and cannot guide; train configs/clip.py:tiny_noised"),
        (small("clip_noised", model__image_size=32), "images of 32 pixels, the decoder draws 16"),
        (small("clip_noised", diffusion__schedule="linear"), "another process than the decoder"),
    ):
        with pytest.raises(InputError, match=says):
            GuidedDecoderStage(config, base.create(clip))
    with pytest.raises(InputError, match="go together"):
        base.create(small("clip", model__noised=True))
    with pytest.raises(InputError, match="a CLIP of noised images guides decoders"):
        base.create(small("decoder", clip__noised=True))
    with pytest.raises(InputError, match="ResNet, which reads no timestep"):
        base.create(small("clip_noised", model__vision_layers=(1, 1, 1, 1), model__vision_stem=()))
