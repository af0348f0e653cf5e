"""The evaluation job: what it measures, that nothing interrupts it for good, and what it refuses."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import coco_files
import export_test
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from short_evaluation import SHORT
from training_processes import PATIENCE, ROOT, Processes
from untrained_models import save, write

from unclip_jax import (
    checkpoint,
    evaluate,
    evaluation_exchange,
    evaluation_pages,
    export,
    feature_networks,
    reference_filter,
    unclip,
)
from unclip_jax import config as configs
from unclip_jax.artifacts import components, evaluations
from unclip_jax.data import embedding_units, embeddings, images
from unclip_jax.errors import InputError
from unclip_jax.evaluated_models import EvaluatedModels, Point
from unclip_jax.evaluation import frechet, inception, preprocessing, protocols, references, scoring
from unclip_jax.evaluation_job import EvaluationJob
from unclip_jax.image_units import CONSTANT, NON_FINITE, DrawnUnits, Share, fill

PARTS = ("clip", "prior_diffusion", "decoder", "upsampler_1")


def nothing():
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Parts that nobody trained."""
    made = tmp_path_factory.mktemp("models")
    for name in PARTS:
        write(made, name)
    return made


@pytest.fixture(scope="module")
def config():
    return configs.load("configs/eval_captioned_shapes.py:smoke", {"microbatch": 2})


@pytest.fixture
def short(monkeypatch):
    """The smoke protocol with 32 captions and 40 real images, of the decoder alone, to have less to compile."""
    monkeypatch.setitem(protocols.PROTOCOLS, SHORT.name, SHORT)


@pytest.fixture(scope="module")
def models(folder, config) -> EvaluatedModels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(protocols.PROTOCOLS, SHORT.name, SHORT)
        return evaluate.read_models(config, str(folder))


def changed(config, **values):
    with (copy := config.copy_and_resolve_references()).unlocked():
        copy.update_from_flattened_dict(values)
    return copy


def measure(results, key="fid", point=0):
    ((_, found),) = results["points"][point]["protocols"].items()
    (measures,) = found.values()
    return next(one for one in measures if one["key"] == key)


# ---------------------------------------------------------------- what it measures


def test_images_are_those_of_generate_and_numbers_those_of_their_features(short, models, folder, config, tmp_path):
    job = EvaluationJob(config, models, tmp_path, reference=tmp_path / "reference")
    results = job.run(Share(), stop=nothing)
    chain = models.at(models.own)
    captions, ids = [row.caption for row in job.rows], [row.caption_id for row in job.rows]
    made = chain.generate(captions, ids=ids, seed=config.seed)
    drawn = job.drawn(job.points[0])
    np.testing.assert_array_equal(drawn.images.gathered("image")["image"], made.images["decoder"])
    np.testing.assert_allclose(drawn.z_i.gathered("z_i")["z_i"], made.z_i, rtol=1e-5, atol=1e-6)
    (features,) = drawn.features.values()
    z_i = chain.embed_images(made.images["decoder"])
    np.testing.assert_allclose(features.gathered("z_i")["z_i"], z_i, rtol=1e-4, atol=1e-5)
    real = chain.embed_images(np.stack([job._pool.image(number) for number in range(40)]))
    found = measure(results)
    expected = frechet.distance_of_features(z_i, real)
    assert found["value"] == pytest.approx(expected, rel=1e-4) and expected > 1e-5
    assert found["name"].startswith("Fréchet distance (CLIP ") and found["standard_error"] > 0
    score = 100 * (z_i * chain.embed_text(captions)).sum(1)
    assert measure(results, "clip_score")["value"] == pytest.approx(score.mean(), rel=1e-4)
    assert results["manifest"]["protocols"] == {config.protocols[0]: protocols.named(config.protocols[0]).digest}
    assert results["points"][0]["bad"] == {"count": 0, "images": []}
    page = evaluation_pages.page(results, job.shown(4))
    assert page.count("data:image/png") == 8 and "is not the FID" not in page and captions[3] in page
    assert "they are not the FID that papers print" in page and f"Run <code>{job.id}</code>" in page
    again = EvaluationJob(config, models, tmp_path, reference=tmp_path / "reference")
    assert again.run(Share(), stop=nothing)["points"] == results["points"]  # nothing is made anew, nothing changes
    exported(tmp_path, made.images["decoder"], real)
    carded(tmp_path, folder, results)


def exported(workdir, pixels, real):
    """What others' programs are given: the images, by one file or by many, and the moments of the real ones."""
    out = workdir / "exported"
    evaluation_exchange.export(workdir, out, form="npz")
    (path,) = [path for path in out.glob("*.npz") if "reference" not in path.name]
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], pixels)
    evaluation_exchange.export(workdir, out, form="png")
    for caption_id in (0, 7, 31):
        picture = Image.open(out / path.stem / f"{caption_id}.png")
        np.testing.assert_array_equal(np.asarray(picture), pixels[caption_id])
    (path,) = out.glob("reference-*.npz")
    known = references.read(path, expected={"protocol": SHORT.digest})
    assert known.moments.count == 40
    np.testing.assert_allclose(known.moments.sigma, np.cov(real.T), rtol=1e-3, atol=1e-7)
    with pytest.raises(InputError, match="is of another protocol"):
        references.read(path, expected={"protocol": protocols.named("emoji").digest})
    with pytest.raises(InputError, match="holds no images of an evaluation"):
        evaluation_exchange.export(out, out, form="npz")


def carded(workdir, folder, results):
    """The card of an export has these numbers, if it is the weights that were scored that are exported."""
    (workdir / "results.json").write_text(json.dumps(results))
    record = {**export_test.OPTIONS, "workdir": str(folder / "decoder"), "evaluation": str(workdir)}
    export.run(record, str(workdir / "decoder"), command="", poll=nothing)
    card = (workdir / "decoder" / "README.md").read_text()
    value, error = evaluation_pages.stated(measure(results)["value"], measure(results)["standard_error"])
    assert f"| {SHORT.name} | {SHORT.digest} |" in card and f"| {value} ± {error} |" in card and "decoder 0" in card
    for name, says in (("prior_ar", "none of which is exported"), ("decoder", "scored other weights of decoder")):
        others = write(workdir / "others", name, seed=1)
        with pytest.raises(InputError, match=says):
            evaluations.read(str(workdir), components.describe({name: str(others)}), weights="ema")
    with pytest.raises(InputError, match="holds no results that can be read"):
        evaluations.read(str(folder), components.describe({"clip": str(folder / "clip")}), weights="ema")


def test_score_reads_images_as_the_protocol_does(monkeypatch, tmp_path):
    """The command's arguments are passed on; the numbers are tested where they are computed."""
    seen = {}

    def score(samples, reference, network, **options):
        seen.update(options, samples=samples, reference=reference, network=network.name)
        return {"metrics": {"fid": {"value": np.float64(1.5), "standard_error": None}}}

    monkeypatch.setattr(scoring, "score", score)
    monkeypatch.setattr(inception, "check_device", lambda size: 0.0)  # tested where it is defined

    class Options:
        samples, reference, inception, protocol = "a.npz", "b.npz", "redrawn", "coco30k-clean"
        batch_size, out = 8, str(tmp_path / "score.json")

    *_, text = evaluation_exchange.score(Options)
    assert json.loads(text) == json.loads(pathlib.Path(Options.out).read_text())
    assert json.loads(text)["metrics"]["fid"]["value"] == 1.5
    digest = protocols.named("coco30k-clean").digest
    assert json.loads(text)["protocol"]["digest"] == digest == seen["expected"]["protocol"]
    pixels = coco_files.pixels(3)
    np.testing.assert_array_equal(seen["prepare"](pixels), preprocessing.lanczos_crop(pixels, 256))
    Options.inception = ""
    with pytest.raises(InputError, match="--inception is missing"):
        list(evaluation_exchange.score(Options))


def test_a_sweep_shares_embeddings_and_noise_and_pairs_its_differences(short, models, config, tmp_path):
    swept = changed(config, **{"sweep.decoder": (1.4, models.own.decoder)})
    job = EvaluationJob(swept, models, tmp_path)
    results = job.run(Share(), stop=nothing)
    assert sorted(path.name for path in (tmp_path / "points").glob("z_i*")) == ["z_i-prior_1"]
    values = {one["decoder"]: measure(results, point=n) for n, one in enumerate(results["points"])}
    assert list(values) == [1.4, models.own.decoder]
    alone = EvaluationJob(config, models, tmp_path / "alone").run(Share(), stop=nothing)
    assert measure(alone)["value"] == values[models.own.decoder]["value"]
    (one,) = results["differences"]
    there, base = values[1.4], values[models.own.decoder]
    assert one["value"] == pytest.approx(there["value"] - base["value"], rel=1e-9)
    # Of the same captions and noise: far more certain than two independent numbers would be.
    assert 0 < one["standard_error"] < 0.3 * np.hypot(there["standard_error"], base["standard_error"])
    page = evaluation_pages.page(results, job.shown(2))
    assert page.count("data:image/svg+xml") == 1 and "compared with" in page
    lines = evaluation_pages.markdown(results).splitlines()
    assert len(lines) == 4 and "1.4/1" in lines[2]
    more = changed(config, **{"sweep.decoder": (1.4, 3.0)})  # a scale more in the same folder
    assert len(EvaluationJob(more, models, tmp_path).run(Share(), stop=nothing)["points"]) == 2


def test_two_protocols_of_coco_score_one_set_of_images(models, config, tmp_path, monkeypatch):
    """Both with the references of their own, and a file of near-duplicates that one of them reads."""
    annotations, pictures = coco_files.write(tmp_path, 24)
    names = ("coco30k-openai", "coco30k-clean", "coco30k-openai-filtered")
    for name in names:
        protocol = dataclasses.replace(protocols.named(name), images=24, count=16, size=16)
        monkeypatch.setitem(protocols.PROTOCOLS, name, protocol)
    coco = {"coco_files.annotations": annotations, "coco_files.images": pictures, "protocols": names}
    both = changed(config, **coco)
    with pytest.raises(InputError, match="leaves near-duplicates of the training set out, which a file must name"):
        EvaluationJob(both, models, tmp_path / "run")
    removed = duplicates(models, both, tmp_path, annotations, pictures)
    both = changed(both, removed=str(removed))
    results = EvaluationJob(both, models, tmp_path / "run").run(Share(), stop=nothing)
    (point,) = results["points"]
    values = {name: next(iter(found.values()))[0]["value"] for name, found in point["protocols"].items()}
    assert len(set(values.values())) == 3 and min(values.values()) > 0
    assert results["removed"] == {"coco30k-openai": 0, "coco30k-clean": 0, "coco30k-openai-filtered": 3}
    assert [one["images"] for one in results["references"].values()] == [24, 24, 21]
    assert len(list((tmp_path / "run" / "points").iterdir())) == 3  # embeddings, images, features: once
    mlperf = dataclasses.replace(protocols.named("coco30k-mlperf"), images=16, count=16, size=16)
    monkeypatch.setitem(protocols.PROTOCOLS, "coco30k-mlperf", mlperf)
    other = changed(both, protocols=("coco30k-openai", "coco30k-mlperf"))
    with pytest.raises(InputError, match="coco30k-openai and coco30k-mlperf draw other captions"):
        EvaluationJob(other, models, tmp_path / "other")
    path = next(pathlib.Path(pictures).iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=f"the image .*{path.name} cannot be read"):
        EvaluationJob(both, models, tmp_path / "again").run(Share(), stop=nothing)


def duplicates(models, config, folder, annotations, pictures):
    """The command on a training set that holds three of COCO's images; its embeddings are written as `embed` does."""
    names = sorted(pathlib.Path(pictures).iterdir())[4:7]
    clip = models.at(models.own)
    rng = np.random.default_rng(0)
    trained = [rng.integers(0, 256, (40, 40, 3), np.uint8) for _ in range(9)]
    trained[3:3] = [images.decode(path.read_bytes()) for path in names]
    rows = np.concatenate([clip.embed_images(image[None]) for image in trained])
    job = embeddings.Job(
        data={"examples": len(rows)}, clip=models.described()["models"]["clip"]["digest"], network={}, tokenizer="",
        width=rows.shape[1], unit=64, storage="float32", mirrored=False, backend="cpu",
    )  # fmt: skip
    embedding_units.begin(str(folder / "train"), job)
    embedding_units.write_unit(str(folder / "train"), job, 0, {"z_i": 3.0 * rows, "z_t": rows}, {})
    embedding_units.finish(str(folder / "train"), job)

    class Options:
        clip = str(pathlib.Path(models.models) / "clip")
        training = (str(folder / "train"),)
        threshold = 0.99999
        out = str(folder / "removed.json")

    filtered = changed(config, protocols=("coco30k-openai-filtered",))
    sentence = reference_filter.run(filtered, Options, nothing)
    assert sentence.startswith("3 of 24 images (12.5%)")
    listed = json.loads((folder / "removed.json").read_text())["removed"]
    assert [row[0] for row in listed] == sorted(int(path.stem.rpartition("_")[2]) for path in names)
    assert sorted(row[2] for row in listed) == [3, 4, 5]
    with pytest.raises(InputError, match="none of coco30k-openai leaves near-duplicates out"):
        reference_filter.run(changed(config, protocols=("coco30k-openai",)), Options, nothing)
    return folder / "removed.json"


# ---------------------------------------------------------------- what it refuses


def test_what_goes_wrong_is_said_before_anything_is_written(short, models, folder, config, tmp_path):
    def refused(match, **values):
        with pytest.raises(InputError, match=match):
            given = changed(config, **values)
            found = models if "weights" not in values and "prior" not in values else None
            EvaluationJob(given, found or evaluate.read_models(given, str(folder)), tmp_path / "none")
        assert not (tmp_path / "none").exists()

    refused("there is no protocol 'captioned_shape'; did you mean 'captioned_shapes'", protocols=("captioned_shape",))
    refused("config.protocols is empty", protocols=())
    refused("are of other data or sizes", protocols=("captioned_shapes", "coco30k-openai"))
    refused("config.features is empty", features=())
    refused("there is no feature network 'inceptoin'; did you mean 'inception'", features=("inceptoin",))
    refused("'inception', whose weights are a file that you must have", features=("inception",))
    refused("config.weights='emma'; did you mean 'ema'", weights="emma")
    refused("config.prior='difusion' is unknown", prior="difusion")
    with pytest.raises(InputError, match="config.sweep.prior is set, but the prior 'none' draws nothing"):
        none = evaluate.read_models(changed(config, prior="none"), str(folder))
        none.points((), (1.0, 2.0))
    few = tmp_path / "few"
    for name in ("clip", "decoder", "upsampler_1"):
        shutil.copytree(folder / name, few / name)
    with pytest.raises(InputError, match="the protocol wants images of 256 pixels, and .* upsampler_1 32"):
        EvaluatedModels.read(str(few), prior="none", size=256, sampling={}, weights="ema", microbatch=2)
    with pytest.raises(InputError, match="decoder has no option sampling.candidates"):
        EvaluatedModels.read(
            str(folder), prior="none", size=16, sampling={"decoder": {"candidates": "2"}}, weights="ema",
            microbatch=2,
        )  # fmt: skip


def test_another_run_in_the_folder_is_refused_with_what_differs(short, models, folder, config, tmp_path):
    EvaluationJob(config, models, tmp_path / "run")
    for values, match in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"unit_rows": 8}, "unit_rows was 16, is 8"),
        ({"sweep.decoder": (2.0,)}, "guidance was .* is 'sweep'"),
    ):
        with pytest.raises(InputError, match=f"belongs to another run \\({match}"):
            EvaluationJob(changed(config, **values), models, tmp_path / "run")
    for values, match in (
        (
            {"sampled.decoder.timesteps": "2", "sampled.decoder.guidance_scale": "2.0", "weights": "params"},
            "guidance.decoder was 1.5, is 2.0; sampling.decoder.timesteps was '3', is '2'; weights was 'ema', is 'para",
        ),
    ):
        given = changed(config, **values)
        with pytest.raises(InputError, match=match):
            EvaluationJob(given, evaluate.read_models(given, str(folder)), tmp_path / "run")
    shutil.copytree(folder, tmp_path / "retrained")
    config_there = configs.from_json((folder / "decoder" / "config.json").read_text())
    shutil.rmtree(tmp_path / "retrained" / "decoder")
    read = checkpoint.trained_on(folder / "decoder", 0)
    save(tmp_path / "retrained" / "decoder", config_there, seed=5, step=7, extra={"data": read})
    with pytest.raises(InputError, match="models.decoder.digest was .*; models.decoder.step was 0, is 7"):
        EvaluationJob(config, evaluate.read_models(config, str(tmp_path / "retrained")), tmp_path / "run")


def test_a_checkpoint_without_a_moving_average_is_refused(folder, tmp_path):
    shutil.copytree(folder / "upsampler_1", tmp_path / "upsampler_1")
    (step,) = checkpoint.steps_of(tmp_path / "upsampler_1" / "checkpoints")
    where = tmp_path / "upsampler_1" / "checkpoints" / str(step)
    meta = ocp.JsonCheckpointHandler().restore(where / "meta")
    shutil.rmtree(where / "ema")
    del meta["digest"], meta["arrays"]["ema"]
    meta["digest"] = checkpoint.meta_digest(meta)
    (where / "meta" / "metadata").write_text(json.dumps(meta))
    folders = {"upsampler_1": str(tmp_path / "upsampler_1")}
    with pytest.raises(InputError, match="has no moving average of weights; --weights=params takes the last"):
        unclip.UnCLIP.load(folders, weights="ema")
    unclip.UnCLIP.load(folders, weights="params")


def test_references_of_another_protocol_are_refused(short, models, folder, config, tmp_path, monkeypatch):
    """Here by features of a CLIP that is named, as one of another run would be."""
    given = changed(config, reference=str(tmp_path / "reference"), clip_workdir=str(folder / "clip"))
    evaluate.evaluate(given, models, tmp_path / "run", share=Share(), stop=nothing)
    name = config.protocols[0]
    monkeypatch.setitem(protocols.PROTOCOLS, name, dataclasses.replace(protocols.named(name), metrics=("fid",)))
    with pytest.raises(InputError, match=r"belongs to another run \(protocol.digest was"):
        evaluate.evaluate(given, models, tmp_path / "other", share=Share(), stop=nothing)


def test_images_that_are_none_are_named_and_too_many_end_the_job(short, models, config, tmp_path, monkeypatch):
    """A prior whose embedding of one caption is not finite, and an image that is of one colour."""
    prior, decode = unclip.UnCLIP.sample_prior, unclip.UnCLIP.decode

    def broken(self, captions, **options):
        z_i = np.array(prior(self, captions, **options))
        z_i[np.array(options["ids"]) == 5] = np.nan
        return z_i

    def flat(self, z_i, captions, **options):
        made = np.array(decode(self, z_i, captions, **options))
        made[np.array(options["ids"]) == 20] = (9, 8, 7)
        return made

    monkeypatch.setattr(unclip.UnCLIP, "sample_prior", broken)
    monkeypatch.setattr(unclip.UnCLIP, "decode", flat)
    job = EvaluationJob(changed(config, max_bad_percent=10.0), models, tmp_path)
    results = job.run(Share(), stop=nothing)
    bad = results["points"][0]["bad"]
    assert [(one["row"], one["why"]) for one in bad["images"]] == [(5, NON_FINITE), (20, CONSTANT)]
    assert bad["count"] == 2
    assert job.rows[5].caption in evaluation_pages.page(results, job.shown(1))
    strict = EvaluationJob(changed(config, max_bad_percent=5.0), models, tmp_path)
    with pytest.raises(InputError, match="2 of 32 images are bad, more than .*=5: the first is row 5"):
        strict.run(Share(), stop=nothing)


def test_noise_that_depends_on_the_batch_is_refused(folder, config):
    with jax.default_prng_impl("rbg"), pytest.raises(InputError, match="unset JAX_DEFAULT_PRNG_IMPL"):
        evaluate.read_models(config, str(folder))


def test_inception_is_asked_for_as_the_protocol_says(monkeypatch):
    protocol = protocols.named("coco30k-clean")
    network = feature_networks.read("inception-redrawn", protocol, weights="", clip=None, microbatch=2)
    assert network.path == "clean" and "redrawn" in network.name
    with pytest.raises(InputError, match="give its workdir by --config.clip_workdir"):
        feature_networks.read("clip", protocol, weights="", clip=None, microbatch=2)


# ---------------------------------------------------------------- following a run


def test_each_checkpoint_of_a_run_is_scored_as_it_appears(short, folder, config, tmp_path):
    """Two steps, the first of which its run deletes when it saves the last one."""
    followed = tmp_path / "models"
    shutil.copytree(folder, followed, ignore=shutil.ignore_patterns("upsampler_*"))
    own = changed(configs.from_json((folder / "decoder" / "config.json").read_text()), total_steps=9)
    trained_on = {"data": checkpoint.trained_on(folder / "decoder", 0)}
    shutil.rmtree(followed / "decoder")
    save(followed / "decoder", own, seed=1, step=4, extra=trained_on)

    class Options:
        follow, checkpoint, workdir = "decoder", str(followed), str(tmp_path / "out")

    config = changed(config, prior="none")
    sentences = evaluate.follow(config, Options, share=Share(), stop=nothing)
    assert "decoder-00000004" in next(sentences)
    save(followed / "decoder", own, seed=2, step=9, extra=trained_on)
    assert "decoder-00000009" in next(sentences)
    assert next(sentences).startswith("the run of decoder has ended; 2 of its checkpoints are scored")
    assert not list(sentences)
    rows = (tmp_path / "out" / "followed.md").read_text().splitlines()
    assert len(rows) == 4 and "decoder 4 " in rows[2] and "decoder 9 " in rows[3]
    assert (tmp_path / "out" / "reference").is_dir()  # which both share
    Options.follow = "upsampler_3"
    with pytest.raises(InputError, match="there is no such part; did you mean 'upsampler_"):
        next(evaluate.follow(config, Options, share=Share(), stop=nothing))


# ---------------------------------------------------------------- real processes


def units_of(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(workdir)): path.read_bytes() for path in sorted(workdir.rglob("*.npz"))}


def interrupted(command, workdir, log, *, number, code):
    """Starts the job, waits until it has finished a unit of images more, and sends it a signal."""
    images = "points/decoder_1.5-prior_1/units/*.json"
    before = len(list(workdir.glob(images)))
    process = Processes(command, logs=log, environment={"PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + PATIENCE
        while len(list(workdir.glob(images))) <= before and process.running() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.processes[0].send_signal(number)
        assert process.codes() == [code], process.texts()[0][-2000:]
    finally:
        process.kill()


def test_killed_stopped_damaged_and_shared_it_comes_to_the_same_digits(folder, tmp_path, compile_cache):
    """kill -9, SIGTERM, a cut unit; then two processes that JAX joins; against one that nobody hurt."""
    command = [sys.executable, str(ROOT / "tests" / "short_evaluation.py")]
    command += ["--config=configs/eval_captioned_shapes.py:smoke"]
    command += [f"--checkpoint={folder}", f"--compile_cache={compile_cache}", "--config.unit_rows=2"]
    command += ["--config.microbatch=2"]
    alone = subprocess.run(
        [*command, f"--workdir={tmp_path / 'alone'}"], cwd=ROOT, capture_output=True, text=True,
        timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    hurt = tmp_path / "hurt"
    command += [f"--workdir={hurt}"]
    interrupted(command, hurt, tmp_path / "killed", number=signal.SIGKILL, code=-signal.SIGKILL)
    interrupted(command, hurt, tmp_path / "stopped", number=signal.SIGTERM, code=42)
    done = sorted(hurt.glob("points/decoder_1.5-prior_1/units/*.npz"))
    assert 2 <= len(done) < 16 and not (hurt / "results.json").exists()
    done[0].write_bytes(done[0].read_bytes()[:-100])
    both = Processes(command, logs=tmp_path / "both", processes=2, environment={"PYTHONPATH": str(ROOT)})
    assert both.codes() == [0, 0], "\n".join(text[-2000:] for text in both.texts())
    assert units_of(hurt) == units_of(tmp_path / "alone") and len(units_of(hurt)) == 3 * 16 + 20
    there, here = (json.loads((workdir / "results.json").read_text()) for workdir in (tmp_path / "alone", hurt))
    assert here["run"] == there["run"] and here["points"] == there["points"]
    assert measure(here)["value"].hex() == measure(there)["value"].hex()
    assert "is damaged" in both.texts()[0] and str(hurt / "results.html") in both.texts()[1]


def test_shares_without_jax_come_to_the_same(short, models, config, tmp_path):
    whole = EvaluationJob(config, models, tmp_path / "whole")
    expected = whole.run(Share(), stop=nothing)
    job = EvaluationJob(config, models, tmp_path / "shared")
    assert job.run(Share(1, 2), stop=nothing) is None
    found = EvaluationJob(config, models, tmp_path / "shared").run(Share(0, 2), stop=nothing)
    assert found["points"] == expected["points"] and units_of(tmp_path / "shared") == units_of(tmp_path / "whole")


def test_a_unit_that_another_process_made_is_not_made_again(short, models, config, tmp_path, monkeypatch):
    job = EvaluationJob(config, models, tmp_path)
    drawn = job.drawn(Point(models.own.decoder, 1.0))
    fill(drawn, Share(), label="first", stop=nothing)
    monkeypatch.setattr(DrawnUnits, "make", None)
    fill(job.drawn(Point(models.own.decoder, 1.0)), Share(), label="again", stop=nothing)
