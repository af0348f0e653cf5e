"""Images from prompts: as a program that is stopped and goes on, and what it refuses."""

import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import untrained_models
from PIL import Image

from unclip_jax import generate, picture_files, programs, unclip
from unclip_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAR = "a small red star on a white background"
RING = "a large blue ring on a grey background"
PATIENCE = 300.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "decoder", "upsampler_1"):
        untrained_models.write(folder, name)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(models, out, cache, *options):
    command = [sys.executable, "-m", "unclip_jax.generate", f"--models={models}", f"--out={out}", "--prior=none"]
    command += [f"--prompt={STAR}", f"--prompt={RING}", "--batch_size=1", f"--compile_cache={cache}", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, err


def test_stopped_and_begun_again_it_makes_the_same_images(models, cache, tmp_path):
    process = start(models, tmp_path / "stopped", cache, "--samples=3", "--stages=all")
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "stopped").glob("*seed0.png")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, _, err = finished(process)
    assert code == programs.REQUEUE, err
    before = {path: path.read_bytes() for path in (tmp_path / "stopped").glob("*.png")}
    assert 1 <= len([path for path in before if path.stem.rpartition("-")[2].startswith("seed")]) < 6

    code, out, err = finished(start(models, tmp_path / "stopped", cache, "--samples=3", "--stages=all"))
    assert code == programs.DONE, err
    assert "are there already" in err and "grid.png" in out
    assert all(path.read_bytes() == content for path, content in before.items())
    # One image alone, of its own seed, is the third sample of the run that was stopped.
    code, _, err = finished(start(models, tmp_path / "alone", cache, "--seed=2"))
    assert code == programs.DONE, err
    for index in (0, 1):
        name = f"0000{index}-none-seed2.png"
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "alone" / name)), np.asarray(Image.open(tmp_path / "stopped" / name))
        )
    with Image.open(tmp_path / "stopped" / "00001-none-seed2.png") as picture:
        assert picture.size == (32, 32)
        assert picture.text["prompt"] == RING and picture.text["seed"] == "2"
        assert json.loads(picture.text["unclip_jax"])["models"]["decoder"]["step"] == 0
    manifest = json.loads((tmp_path / "stopped" / "manifest.json").read_text())
    assert len(manifest["images"]) == 6
    assert {row["file"] for row in manifest["images"]} == {
        f"0000{index}-none-seed{seed}.png" for index in (0, 1) for seed in range(3)
    }
    assert len(list((tmp_path / "stopped").glob("*-decoder.png"))) == 6


@pytest.mark.parametrize("options, says", [
    (("--models=nowhere",), "there is no folder 'nowhere'"),
    (("--prior=difusion",), "did you mean 'diffusion'"),
    (("--negative_prompt=a ring", "--guidance_scale=1"), "no part that reads captions is guided"),
    (("--negative_prompt= ",), "--negative_prompt is empty"),
    (("--prior=ar",), "holds no trained prior_ar; train it: python -m unclip_jax.train"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(models, cache, tmp_path, options, says):
    code, _, err = finished(start(models, tmp_path / "out", cache, *options))
    assert code == programs.FAILED
    assert says in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_both_places(tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{RING}\n\n  {STAR}  \n")
    assert generate.read_prompts([STAR], str(tmp_path / "prompts.txt")) == [STAR, RING, STAR]


def test_prompts_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match="is empty"):
        generate.read_prompts([STAR, " \t"], None)
    with pytest.raises(InputError, match="there is no prompt"):
        generate.read_prompts([], None)
    with pytest.raises(InputError, match="cannot be read"):
        generate.read_prompts([], str(tmp_path / "nowhere.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        generate.read_prompts([], str(tmp_path / "latin.txt"))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(InputError, match="no prompt in"):
        generate.read_prompts([], str(tmp_path / "blank.txt"))


def test_a_prompt_given_twice_is_drawn_with_further_seeds():
    images = generate.wanted_images([STAR, RING, STAR], priors=["diffusion", "none"], seed=7, samples=2)
    star = [image.seed for image in images if image.prompt == STAR and image.prior == "none"]
    assert star == [7, 8, 9, 10]
    assert len({image.name for image in images}) == len(images) == 12


def _writer(folder, **record):
    return generate.Writer(str(folder), record={"versions": {"unclip_jax": "0"}, **record}, stages="last")


def test_a_folder_of_other_options_is_refused(tmp_path):
    _writer(tmp_path, sampling={"eta": 0.0})
    _writer(tmp_path, sampling={"eta": 0.0})
    with pytest.raises(InputError, match="sampling was .*0.0.*, is .*1.0"):
        _writer(tmp_path, sampling={"eta": 1.0})
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="no list of images"):
        _writer(tmp_path, sampling={"eta": 0.0})


def test_a_damaged_image_is_made_again_and_another_prompts_is_kept(tmp_path):
    writer = _writer(tmp_path)
    image = generate.Wanted(0, STAR, 0, "none")
    assert not writer.has(image)
    rng = np.random.default_rng(0)
    writer.write(image, {"decoder": rng.integers(0, 256, (16, 16, 3), np.uint8)})
    assert writer.has(image)
    with pytest.raises(InputError, match="shows another prompt"):
        writer.has(generate.Wanted(0, RING, 0, "none"))
    path = tmp_path / f"{image.name}.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert not writer.has(image)


@pytest.mark.parametrize("negative", [None, RING])
def test_a_negative_prompt_reaches_the_model_and_stands_in_every_image(tmp_path, negative):
    asked = []

    class Model(unclip.UnCLIP):
        microbatch = 2

        def generate(self, captions, **options):
            asked.append(options["negative"])
            return unclip.Generation(None, {"decoder": np.zeros((len(captions), 8, 8, 3), np.uint8)}, {})

    class NeverStop:
        def poll(self):
            return False

    writer = _writer(tmp_path, negative_prompt=negative)
    images = generate.wanted_images([STAR], priors=["none"], seed=0, samples=3)
    model = Model.__new__(Model)
    assert generate.make(model, writer, images, NeverStop(), negative=negative) == programs.DONE
    assert asked == [negative, negative]
    with Image.open(tmp_path / f"{images[0].name}.png") as picture:
        assert picture.text.get("negative_prompt") == negative
    assert json.loads((tmp_path / "manifest.json").read_text())["record"]["negative_prompt"] == negative
    with pytest.raises(InputError, match="negative_prompt was"):
        _writer(tmp_path, negative_prompt=STAR)


def test_variations_are_of_the_picture_and_named_for_it(tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    picture, digest = picture_files.read(str(tmp_path / "given.png"))
    assert digest == hashlib.sha256((tmp_path / "given.png").read_bytes()).hexdigest()
    asked = []

    class Model(unclip.UnCLIP):
        microbatch = 2

        def vary(self, images, captions=None, **options):
            asked.append((images, captions, options["ids"]))
            return unclip.Generation(None, {"decoder": images}, {})

    class NeverStop:
        def poll(self):
            return False

    images = generate.wanted_images([""], priors=[generate.IMAGE], seed=3, samples=3)
    writer = _writer(tmp_path / "out", image=digest)
    assert generate.make(Model.__new__(Model), writer, images, NeverStop(), picture=picture) == programs.DONE
    assert [captions for _, captions, _ in asked] == [["", ""], [""]]
    assert all(np.array_equal(image, given) for stack, _, _ in asked for image in stack)
    assert len({number for _, _, ids in asked for number in ids}) == 3
    assert [image.name for image in images] == [f"00000-image-seed{seed}" for seed in (3, 4, 5)]
    assert all(writer.has(image) for image in images)
    with pytest.raises(InputError, match="nowhere.png.*cannot be read"):
        picture_files.read(str(tmp_path / "nowhere.png"))
    (tmp_path / "cut.png").write_bytes((tmp_path / "given.png").read_bytes()[:60])
    with pytest.raises(InputError, match="cut.png.*cannot be decoded"):
        picture_files.read(str(tmp_path / "cut.png"))


def test_every_sampling_flag_names_a_setting_that_its_stages_have():
    from small_configs import small

    for parts, key in generate.SAMPLING_FLAGS.values():
        for part in parts:
            assert key in small(untrained_models.CASES[part]).sampling, (part, key)
