"""The oracle against scenes whose truth is known, fresh, damaged, and under wrong captions."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from unclip_jax.data.scene_rendering import render
from unclip_jax.data.scenes import COLOURS, SHAPES, Kind, Placement, Scene, caption, scene_at
from unclip_jax.errors import InputError
from unclip_jax.evaluation import oracle

COUNT = 300


def renders(resolution: int, split: str = "train") -> tuple[np.ndarray, list[str]]:
    scenes = [scene_at(seed=1234, split=split, index=index) for index in range(COUNT)]
    return np.stack([render(scene, resolution) for scene in scenes]), [caption(scene) for scene in scenes]


def blurred(images: np.ndarray, sigma: float, noise: float) -> np.ndarray:
    soft = ndimage.gaussian_filter(images.astype(np.float64), (0, sigma, sigma, 0))
    noisy = soft + noise * np.random.default_rng(0).normal(size=soft.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("resolution", "split"), [(32, "train"), (64, "train"), (64, "unseen"), (128, "train")])
def test_reads_real_renders_rightly(resolution, split):
    score = oracle.score(*renders(resolution, split))
    for group in ("single", "two"):
        assert score[group]["n"] > 100
        for key in ("colour", "shape", "both", "count", "background", "all"):
            assert score[group][key] >= 0.98, (group, key)
    assert score["two"]["relation"] >= 0.98


@pytest.mark.parametrize(("sigma", "noise"), [(1.0, 0.0), (0.0, 12.0), (1.0, 8.0)])
def test_blur_and_noise_cost_little(sigma, noise):
    images, captions = renders(64)
    score = oracle.score(blurred(images, sigma, noise), captions)
    for group in ("single", "two"):
        for key in ("colour", "shape", "both", "all"):
            assert score[group][key] >= 0.95, (group, key)


def test_shuffled_captions_score_as_chance():
    shuffled = oracle.score(*renders(64))["shuffled"]
    single, two = shuffled["single"], shuffled["two"]
    # Shapes and colours are close to uniform, and 8 rotations of 150 captions leave a standard error near 0.01.
    assert single["colour"] == pytest.approx(1 / len(COLOURS), abs=0.04)
    assert single["shape"] == pytest.approx(1 / len(SHAPES), abs=0.04)
    assert single["both"] < 0.05 and single["all"] < 0.05
    assert two["relation"] == pytest.approx(1 / 4, abs=0.05)
    assert two["both"] < 0.08 and two["all"] < 0.02


def test_every_shape_of_every_colour_is_told_from_pixels():
    kinds = [Kind("large", "solid", colour, shape) for colour in COLOURS for shape in SHAPES]
    scenes = [Scene((kind,), "", "grey", (Placement(0.5, 0.5, 0.25, 0.1),)) for kind in kinds]
    readings = oracle.read(np.stack([render(scene, 64) for scene in scenes]))
    assert [[(o.colour, o.shape) for o in reading.objects] for reading in readings] == [
        [(kind.colour, kind.shape)] for kind in kinds
    ]
    assert all(reading.background == "grey" for reading in readings)
    for reading in readings:
        # A triangle's centroid lies a sixth of its height below the centre of its box.
        assert abs(reading.objects[0].x - 0.5) < 0.02 and abs(reading.objects[0].y - 0.5) < 0.07


def pair(relation: str, gap: float) -> Scene:
    """A red circle and a blue square whose outlines lie `gap` image sides apart, or overlap where it is negative."""
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    reach = 0.5 * (0.18 * (0.95 + 0.83) + gap)
    places = [Placement(0.5 + sign * dx * reach, 0.5 + sign * dy * reach, 0.18, 0.0) for sign in (1, -1)]
    kinds = (Kind("large", "solid", "red", "circle"), Kind("large", "solid", "blue", "square"))
    return Scene(kinds, relation, "white", tuple(places))


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
@pytest.mark.parametrize("gap", [0.1, 0.0, -0.02])
def test_relation_of_objects_apart_and_touching(relation, gap):
    scene = pair(relation, gap)
    score = oracle.score(render(scene, 64)[None], [caption(scene)])["two"]
    assert score["both"] == score["relation"] == score["count"] == score["all"] == 1.0


def test_each_wrong_word_costs_its_own_rate():
    scene = pair("left of", 0.1)
    image = render(scene, 64)[None]
    red, blue = scene.kinds

    def rates(**changes):
        return oracle.score(image, [caption(dataclasses.replace(scene, **changes))])["two"]

    wrong_relation = rates(relation="above")
    assert (wrong_relation["both"], wrong_relation["relation"], wrong_relation["all"]) == (1.0, 0.0, 0.0)
    swapped = rates(kinds=(blue, red))
    assert (swapped["both"], swapped["relation"]) == (1.0, 0.0)
    wrong_shape = rates(kinds=(dataclasses.replace(red, shape="star"), blue))
    assert (wrong_shape["colour"], wrong_shape["shape"], wrong_shape["both"]) == (1.0, 0.5, 0.5)
    assert wrong_shape["relation"] == 1.0
    wrong_colour = rates(kinds=(dataclasses.replace(red, colour="green"), blue))
    assert (wrong_colour["colour"], wrong_colour["shape"], wrong_colour["all"]) == (0.5, 1.0, 0.0)
    alone = oracle.score(image, [caption(Scene((red,), "", "white", scene.placements[:1]))])["single"]
    assert alone["count"] == alone["all"] == 0.0


def test_pictures_of_nothing_score_nothing():
    blank = np.full((2, 64, 64, 3), 246, np.uint8)
    assert all(reading.objects == () and reading.background == "white" for reading in oracle.read(blank))
    captions = ["a large red star on a white background", caption(pair("above", 0.1))]
    score = oracle.score(blank, captions)
    assert score["single"]["both"] == score["two"]["both"] == score["two"]["relation"] == score["two"]["all"] == 0.0
    assert oracle.read(blank[:0]) == []
    assert oracle.score(blank[:0], []) == {"shuffled": {}}


def test_pictures_of_noise_are_read_without_failing():
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    assert len(oracle.read(noise)) == 8


def test_bad_input_is_named():
    blank = np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(InputError, match="2 images"):
        oracle.score(blank, ["a large red star on a white background"])
    with pytest.raises(InputError, match="a dog"):
        oracle.score(blank, ["a dog", "a cat"])
    with pytest.raises(InputError, match="16x16"):
        oracle.read(np.zeros((1, 8, 8, 3), np.uint8))
