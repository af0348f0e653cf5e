"""Karlo imported: what its networks draw is what diffusers' pipelines draw of the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_karlo
import torch
from diffusers import KandinskyV22PriorPipeline, UnCLIPScheduler
from diffusers.schedulers import scheduling_unclip
from PIL import Image

from unclip_jax import convert, unclip
from unclip_jax.errors import InputError
from unclip_jax.importing import karlo
from unclip_jax.importing.formats import Request
from unclip_jax.stages import base

PROMPTS = ["a small red star!", "a large blue circle on the left of a green ring, and more than it can hold"]
# Two levels of 255 would be a step that rounding alone cannot make: both round the same number, to 1e-5.
CLOSE = 1


@pytest.fixture(scope="module")
def parts():
    return tiny_karlo.components()


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """Both pipelines' folders in one."""
    folder = tmp_path_factory.mktemp("karlo")
    tiny_karlo.text_to_image(parts).save_pretrained(folder)
    tiny_karlo.variation(parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    models = tmp_path_factory.mktemp("models") / "karlo"
    made = convert.convert(Request(format="karlo", path=str(folder)), str(models))
    assert list(made) == ["clip", "prior_diffusion", "decoder", "upsampler_1_last", "upsampler_1"]
    return str(models)


@pytest.fixture(scope="module")
def model(models):
    return unclip.UnCLIP.load(models, microbatch=2)


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    # Pictures that say something: neither flat nor all clipped.
    assert len(np.unique(theirs)) > 100 and np.mean((theirs == 0) | (theirs == 255)) < 0.5
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= CLOSE


def test_text_to_image_is_the_pipelines(parts, model, monkeypatch):
    given = tiny_karlo.noise(len(PROMPTS))
    made = model.generate(PROMPTS, noise=given)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", tiny_karlo.steps_noise(given))
    theirs = tiny_karlo.text_to_image(parts)(PROMPTS, output_type="np", **tiny_karlo.latents(given))
    assert_same(made.images["upsampler_1"], np.round(theirs.images * 255).astype(np.uint8))


def test_variations_are_the_pipelines(parts, model, monkeypatch):
    pixels = np.random.default_rng(5).integers(0, 256, (2, 16, 16, 3), np.uint8)
    given = tiny_karlo.noise(2, seed=1, without=("prior_diffusion",))
    made = model.vary(pixels, noise=given)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", tiny_karlo.steps_noise(given))
    pipeline = tiny_karlo.variation(parts)
    pictures = [Image.fromarray(image) for image in pixels]
    inputs = pipeline.feature_extractor(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        z_i = pipeline.image_encoder(inputs).image_embeds.numpy()
    np.testing.assert_allclose(made.z_i, z_i, atol=2e-5 * np.abs(z_i).max())
    images = []
    for row in range(2):  # of one image each, as the pipeline wants them
        one = {name: (start[row : row + 1], steps[row : row + 1]) for name, (start, steps) in given.items()}
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", tiny_karlo.steps_noise(one))
        images.append(pipeline(pictures[row], output_type="np", **tiny_karlo.latents(one)).images[0])
    assert_same(made.images["upsampler_1"], np.round(np.stack(images) * 255).astype(np.uint8))


def test_kandinskys_prior_is_the_pipelines(parts, tmp_path, monkeypatch):
    names = ("prior", "image_encoder", "text_encoder", "tokenizer")
    pipeline = KandinskyV22PriorPipeline(
        **{name: parts[name] for name in names},
        scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0),
        image_processor=parts["feature_extractor"],
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "theirs")
    request = Request(format="kandinsky_prior", path=str(tmp_path / "theirs"))
    assert list(convert.convert(request, str(tmp_path / "models"))) == ["clip", "prior_diffusion"]
    model = unclip.UnCLIP.load(str(tmp_path / "models"), microbatch=2)
    assert model.parts["prior_diffusion"].config.diffusion.clip_x_start == 10.0
    given = {"prior_diffusion": tiny_karlo.noise(len(PROMPTS), seed=2)["prior_diffusion"]}
    made = model.sample_prior(PROMPTS, noise=given)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", tiny_karlo.steps_noise(given))
    latents = torch.tensor(given["prior_diffusion"][0])
    theirs = pipeline(PROMPTS, latents=latents, output_type="np").image_embeds
    np.testing.assert_allclose(made, theirs, atol=2e-5 * np.abs(theirs).max())


def test_a_pipeline_without_its_image_encoder_reads_captions_only(folder, tmp_path):
    """Karlo's text to image comes so."""
    for path in folder.iterdir():
        if path.name in ("text_encoder", "tokenizer"):
            (tmp_path / path.name).symlink_to(path)
    name, clip = next(karlo.diffusers(Request(format="karlo", path=str(tmp_path))))
    assert name == "clip" and not clip.config.model.image_tower
    assert set(clip.params["params"]) == {"text", "logit_scale"}
    stage = base.create(clip.config)
    tokens = jnp.asarray([[2046, 5, 2047, *[0] * (tiny_karlo.LENGTH - 3)]])
    z_t = stage.predict_fns()["raw_z_t"](jax.tree.map(jnp.asarray, clip.params), {}, {"clip_tokens": tokens}, None)
    assert z_t.shape == (1, tiny_karlo.DIM)
    with pytest.raises(InputError, match="no image tower"):
        stage.predict_fns()["raw_z_i"](clip.params, {}, {"clip_image": jnp.zeros((1, 16, 16, 3), jnp.uint8)}, None)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="should hold the folders of diffusers' UnCLIPPipeline"):
        next(karlo.diffusers(Request(format="karlo", path=str(tmp_path))))
