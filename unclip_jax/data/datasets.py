"""The data sets that a config can name, and how any prepared data set is opened.

Each function of the table writes a TFDS builder as ArrayRecord, unless it is there. A directory made by
`python -m unclip_jax.prepare` from a user's own images is opened the same way. Reading imports neither TensorFlow nor
torch.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from unclip_jax.data.sources import Source
from unclip_jax.errors import InputError, nearest


def _captioned_shapes(data_dir: str, variant: str) -> str:
    from unclip_jax.data import captioned_shapes

    return captioned_shapes.prepare(data_dir=data_dir, variant=variant)


def _emoji(data_dir: str, variant: str) -> str:
    from unclip_jax.data import emoji

    if variant != "default":
        raise InputError(f"emoji has no variant {variant!r}: it has one, 'default'")
    return emoji.prepare(data_dir=data_dir)


# Modules are imported only when asked for: emoji wants a font, and writing wants TensorFlow.
DATASETS: dict[str, Callable[[str, str], str]] = {"captioned_shapes": _captioned_shapes, "emoji": _emoji}

REQUIRED_FEATURES = ("image", "caption", "id")
# Bytes at either end of a shard that the fingerprint reads.
_SAMPLE = 1 << 16


def prepare(name: str, *, data_dir: str, variant: str) -> str:
    """Writes a data set below `data_dir`, unless it is there, and returns the builder's directory.

    Args:
      name: a key of `DATASETS`.
      data_dir: root of prepared data sets.
      variant: one that the data set knows, such as "tiny" of captioned_shapes; emoji has "default" alone.

    Raises:
      InputError: unknown name or variant, or what the data set needs (such as a font) is missing.
    """
    if name not in DATASETS:
        raise InputError(f"no data set {name!r}; {nearest(name, DATASETS)}")
    return DATASETS[name](data_dir, variant)


def open_source(directory: str, split: str, *, required: Sequence[str] = REQUIRED_FEATURES) -> Source:
    """Opens a split of a prepared data set for random access.

    Args:
      directory: of a TFDS builder (it holds `dataset_info.json`), local or remote.
      split: its name, or a TFDS slice such as "train[:100]".
      required: features that the records must have, `image` among them.

    Returns:
      Records with `image` (encoded bytes), `caption` (UTF-8 bytes), `id` and whatever else the data set keeps.

    Raises:
      InputError: no such directory, no such split, no examples, or not this project's kind of record.
    """
    import tensorflow_datasets as tfds

    builder = _builder(directory)
    lacking = [feature for feature in required if feature not in builder.info.features]
    if lacking:
        has = ", ".join(builder.info.features)
        raise InputError(f"records in {directory!r} lack {', '.join(lacking)}; they have {has}")
    _check_split(builder, directory, split)
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    # What TFDS raises of records in a format without random access, such as TFRecord.
    except (NotImplementedError, ValueError, OSError) as error:
        raise InputError(f"split {split!r} in {directory!r} cannot be opened: {error}") from error


def class_names(directory: str, feature: str) -> tuple[str, ...]:
    """Returns the names of a label feature's classes, in their order.

    Args:
      directory: of a TFDS builder.
      feature: a ClassLabel, or a sequence of them, of its records.

    Raises:
      InputError: no such directory, or its records have no such label; those that they have are named.
    """
    labels = {name: label for name, value in _builder(directory).info.features.items() if (label := _label(value))}
    if not labels:
        raise InputError(f"records in {directory!r} have no feature of class labels (TFDS's ClassLabel)")
    if feature not in labels:
        raise InputError(f"records in {directory!r} have no class label {feature!r}; {nearest(feature, labels)}")
    return tuple(labels[feature].names)


def _label(feature: Any) -> Any:
    """The ClassLabel that a feature is, or that it is a sequence of; None where it is something else."""
    import tensorflow_datasets as tfds

    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
    return inner if isinstance(inner, tfds.features.ClassLabel) and inner.num_classes else None


def fingerprint(directory: str, split: str) -> dict[str, Any]:
    """Returns what tells this data from other data, for the checkpoint: name, version, split, examples and a digest.

    The digest covers the builder's description, the names and sizes of the split's shards and 64 kB at both ends of
    each: cheap, and other data hardly passes for the same.
    """
    builder = _builder(directory)
    _check_split(builder, directory, split)
    base = split.partition("[")[0]
    files = sorted(str(path) for path in builder.info.splits[base].filepaths)
    digest = hashlib.sha256()
    digest.update(json.dumps(builder.info.features.to_json(), sort_keys=True).encode())
    digest.update(json.dumps(list(builder.info.splits[base].shard_lengths)).encode())
    for file in map(epath.Path, files):
        size = file.stat().length
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as shard:
            digest.update(shard.read(_SAMPLE))
            shard.seek(max(0, size - _SAMPLE))
            digest.update(shard.read(_SAMPLE))
    return {
        "name": builder.info.full_name,
        "version": str(builder.info.version),
        "split": split,
        "examples": builder.info.splits[split].num_examples,
        "digest": digest.hexdigest(),
    }


def slice_of(directory: str, split: str) -> tuple[str, int, int]:
    """Returns (name of the whole split, first example, number of examples) of a split or one slice of it.

    Raises:
      InputError: no such split, or several slices.
    """
    import tensorflow_datasets as tfds

    builder = _builder(directory)
    _check_split(builder, directory, split)
    slices = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    if len(slices) != 1:
        raise InputError(f"split {split!r} is put together of {len(slices)} slices; embeddings are read of one")
    (one,) = slices
    return one.splitname, one.from_ or 0, builder.info.splits[split].num_examples


def _builder(directory: str) -> Any:
    import tensorflow_datasets as tfds

    if not (epath.Path(directory) / "dataset_info.json").exists():
        raise InputError(
            f"{directory!r} holds no prepared data set (no dataset_info.json): prepare it first, "
            f"or name one of {', '.join(sorted(DATASETS))}"
        )
    try:
        return tfds.builder_from_directory(directory)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"the data set description in {directory!r} cannot be read: {error}") from error


def _check_split(builder: Any, directory: str, split: str) -> None:
    splits = builder.info.splits
    name = split.partition("[")[0]
    if name not in splits:
        raise InputError(f"{directory!r} has no split {name!r}; {nearest(name, splits) if splits else 'it has none'}")
    try:
        count = splits[split].num_examples
    except (ValueError, KeyError) as error:
        raise InputError(f"{split!r} is no part of a split of {directory!r}: {error}") from error
    if not count:
        raise InputError(f"split {split!r} in {directory!r} is empty")
