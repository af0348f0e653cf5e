"""Images as (z_i, x_T) and back: of Gaussian data, whose flow is known in closed form, and of untrained networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_models
from small_configs import small

from unclip_jax import parts, unclip
from unclip_jax.arrays import from_uint8
from unclip_jax.errors import InputError
from unclip_jax.manipulation import interpolation, text_diffs
from unclip_jax.manipulation.latents import Codec, Latents, check_decoder, psnr
from unclip_jax.manipulation.variations import repeated
from unclip_jax.stages import base

VARIANCE = 0.25
TEMPERATURE = 0.9
PICTURES = [np.random.default_rng(number).integers(0, 256, (40, 33 + number, 3), np.uint8) for number in range(3)]


class GaussianNetwork:
    """Stands in for a decoder's or an upsampler's network: the best one there is for pixels of N(mean, VARIANCE).

    The mean is the first number of z_i, or the enlarged image, so what a function does not hand on would be seen.
    """

    def __init__(self, alpha_bars):
        self.alpha_bars = jnp.asarray(alpha_bars, jnp.float32)

    def apply(self, params, x, *rest, method=None):
        if method == "condition":
            return rest[0][:, :1, None, None]
        t, mean = (rest[0], rest[1]) if method == "denoise" else (rest[0], x[..., 3:])
        ab, x_t = self.alpha_bars[t][:, None, None, None], x[..., :3]
        residual = (x_t - jnp.sqrt(ab) * mean) / (ab * VARIANCE + 1 - ab)
        v = jnp.sqrt(ab * (1 - ab)) * (1 - VARIANCE) * residual - jnp.sqrt(1 - ab) * mean
        return jnp.concatenate([v, jnp.zeros_like(v)], -1)


def there_and_back(case, steps, **sampling):
    """Returns the images, x_T, what it is in closed form, and the images that are drawn of it."""
    options = {"method": "ddim", "timesteps": steps, "threshold": "none", "skip_noisiest": 1, **sampling}
    stage = base.create(small(case, **{f"sampling__{key}": value for key, value in options.items()}))
    stage.network = GaussianNetwork(stage.diffusion.alpha_bars)
    rng = np.random.default_rng(0)
    spec = stage.predict_specs(2)["x_T"]
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in spec.items()}
    batch["image"] = jnp.asarray(rng.integers(60, 200, spec["image"].shape), jnp.uint8)
    if case == "decoder":
        batch["z_i"] = batch["z_i"].at[:, 0].set(jnp.asarray([-0.2, 0.3]))
        mean = batch["z_i"][:, :1, None, None]
    else:
        batch["low_res"] = jnp.asarray(rng.integers(60, 200, (2, 1, 1, 3)).repeat(16, 1).repeat(16, 2), jnp.uint8)
        mean = from_uint8(batch["low_res"])[:, :1, :1]
    functions = {name: jax.jit(stage.predict_fns()[name]) for name in ("x_T", "sample")}
    x_T = functions["x_T"]({}, {}, batch, None)
    ab = stage.diffusion.alpha_bars[stage.diffusion.respaced(stage.invert.keywords["timesteps"]).timesteps[-1]]
    flow = np.sqrt(ab) * mean + np.sqrt((ab * VARIANCE + 1 - ab) / VARIANCE) * (from_uint8(batch["image"]) - mean)
    given = {**batch, "x_T": x_T, "id": jnp.arange(2, dtype=jnp.uint32)}
    return np.asarray(batch["image"]), x_T, flow, np.asarray(functions["sample"]({}, {}, given, jax.random.key(0)))


def test_x_T_is_where_the_flow_of_gaussian_data_leads():
    """The flow keeps (x_t - its mean) / (its deviation), so x_T is known; and drawing it gives the image back."""
    images, x_T, flow, again = there_and_back("decoder", "250", guidance_scale=1.0)
    np.testing.assert_allclose(x_T, flow, atol=0.03)
    _, coarse, _, worse = there_and_back("decoder", "25", guidance_scale=1.0)
    assert np.abs(x_T - flow).max() < 0.5 * np.abs(coarse - flow).max()
    assert psnr(again, images).min() > psnr(worse, images).max() > 25
    assert psnr(again, images).min() > 45


def test_an_upsamplers_x_T_is_what_its_temperature_scales():
    images, x_T, flow, again = there_and_back("upsampler", "250", temperature=TEMPERATURE)
    np.testing.assert_allclose(TEMPERATURE * x_T, flow, atol=0.03)
    assert psnr(again, images).min() > 45


def test_the_steps_that_are_left_out_are_the_noisiest():
    all_steps, fewer = (
        base.create(small("decoder", sampling__timesteps="5", sampling__skip_noisiest=skipped)) for skipped in (0, 2)
    )
    assert all_steps.invert.keywords["timesteps"] == 5
    for of in (fewer.invert, fewer.sampler):
        np.testing.assert_array_equal(of.keywords["timesteps"], [500, 250, 0])
    with pytest.raises(InputError, match="skip_noisiest=5, but there are 5 steps"):
        base.create(small("decoder", sampling__timesteps="5", sampling__skip_noisiest=5))


def test_psnr_in_closed_form():
    grey = np.full((2, 4, 4, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(grey, grey + np.uint8(5)), 20 * np.log10(255 / 5))
    assert np.isinf(psnr(grey, grey)).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    untrained_models.write(folder, "clip")
    untrained_models.write(folder, "decoder", model__unet__channel_mult=(1,), model__unet__attention_resolutions=(16,))
    untrained_models.write(folder, "upsampler_1", unet__channel_mult=(1,))
    return unclip.UnCLIP.load(str(folder), microbatch=8)


@pytest.fixture(scope="module")
def codec(model):
    return Codec(model, steps=4)


@pytest.fixture(scope="module")
def encoded(codec):
    return codec.encode(PICTURES, ["a ring", "", "a star"])


def assert_same(images, others):
    assert images.keys() == others.keys()
    for name in images:
        np.testing.assert_array_equal(images[name], others[name], err_msg=name)


def test_encoded_are_central_squares_at_every_parts_size(codec, encoded):
    assert codec.sides == {"decoder": 16, "upsampler_1": 32}
    assert {name: x.shape for name, x in encoded.latents.x_T.items()} == {
        "decoder": (3, 16, 16, 3), "upsampler_1": (3, 32, 32, 3)
    }  # fmt: skip
    middle = np.s_[3:36] if PICTURES[0].shape[1] == 33 else None
    alone = codec.encode([PICTURES[0][middle]], ["a ring"])
    for name, x in alone.latents.x_T.items():
        np.testing.assert_allclose(x[0], encoded.latents.x_T[name][0], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(np.linalg.norm(encoded.latents.z_i, axis=1), 1, atol=1e-5)


def test_at_eta_0_latents_are_drawn_the_same_again_whatever_the_seed(codec, encoded):
    assert_same(codec.draw(encoded.latents), encoded.again)
    assert_same(codec.draw(encoded.latents, seed=7, ids=[5, 6, 7]), encoded.again)
    turned = codec.draw(encoded.latents.take([2, 0]))
    assert_same(turned, {name: images[[2, 0]] for name, images in encoded.again.items()})


def test_theta_0_and_the_ends_of_a_path_are_the_reconstructions(codec, encoded):
    z_t, z_t0 = np.random.default_rng(0).normal(size=(2, *encoded.latents.z_i.shape)).astype(np.float32)
    z_d = text_diffs.direction(z_t, z_t0)
    drawn = codec.draw(text_diffs.along(encoded.latents, z_d, [0.0, 0.4]))
    assert_same({name: images[::2] for name, images in drawn.items()}, encoded.again)
    assert (drawn["decoder"][1::2] != encoded.again["decoder"]).any()
    path = interpolation.between(encoded.latents.take([0, 1]), encoded.latents.take([1, 2]), [0.0, 0.5, 1.0])
    assert path.captions == ("a ring", "a ring", "", "", "", "a star")
    drawn = codec.draw(path)
    assert_same({name: images[[0, 2, 5]] for name, images in drawn.items()}, encoded.again)
    assert (drawn["decoder"][1] != drawn["decoder"][2]).any()


def test_variations_differ_by_their_ids_alone(model, encoded):
    codec = Codec(model, steps=4, last="decoder")
    one = repeated(encoded.latents.take([0]), samples=3)
    drawn = codec.draw(one, eta=1.0, ids=[4, 4, 5])["decoder"]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    assert (drawn[0] != encoded.again["decoder"][0]).any()
    # x_T has a say of its own, and is drawn by the ids where it is not given.
    fresh = codec.draw(dataclasses.replace(one, x_T={}), eta=1.0, ids=[4, 4, 5])["decoder"]
    assert (fresh[0] == fresh[1]).all() and (fresh[0] != fresh[2]).any() and (fresh[0] != drawn[0]).any()


def test_details_may_be_drawn_as_the_model_draws_them(model, encoded):
    """The upsampler's part is then the model's own; only the decoder is encoded for."""
    codec = Codec(model, steps=4, details="drawn")
    assert codec.at(0.0).parts["upsampler_1"] is model.parts["upsampler_1"]
    assert codec.at(0.0).parts["decoder"].config.sampling.timesteps == "4"
    with pytest.raises(InputError, match="did you mean 'drawn'"):
        Codec(model, details="drown")


def test_latents_are_read_as_they_were_written(encoded, tmp_path):
    encoded.latents.save(tmp_path / "a.npz")
    again = Latents.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.z_i, encoded.latents.z_i)
    assert again.captions == encoded.latents.captions
    assert_same(dict(again.x_T), dict(encoded.latents.x_T))
    content = (tmp_path / "a.npz").read_bytes()
    for damaged in (b"", b"PK", content[: len(content) // 2]):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="a.npz holds no latents"):
            Latents.load(tmp_path / "a.npz")


def test_what_cannot_be_encoded_is_refused(model, codec):
    with pytest.raises(InputError, match="image 1 has 31 x 40 pixels, and upsampler_1 draws 32 x 32"):
        codec.encode([PICTURES[0], PICTURES[0][:, :31]])
    with pytest.raises(InputError, match="at least one"):
        codec.encode([])
    with pytest.raises(InputError, match="3 embeddings were given, but captions for 1"):
        codec.encode(PICTURES, ["a ring"])
    with pytest.raises(InputError, match="1 embeddings were given for 3 images"):
        codec.encode(PICTURES, z_i=np.ones((1, 16), np.float32))
    with pytest.raises(InputError, match="x_T of decoder has shape \\(8, 8, 3\\); it draws 16"):
        codec.draw(Latents(np.ones((1, 16), np.float32), {"decoder": np.zeros((1, 8, 8, 3), np.float32)}, ("",)))
    with pytest.raises(InputError, match="did you mean 'upsampler_1'"):
        Codec(model, last="upsampler1")
    with pytest.raises(InputError, match="eta"):
        codec.at(1.5)
    without = unclip.UnCLIP({name: part for name, part in model.parts.items() if name == "clip"}, models="runs/some")
    with pytest.raises(InputError, match="runs/some holds no trained decoder; train it: python -m unclip_jax.train"):
        Codec(without)


@pytest.mark.parametrize("changes", [{"model__embed_dim": 0}, {"condition": "text"}])
def test_a_decoder_that_knows_no_z_i_is_refused_with_what_trains_one(changes):
    config = small("decoder", **changes)
    part = parts.Part("decoder", "runs/some/decoder", base.create(config), config, {}, {}, 0)
    with pytest.raises(InputError, match="runs/some/decoder reads .*unclip_jax.train --config=configs/decoder.py:tiny"):
        check_decoder(part)
