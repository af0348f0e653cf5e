"""The data set `image_text`: a user's own captioned pictures, as ArrayRecord that TFDS reads by random access.

Every unit of the source (a tar shard, a chunk of a caption file) becomes one shard of the result on its own, so any
number of workers may write, in any order, and stop at any moment; `assemble` then gives the shards their names and
writes TFDS's metadata last. Neither writing nor reading imports TensorFlow or JAX.

Features: `image` (the encoded file), `caption` (cleaned), `id` (int64, unique and ascending, not dense), `source` (the
shard or caption file), `key` (the example's name there) and, where the classes are given, `label`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from unclip_jax.data import archives, captions, folders, images
from unclip_jax.data.records import Bad, Ignored, Record, Unit
from unclip_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.features import FeaturesDict

NAME, VERSION = "image_text", "1.0.0"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done to each example.

    Attributes:
      size: pictures with a longer shorter side are resized to it, in pixels; 0 keeps every picture as it is.
      validation_percent: share of examples, chosen by their names, that go to the split `validation`, in [0, 100).
      max_pixels: largest picture that is decoded, width x height.
      classes: names of the classes that labels name; () keeps no labels.
    """

    size: int = 0
    validation_percent: float = 0.0
    max_pixels: int = images.MAX_PIXELS
    classes: tuple[str, ...] = ()


@dataclasses.dataclass
class UnitReport:
    """What became of one unit.

    Attributes:
      records, bytes: number of examples and their bytes, by split.
      bad: the examples left out, each with the reason.
      ignored: members of the archive that belong to no example.
    """

    records: dict[str, int]
    bytes: dict[str, int]
    bad: list[Bad]
    ignored: int = 0

    @property
    def seen(self) -> int:
        return sum(self.records.values()) + len(self.bad)

    @property
    def damaged(self) -> list[Bad]:
        """Archives that could not be read to their end."""
        return [bad for bad in self.bad if not bad.key]


def features(classes: Sequence[str] = ()) -> "FeaturesDict":
    """Returns the TFDS features of the data set, with labels of these classes."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Text(),
            "id": np.int64,
            "source": tfds.features.Text(),
            "key": tfds.features.Text(),
            **({"label": tfds.features.ClassLabel(names=classes)} if classes else {}),
        }
    )


def class_of(label: str, classes: Sequence[str]) -> int:
    """Returns the number of the class that a label names, by name or number; -1 where there is no label.

    Raises:
      InputError: it names none of them.
    """
    if not label:
        return -1
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise InputError(f"its label {label[:100]!r} is none of the {len(classes)} classes; {nearest(label, classes)}")


def convert(record: Record, settings: Settings) -> tuple[bytes, str]:
    """Checks an example and returns its encoded picture, resized where the settings ask for it, and clean caption.

    Raises:
      InputError: the picture does not decode, or nothing is left of the caption.
    """
    caption = captions.clean(record.caption)
    if not caption:
        raise InputError("its caption is empty")
    pixels = images.decode(record.image, max_pixels=settings.max_pixels)
    height, width = pixels.shape[:2]
    if not settings.size or min(height, width) <= settings.size:
        return record.image, caption
    scale = settings.size / min(height, width)
    # Pillow's bicubic widens its kernel when it shrinks, so it antialiases.
    smaller = Image.fromarray(pixels).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC
    )
    lossless = images.read_header(record.image)[0] == "png"
    return (images.encode_png if lossless else images.encode_jpeg)(np.asarray(smaller)), caption


def split_of(source: str, key: str, *, validation_percent: float) -> str:
    """Returns the split of an example: a function of its name, so it is the same in every run and order."""
    digest = hashlib.sha256(f"{source}/{key}".encode("utf-8", "replace")).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < validation_percent / 100 * 2**64 else "train"


def write_unit(
    unit: Unit, settings: Settings, *, directory: str, on_example: Callable[[], None] = lambda: None
) -> UnitReport:
    """Writes one unit's shards and, last, its report; a unit whose report is there is whole.

    Args:
      unit: what to read.
      settings: what to do to each example.
      directory: where finished units wait for `assemble`.
      on_example: called after each example, good or bad.

    Raises:
      InputError: the source cannot be read or the disk not be written.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    serialize = features(settings.classes).serialize_example
    report = UnitReport({split: 0 for split in SPLITS}, {split: 0 for split in SPLITS}, [])
    writers = {split: _Writer(shard_path(directory, unit, split)) for split in SPLITS}
    for item in archives.read_tar(unit.path) if unit.kind == "tar" else folders.read_entries(unit):
        if isinstance(item, Ignored):
            report.ignored += 1
            continue
        if isinstance(item, Record):
            try:
                image, caption = convert(item, settings)
                split = split_of(item.source, item.key, validation_percent=settings.validation_percent)
                example = {
                    "image": image,
                    "caption": caption,
                    "id": unit.first_id + sum(report.records.values()),
                    "source": item.source,
                    "key": item.key,
                    **({"label": class_of(item.label, settings.classes)} if settings.classes else {}),
                }
                # The order of a proto map's entries is random; `deterministic` sorts them, so equal means equal bytes.
                data = tf_example_pb2.Example.FromString(serialize(example)).SerializeToString(deterministic=True)
                writers[split].write(data)
                report.records[split] += 1
                report.bytes[split] += len(data)
            except InputError as error:
                item = Bad(item.source, item.key, str(error))
        if isinstance(item, Bad):
            report.bad.append(item)
        on_example()
    for split, writer in writers.items():
        writer.commit(report.records[split])
    _write_json(report_path(directory, unit), dataclasses.asdict(report))
    return report


def shard_path(directory: str, unit: Unit, split: str) -> str:
    return os.path.join(directory, f"{unit.index:07d}.{split}.array_record")


def report_path(directory: str, unit: Unit) -> str:
    return os.path.join(directory, f"{unit.index:07d}.json")


def read_report(directory: str, unit: Unit) -> UnitReport | None:
    """Returns the report of a finished unit, None where it is not finished."""
    try:
        with open(report_path(directory, unit), encoding="utf-8") as file:
            fields = json.load(file)
    except FileNotFoundError:
        return None
    return UnitReport(**{**fields, "bad": [Bad(**bad) for bad in fields["bad"]]})


class _Writer:
    """An ArrayRecord file that appears under its name only when it is whole; none where there is no record."""

    def __init__(self, path: str):
        self.path, self.partial = path, f"{path}.{os.getpid()}.partial"
        self.writer: ArrayRecordWriter | None = None

    def write(self, data: bytes) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self.writer is None:
            # One record per chunk, as TFDS writes: random access then reads no neighbour.
            self.writer = ArrayRecordWriter(self.partial, "group_size:1")
        self.writer.write(data)

    def commit(self, records: int) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        if self.writer is None:
            return
        self.writer.close()
        # A full disk shows itself here.
        reader = ArrayRecordReader(self.partial)
        written = reader.num_records()
        reader.close()
        if written != records:
            raise InputError(f"{self.partial} holds {written} of {records} records; is the disk full?")
        _sync(self.partial)
        os.replace(self.partial, self.path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write_json(path: str, value: object) -> None:
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


def assemble(
    units: list[Unit], reports: list[UnitReport], *, directory: str, out: str, classes: Sequence[str] = ()
) -> None:
    """Gives the shards of all units their names in `out` and then writes TFDS's metadata.

    Shards keep the order of the units. Interrupted anywhere, it can be called again; until its last step, `out` has no
    `dataset_info.json` and TFDS refuses it.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming

    staged = os.path.join(directory, "metadata")
    os.makedirs(staged, exist_ok=True)
    template = naming.ShardedFileTemplate(data_dir=staged, dataset_name=NAME, filetype_suffix="array_record")
    infos = []
    for split in SPLITS:
        chosen = [(unit, report) for unit, report in zip(units, reports, strict=True) if report.records[split]]
        for index, (unit, _) in enumerate(chosen):
            name = f"{NAME}-{split}.array_record-{index:05d}-of-{len(chosen):05d}"
            if os.path.exists(shard_path(directory, unit, split)):
                os.replace(shard_path(directory, unit, split), os.path.join(out, name))
            # TFDS finds the splits by file names; these empty ones stand in for the shards beside the metadata.
            open(os.path.join(staged, name), "wb").close()
        if chosen:
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[report.records[split] for _, report in chosen],
                    num_bytes=sum(report.bytes[split] for _, report in chosen),
                    filename_template=template.replace(split=split),
                )
            )
    tfds.folder_dataset.write_metadata(
        data_dir=staged,
        features=features(classes),
        split_infos=infos,
        version=VERSION,
        filename_template=template,
        check_data=False,
        description="Captioned pictures, prepared by unclip_jax.",
    )
    names = [name for name in sorted(os.listdir(staged)) if name.endswith(".labels.txt")]
    for name in (*names, "features.json", "dataset_info.json"):
        os.replace(os.path.join(staged, name), os.path.join(out, name))
