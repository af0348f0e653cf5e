"""Evaluators against hand-made models whose scores are known."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from unclip_jax.errors import InputError
from unclip_jax.evaluation import evaluators

COUNT, SIZE = 11, 4  # the last batch is filled up
SPECS = {
    "loss": {"value": jax.ShapeDtypeStruct((SIZE,), np.float32)},
    "z_i": {"picture": jax.ShapeDtypeStruct((SIZE, 3), np.float32)},
    "z_t": {"caption": jax.ShapeDtypeStruct((SIZE, 3), np.float32)},
    "sample_z_i": {"caption": jax.ShapeDtypeStruct((SIZE, 3), np.float32)},
    "reconstruct": {"image": jax.ShapeDtypeStruct((SIZE, 2, 2, 3), np.uint8)},
}
CONFIG = ConfigDict({"examples": COUNT, "batch_size": SIZE})


class Examples:
    """Evaluation data that hands out rows of given arrays, zeros after the last."""

    def __init__(self, **fields):
        self.fields = fields

    def __call__(self, spec, *, limit, batch_size):
        assert limit == COUNT and batch_size == SIZE
        for start in range(0, limit, batch_size):
            index = np.arange(start, start + batch_size)
            mask = index < limit
            batch = {name: np.where(_wide(mask, self.fields[name]), self.fields[name].take(index, 0, mode="clip"), 0)
                     for name in spec}  # fmt: skip
            yield {**batch, "mask": mask}


def _wide(mask, field):
    return mask.reshape(-1, *[1] * (field.ndim - 1))


def run(name, predict, **fields):
    evaluator = evaluators.create(name, predict=predict, specs=SPECS, data=Examples(**fields), put=dict, config=CONFIG)
    return dict(evaluator.run("params", "frozen"))


def unit(rng, count=COUNT):
    z = rng.normal(size=(count, 3)).astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def test_loss_averages_whole_batches_and_weights_pairs():
    value = np.arange(COUNT, dtype=np.float32)

    def loss(params, frozen, batch, rng):
        assert (params, frozen) == ("params", "frozen")
        v = batch["value"]
        return v.mean(), {"mean": v.mean(), "large": (v[v > 5].sum(), (v > 5).sum()), "none": (0.0, 0.0)}

    scores = run("loss", {"loss": loss}, value=value)
    assert scores == {"loss": value[:8].mean(), "mean": value[:8].mean(), "large": 6.5}


def test_retrieval_counts_captions_nearer_than_the_own():
    rng = np.random.default_rng(0)
    z_i, z_t = unit(rng), unit(rng)
    z_t[:6] = z_i[:6]  # these find their own caption first
    predict = {
        "z_i": lambda params, frozen, batch, rng: batch["picture"],
        "z_t": lambda params, frozen, batch, rng: batch["caption"],
    }
    scores = run("retrieval", predict, picture=z_i, caption=z_t)
    ranks = [sorted(-float(z_i[i] @ t) for t in z_t).index(-float(z_i[i] @ z_t[i])) for i in range(COUNT)]
    assert scores["image_to_text_r1"] == pytest.approx(np.mean([rank < 1 for rank in ranks]))
    assert scores["image_to_text_r5"] == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    assert scores["image_to_text_r1"] >= 6 / COUNT


def test_retrieval_of_a_model_that_says_always_the_same_is_no_success():
    predict = {name: lambda params, frozen, batch, rng: np.ones((SIZE, 3), np.float32) for name in ("z_i", "z_t")}
    rng = np.random.default_rng(0)
    scores = run("retrieval", predict, picture=unit(rng), caption=unit(rng))
    assert scores["image_to_text_r1"] == pytest.approx(1 / COUNT)
    assert scores["image_to_text_r5"] == pytest.approx(5 / COUNT)


def test_embedding_gives_the_cosine_and_that_of_others():
    rng = np.random.default_rng(0)
    z_i, sampled = unit(rng), unit(rng)
    predict = {
        "sample_z_i": lambda params, frozen, batch, rng: batch["caption"],
        "z_i": lambda params, frozen, batch, rng: batch["picture"],
    }
    scores = run("embedding", predict, picture=z_i, caption=sampled)
    assert scores["cosine"] == pytest.approx(np.mean([a @ b for a, b in zip(z_i, sampled, strict=True)]), abs=1e-6)
    others = []
    for start in range(0, COUNT, SIZE):
        part = slice(start, min(start + SIZE, COUNT))
        others += [a @ b for a, b in zip(sampled[part], np.roll(z_i[part], 1, axis=0), strict=True)]
    assert scores["cosine_of_others"] == pytest.approx(np.mean(others), abs=1e-6)


def test_pictures_are_laid_out_on_white():
    images = np.arange(COUNT, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    scores = run("pictures", {"reconstruct": lambda params, frozen, batch, rng: batch["image"]}, image=images)
    assert np.array_equal(scores["samples"], evaluators.grid(images[:SIZE]))
    grid = evaluators.grid(images, columns=4, gap=1)
    assert grid.shape == (3 * 3 - 1, 4 * 3 - 1, 3) and grid.dtype == np.uint8
    for number in range(COUNT):
        top, left = number // 4 * 3, number % 4 * 3
        assert (grid[top : top + 2, left : left + 2] == number).all()
    assert (grid[2] == 255).all() and (grid[:, 2] == 255).all() and (grid[6:, 9:] == 255).all()


def test_unknown_and_unfitting_evaluators_are_refused():
    with pytest.raises(InputError, match="did you mean 'retrieval'"):
        run("retreival", {})
    with pytest.raises(InputError, match="'pictures' needs 'reconstruct', which this stage does not predict"):
        run("pictures", {"loss": None})
