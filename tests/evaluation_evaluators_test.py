"""Evaluators against hand-made models whose scores are known, and in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import SIZE, Examples, create, run, unit

from unclip_jax import config as configs
from unclip_jax import sharding, train
from unclip_jax.arrays import from_uint8
from unclip_jax.data.scenes import SHAPES
from unclip_jax.errors import InputError
from unclip_jax.evaluation import evaluators

COUNT = 11  # the last batch is filled up


def loss(params, frozen, batch, rng):
    assert (params, frozen) == ("params", "frozen")
    v = batch["value"]
    return v.mean(), {"mean": v.mean(), "large": (v[v > 5].sum(), (v > 5).sum()), "none": (0.0, 0.0)}


def test_loss_averages_whole_batches_and_weights_pairs():
    value = np.arange(COUNT, dtype=np.float32)
    scores = run("loss", Examples(value=value), predict={"loss": loss})
    assert scores == {"loss": value[:8].mean(), "mean": value[:8].mean(), "large": 6.5}


@pytest.mark.parametrize(("examples", "said"), [
    (8, ""), (11, "leaves out 3 of 11 examples"), (99, "leaves out 3 of 11 examples"), (3, "no value for 3 examples"),
])
def test_examples_that_the_loss_leaves_out_are_counted_in_the_log(examples, said, caplog):
    data = Examples(value=np.arange(COUNT, dtype=np.float32))
    create("loss", data, predict={"loss": loss}, examples=examples)
    assert said in caplog.text and bool(said) == bool(caplog.records)


def test_embedding_gives_the_cosine_and_that_of_others():
    rng = np.random.default_rng(0)
    z_i, sampled = unit(rng, COUNT), unit(rng, COUNT)
    predict = {
        "sample_z_i": lambda params, frozen, batch, rng: batch["caption"],
        "z_i": lambda params, frozen, batch, rng: batch["picture"],
    }
    scores = run("embedding", Examples(picture=z_i, caption=sampled), predict=predict)
    assert scores["cosine"] == pytest.approx(np.mean([a @ b for a, b in zip(z_i, sampled, strict=True)]), abs=1e-6)
    others = []
    for start in range(0, COUNT, SIZE):
        part = slice(start, min(start + SIZE, COUNT))
        others += [a @ b for a, b in zip(sampled[part], np.roll(z_i[part], 1, axis=0), strict=True)]
    assert scores["cosine_of_others"] == pytest.approx(np.mean(others), abs=1e-6)


def test_pictures_are_laid_out_on_white():
    images = np.arange(COUNT, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    predict = {"reconstruct": lambda params, frozen, batch, rng: batch["image"]}
    scores = run("pictures", Examples(image=images), predict=predict)
    assert np.array_equal(scores["samples"], evaluators.grid(images[:SIZE]))
    grid = evaluators.grid(images, columns=4, gap=1)
    assert grid.shape == (3 * 3 - 1, 4 * 3 - 1, 3) and grid.dtype == np.uint8
    for number in range(COUNT):
        top, left = number // 4 * 3, number % 4 * 3
        assert (grid[top : top + 2, left : left + 2] == number).all()
    assert (grid[2] == 255).all() and (grid[:, 2] == 255).all() and (grid[6:, 9:] == 255).all()


def test_functions_get_the_fields_that_they_read_and_no_others():
    """One set of fields is one compiled program, whoever calls it."""
    seen = []

    def record(name):
        def call(params, frozen, batch, rng):
            seen.append((name, *sorted(batch)))
            return batch["picture" if name == "z_i" else "caption"]

        return call

    rng = np.random.default_rng(0)
    data = Examples(picture=unit(rng, COUNT), caption=unit(rng, COUNT), label=np.arange(COUNT) % 3, names="abc")
    predict = {name: record(name) for name in ("z_i", "z_t")}
    for name in ("retrieval", "zero_shot", "linear_probe"):
        run(name, data, predict=predict, tokenize=lambda texts, length: np.zeros((len(texts), 3)), specs={
            "z_i": {"picture": jax.ShapeDtypeStruct((SIZE, 3), np.float32)},
            "z_t": {"caption": jax.ShapeDtypeStruct((SIZE, 3), np.float32)},
        })  # fmt: skip
    assert set(seen) == {("z_i", "picture"), ("z_t", "caption")}


def test_unknown_and_unfitting_evaluators_are_refused():
    with pytest.raises(InputError, match="did you mean 'retrieval'"):
        run("retreival", Examples())
    with pytest.raises(InputError, match="'pictures' needs 'reconstruct', which this stage does not predict"):
        run("pictures", Examples(), predict={"loss": loss})


@pytest.fixture
def config(data_dir):
    """A small CLIP, with every evaluator that it has."""
    config = configs.load("tests/small_clip.py:2")
    with config.unlocked():
        config.data.data_dir = data_dir
        config.evaluation.update({"examples": 30, "batch_size": 16, "probe_examples": 60})
        config.evaluation.evaluators = ("loss", "retrieval", "zero_shot", "linear_probe")
    return config


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(train.sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


def test_a_run_measures_its_data_by_their_labels(config, tmp_path, caplog):
    """On eight devices, whose parts are gathered; zero-shot again by hand, on one."""
    run = train.Run(config, str(tmp_path / "run"))
    assert "'loss' leaves out 14 of 30 examples" in caplog.text
    params = run.program.init(jax.random.key(0)).params
    scores = {name: value for evaluator in run.evaluators for name, value in evaluator.run(params, {})}
    assert {"loss", "image_to_text_r5", "text_to_image_median_rank", "probe_mean_per_class"} <= set(scores)
    assert 0 <= scores["probe_top1"] <= 1 and 1e-6 <= scores["probe_strength"] <= 1e6

    spec = {"label": jax.ShapeDtypeStruct((30,), np.int32), **run.program.stage.predict_specs(30)["z_i"]}
    (batch,) = run.input.evaluation().batches(spec, source="labelled", limit=30, batch_size=30)
    network, weights = run.program.stage.network, jax.device_put(params, jax.devices()[0])
    prompts = [prompt for shape in SHAPES for prompt in (f"a {shape}", f"a small {shape}", f"a large {shape}")]
    tokens = jnp.asarray(run.input.tokenizer.encode(prompts + prompts[:9], 24))  # as many as images
    z_i, z_t, _ = jax.jit(network.apply)(weights, from_uint8(batch["clip_image"]), tokens)
    z_t = z_t[:21]
    means = (z_t / np.linalg.norm(z_t, axis=1, keepdims=True)).reshape(7, 3, -1).mean(1)
    classes = means / np.linalg.norm(means, axis=1, keepdims=True)
    labelled = batch["label"] >= 0
    assert 15 < labelled.sum() < 30
    hits = np.argmax(z_i @ classes.T, axis=1)[labelled] == batch["label"][labelled]
    assert scores["zero_shot_top1"] == pytest.approx(hits.mean())
    shares = [hits[batch["label"][labelled] == label].mean() for label in set(batch["label"][labelled])]
    assert scores["zero_shot_mean_per_class"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize(("values", "message"), [
    ({"label": "shap"}, "config.evaluation.label: records in .* have no class label 'shap'; did you mean 'shape'"),
    ({"label": ""}, "have no class label ''; known are background, colour, relation, shape, size, texture"),
    ({"classes": ("circle", "square")}, "classes has 2 names, but config.evaluation.label='shape' has 7 classes"),
    ({"classes": ("@nowhere.txt",)}, "classes: the file 'nowhere.txt' cannot be read"),
    ({"classes": (1, 2)}, "classes has 1; it takes texts"),
    ({"templates": ("a {}", "a photo")}, "templates has 'a photo', which has no {} for the name"),
    ({"recall_at": (1, 40)}, "recall_at has 40, but retrieval is among 30 pairs"),
    ({"label_split": "valid"}, "config.evaluation.label_split: .*no split 'valid'"),
    ({"label_train_split": "trian"}, "config.evaluation.label_train_split: .*did you mean 'train'"),
    ({"label_dataset": "/nowhere", "label_split": "test"}, "evaluation.label_dataset and label: '/nowhere' holds no"),
    ({"label_dataset": "there"}, "label_dataset='.*there' needs config.evaluation.label_split, one of its splits"),
])
def test_what_evaluators_cannot_use_is_found_before_anything_is_written(
    config, one_device, tmp_path, data_dir, values, message
):
    if values.get("label_dataset") == "there":  # a data set that is there
        values = {**values, "label_dataset": train.Input(train.build(config, sharding.make_mesh({}))).directory}
        message = message.replace("there", "")
    config.update_from_flattened_dict({f"evaluation.{key}": value for key, value in values.items()})
    with pytest.raises(InputError, match=message):
        train.Run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_labels_may_come_from_another_data_set(config, one_device, tmp_path, data_dir):
    """Here the same one, other splits, under its path."""
    directory = train.Input(train.build(config, train.sharding.make_mesh(config.mesh))).directory
    config.update_from_flattened_dict({
        "evaluation.label_dataset": directory, "evaluation.label_split": "unseen",
        "evaluation.label_train_split": "validation[:20]", "evaluation.label": "background",
    })  # fmt: skip
    data = train.Run(config, str(tmp_path / "run")).input.evaluation()
    assert (data.count("labelled"), data.count("labelled_training"), data.count("evaluation")) == (32, 20, 32)
    assert data.class_names() == ("white", "grey", "black", "beige")
    spec = {"label": jax.ShapeDtypeStruct((32,), np.int32)}
    (batch,) = data.batches(spec, source="labelled", limit=99, batch_size=32)
    assert batch["mask"].all() and set(batch["label"]) <= set(range(4))
