"""Protocols: which captions and images they name, read from COCO's own files, and what they refuse."""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
from typing import Any

import coco_files
import numpy as np
import pytest

from unclip_jax.data import datasets, images
from unclip_jax.errors import InputError
from unclip_jax.evaluation import coco, near_duplicates, pools, protocols, rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
COUNT = 40


def small(name: str, **changes: Any) -> protocols.Protocol:
    """A COCO protocol that is content with 40 images and draws 30."""
    changes = {"images": 30 if "mlperf" in name else COUNT, "count": 30, **changes}
    return dataclasses.replace(protocols.named(name), **changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    return coco_files.write(tmp_path_factory.mktemp("coco"), COUNT)


@pytest.fixture(scope="module")
def pool(files) -> coco.Annotated:
    return coco.Annotated(*files)


def test_names_stand_for_what_they_always_stood_for():
    """Digests stand in published results: who changes a protocol must give it another name."""
    known = {
        "coco30k-openai": "2c5071437d46bdde",
        "coco30k-openai-filtered": "e496ef51479a92a8",
        "coco30k-clean": "7e956cbe964a99a9",
        "coco30k-mlperf": "a48d355a02da7789",
        "captioned_shapes": "c370b727c9798e4e",
        "captioned_shapes-1k": "a604baeac138c474",
        "captioned_shapes-smoke": "5dfc925762096586",
        "emoji": "83d78dbba3c97d2f",
    }
    assert {name: protocol.digest for name, protocol in protocols.PROTOCOLS.items()} == known
    for protocol in protocols.PROTOCOLS.values():
        for field in dataclasses.fields(protocol):
            old = getattr(protocol, field.name)
            new = (not old) if isinstance(old, bool) else old * 2 + 1 if isinstance(old, int) else (*old, "x")
            changed = dataclasses.replace(protocol, **{field.name: new if not isinstance(old, str) else old + "x"})
            assert changed.digest != protocol.digest, field.name
    with pytest.raises(InputError, match="did you mean 'coco30k-openai'"):
        protocols.named("coco30k_openai")


def test_one_caption_of_each_image_in_the_order_of_digests(pool, files):
    found = rows.chosen(small("coco30k-openai"), pool)
    assert [row.row for row in found] == list(range(30)) and len({row.image_id for row in found}) == 30
    ids = [coco_files.image_id(number) for number in range(COUNT)]

    def rank(kind, number):
        return hashlib.sha256(f"unclip_jax coco30k 2014/{kind}/{number}".encode()).hexdigest()

    assert [row.image_id for row in found] == sorted(ids, key=lambda one: rank("image", one))[:30]
    annotations = json.loads(pathlib.Path(files[0]).read_text())["annotations"]
    for row in found:
        own = [one for one in annotations if one["image_id"] == row.image_id]
        first = min(own, key=lambda one: rank("caption", one["id"]))
        assert (row.caption_id, row.caption) == (first["id"], first["caption"].strip())
    assert rows.chosen(small("coco30k-openai-filtered"), pool) == found == rows.chosen(small("coco30k-clean"), pool)
    fewer = rows.chosen(dataclasses.replace(small("coco30k-openai"), count=7), pool)
    assert fewer == found[:7]  # any first n are a sample


def test_the_order_is_this_one_everywhere():
    """The first ids of COCO in the order that `printf 'unclip_jax coco30k 2014/image/42' | sha256sum` gives them."""

    class Ten:
        fingerprint = {"name": "ten"}
        image_ids = (42, 73, 74, 133, 136, 139, 143, 164, 192, 196)
        captions = tuple((image_id, image_id, "a caption") for image_id in image_ids)

        def image(self, image_id):
            raise AssertionError

    protocol = dataclasses.replace(protocols.named("coco30k-openai"), images=10, count=10)
    assert [row.image_id for row in rows.chosen(protocol, Ten())] == [136, 143, 42, 192, 73, 133, 139, 164, 196, 74]


def test_mlperf_draws_what_pandas_would(pool):
    """`DataFrame.sample(frac=1, random_state=2023)` permutes by NumPy's RandomState; the first of each image stays."""
    found = rows.chosen(small("coco30k-mlperf"), pool)
    order = np.random.RandomState(2023).permutation(len(pool.captions))
    seen: dict[int, int] = {}
    for place in order:
        caption_id, image_id, _ = pool.captions[place]
        if image_id not in seen and len(seen) < 30:
            seen[image_id] = caption_id
    assert [row.caption_id for row in found] == sorted(seen.values())
    assert rows.references(small("coco30k-mlperf"), pool, found, ()) == sorted(seen)
    assert rows.references(small("coco30k-openai"), pool, found, ()) == sorted(pool.image_ids)
    # The stream that NumPy has frozen.
    assert np.random.RandomState(2023).permutation(10).tolist() == [8, 2, 5, 0, 3, 4, 1, 9, 6, 7]


def test_both_ways_of_reading_coco_give_the_same_rows_and_pixels(pool, files, tmp_path):
    """TFDS' data set, written by its own library, with the splits that make up the validation set."""
    made = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "coco_prepared.py"), *files, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    prepared = coco.Prepared(made.stdout.split()[-1])
    assert list(prepared.image_ids) == list(pool.image_ids)
    assert sorted(prepared.captions) == sorted(pool.captions)
    protocol = small("coco30k-openai")
    assert rows.chosen(protocol, prepared) == rows.chosen(protocol, pool)
    for image_id in pool.image_ids[:3]:
        np.testing.assert_array_equal(prepared.image(image_id), pool.image(image_id))
    opened = pools.opened(protocol, {"tfds": made.stdout.split()[-1]})
    assert opened.fingerprint == prepared.fingerprint


def test_coco_that_is_not_whole_is_refused_by_name(files, tmp_path, pool):
    annotations, folder = files
    with pytest.raises(InputError, match="wants 40504 reference images, COCO, captions_val2014.json has 40"):
        rows.chosen(protocols.named("coco30k-openai"), pool)
    with pytest.raises(InputError, match="wants 41 captions.* has 40"):
        rows.chosen(dataclasses.replace(small("coco30k-openai"), count=41), pool)
    with pytest.raises(InputError, match="needs COCO: give --config.coco_files.annotations="):
        pools.opened(protocols.named("coco30k-clean"), {"annotations": annotations})
    for value, match in (
        ("[]", "is no file of COCO captions"),
        ("{", "is no file of COCO captions"),
        ('{"images": [{"id": 1}], "annotations": []}', "is no file of COCO captions.*file_name"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 5, "caption": "a"}]}', "caption 1 of .* image 5"),
    ):
        path = tmp_path / "captions.json"
        path.write_text(value)
        with pytest.raises(InputError, match=match):
            coco.Annotated(str(path), folder)
    with pytest.raises(InputError, match="cannot be read"):
        coco.Annotated(str(tmp_path / "none.json"), folder)
    whole = json.loads(pathlib.Path(annotations).read_text())
    whole["annotations"].append(whole["annotations"][0])
    path.write_text(json.dumps(whole))
    with pytest.raises(InputError, match="two captions of id"):
        coco.Annotated(str(path), folder)
    first = whole["images"][0]["file_name"]
    (tmp_path / "few").mkdir()
    with pytest.raises(InputError, match=f"lacks {first}"):
        coco.Annotated(annotations, str(tmp_path / "few"))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    annotations, folder = coco_files.write(tmp_path, 2)
    (name,) = [path for path in pathlib.Path(folder).iterdir() if f"{coco_files.image_id(1):012d}" in path.name]
    name.write_bytes(name.read_bytes()[:300])
    damaged = coco.Annotated(annotations, folder)
    damaged.image(coco_files.image_id(0))
    with pytest.raises(InputError, match=f"the image .*{name.name} cannot be read"):
        damaged.image(coco_files.image_id(1))


def test_scenes_are_new_ones_and_always_the_same(data_dir):
    protocol = protocols.named("captioned_shapes-smoke")
    found = rows.chosen(protocol, pools.opened(protocol, {}))
    assert len(found) == 96 and found[0].caption == (
        "a large striped yellow triangle below a small purple square on a black background"
    )
    pool = pools.opened(protocol, {})
    directory = datasets.prepare("captioned_shapes", data_dir=data_dir, variant="smoke")
    validation = datasets.open_source(directory, "validation")
    known = {images.decode(bytes(validation[index]["image"])).tobytes() for index in range(len(validation))}
    assert not known & {pool.image(index).tobytes() for index in range(32)}


# ---------------------------------------------------------------- near-duplicates


def test_nearest_neighbours_are_those_of_brute_force():
    rng = np.random.default_rng(3)
    training = rng.normal(size=(500, 12)).astype(np.float32) * rng.uniform(0.1, 9, (500, 1)).astype(np.float32)
    queries = rng.normal(size=(60, 12)).astype(np.float32)
    queries[7] = 5 * training[123]
    cosines, index = near_duplicates.nearest(queries, iter(np.split(training, [100, 101, 350])))
    whole = queries @ training.T / np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(training, axis=1))
    np.testing.assert_array_equal(index, whole.argmax(1))
    np.testing.assert_allclose(cosines, whole.max(1), rtol=1e-5)
    assert index[7] == 123 and cosines[7] == pytest.approx(1.0, abs=1e-6)


def test_what_is_left_out_is_published_and_held_to(pool, tmp_path):
    ids = list(pool.image_ids)
    cosines = np.linspace(0.5, 0.99, COUNT).astype(np.float32)
    written = near_duplicates.write(
        tmp_path / "removed.json",
        protocol="coco30k-openai-filtered",
        threshold=0.9,
        clip="abc",
        training=[{"name": "mine"}],
        image_ids=ids,
        cosines=cosines,
        neighbours=np.arange(COUNT),
    )
    expected = [one for one, cosine in zip(ids, cosines, strict=True) if cosine >= 0.9]
    assert list(written.ids) == expected and 0 < len(expected) < COUNT
    again = near_duplicates.read(str(tmp_path / "removed.json"), protocol="coco30k-openai-filtered")
    assert again == written
    protocol = small("coco30k-openai-filtered")
    left = rows.references(protocol, pool, rows.chosen(protocol, pool), again.ids)
    assert left == sorted(set(ids) - set(expected))
    with pytest.raises(InputError, match="not of this set, such as 7"):
        rows.references(protocol, pool, rows.chosen(protocol, pool), (7,))
    with pytest.raises(InputError, match="names what coco30k-openai-filtered leaves out, not emoji"):
        near_duplicates.read(str(tmp_path / "removed.json"), protocol="emoji")
    text = (tmp_path / "removed.json").read_text()
    (tmp_path / "removed.json").write_text(text.replace("0.9,", "0.8,"))
    with pytest.raises(InputError, match="was changed"):
        near_duplicates.read(str(tmp_path / "removed.json"), protocol="coco30k-openai-filtered")
