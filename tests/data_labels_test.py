"""Labels: how a record's classes become the one of an example, and how labelled data sets come about."""

import io
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from captioned_tars import picture, write_tar
from PIL import Image

from unclip_jax import prepare
from unclip_jax.data import captioned_shapes, datasets, examples, image_text, order, pipeline
from unclip_jax.data.scenes import SHAPES, scene_at
from unclip_jax.errors import InputError

COUNT = 11
NAMES = ("cat", "dog", "hot_dog")
SPEC = {"label": jax.ShapeDtypeStruct((4,), np.int32), "id": jax.ShapeDtypeStruct((4,), np.uint32)}


@pytest.mark.parametrize(("value", "label"), [
    (2, 2), (np.int64(0), 0), (-1, -1), ([3, -1], 3), ([-1, -1], -1), ([3, 4], -1), ([4, 4], 4), ([], -1),
])
def test_an_example_has_the_only_class_that_its_record_names(value, label):
    assert examples.only_class(value) == label


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A data set as TFDS writes those for classification: images and labels, neither captions nor ids."""
    path = tmp_path_factory.mktemp("labelled")
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=NAMES),
        "weight": np.float32,
    })
    writer = ArrayRecordWriter(str(path / "labelled-test.array_record-00000-of-00001"), "group_size:1")
    for index in range(COUNT):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(buffer, format="PNG")
        writer.write(features.serialize_example(
            {"image": buffer.getvalue(), "label": index % 3 if index != 6 else -1, "weight": 0.5}
        ))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=str(path), dataset_name="labelled", filetype_suffix="array_record", split="test"
    )
    split = tfds.core.SplitInfo(name="test", shard_lengths=[COUNT], num_bytes=1, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=str(path), features=features, split_infos=[split], version="1.0.0", check_data=False
    )
    return str(path)


def read(source, **options):
    return list(pipeline.evaluation_batches(source, spec=SPEC, tokenizer=None, batch_size=4, **options))


def test_labels_are_read_from_records_without_captions_and_ids(folder):
    assert datasets.class_names(folder, "label") == NAMES
    batches = read(datasets.open_source(folder, "test", required=("image", "label")), label="label")
    labels = np.concatenate([batch["label"] for batch in batches])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels[:COUNT], [0, 1, 2, 0, 1, 2, -1, 1, 2, 0, 1])
    with pytest.raises(InputError, match="lack caption, id"):
        datasets.open_source(folder, "test")


@pytest.mark.parametrize("limit", [5, COUNT])
def test_a_shuffled_part_is_the_beginning_of_trainings_first_epoch(folder, limit):
    source = datasets.open_source(folder, "test", required=("image", "label"))
    batches = read(source, label="label", limit=limit, shuffle_seed=3)
    ids = np.concatenate([batch["id"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(ids, order.shuffled(np.arange(limit), count=COUNT, seed=3)[1])
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(labels, [-1 if index == 6 else index % 3 for index in ids])
    hosts = [read(source, label="label", limit=limit, shuffle_seed=3, host_index=h, host_count=2) for h in range(2)]
    for name in SPEC:
        joined = [np.concatenate([part[name] for part in parts]) for parts in zip(*hosts, strict=True)]
        np.testing.assert_array_equal(joined, [batch[name] for batch in batches])


def test_scenes_of_one_shape_are_labelled_with_it(data_dir):
    directory = captioned_shapes.prepare(data_dir=data_dir, variant="smoke")
    assert datasets.class_names(directory, "shape") == SHAPES
    labels = np.concatenate([batch["label"] for batch in read(datasets.open_source(directory, "train"), label="shape")])
    shapes = [
        {kind.shape for kind in scene_at(seed=0, split="train", index=i, two_object_fraction=0.25, spread=0.1).kinds}
        for i in range(96)
    ]
    assert 5 < sum(len(found) == 2 for found in shapes) < 40
    np.testing.assert_array_equal(
        labels, [SHAPES.index(*found) if len(found) == 1 else -1 for found in shapes]
    )


def test_what_is_no_label_is_named(folder, data_dir):
    with pytest.raises(InputError, match="no class label 'labl'; did you mean 'label'"):
        datasets.class_names(folder, "labl")
    directory = captioned_shapes.prepare(data_dir=data_dir, variant="smoke")
    with pytest.raises(InputError, match="no class label ''; known are background, colour, relation, shape, size, tex"):
        datasets.class_names(directory, "")
    with pytest.raises(InputError, match="lack label"):
        datasets.open_source(directory, "train", required=("image", "label"))
    with pytest.raises(InputError, match="no feature of the records was named"):
        read([{"image": b"", "label": 1}])


# A user's own pictures.


def labels_of(directory, split="train"):
    source = datasets.open_source(directory, split)
    return [(record["caption"].decode(), int(record["label"])) for record in source]


def test_prepare_keeps_labels_of_a_caption_file(tmp_path):
    folder, out = tmp_path / "in", str(tmp_path / "out")
    folder.mkdir()
    labels = ["dog", "cat", 2, "1", None, "hot_dog", "bird", 3, True, "-1"]
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for number, label in enumerate(labels):
            (folder / f"{number}.png").write_bytes(picture((number, 0, 0)))
            entry = {"file_name": f"{number}.png", "caption": f"number {number}"}
            file.write(json.dumps(entry | ({} if label is None else {"label": label})) + "\n")
    (tmp_path / "names.txt").write_text("cat\n dog \n\nhot_dog\n")
    settings = image_text.Settings(classes=prepare.read_classes(str(tmp_path / "names.txt")))
    prepare.prepare(str(folder), out, settings, entries_per_shard=4, max_bad_percent=50)
    assert datasets.class_names(out, "label") == NAMES
    kept = {0: 1, 1: 0, 2: 2, 3: 1, 4: -1, 5: 2, 8: -1}
    assert labels_of(out) == [(f"number {number}", label) for number, label in kept.items()]
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in bad] == ["6.png", "7.png", "9.png"]
    assert "its label 'bird' is none of the 3 classes" in bad[0]["reason"]
    # The same command again; and another job, which keeps no labels.
    assert "already holds" in prepare.prepare(str(folder), out, settings, entries_per_shard=4)
    with pytest.raises(InputError, match="begun with another classes"):
        prepare.prepare(str(folder), out, image_text.Settings(), entries_per_shard=4)
    prepare.prepare(str(folder), str(tmp_path / "plain"), image_text.Settings())
    assert len(datasets.open_source(str(tmp_path / "plain"), "train")) == len(labels)
    with pytest.raises(InputError, match="no feature of class labels"):
        datasets.class_names(str(tmp_path / "plain"), "label")


def test_prepare_keeps_labels_of_archives(tmp_path):
    members = [
        ("0.png", picture()), ("0.json", b'{"caption": "zero", "label": "dog"}'),
        ("1.png", picture()), ("1.txt", b"one"), ("1.json", b'{"label": 2}'),
        ("2.png", picture()), ("2.txt", b"two"), ("2.json", b"{damaged"),
        ("3.png", picture()), ("3.txt", b"three"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    out = str(tmp_path / "out")
    prepare.prepare(str(tmp_path / "a.tar"), out, image_text.Settings(classes=NAMES))
    assert labels_of(out) == [("zero", 1), ("one", 2), ("two", -1), ("three", -1)]


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"\n\n", "has no names"),
    (b"cat\ndog\ncat\n", "has 'cat' twice"),
])
def test_a_list_of_classes_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare.read_classes(str(path))
