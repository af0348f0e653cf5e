"""Exports: weights that the safetensors library reads back, compiled samplers that run without this package and draw
the same pixels, and what is refused."""

import datetime
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import small_configs
import untrained_models
from PIL import Image

from unclip_jax import export, programs, provenance
from unclip_jax.artifacts import bpe, components, consumer, folders, model_card, png, safetensors_files, stablehlo
from unclip_jax.data import captions
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.interop.tensors import Tensor
from unclip_jax.stages import base

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAR = "a small red star on a white background"
OPTIONS = {
    "format": "safetensors", "clip": "", "weights": "ema", "dtype": "float32", "compute": "", "prior": "",
    "sampling": [], "vocabulary": "", "license": "", "shard_mb": 4096, "parts": [], "pipeline": "unclip",
    "target": "local", "evaluation": "",
}  # fmt: skip


@pytest.fixture
def models(untrained_chain):
    return untrained_chain


@pytest.fixture
def compiled(stablehlo_export):
    """An export of samplers, made by the program."""
    return stablehlo_export


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


def write(workdir, out, *, poll=lambda: None, **options):
    return export.run({**OPTIONS, "workdir": str(workdir), **options}, str(out), command="a command", poll=poll)


# Another interpreter's view: what is named here cannot be imported, so that the export stands on jax and numpy alone.
ELSEWHERE = """
import runpy, sys
hidden = {"unclip_jax", "flax", "safetensors", "PIL", "absl", "tokenizers", "transformers", "ml_collections",
          "jaxtyping", "etils", "orbax", "tensorstore", "cv2", "torch"}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_export_draws_the_same_pixels_without_this_package(models, compiled, compile_cache, tmp_path):
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    done = run("-I", str(script), str(compiled / "run.py"), STAR, f"--out={tmp_path / 'star.png'}", "--seed=3", cwd="/")
    assert done.returncode == 0, done.stderr
    options = [f"--models={models}", f"--out={tmp_path / 'ours'}", f"--prompt={STAR}", "--seed=3", "--batch_size=1"]
    options += ["--decoder_steps=2", "--candidates=1", f"--compile_cache={compile_cache}"]
    ours = run("-m", "unclip_jax.generate", *options)
    assert ours.returncode == 0, ours.stderr
    with (
        Image.open(tmp_path / "star.png") as theirs,
        Image.open(tmp_path / "ours" / "00000-diffusion-seed3.png") as drawn,
    ):
        assert theirs.size == (32, 32) and np.asarray(theirs).std() > 5
        np.testing.assert_array_equal(np.asarray(theirs), np.asarray(drawn))
        assert theirs.text["prompt"] == STAR and theirs.text["seed"] == "3"
        # Both say that a model made them.
        assert provenance.SOURCE_TYPE in theirs.text["XML:com.adobe.xmp"]
        assert provenance.SOURCE_TYPE in drawn.text["XML:com.adobe.xmp"]


def test_what_an_export_says_of_itself(compiled):
    manifest = consumer.verified(compiled)
    built, expires = (datetime.datetime.fromisoformat(manifest[key]) for key in ("built", "expires"))
    assert 178 <= (expires - built).days <= 184  # JAX promises six months
    assert manifest["versions"]["jax"] == export.jax.__version__
    assert set(manifest["functions"]) == {
        "clip.z_t", "clip.z_i", "prior_diffusion.sample_z_i", "decoder.sample", "upsampler_1.sample"
    }  # fmt: skip
    decoder = manifest["functions"]["decoder.sample"]
    assert decoder["platforms"] == ["tpu", "cuda", "cpu"]
    assert decoder["inputs"]["z_i"] == {"dtype": "float32", "shape": ["b", 16]}
    assert decoder["output"] == {"dtype": "uint8", "shape": ["b", 16, 16, 3]}
    assert [step["makes"] for step in manifest["chain"]] == ["z_i", "decoder", "upsampler_1"]
    assert json.loads((compiled / "training.json").read_text())["decoder"]["config"]["sampling"]["timesteps"] == "2"
    card = (compiled / "README.md").read_text()
    assert "| decoder | loss | 0.25 | 0 |" in card and "0.125" not in card  # what came after the exported step
    assert "license: other" in card and "frozen.clip" in card and "--sampling=decoder.timesteps=2" in card
    for part, count in (("clip", 48737), ("upsampler_1", 762150)):
        stage = base.create(small_configs.small(untrained_models.CASES[part]))
        assert count == sum(x.size for x in export.jax.tree.leaves(untrained_models.drawn(stage, 0)))
        assert f"| {count:,} |" in card


def test_the_consumer_is_short(compiled):
    lines = [line for line in (compiled / "run.py").read_text().splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 60


def altered(compiled, tmp_path, change):
    """A folder of links to an export, whose manifest was changed by someone who mends its digest."""
    for path in compiled.iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((compiled / "manifest.json").read_text())
    change(manifest)
    manifest.pop("digest")
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "digest": digest}))
    return tmp_path


@pytest.mark.parametrize("change, says", [
    (lambda m: m.update(expires="2020-01-01T00:00:00+00:00"), "expired on 2020-01-01.*--re_export"),
    (lambda m: m["weights"].update(clip=["../../secret"]), "no file of its own folder"),
    (lambda m: m["functions"]["clip.z_t"].update(file="/etc/passwd"), "no file of its own folder"),
    (lambda m: m["functions"]["clip.z_t"].update(file="README.md"), "README.md was altered or is damaged"),
    (lambda m: m["files"]["bpe.py"].update(sha256="0" * 64), "bpe.py was altered or is damaged"),
])  # fmt: skip
def test_an_export_that_is_not_what_it_says_is_refused(compiled, tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        consumer.verified(altered(compiled, tmp_path, change))


def test_changed_files_are_refused_before_they_are_loaded(compiled, tmp_path):
    consumer.verified(altered(compiled, tmp_path, lambda m: None))
    (tmp_path / "bpe.py").unlink()
    (tmp_path / "bpe.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = run("-I", str(tmp_path / "run.py"), STAR, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "bpe.py was altered" in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "image.png").exists()
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"uint8"', '"int32"'))
    with pytest.raises(ValueError, match="manifest.json was altered"):
        consumer.verified(tmp_path)


@pytest.mark.parametrize("dtype, type_", [("float32", np.float32), ("bfloat16", jnp.bfloat16)])
def test_weights_alone_are_those_of_the_moving_average(models, tmp_path, dtype, type_):
    said = write(models / "clip", tmp_path / "out", dtype=dtype, shard_mb=4096)
    assert "clip as safetensors" in said
    with safetensors.safe_open(tmp_path / "out" / "clip.safetensors", framework="np") as file:
        there = {name: file.get_tensor(name) for name in file.keys()}
    wanted = untrained_models.drawn(base.create(small_configs.small("clip")), 0)
    leaves = export.jax.tree_util.tree_flatten_with_path(wanted)[0]
    table = json.loads((tmp_path / "out" / "names.json").read_text())["clip"]
    by_path = {tuple(row["path"]): name for name, row in table.items()}
    assert len(there) == len(leaves) == len(table)
    for path, leaf in leaves:
        name = by_path[tuple(key.key for key in path)]
        assert there[name].dtype == type_
        np.testing.assert_array_equal(there[name], np.asarray(leaf).astype(type_))


def test_an_export_is_made_again_with_its_own_options(models, tmp_path):
    """The archive is the checkpoint: what it became is told by the files' hashes."""
    copied = tmp_path / "models"
    shutil.copytree(models / "upsampler_1", copied / "upsampler_1")
    old, new, third = (tmp_path / name for name in ("old", "new", "third"))
    write(copied, old, dtype="bfloat16", shard_mb=1, license="cc0-1.0")
    done = run("-m", "unclip_jax.export", f"--re_export={old}", f"--out={new}")
    assert done.returncode == programs.DONE, done.stderr
    assert "byte for byte, those of the earlier export" in done.stdout
    first, second = (folders.read_manifest(str(folder)) for folder in (old, new))
    assert first["record"] == second["record"] and first["files"] == second["files"]
    assert len([name for name in second["files"] if name.endswith(".safetensors")]) == 2  # of 1.5 MB
    assert "cc0-1.0" in (new / "README.md").read_text()
    shutil.rmtree(copied)
    config = small_configs.small(untrained_models.CASES["upsampler_1"])
    untrained_models.save(copied / "upsampler_1", config, seed=1)
    write(copied, third, dtype="bfloat16", shard_mb=1)
    assert "NOT those of the earlier" in export.compared(first["files"], folders.read_manifest(str(third))["files"])


def test_shards_hold_everything_once(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"a.{n}": rng.normal(size=(10, n + 1)).astype(np.float32) for n in range(8)}
    arrays |= {"half": np.zeros((3,), np.float16), "scalar": np.array(2.0), "big": np.ones((100,), np.float32)}
    folder = folders.Folder(tmp_path)
    tensors = {name: Tensor.of(array) for name, array in arrays.items()}
    names = safetensors_files.write_shards(folder, "w", tensors, limit=300)
    index = json.loads((tmp_path / "w.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    found = {}
    for name in names:
        content = safetensors.numpy.load_file(tmp_path / name)
        assert all(index["weight_map"][key] == name for key in content) and not set(content) & set(found)
        assert len(content) == 1 or sum(array.nbytes for array in content.values()) <= 300
        assert folder.files[name]["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        found |= content
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_numbers_that_a_type_lacks_are_refused():
    tensors = {"w": Tensor.of(np.array([1.0, 1e5], np.float32)), "n": Tensor.of(np.array([1 << 20], np.int32))}
    half = safetensors_files.converted(tensors, np.dtype(np.float16))
    assert half["n"].read().dtype == np.int32
    with pytest.raises(InputError, match="w holds numbers up to 100000, which float16 lacks"):
        half["w"].read()


def test_a_folder_that_holds_something_is_left_alone(models, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / ".there.unfinished").mkdir()
    (tmp_path / ".there.unfinished" / "also mine").write_text("")
    for name, says in (("mine", "holds something already"), ("file", "is a file"), ("there", "is in the way")):
        with pytest.raises(InputError, match=says):
            write(models / "clip", tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / ".there.unfinished" / "also mine").exists()


def test_stopped_anywhere_it_leaves_nothing_and_begins_again(models, tmp_path):
    polls = iter([None] * 5)

    def stop():
        if next(polls, 0) == 0:
            raise SystemExit(programs.REQUEUE)

    with pytest.raises(SystemExit):
        write(models / "clip", tmp_path / "out", poll=stop)
    assert not list(tmp_path.iterdir())
    # A kill leaves a folder behind, which the next start removes.
    (tmp_path / ".out.unfinished" / "sub").mkdir(parents=True)
    (tmp_path / ".out.unfinished" / ".unclip_jax_export").touch()
    (tmp_path / ".out.unfinished" / "sub" / "half").touch()
    write(models / "clip", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "clip.safetensors", "names.json", "training.json", "manifest.json", "README.md"
    }  # fmt: skip


@pytest.mark.parametrize("options, says", [
    ({"sampling": ["decoder.timesteps"]}, "is not written as PART.KEY=VALUE"),
    ({"sampling": ["decoder.guidance=2"]}, "guidance_scale"),
    ({"sampling": ["upsampler_2.timesteps=2"]}, "names 'upsampler_2', which is not exported"),
    ({"license": "all rights; reserved"}, "no identifier of a licence"),
    ({"prior": "ar", "format": "stablehlo"}, "needs the part prior_ar"),
    ({"prior": "difusion", "format": "stablehlo"}, "did you mean 'diffusion'"),
    ({"vocabulary": "nowhere", "format": "stablehlo"}, "is not a folder"),
    ({"clip": "nowhere"}, "holds no whole checkpoint"),
])  # fmt: skip
def test_options_that_cannot_be_are_one_sentence_and_write_nothing(models, tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        write(models, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_prior_alone_brings_its_clip(models, tmp_path):
    found = components.find(str(models / "prior_diffusion"), with_clip=True)
    assert found == {"clip": str(models / "clip"), "prior_diffusion": str(models / "prior_diffusion")}
    assert set(components.find(str(models / "decoder"), with_clip=True)) == {"decoder"}  # it is given z_i
    assert set(components.find(str(models / "upsampler_1"), with_clip=True)) == {"upsampler_1"}
    described = components.describe({"prior_diffusion": found["prior_diffusion"]})
    with pytest.raises(InputError, match="reads captions by CLIP"):
        stablehlo.functions(described)


def test_a_damaged_checkpoint_is_not_exported(models, tmp_path):
    name = "upsampler_1"
    meta, step = components.newest(str(models / name))
    assert step == 0 and meta["config"]["stage"] == "upsampler"
    untrained_models.save(tmp_path / name, small_configs.small("upsampler"))
    items = tmp_path / name / "checkpoints" / "0" / "ema"
    largest = max((path for path in items.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(InputError, match="no checkpoint in .* is whole"):
        write(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_becomes_the_same_ids_without_other_libraries(compiled):
    ours, theirs = Tokenizer("tiny"), bpe.Encoder(compiled)
    rng = np.random.default_rng(0)
    alphabet = " abcdefghij'sTREllvmd  09½²!?.,-_ÄéßİΣςΑ中文字ñ́🙂‍👩🏽\t£¡­'s't're "
    texts = ["".join(rng.choice(list(alphabet), size=rng.integers(0, 60))) for _ in range(400)]
    texts += [STAR, "", "it's the dog's; don't!'s", "x" * 300, "'", "''s", "’s", "12345 3rd", "ΑΣ ΑΣ."]
    clean = [captions.clean(text) for text in texts]
    for length in (24, 7):
        np.testing.assert_array_equal(theirs(clean, length), ours.encode(texts, length))


def test_a_png_is_what_pillow_reads(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    marks = provenance.marks("somebody's program")
    (tmp_path / "a.png").write_bytes(png.encode(pixels, {**marks, "prompt": "été 🙂"}))
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)
        assert picture.text == {**marks, "prompt": "été 🙂"}
        # Pillow reads XMP by the standard's own keyword.
        assert b"trainedAlgorithmicMedia" in picture.info["xmp"]


def test_licences_are_identifiers():
    assert model_card.check_license("Apache-2.0") == "apache-2.0" and model_card.check_license("") == "other"
