"""MS-COCO's captioned images, from the files that users have: TFDS' `coco_captions`, or the annotations and a folder.

    annotations/captions_val2014.json     {"images": [{"id", "file_name", …}], "annotations": [{"id", "image_id",
                                          "caption"}]}
    val2014/COCO_val2014_000000000042.jpg

TFDS deals the validation set of 2014 out to its splits `val`, `test` and `restval`, which are put together again here.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from unclip_jax.data import captions as captions_lib
from unclip_jax.data import datasets, images
from unclip_jax.errors import InputError

# TFDS' splits that make up COCO's validation set of 2014 (Karpathy and Fei-Fei's division).
TFDS_SPLITS = ("val", "test", "restval")
_FEATURES = ("image", "image/id", "captions")


class Annotated:
    """COCO as its annotation file and a folder of its images; a `rows.Pool`."""

    def __init__(self, annotations: str, folder: str):
        """Reads the annotations; no image is opened yet.

        Args:
          annotations: path of captions_val2014.json.
          folder: of its images.

        Raises:
          InputError: the file is not there or is no such file, or an image of it is not in the folder.
        """
        path = pathlib.Path(annotations).expanduser()
        try:
            data = path.read_bytes()
            value = json.loads(data)
            files = {int(image["id"]): str(image["file_name"]) for image in value["images"]}
            found = [(int(one["id"]), int(one["image_id"]), str(one["caption"])) for one in value["annotations"]]
        except OSError as error:
            raise InputError(f"the annotations {annotations!r} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{annotations!r} is no file of COCO captions ({error!r}); it should be captions_val2014.json"
            ) from error
        self._folder, self._files = pathlib.Path(folder).expanduser(), files
        self.image_ids = sorted(files)
        self.captions = _cleaned(found, known=files, where=annotations)
        sizes = _sizes(self._folder)
        for image_id, name in files.items():
            if name not in sizes:
                raise InputError(f"the folder {folder!r} lacks {name} (image {image_id} of {annotations!r})")
        listing = [(name, sizes[name]) for _, name in sorted(files.items())]
        self.fingerprint = {
            "name": f"COCO, {path.name}",
            "annotations": hashlib.sha256(data).hexdigest(),
            "images": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        }

    def image(self, image_id: int) -> UInt8[np.ndarray, "_ _ 3"]:
        """Returns an image's pixels; raises InputError, which names it, where it cannot be read."""
        path = self._folder / self._files[image_id]
        try:
            return images.decode(path.read_bytes())
        except (OSError, InputError) as error:
            raise InputError(f"the image {path} cannot be read: {error}") from error


class Prepared:
    """COCO as TFDS prepared it, in ArrayRecord files; a `rows.Pool`."""

    def __init__(self, directory: str, splits: Sequence[str] = TFDS_SPLITS):
        """Reads ids and captions of all records.

        Raises:
          InputError: there is no such data set, or it is in files without random access.
        """
        try:
            self._sources = [datasets.open_source(directory, split, required=_FEATURES) for split in splits]
        except InputError as error:
            raise InputError(
                f"{error}; TFDS prepares coco_captions by tfds.builder('coco_captions', file_format='array_record')"
                ".download_and_prepare()"
            ) from error
        self._places: dict[int, tuple[int, int]] = {}
        found: list[tuple[int, int, str]] = []
        for number, source in enumerate(self._sources):
            for index in range(len(source)):
                record = source[index]
                image_id = int(record["image/id"])
                self._places[image_id] = number, index
                said = record["captions"]
                found += [
                    (int(caption_id), image_id, bytes(text).decode() if isinstance(text, bytes) else str(text))
                    for caption_id, text in zip(said["id"], said["text"], strict=True)
                ]
        self.image_ids = sorted(self._places)
        self.captions = _cleaned(sorted(found), known=self._places, where=directory)
        self.fingerprint = {
            "name": "COCO, coco_captions of TFDS",
            "splits": [datasets.fingerprint(directory, split) for split in splits],
        }

    def image(self, image_id: int) -> UInt8[np.ndarray, "_ _ 3"]:
        """Returns an image's pixels; raises InputError, which names it, where it cannot be read."""
        source, index = self._places[image_id]
        try:
            return images.decode(bytes(self._sources[source][index]["image"]))
        except InputError as error:
            raise InputError(f"the image {image_id} of coco_captions cannot be read: {error}") from error


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except OSError as error:
        raise InputError(f"the folder of images {str(folder)!r} cannot be read: {error}") from error


def _cleaned(
    found: Sequence[tuple[int, int, str]], *, known: Mapping[int, Any], where: str
) -> list[tuple[int, int, str]]:
    """Checks that captions belong to images, no two to one id, and cleans their texts as prompts are."""
    seen: set[int] = set()
    cleaned = []
    for caption_id, image_id, text in found:
        if image_id not in known:
            raise InputError(f"caption {caption_id} of {where!r} describes image {image_id}, which is not listed there")
        if caption_id in seen or not 0 <= caption_id < 2**32:
            raise InputError(f"{where!r} has two captions of id {caption_id}, or it is no number below 2^32")
        seen.add(caption_id)
        if words := captions_lib.clean(text):
            cleaned.append((caption_id, image_id, words))
    return cleaned
