"""Embeddings made once: that they are CLIP's, that nothing interrupts them for good, and that training reads them."""

import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_configs import small
from training_processes import PATIENCE, ROOT
from untrained_models import write

from unclip_jax import embed, fitting, inputs, prepare, program, sharding
from unclip_jax.data import datasets, embedding_units, embeddings, images, pipeline, resize
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError


class Options:
    """The program's flags, with their defaults."""

    def __init__(self, **given):
        defaults = {"config": None, "storage": "float32", "unit_examples": 64, "mirrored": None, "workers": 0}
        defaults |= {"process_index": None, "process_count": None}
        for name in ("clip", "data", "data_dir", "split", "vocabulary", "out"):
            defaults[name] = ""
        unknown = set(given) - set(defaults)
        assert not unknown
        self.__dict__.update(defaults, **given)


def nothing():
    pass


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    """Two CLIPs that nobody trained."""
    folder = tmp_path_factory.mktemp("models")
    write(folder, "clip", data__variant="smoke")
    write(folder / "other", "clip", seed=1, data__variant="smoke")
    return folder


@pytest.fixture(scope="module")
def directory(data_dir) -> str:
    """The data set: 96 examples in "train", so two units of 64."""
    return datasets.prepare("captioned_shapes", data_dir=data_dir, variant="smoke")


@pytest.fixture(scope="module")
def made(models, directory, tmp_path_factory) -> pathlib.Path:
    """A finished folder, float32 and with mirrored pictures."""
    out = tmp_path_factory.mktemp("embeddings")
    list(embed.run(Options(clip=str(models / "clip"), data=directory, mirrored=True, out=str(out)), nothing))
    return out


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- training


def built(case, models, data_dir, **overrides):
    """The program of a small config whose CLIP is the one in `models`."""
    values = {"data__variant": "smoke", "data__cache": False, "data__data_dir": data_dir, **overrides}
    reads_clip = {} if case == "upsampler" else {"frozen__clip": str(models / "clip")}
    config = small(case, batch_size=8, **reads_clip, **values)
    return program.build(config, sharding.make_mesh({"data": 1}, jax.devices()[:1]))


def first_batches(case, models, data_dir, networks, count, **overrides):
    read = inputs.Input(built(case, models, data_dir, **overrides), networks).training(0)
    batches = [next(read) for _ in range(count)]
    read.close()
    return batches


@pytest.fixture(scope="module")
def networks(models) -> dict[str, str]:
    return {"clip": embed.read_clip(str(models / "clip")).fingerprint}


BOTH, IMAGE = {"clip_image", "clip_tokens"}, {"clip_image"}
# Stage, options, the fields that embeddings stand in for, and how near losses are. CLIP's rounding differs between
# batches of 8 and of 64; whitening divides it by the deviations of embeddings that, untrained, are nearly all one.
CASES = {
    "prior_ar": ("prior_ar", {}, BOTH, 1e-6),
    "prior_diffusion": ("prior_diffusion", {"embedding__norm": "raw"}, BOTH, 1e-6),
    "whitened": ("prior_diffusion", {"embedding__norm": "raw", "embedding__scaling": "whiten"}, BOTH, 2e-5),
    "decoder": ("decoder", {"data__crop_fraction": 0.75}, IMAGE, 1e-6),
}


def fitted(program_, frozen, read):
    """What the stage measures of the data, before its first step."""
    stage = program_.stage
    over_data = fitting.OverData(
        functools.partial(read.fitting, batch_size=fitting.CHUNK),
        frozen,
        spec=stage.batch_spec(fitting.CHUNK),
        examples=128,
        devices=jax.devices()[:1],
    )
    return stage.fit_statistics(over_data)[0]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_running_clip(case, models, data_dir, made, networks):
    """On the same examples in the same order, mirrored or not, from the cache or not; and what is fitted before."""
    case, options, replaced, near = CASES[case]
    options = dict(options)
    online, stored = (built(case, models, data_dir, **options, data__embeddings=x) for x in ("", str(made)))
    stage, frozen = online.stage, inputs.load_frozen(online)
    assert replaced <= set(stage.batch_spec(8)) and replaced.isdisjoint(stored.stage.batch_spec(8))
    assert stage.predict_specs(8) == stored.stage.predict_specs(8)
    measured, again = (fitted(x, frozen, inputs.Input(x, networks)) for x in (online, stored))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), measured, again)
    params = jax.jit(stage.init)(jax.random.key(1))
    unmeasured = jax.jit(stage.init_frozen)(jax.random.key(0)).get("statistics", {})
    frozen |= {"statistics": {**unmeasured, **measured}}
    loss = jax.jit(lambda batch, rng: stage.loss(params, frozen, batch, rng, train=True)[0])
    seen = {}
    for cache, flip in ((False, False), (False, True), (True, True), (True, False)):
        options |= {"data__cache": cache, "data__flip": flip}
        run = first_batches(case, models, data_dir, networks, 6, **options)
        read = first_batches(case, models, data_dir, networks, 6, data__embeddings=str(made), **options)
        for step, (old, new) in enumerate(zip(run, read, strict=True)):
            assert set(old) - set(new) == replaced and "z_i" in new
            for name in set(old) & set(new):
                np.testing.assert_array_equal(old[name], new[name], err_msg=name)
            expected, found = (float(loss(batch, jax.random.key(step))) for batch in (old, new))
            assert found == pytest.approx(expected, rel=near)
            seen.setdefault((flip, step), []).append((expected, new["z_i"]))
    for step in range(6):
        (loss_0, straight), (loss_1, cached) = seen[False, step]
        assert loss_0 == loss_1 and np.array_equal(straight, cached)
        turned = seen[True, step][0][1]
        assert not np.array_equal(turned, straight)  # in some rows only: about half are mirrored
    same = np.mean([np.all(seen[True, step][0][1] == seen[False, step][0][1], -1) for step in range(6)])
    assert 0.2 < same < 0.8


def test_a_slice_reads_its_own_rows_and_a_mixture_those_beside_each_set(models, directory, data_dir, made, networks):
    options = {"data__embeddings": str(made), "data__split": "train[20:60]"}
    read = first_batches("prior_ar", models, data_dir, networks, 3, **options)
    whole = embeddings.Stored(str(made / "train"))
    straight = np.zeros(8, bool)
    for batch in read:
        np.testing.assert_array_equal(batch["z_i"], whole.rows("z_i", batch["id"].astype(np.int64) + 20, straight))
        assert batch["id"].max() < 40
    both = (("captioned_shapes", "smoke", "train", 1.0), ("captioned_shapes", "smoke", "validation", 1.0))
    for split in ("train", "validation"):  # beside the data
        list(embed.run(Options(clip=str(models / "clip"), data=directory, split=split), nothing))
    options = {"data__mixture": both, "data__embeddings": "auto"}
    other = embeddings.Stored(os.path.join(inputs.beside(directory, networks["clip"]), "validation"))
    for batch in first_batches("prior_ar", models, data_dir, networks, 3, **options):
        for index, row in zip(batch["id"].astype(np.int64), batch["z_t"], strict=True):
            source, place = (whole, index) if index < 96 else (other, index - 96)
            np.testing.assert_array_equal(row, source.rows("z_t", np.array([place]), straight[:1])[0])
    with pytest.raises(InputError, match="one folder, config.data.mixture has 2 data sets"):
        inputs.Input(built("prior_ar", models, data_dir, data__mixture=both, data__embeddings=str(made)), networks)


def test_embeddings_of_something_else_are_refused_by_name(models, data_dir, made, networks, directory, tmp_path):
    def refused(match, case="prior_ar", given=networks, **overrides):
        options = {"data__embeddings": str(made), **overrides}
        with pytest.raises(InputError, match=match):
            inputs.Input(built(case, models, data_dir, **options), given)

    there = rf"clip \('{networks['clip']}' there, 'another' here\)"
    refused(rf"not this run's: {there}.*unclip_jax.embed --clip=", given={"clip": "another"})
    refused("holds no embeddings; make them: python -m unclip_jax.embed", data__embeddings=str(tmp_path / "none"))
    list(embed.run(Options(clip=str(models / "clip"), data=directory), nothing))
    only = rf"holds no embeddings, only of other CLIPs \({networks['clip']}\); make them"
    refused(only, data__embeddings="auto", given={"clip": "another"})
    refused("not this run's: network.activation", clip__activation="gelu")
    refused("put together of 2 slices", data__split="train[:20]+train[40:]")
    refused("this upsampler reads no embeddings; leave it empty", "upsampler", given={})
    shutil.copytree(made / "train", tmp_path / "validation")
    refused("not this run's: data.digest.*data.examples", data__split="validation", data__embeddings=str(tmp_path))
    straight = tmp_path / "straight"
    list(embed.run(Options(clip=str(models / "clip"), data=directory, out=str(straight)), nothing))
    refused("mirrored.*--mirrored", data__flip=True, data__embeddings=str(straight))
    whole = json.loads((straight / "train" / "embeddings.json").read_text())
    (straight / "train" / "embeddings.json").unlink()
    (straight / "train" / "units" / "00001.json").unlink()
    refused("not finished, 1 of 2 units are missing", data__embeddings=str(straight))
    whole["job"]["clip"] = networks["clip"][::-1]
    (straight / "train" / "embeddings.json").write_text(json.dumps(whole))
    refused("embeddings.json is damaged", data__embeddings=str(straight))


def test_a_run_remembers_its_embeddings(models, data_dir, made, networks):
    runs = (built("prior_ar", models, data_dir, data__embeddings=folder) for folder in ("", str(made)))
    plain, read = (inputs.Input(run, networks) for run in runs)
    assert read.fingerprint == {**plain.fingerprint, "embeddings": [embeddings.Stored(str(made / "train")).fingerprint]}


# ---------------------------------------------------------------- the job


def test_rows_are_what_clip_makes_of_the_pictures(models, directory, made):
    clip = embed.read_clip(str(models / "clip"))
    stored = embeddings.Stored(str(made / "train"))
    record = datasets.open_source(directory, "train")[70]
    pixels = resize.square(images.decode(record["image"]), size=clip.network.image_size)
    encode = jax.jit(lambda params, x: clip.network.apply(params, x, method="encode_image"))
    for mirrored in (False, True):
        seen = pixels[None, :, ::-1] if mirrored else pixels[None]
        z_i = encode(clip.params, jnp.asarray(seen / 127.5 - 1, jnp.float32))
        row = stored.rows("z_i", np.array([70]), np.array([mirrored]))
        np.testing.assert_allclose(row, np.asarray(z_i), rtol=1e-4, atol=1e-5)
        assert abs(np.linalg.norm(row) - 1) > 1e-3  # as CLIP's head returns it


@pytest.mark.parametrize(("storage", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0.0)])
def test_storage_rounds_to_nearest(storage, bound, tmp_path):
    job = a_job(storage=storage)
    rows = {name: np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32) for name in job.names}
    read = stored_in(tmp_path / storage, job, rows)
    found = read.rows("z_t", np.arange(100), np.zeros(100, bool))
    error = np.abs(found - rows["z_t"]) / np.abs(rows["z_t"])
    assert error.max() <= bound and (error.max() > bound / 4 or not bound)
    if storage == "float16":
        with pytest.raises(InputError, match="z_i of example 64 is not finite in float16; try --storage=float32"):
            rows["z_i"][64, 3] = 7e4
            stored_in(tmp_path / "wild", job, rows)


def a_job(**options):
    data = {"examples": 100}
    options = {"data": data, "clip": "a", "network": {}, "tokenizer": "b", "width": 8, "unit": 64, **options}
    return embeddings.Job(**{"storage": "float32", "mirrored": True, "backend": "cpu", **options})


def stored_in(folder, job, rows):
    embedding_units.begin(str(folder), job)
    for number in range(job.units()):
        inside = job.examples_of(number)
        unit = {name: row[inside.start : inside.stop] for name, row in rows.items()}
        embedding_units.write_unit(str(folder), job, number, unit, {})
    assert embedding_units.finish(str(folder), job)
    return embeddings.Stored(str(folder))


def test_no_flipped_bit_is_read_and_every_one_is_found(tmp_path):
    """All over a small folder: the reader refuses the row or it is as it was; the job finds the unit."""
    job = a_job(data={"examples": 5})
    rows = {name: np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32) for name in job.names}
    stored_in(tmp_path, job, rows)
    straight = np.zeros(5, bool)
    for file in ("units/00000.npy", "units/00000.json", "embeddings.json"):
        path, found = tmp_path / file, 0
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 29):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            if file.startswith("units"):
                assert embeddings.report(str(tmp_path), job, 0, verify=True) is None, bit
            try:
                read = embeddings.Stored(str(tmp_path))
                for name in ("z_i", "z_t"):
                    np.testing.assert_array_equal(read.rows(name, np.arange(5), straight), rows[name])
            except InputError as error:
                assert "damaged" in str(error)
                found += 1
        path.write_bytes(whole)
        assert found or file == "units/00000.json"  # which the reader does not need
    (tmp_path / "units/00000.npy").write_bytes(whole[:-1])
    with pytest.raises(InputError, match="00000.npy is missing or cut short"):
        embeddings.Stored(str(tmp_path))


def test_bad_pictures_have_no_rows_and_are_replaced_as_they_would_be(models, tmp_path):
    """A picture that is none is passed over with its own reason, by a run that decodes no picture."""
    data, damaged = tmp_path / "data", 11
    pictures(tmp_path / "source", 70)
    prepare.prepare(str(tmp_path / "source"), str(data), prepare.Settings())
    source = datasets.open_source(str(data), "train")
    records = [dict(source[index]) for index in range(70)]
    records[damaged]["image"] = b"no picture"
    clip = embed.read_clip(str(models / "clip"))
    job = a_job(data={"examples": 70}, clip=clip.fingerprint, width=clip.network.embed_dim, mirrored=False)
    tokenizer = Tokenizer("tiny")
    embed.embed(str(tmp_path / "out"), job, records, embed.Embedder(clip, mirrored=False), tokenizer)
    embedding_units.finish(str(tmp_path / "out"), job)
    stored = embeddings.Stored(str(tmp_path / "out"))
    assert stored.problem(damaged).startswith("not a JPEG, PNG or WebP") and not stored.problem(damaged + 1)
    tokens = {"id": jax.ShapeDtypeStruct((10,), np.uint32)}
    pixels = {"clip_image": jax.ShapeDtypeStruct((10, 8, 8, 3), np.uint8), **tokens}
    vectors = {"z_i": jax.ShapeDtypeStruct((10, clip.network.embed_dim), np.float32), **tokens}
    taken = []
    for spec in (pixels, vectors):
        options = {"tokenizer": tokenizer, "seed": 3, "batch_size": 10, "max_bad_fraction": 0.1}
        batches = pipeline.training_batches(records, spec=spec, embeddings=stored, **options)
        taken.append([next(batches)["id"].tolist() for _ in range(14)])
        assert list(batches.bad) == [damaged]
        batches.close()
    assert taken[0] == taken[1] and damaged not in sum(taken[1], [])


def test_a_damaged_row_ends_a_run_with_its_name(models, data_dir, made, networks, tmp_path):
    """In threads, in worker processes and in this one the same sentence."""
    shutil.copytree(made, tmp_path / "copy")
    path = tmp_path / "copy" / "train" / "units" / "00000.npy"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    for workers in (0, 1):
        options = {"data__embeddings": str(tmp_path / "copy"), "data__workers": workers}
        with pytest.raises(InputError, match="embeddings of example .* in .*00000.npy are damaged"):
            first_batches("prior_ar", models, data_dir, networks, 12, **options)


def test_what_the_job_refuses(models, directory, made, tmp_path):
    def refused(match, **options):
        with pytest.raises(InputError, match=match):
            list(embed.run(Options(**{"clip": str(models / "clip"), "data": directory, **options}), nothing))

    refused("no CLIP is named", clip="")
    refused("holds no checkpoint; it should be the workdir of a training run", clip=str(tmp_path))
    refused("holds no prepared data set", data=str(tmp_path))
    refused("has no split 'nothing'", split="nothing")
    refused("is no multiple of 64", unit_examples=100)
    refused("give both, the index from 0 and below the count", process_index=2, process_count=2)
    refused("was begun with another clip", clip=str(models / "other" / "clip"), out=str(made), mirrored=True)
    refused(r"begun with another mirrored \(True there, False here\)", out=str(made))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.tex").touch()
    refused("train is not empty and holds no embeddings; choose another --out", out=str(tmp_path))
    (tmp_path / "file").touch()
    refused("cannot be written", out=str(tmp_path / "file"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "thesis.tex", "train"]


# ---------------------------------------------------------------- real processes


def pictures(folder: pathlib.Path, count: int) -> None:
    """Writes a folder of captioned pictures, each of a colour of its own."""
    folder.mkdir()
    lines = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        (folder / f"{number}.png").write_bytes(images.encode_png(pixels))
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": f"picture {number}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def start(command, log, **environment):
    with log.open("w") as file:
        environment = {**os.environ, **environment}
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)


def interrupted(command, units, log, *, number, code):
    """Starts the job, waits until it has finished a unit more, and sends it a signal."""
    before, process = len(list(units.glob("*.json"))), start(command, log)
    try:
        deadline = time.monotonic() + PATIENCE
        while len(list(units.glob("*.json"))) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        assert process.wait(PATIENCE) == code, log.read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


def test_killed_stopped_damaged_and_shared_it_makes_the_same_files(models, tmp_path, compile_cache):
    """kill -9, SIGTERM, a flipped bit, a cut file; then two processes that JAX joins; against one that nobody hurt."""
    count = 40 * embed.CHUNK
    pictures(tmp_path / "source", count)
    data = str(tmp_path / "data")
    prepare.prepare(str(tmp_path / "source"), data, prepare.Settings())
    clip, units = str(models / "clip"), tmp_path / "out" / "train" / "units"
    command = [sys.executable, "-m", "unclip_jax.embed", f"--clip={clip}", f"--data={data}", "--unit_examples=64"]
    command += [f"--out={tmp_path / 'out'}", "--storage=float32", f"--compile_cache={compile_cache}", "--workers=0"]
    interrupted(command, units, tmp_path / "killed.log", number=signal.SIGKILL, code=-signal.SIGKILL)
    interrupted(command, units, tmp_path / "stopped.log", number=signal.SIGTERM, code=42)
    assert "run the same command" in (tmp_path / "stopped.log").read_text()
    done = sorted(units.glob("*.json"))
    assert 2 <= len(done) < 40 and not (tmp_path / "out" / "train" / "embeddings.json").exists()
    first, second = (path.with_suffix(".npy") for path in done[:2])
    damaged = bytearray(first.read_bytes())
    damaged[1000] ^= 16
    first.write_bytes(damaged)
    second.write_bytes(second.read_bytes()[:-100])
    hosts = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    processes = [start(command, log, **hosts, JAX_PROCESS_ID=str(index)) for index, log in enumerate(logs)]
    try:
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    alone = Options(clip=clip, data=data, out=str(tmp_path / "alone"))
    (sentence,) = embed.run(alone, nothing)
    left = {name for name in files_of(tmp_path / "out") if ".partial-" in name}
    ours = {name: content for name, content in files_of(tmp_path / "out").items() if name not in left}
    assert ours == files_of(tmp_path / "alone") and len(left) <= 2
    assert sentence.partition("alone")[2] == logs[0].read_text().strip().splitlines()[-1].partition("out")[2]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def test_shares_without_jax_make_the_same_files(models, directory, made, tmp_path):
    for index in (1, 0):
        options = {"clip": str(models / "clip"), "data": directory, "mirrored": True, "out": str(tmp_path)}
        (sentence,) = embed.run(Options(process_index=index, process_count=2, **options), nothing)
        assert ("1 of 2 units are left to others" in sentence) == bool(index)
    assert files_of(tmp_path) == files_of(made)
