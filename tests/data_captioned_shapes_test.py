"""captioned_shapes: its grammar, its pictures, and its records as another process reads them."""

import collections
import io
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from unclip_jax.data import captioned_shapes
from unclip_jax.data.scene_rendering import render
from unclip_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Description,
    Kind,
    Placement,
    Scene,
    abridge,
    caption,
    is_unseen,
    parse_caption,
    sample_scene,
    scene_at,
)
from unclip_jax.errors import InputError

PREPARE = """
import sys
from unclip_jax.data import captioned_shapes as c
print(c.prepare(data_dir=sys.argv[1], variant="smoke"))
"""
# The process ends itself by a signal that nothing can catch, in the middle of the validation split.
PREPARE_AND_DIE = """
import os, signal, sys
from unclip_jax.data import captioned_shapes as c
drawn, render = [], c.render
def render_or_die(scene, resolution):
    drawn.append(scene)
    if len(drawn) == 110:
        os.kill(os.getpid(), signal.SIGKILL)
    return render(scene, resolution)
c.render = render_or_die
c.prepare(data_dir=sys.argv[1], variant="smoke")
"""


def scenes(split: str, count: int) -> list[Scene]:
    return [scene_at(seed=3, split=split, index=index) for index in range(count)]


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)


def downsample(image: np.ndarray, factor: int) -> np.ndarray:
    side = image.shape[0] // factor
    return image.astype(np.float64).reshape(side, factor, side, factor, 3).mean((1, 3))


def test_grammar_reads_the_sentences_of_the_specification():
    assert parse_caption("a small striped red star left of a large blue circle on a grey background") == Description(
        (Kind("small", "striped", "red", "star"), Kind("large", "solid", "blue", "circle")), "left of", "grey"
    )
    assert parse_caption("A large green triangle on a white background") == Description(
        (Kind("large", "solid", "green", "triangle"),), "", "white"
    )
    assert parse_caption("an orange heart") == Description((Kind("", "solid", "orange", "heart"),), "", "")
    assert parse_caption("a striped star above a small ring") == Description(
        (Kind("", "striped", "", "star"), Kind("small", "solid", "", "ring")), "above", ""
    )


def test_caption_and_description_determine_each_other():
    for scene in scenes("train", 300) + scenes("unseen", 300):
        assert parse_caption(caption(scene)) == Description(scene.kinds, scene.relation, scene.background)
    kinds = [Kind(*words) for words in itertools.product(SIZES, TEXTURES, COLOURS, SHAPES)]
    captions = {caption(Description((kind,), "", "white")) for kind in kinds}
    assert len(captions) == len(kinds) == 2 * 3 * 8 * 7


@pytest.mark.parametrize("detail", [0.0, 0.3, 1.0])
def test_abridged_captions_keep_shapes_and_textures_and_some_of_the_rest(detail):
    told = collections.Counter()
    for index, scene in enumerate(scenes("train", 500)):
        said = abridge(scene, detail=detail, seed=0, index=index)
        assert parse_caption(caption(said)) == said == abridge(scene, detail=detail, seed=0, index=index)
        assert [(k.shape, k.texture) for k in said.kinds] == [(k.shape, k.texture) for k in scene.kinds]
        assert said.relation == scene.relation and said.background in ("", scene.background)
        assert all(k.size in ("", whole.size) for k, whole in zip(said.kinds, scene.kinds, strict=True))
        assert all(k.colour in ("", whole.colour) for k, whole in zip(said.kinds, scene.kinds, strict=True))
        told.update(size=said.kinds[0].size != "", colour=said.kinds[0].colour != "", background=said.background != "")
    for word in ("size", "colour", "background"):
        assert abs(told[word] / 500 - detail) <= 4 * np.sqrt(detail * (1 - detail) / 500)


@pytest.mark.parametrize("text", [
    "", "a red", "a large mauve star on a white background", "a large red star left of on a white background",
    "a large red star beside a small blue ring on a white background", "a large red star on a white background.",
])
def test_other_sentences_are_refused(text):
    with pytest.raises(InputError, match="captioned_shapes"):
        parse_caption(text)


def test_scene_depends_on_seed_split_and_index_alone():
    forward = [scene_at(seed=3, split="train", index=index) for index in range(20)]
    backward = [scene_at(seed=3, split="train", index=index) for index in reversed(range(20))]
    assert forward == backward[::-1]
    for other in (scenes("validation", 20), [scene_at(seed=4, split="train", index=index) for index in range(20)]):
        assert len(set(map(caption, forward)) & set(map(caption, other))) <= 1


def test_unseen_kinds_are_held_back_and_every_word_is_seen():
    seen = [kind for split in ("train", "validation") for scene in scenes(split, 1500) for kind in scene.kinds]
    assert not any(is_unseen(kind) for kind in seen)
    assert all(any(is_unseen(kind) for kind in scene.kinds) for scene in scenes("unseen", 500))
    held_back = {(kind.colour, kind.shape) for scene in scenes("unseen", 1500) for kind in scene.kinds} - {
        (kind.colour, kind.shape) for kind in seen
    }
    # One colour of every shape is never seen with it.
    assert {shape for _, shape in held_back} == set(SHAPES) and len(held_back) == len(SHAPES)
    for words, field in ((COLOURS, "colour"), (SHAPES, "shape"), (TEXTURES, "texture"), (SIZES, "size")):
        assert {getattr(kind, field) for kind in seen} == set(words)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_share_of_two_objects(fraction):
    rng = np.random.default_rng(0)
    pairs = sum(len(sample_scene(rng, two_object_fraction=fraction).kinds) == 2 for _ in range(1000))
    assert abs(pairs / 1000 - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / 1000)


def test_without_spread_objects_are_where_the_caption_lets_one_expect_them():
    for index in range(200):
        scene = scene_at(seed=3, split="train", index=index, spread=0.0)
        places = scene.placements
        if len(places) == 1:
            assert (places[0].x, places[0].y) == (0.5, 0.5)
        else:
            along, across = ("x", "y") if scene.relation in ("left of", "right of") else ("y", "x")
            assert [getattr(place, across) for place in places] == [0.5, 0.5]
            near, far = sorted(places, key=lambda place: getattr(place, along))
            # As much room before the first as between the two as after the second, but for margin and gap.
            before = getattr(near, along) - near.radius - 0.025
            after = 1 - getattr(far, along) - far.radius - 0.025
            between = getattr(far, along) - far.radius - getattr(near, along) - near.radius - 0.04
            assert before == pytest.approx(after) == pytest.approx(between) and before > 0


def test_objects_lie_inside_apart_and_as_the_relation_says():
    pairs = 0
    for scene in scenes("train", 800):
        for place in scene.placements:
            assert 0 < place.x - place.radius and place.x + place.radius < 1
            assert 0 < place.y - place.radius and place.y + place.radius < 1
        if len(scene.kinds) == 1:
            continue
        pairs += 1
        a, b = scene.placements
        across, down = b.x - a.x, b.y - a.y
        offset = {"left of": across, "right of": -across, "above": down, "below": -down}[scene.relation]
        assert offset > a.radius + b.radius + 0.03
        assert offset > 1.5 * min(abs(across), abs(down))
        assert scene.kinds[0].colour != scene.kinds[1].colour
    assert pairs > 300


@pytest.mark.parametrize("resolution", [16, 32, 64, 128])
def test_smaller_pictures_are_the_larger_one_averaged(resolution):
    for scene in scenes("train", 40):
        error = np.abs(downsample(render(scene, 256), 256 // resolution) - render(scene, resolution))
        assert error.mean() < 0.6, caption(scene)
        assert np.quantile(error, 0.99) < 12, caption(scene)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_object_stays_in_its_box_and_keeps_its_hue(shape, texture):
    place = Placement(0.5, 0.5, 0.3, 0.15)
    image = render(Scene((Kind("large", texture, "orange", shape),), "", "black", (place,)), 128).astype(float)
    outside = np.ones((128, 128), bool)
    outside[int((0.5 - 0.3 * 1.1) * 128):int((0.5 + 0.3 * 1.1) * 128) + 1] = False
    assert (image[outside] == BACKGROUNDS["black"]).all()
    mean = image.sum((0, 1)) - 128 * 128 * np.array(BACKGROUNDS["black"])
    covered = mean / mean[0]
    # Light and dark halves have one hue: red to green stays as in the palette, but for the background seen through.
    assert abs(covered[1] - COLOURS["orange"][1] / COLOURS["orange"][0]) < 0.06
    whole = render(Scene((Kind("large", "solid", "orange", shape),), "", "black", (place,)), 128).astype(float)
    share = (image[..., 0].sum() - 18 * 128 * 128) / (whole[..., 0].sum() - 18 * 128 * 128)
    assert share == pytest.approx(1.0 if texture == "solid" else 0.76, abs=0.04)


def test_circle_covers_pi_r_squared_at_every_resolution():
    scene = Scene((Kind("large", "solid", "red", "circle"),), "", "black", (Placement(0.48, 0.53, 0.29, 0.0),))
    contrast = COLOURS["red"][0] - BACKGROUNDS["black"][0]
    areas = [(render(scene, side)[..., 0].astype(float) - 18).mean() / contrast for side in (16, 64, 256)]
    radius = np.sqrt(np.array(areas) / np.pi)
    assert np.ptp(radius) < 0.001 and 0.26 < radius[0] < 0.29


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="did you mean 'train'"):
        scene_at(seed=0, split="trian", index=0)
    with pytest.raises(InputError, match="1.5"):
        sample_scene(np.random.default_rng(0), two_object_fraction=1.5)
    with pytest.raises(InputError, match="spread is -0.1"):
        sample_scene(np.random.default_rng(0), spread=-0.1)
    with pytest.raises(InputError, match="did you mean 'tiny'"):
        captioned_shapes.prepare(data_dir="nowhere", variant="tinny")
    with pytest.raises(InputError, match="4 pixels"):
        render(scenes("train", 1)[0], 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    """The smoke variant, prepared by a process of its own after another was killed at it."""
    data_dir = str(tmp_path_factory.mktemp("data"))
    killed = python(PREPARE_AND_DIE, data_dir)
    assert killed.returncode == -9, killed.stderr
    version = pathlib.Path(data_dir, "captioned_shapes", "smoke", "1.1.0")
    assert version.parent.exists() and not version.exists()
    finished = python(PREPARE, data_dir)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == str(version)
    return str(version)


def test_prepared_once_is_left_alone(prepared):
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(prepared).iterdir()}
    assert captioned_shapes.prepare(data_dir=str(pathlib.Path(prepared).parents[2]), variant="smoke") == prepared
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(prepared).iterdir()} == before


@pytest.mark.parametrize(("split", "count"), [("train", 96), ("validation", 32), ("unseen", 32)])
def test_records_hold_the_scene(prepared, split, count):
    builder = tfds.builder_from_directory(prepared)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == count
    for index in range(count):
        record = source[index]
        scene = scene_at(
            seed=captioned_shapes.SEED, split=split, index=index, two_object_fraction=0.25, spread=0.1
        )
        assert record["id"] == index
        said = parse_caption(record["caption"].decode())
        assert split == "train" or said == Description(scene.kinds, scene.relation, scene.background)
        assert said == abridge(scene, detail=0.5 if split == "train" else 1.0, seed=captioned_shapes.SEED, index=index)
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
        np.testing.assert_array_equal(pixels, render(scene, 64))
        kinds = tuple(
            Kind(SIZES[record["size"][i]], TEXTURES[record["texture"][i]],
                 list(COLOURS)[record["colour"][i]], SHAPES[record["shape"][i]])
            for i in range(record["num_objects"])
        )
        assert kinds == scene.kinds
        assert list(BACKGROUNDS)[record["background"]] == scene.background
        assert record["relation"] == (RELATIONS.index(scene.relation) if scene.relation else -1)
        np.testing.assert_allclose(record["centre"][: len(kinds)], [(p.x, p.y) for p in scene.placements], rtol=1e-6)
        np.testing.assert_allclose(record["radius"][: len(kinds)], [p.radius for p in scene.placements], rtol=1e-6)


def test_reading_imports_no_tensorflow(prepared):
    script = """
import sys
import tensorflow_datasets as tfds
from unclip_jax.data import captioned_shapes, emoji
builder = tfds.builder_from_directory(sys.argv[1])
source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
print(len(source), source[5]["id"], "tensorflow" in sys.modules, "torch" in sys.modules)
"""
    read = python(script, prepared)
    assert read.stdout.split() == ["96", "5", "False", "False"], read.stderr
