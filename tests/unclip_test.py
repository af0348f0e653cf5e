"""The chain from text to image: what an image may depend on, and which parts may be put together."""

import shutil

import numpy as np
import pytest
import untrained_models

from unclip_jax import unclip
from unclip_jax.errors import InputError

CAPTIONS = [
    "a small red star on a white background",
    "a large blue ring on a grey background",
    "a large striped green heart above a small pink cross on a beige background",
]
IDS = [11, 5, 4_000_000_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return untrained_models.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(folder):
    return unclip.UnCLIP.load(str(folder), microbatch=8)


@pytest.fixture(scope="module")
def made(model):
    return model.generate(CAPTIONS, seed=3, ids=IDS)


def test_every_stage_enlarges_what_the_one_before_it_made(made):
    assert {name: images.shape for name, images in made.images.items()} == {
        "decoder": (3, 16, 16, 3), "upsampler_1": (3, 32, 32, 3), "upsampler_2": (3, 64, 64, 3)
    }  # fmt: skip
    assert all(images.dtype == np.uint8 and images.std() > 1 for images in made.images.values())
    np.testing.assert_allclose(np.linalg.norm(made.z_i, axis=1), 1, atol=1e-5)


def test_an_image_does_not_depend_on_the_others_nor_on_its_place(model, made):
    others = ["a large yellow circle on a black background"] * 8
    again = model.generate([*others, CAPTIONS[1]], seed=3, ids=[*range(100, 108), IDS[1]])
    for name, images in made.images.items():
        np.testing.assert_array_equal(again.images[name][8], images[1], err_msg=name)


def test_seed_and_id_and_caption_each_change_the_image(model, made):
    changed = [
        model.generate([CAPTIONS[0]], seed=4, ids=[IDS[0]]),
        model.generate([CAPTIONS[0]], seed=3, ids=[IDS[1]]),
        model.generate([CAPTIONS[1]], seed=3, ids=[IDS[0]]),
    ]
    for other in changed:
        assert (other.images["decoder"][0] != made.images["decoder"][0]).any()


def test_without_a_prior_the_text_embedding_is_decoded(model):
    z_t = model.embed_text(CAPTIONS)
    np.testing.assert_array_equal(model.sample_prior(CAPTIONS, prior="none"), z_t)
    made = model.generate(CAPTIONS, seed=3, ids=IDS, prior="none")
    np.testing.assert_array_equal(made.images["decoder"], model.decode(z_t, CAPTIONS, seed=3, ids=IDS))


def test_a_dropped_embedding_leaves_the_caption(model, made):
    alone = model.generate(CAPTIONS, seed=3, ids=IDS, prior="dropped")
    assert alone.z_i is None and "prior_diffusion" not in alone.seconds
    assert (alone.images["decoder"] != made.images["decoder"]).any()
    # The null embedding is zeros; that the two programs are not one may cost a bit.
    zeros = model.decode(np.zeros_like(made.z_i), CAPTIONS, seed=3, ids=IDS)
    assert np.abs(alone.images["decoder"].astype(int) - zeros).max() <= 1
    with pytest.raises(InputError, match="no prior 'dropped'"):
        model.sample_prior(CAPTIONS, prior="dropped")


def test_each_stage_takes_the_8_bit_image_of_the_one_before(model, made):
    again = model.upsample(made.images["decoder"], seed=3, ids=IDS)
    for name, images in again.items():
        np.testing.assert_array_equal(images, made.images[name], err_msg=name)


def test_a_negative_prompt_reaches_the_parts_that_are_guided(folder, model, made):
    assert model.steered("diffusion") == ["decoder"]
    same = model.generate(CAPTIONS, seed=3, ids=IDS, negative="")
    other = model.generate(CAPTIONS, seed=3, ids=IDS, negative=CAPTIONS[1])
    for name, images in made.images.items():
        np.testing.assert_array_equal(same.images[name], images, err_msg=name)
        assert (other.images[name] != images).any(), name
    np.testing.assert_array_equal(other.z_i, made.z_i)
    guided = unclip.UnCLIP.load(str(folder), sampling={"prior_diffusion": {"guidance_scale": 2}}, microbatch=8)
    assert guided.steered("diffusion") == ["prior_diffusion", "decoder"] and guided.steered("none") == ["decoder"]
    away = [guided.sample_prior(CAPTIONS, negative=negative) for negative in (None, CAPTIONS[1])]
    assert np.abs(away[0] - away[1]).max() > 1e-3


def test_a_negative_prompt_that_nothing_would_read_is_refused(folder, tmp_path):
    unguided = {"decoder": {"guidance_scale": 1}}
    model = unclip.UnCLIP.load(str(folder), only=["clip", "prior_diffusion", "decoder"], sampling=unguided)
    with pytest.raises(InputError, match="no part that reads captions is guided"):
        model.generate(CAPTIONS, negative=CAPTIONS[0])
    with pytest.raises(InputError, match="guidance_scale 1 steers nowhere"):
        model.decode(np.zeros((3, 16), np.float32), CAPTIONS, negative=CAPTIONS[0])
    wordless = untrained_models.write(tmp_path, "decoder", model__text=None)
    model = unclip.UnCLIP.load({"clip": str(folder / "clip"), "decoder": str(wordless)})
    with pytest.raises(InputError, match="no part that reads captions"):
        model.check(prior="none", negative=CAPTIONS[0])
    with pytest.raises(InputError, match="reads none"):
        model.decode(np.zeros((3, 16), np.float32), CAPTIONS, negative=CAPTIONS[0])


def test_a_decoder_of_text_embeddings_takes_them_and_no_prior(folder, tmp_path):
    trained = untrained_models.write(tmp_path, "decoder", condition="text")
    workdirs = {"clip": folder / "clip", "prior_ar": folder / "prior_ar", "decoder": trained}
    model = unclip.UnCLIP.load({name: str(path) for name, path in workdirs.items()}, microbatch=8)
    with pytest.raises(InputError, match="was trained on embeddings of texts.*use the prior 'none'"):
        model.generate(CAPTIONS, prior="ar")
    plain = model.generate(CAPTIONS, prior="none").images["decoder"]
    np.testing.assert_array_equal(plain, model.decode(model.embed_text(CAPTIONS), CAPTIONS))
    # Its null branch reads the negative prompt's z_t too: not even the empty caption is the null condition.
    assert (model.generate(CAPTIONS, prior="none", negative="").images["decoder"] != plain).any()


def test_glide_draws_from_captions_without_a_clip(tmp_path):
    untrained_models.write(tmp_path, "decoder", model__embed_dim=0)
    assert unclip.names_for(str(tmp_path), priors=["dropped"]) == ["decoder"]
    model = unclip.UnCLIP.load(str(tmp_path), only=["decoder"], microbatch=8)
    with pytest.raises(InputError, match="reads captions and no embedding: use the prior 'dropped'"):
        model.generate(CAPTIONS, prior="none")
    made = model.generate(CAPTIONS, prior="dropped").images["decoder"]
    assert made.shape == (3, 16, 16, 3) and (made[0] != made[1]).any()


def test_each_prior_gives_embeddings_of_its_own(model, made):
    ar = model.sample_prior(CAPTIONS, prior="ar", seed=3, ids=IDS)
    np.testing.assert_allclose(np.linalg.norm(ar, axis=1), 1, atol=1e-5)
    assert np.abs(ar - made.z_i).max() > 0.01


def test_images_of_any_size_are_embedded(model):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    # What CLIP sees is the mean of every 2x2 block.
    small = np.floor(large.reshape(2, 32, 2, 32, 2, 3).mean((2, 4)) + 0.5).astype(np.uint8)
    np.testing.assert_allclose(model.embed_images(large), model.embed_images(small), atol=2e-3)


def test_compilation_is_not_counted_as_work(model, made):
    timing = model.timings["decoder"]
    assert timing.compile_seconds > timing.seconds / max(timing.images, 1)
    assert set(made.seconds) == {"prior_diffusion", "decoder", "upsampler_1", "upsampler_2"}


def test_image_ids_tell_prompts_and_seeds_apart():
    ids = {unclip.image_id(prompt, seed) for prompt in CAPTIONS for seed in range(100)}
    assert len(ids) == 300 and all(0 <= number < 2**32 for number in ids)


def test_sampling_options_replace_those_of_the_run(folder, model, made):
    other = unclip.UnCLIP.load(
        str(folder), only=["clip", "decoder"], sampling={"decoder": {"guidance_scale": "1", "timesteps": 2}}
    )
    assert other.part("decoder").config.sampling.guidance_scale == 1.0
    assert other.part("decoder").config.sampling.timesteps == "2"
    assert model.part("decoder").config.sampling.timesteps == "3"


@pytest.mark.parametrize("key, value, says", [
    ("guidance", 2.0, "guidance_scale"), ("guidance_scale", "much", "float"), ("eta", 7.0, r"\[0, 1\]"),
])  # fmt: skip
def test_a_sampling_option_that_cannot_be_is_named(folder, key, value, says):
    with pytest.raises(InputError, match=says):
        unclip.UnCLIP.load(str(folder), only=["decoder", "clip"], sampling={"decoder": {key: value}})


def test_a_missing_part_is_named_with_the_command_that_trains_it(folder):
    model = unclip.UnCLIP.load(str(folder), only=["clip", "decoder"])
    with pytest.raises(InputError, match="configs/prior_ar.py:tiny --workdir=.*/prior_ar --config.frozen.clip=.*/clip"):
        model.generate(CAPTIONS, prior="ar")
    with pytest.raises(InputError, match="diffusion"):
        model.generate(CAPTIONS, prior="difusion")


def test_folders_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        unclip.UnCLIP.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no trained part"):
        unclip.UnCLIP.load(str(tmp_path))


def test_parts_of_another_clip_are_refused(folder, tmp_path):
    wider = untrained_models.write(tmp_path / "wider", "clip", model__text_depth=1)
    with pytest.raises(InputError, match="text_depth=2 there, 1 here"):
        unclip.UnCLIP.load({"clip": str(wider), "decoder": str(folder / "decoder")})
    reseeded = untrained_models.write(tmp_path / "reseeded", "clip", seed=1)
    with pytest.raises(InputError, match="whose weights are not those"):
        unclip.UnCLIP.load({"clip": str(reseeded), "decoder": str(folder / "decoder")})


def test_a_copy_of_the_clip_is_that_clip(folder, tmp_path):
    shutil.copytree(folder / "clip", tmp_path / "clip")
    unclip.UnCLIP.load({"clip": str(tmp_path / "clip"), "decoder": str(folder / "decoder")})


def test_a_cascade_with_a_gap_is_refused(folder):
    with pytest.raises(InputError, match="upsampler_2 .* takes images of 32 pixels, decoder .* makes 16"):
        unclip.UnCLIP.load(str(folder), only=["clip", "decoder", "upsampler_2"])


def test_a_stage_in_the_place_of_another_is_refused(folder):
    with pytest.raises(InputError, match="holds a prior_ar, where a decoder is wanted"):
        unclip.UnCLIP.load({"clip": str(folder / "clip"), "decoder": str(folder / "prior_ar")})


def test_counts_that_do_not_fit_are_refused(model):
    with pytest.raises(InputError, match="2 embeddings were given for 3 captions"):
        model.decode(np.zeros((2, 16), np.float32), CAPTIONS)
    with pytest.raises(InputError, match="1 ids were given for 3"):
        model.sample_prior(CAPTIONS, ids=[1])
    with pytest.raises(InputError, match="nothing to make"):
        model.embed_text([])


def test_devices_that_share_an_image_draw_the_same_one_and_each_holds_less_of_it(folder, model):
    shared = unclip.UnCLIP.load(str(folder), only=["clip", "upsampler_1"], microbatch=2, devices_per_image=4)
    low_res = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    images = {who: who.predictor.run("upsampler_1", "sample", {"low_res": low_res}, seed=1) for who in (model, shared)}
    difference = np.abs(np.int16(images[model]) - images[shared])
    assert difference.max() <= 1  # of 255: sums are rounded in another order

    def compiled(who):
        return next(program for key, program in who.predictor._programs.items() if key[0] == "upsampler_1")

    assert "collective-permute" in compiled(shared).as_text()  # the rows at the borders
    held = [compiled(who).memory_analysis().temp_size_in_bytes for who in (shared, model)]  # of an image by 4, and by 1
    assert held[0] < 0.6 * held[1]


def test_devices_that_cannot_share_images_evenly_are_refused(folder):
    with pytest.raises(InputError, match="3 devices per image do not divide this host's 8; 1, 2, 4, 8 do"):
        unclip.UnCLIP.load(str(folder), only=["clip"], devices_per_image=3)
