"""Labels: how a record's classes become the one of an example, and what labelled data sets may look like."""

import io

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from unclip_jax.data import captioned_shapes, datasets, examples, order, pipeline
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
