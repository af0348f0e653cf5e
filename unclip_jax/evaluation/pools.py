"""Where a protocol's captions and real images come from, by the name of its source."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from unclip_jax.data import captions as captions_lib
from unclip_jax.data import datasets, images, scene_rendering, scenes
from unclip_jax.errors import InputError
from unclip_jax.evaluation import coco, protocols
from unclip_jax.evaluation.rows import Pool

# Scenes of the data set `captioned_shapes` are drawn with seed 0; these are drawn like its validation split, as
# `tiny` has it, from a seed of their own, so that no model was trained on one.
_SEED, _SPLIT, _TWO_OBJECTS, _SPREAD = 1, "validation", 0.25, 0.1
_SIDE = 64


class Scenes:
    """Rendered scenes with their captions, made as they are asked for; a `rows.Pool`."""

    def __init__(self, count: int):
        """Describes `count` scenes."""
        self._scenes = [
            scenes.scene_at(seed=_SEED, split=_SPLIT, index=index, two_object_fraction=_TWO_OBJECTS, spread=_SPREAD)
            for index in range(count)
        ]
        self.image_ids = range(count)
        self.captions = [(index, index, scenes.caption(scene)) for index, scene in enumerate(self._scenes)]
        drawn = {"seed": _SEED, "split": _SPLIT, "two_object_fraction": _TWO_OBJECTS, "spread": _SPREAD}
        self.fingerprint = {"name": "captioned_shapes", "side": _SIDE, "count": count, **drawn}

    def image(self, image_id: int) -> UInt8[np.ndarray, "_ _ 3"]:
        """Returns a scene's pixels."""
        return scene_rendering.render(self._scenes[image_id], _SIDE)


class Emoji:
    """All emoji of the installed font, training pictures too: they are few; a `rows.Pool`."""

    def __init__(self, data_dir: str):
        """Prepares the data set, unless it is there."""
        directory = datasets.prepare("emoji", data_dir=data_dir, variant="default")
        sources = [datasets.open_source(directory, split) for split in ("train", "validation")]
        records = [source[index] for source in sources for index in range(len(source))]
        by_code = {int(record["code_point"]): record for record in records}
        self._images = {code: bytes(record["image"]) for code, record in by_code.items()}
        self.image_ids = sorted(by_code)
        self.captions = [
            (code, code, captions_lib.clean(bytes(by_code[code]["caption"]).decode())) for code in self.image_ids
        ]
        splits = [datasets.fingerprint(directory, split) for split in ("train", "validation")]
        self.fingerprint = {"name": "emoji", "splits": splits}

    def image(self, image_id: int) -> UInt8[np.ndarray, "_ _ 3"]:
        """Returns an emoji's pixels."""
        return images.decode(self._images[image_id])


def opened(protocol: protocols.Protocol, options: Mapping[str, Any]) -> Pool:
    """Opens what a protocol draws from.

    Args:
      protocol: what is measured.
      options: "data_dir", the root of built-in data sets; and of COCO "tfds", a prepared `coco_captions`, or
        "annotations" and "images", the file and the folder.

    Raises:
      InputError: it is not there, or the options do not say where.
    """
    if protocol.source == "captioned_shapes":
        return _scenes(max(protocol.count, protocol.images))
    if protocol.source == "emoji":
        return Emoji(str(options["data_dir"]))
    given = [key for key in ("tfds", "annotations", "images") if options.get(key)]
    if given == ["tfds"]:
        return coco.Prepared(str(options["tfds"]))
    if given == ["annotations", "images"]:
        return coco.Annotated(str(options["annotations"]), str(options["images"]))
    raise InputError(
        f"{protocol.name} needs COCO: give --config.coco_files.annotations=captions_val2014.json and "
        "--config.coco_files.images=val2014, or --config.coco_files.tfds with the folder that TFDS prepared"
    )


@functools.cache
def _scenes(count: int) -> Scenes:
    return Scenes(count)
