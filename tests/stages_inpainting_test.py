"""What is left of an image when a box is taken out of it, what networks are told of that, and what they keep."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_models
from small_configs import small

from unclip_jax import beginnings, digests, program, sharding
from unclip_jax import config as configs
from unclip_jax.data import fake
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.gaussian import GaussianDiffusion
from unclip_jax.errors import InputError
from unclip_jax.stages import base, inpainting

# One level in the U-Nets, for networks have tests of their own; the decoder reads nothing but noise.
_LEVEL: dict[str, Any] = {"channel_mult": (1,), "attention_resolutions": ()}
UPSAMPLER = {f"unet__{key}": value for key, value in _LEVEL.items()}
DECODER: dict[str, Any] = {
    **{f"model__unet__{key}": value for key, value in {**_LEVEL, "image_size": 8}.items()},
    "model__text": None, "model__embed_dim": 0, "sampling__guidance_scale": 1.0,
}  # fmt: skip
CASES = {"decoder": DECODER, "upsampler": UPSAMPLER}


def test_a_box_is_taken_out_of_each_image():
    images = jax.random.uniform(jax.random.key(1), (64, 16, 24, 3), minval=0.1)
    known = inpainting.erased(jax.random.key(0), images)
    mask = np.asarray(known.mask)[..., 0]
    assert set(np.unique(mask)) == {0, 1}
    for hole in 1 - mask:
        rows, columns = hole.any(1), hole.any(0)
        assert np.array_equal(hole, np.outer(rows, columns)), "no box"
        for line in (rows, columns):
            places = np.flatnonzero(line)
            assert len(places) == places[-1] - places[0] + 1 and len(places) >= len(line) // 4
    assert np.array_equal(np.asarray(known.image), np.where(mask[..., None] > 0, images, 0))
    assert 0.2 < mask.mean() < 0.9 and len(np.unique(mask.sum((1, 2)))) > 20


def test_known_pixels_come_with_their_mask():
    with pytest.raises(InputError, match="two fields"):
        inpainting.given({"known": jnp.zeros((1, 4, 4, 3), jnp.uint8)})
    assert inpainting.given({}) is None
    nothing = inpainting.nothing(2, 4)
    assert not nothing.mask.any() and nothing.beside(jnp.ones((2, 4, 4, 3))).shape == (2, 4, 4, 7)


def test_the_network_must_read_four_channels_more():
    inpainting.check(10, 6, inpaints=True)
    with pytest.raises(InputError, match="in_channels is 3; with inpaint=True it must be 7"):
        inpainting.check(3, 3, inpaints=True)


def stages(case):
    """A stage, and the one that goes on from it to inpaint."""
    plain = small(case, **CASES[case])
    wide = plain.to_dict()
    wide["inpaint"] = True
    (wide["model"]["unet"] if case == "decoder" else wide["unet"])["in_channels"] += 4
    return base.create(plain), base.create(configs.from_json_value(wide))


@pytest.mark.parametrize("case", CASES)
def test_fine_tuning_begins_where_the_base_model_was_whatever_is_known(case):
    """By one call of each network; the four new channels are read once they have weights, and get a gradient."""
    before, after = stages(case)
    params = untrained_models.drawn(before, 0)
    # A call in the sampler's place.
    once = functools.partial(lambda denoise, x_T, keys, **_: denoise(x_T, jnp.full(2, 500, jnp.int32))[..., :3])
    before.sampler = after.sampler = once
    batch = jax.tree.map(jnp.asarray, fake.batch(after.predict_specs(2)["loss"], seed=0, vocab_size=4))
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((2, after.side, after.side, 1)) < 0.5, jnp.float32)
    known = inpainting.Known(jnp.asarray(rng.uniform(-1, 1, (*mask.shape[:3], 3)), jnp.float32) * mask, mask)
    keys = jax.random.split(jax.random.key(0), 2)

    def sample(stage, params, known=None):
        if case == "decoder":
            return stage.sample(params, {}, None, None, keys, known=known)
        return stage.sample(params, batch["low_res"], keys, known=known)

    def loss(params):
        return after.loss(params, {}, batch, jax.random.key(1), train=True)[0]

    widened = inpainting.widened(params)
    told = jax.tree.map(lambda x, y: x + 0.1 if x.shape != y.shape else x, widened, _first_three(widened))
    wanted = jax.jit(lambda: sample(before, params))()
    with_known = jax.jit(lambda params: sample(after, params, known))
    np.testing.assert_allclose(with_known(widened), wanted, atol=1e-5)
    assert np.abs(with_known(told) - wanted).max() > 1e-2
    if case == "upsampler":
        return
    (gradient,) = (x for name, x in digests.named(jax.jit(jax.grad(loss))(widened)) if "['in_conv']['kernel']" in name)
    assert gradient.shape[2] == 7
    assert np.abs(gradient[:, :, 3:7]).max((0, 1, 3)).min() > 0


def _first_three(params):
    """Weights of which those that were widened have another shape."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x[:, :, :3] if "['in_conv']['kernel']" in jax.tree_util.keystr(path) else x, params
    )


def test_a_region_that_is_given_back_is_as_noisy_as_the_forward_process_makes_it():
    """x_t there is N(sqrt(alpha_bar) x_start, 1 - alpha_bar) at every step, by the samples of 4,000 images."""
    process = GaussianDiffusion.create(prediction="x_start", variance="fixed_small")
    seen = []

    def denoise(x_t, t):
        values = x_t[:, 0, 0]  # a pixel that is known
        jax.debug.callback(lambda *all: seen.append([float(x) for x in all]), t[0], values.mean(), values.var())
        return jnp.zeros_like(x_t)

    image = jnp.full((4000, 1, 2, 3), 0.75)
    part = inpainting.Known(image, jnp.ones((4000, 1, 2, 1)).at[:, :, 1].set(0))
    sampler = part.keeping(functools.partial(samplers.sample, process, method="ddpm", timesteps=8))
    keys = jax.random.split(jax.random.key(0), 4000)
    sampler(denoise, samplers.initial_noise(keys, image.shape[1:]), keys)
    jax.effects_barrier()
    assert len(seen) == 8
    for t, mean, variance in seen:
        ab = process.alpha_bars[int(t)]
        np.testing.assert_allclose(mean, 0.75 * np.sqrt(ab), atol=0.05)
        np.testing.assert_allclose(variance, 1 - ab, rtol=0.06, atol=1e-4)


def test_a_run_begins_from_the_moving_average_of_another_and_refuses_what_is_no_such_run(tmp_path):
    workdir = untrained_models.write(tmp_path, "decoder", **DECODER)
    clip = {"clip": digests.fingerprint(untrained_models.drawn(base.create(small("clip")), 0))}
    devices = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])

    def read(networks=clip, case="decoder", **changes):
        values = {**(DECODER if case == "decoder" else {}), "begin_from": str(workdir), **changes}
        return beginnings.read(program.build(small(case, **values), devices), networks)

    assert read(begin_from="") is None
    wanted = dict(digests.named(untrained_models.drawn(base.create(small("decoder", **DECODER)), 0)))
    wide = {"model__unet__in_channels": 7, "inpaint": True}
    elsewhere = untrained_models.drawn(base.create(small("decoder", **DECODER, **wide)), 1)
    for name, x in digests.named(read(**wide).put(elsewhere)):
        first = x[:, :, :3] if "['in_conv']['kernel']" in name else x
        np.testing.assert_array_equal(first, wanted[name], err_msg=name)
        assert first.shape == x.shape or not np.any(x[:, :, 3:])
    with pytest.raises(InputError, match="holds a decoder, and this is a upsampler"):
        read(case="upsampler")
    with pytest.raises(InputError, match="holds another network: .* there and .* here"):
        read(model__unet__channels=64)
    with pytest.raises(InputError, match="trained on another clip than that in"):
        read(networks={"clip": "0" * 16})
    with pytest.raises(InputError, match="holds no checkpoint"):
        read(begin_from=str(tmp_path))
