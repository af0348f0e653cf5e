"""The data set `captioned_shapes`: rendered scenes, their captions and the truth about them.

Scene i of a split is a function of (seed, split, i) alone (`scenes.scene_at`), so that two machines prepare the
same records. Splits: `train`, whose captions often say less than is seen; `validation`, drawn alike but captioned in
full; `unseen`, so too, where each scene holds an object of a kind (`scenes.is_unseen`) that the other two never show.
"""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.data import preparation
from unclip_jax.data.scene_rendering import render
from unclip_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    abridge,
    caption,
    scene_at,
)
from unclip_jax.errors import InputError, nearest

SEED = 0
_ABSENT = -1  # the class of what a scene does not have: a second object, a relation


@dataclasses.dataclass(kw_only=True)
class CaptionedShapesConfig(tfds.core.BuilderConfig):
    """A size of the data set.

    Attributes:
      resolution: pixels a side.
      train, validation, unseen: scenes of each split.
      two_object_fraction: share of scenes with two objects.
      detail: share of the sizes, colours and backgrounds that captions of `train` tell (`scenes.abridge`); the other
        splits' captions tell all.
      spread: see `scenes.sample_scene`.
    """

    resolution: int = 64
    train: int = 8000
    validation: int = 1000
    unseen: int = 1000
    two_object_fraction: float = 0.5
    detail: float = 0.5
    spread: float = 1.0


class CaptionedShapes(tfds.core.GeneratorBasedBuilder):
    """Builder of `captioned_shapes`; use `prepare`, which also makes the preparation whole or absent."""

    VERSION = tfds.core.Version("1.1.0")  # since 1.1 captions may say less than is seen
    BUILDER_CONFIGS: ClassVar[list[CaptionedShapesConfig]] = [
        CaptionedShapesConfig(name="smoke", train=96, validation=32, unseen=32, two_object_fraction=0.25, spread=0.1),
        CaptionedShapesConfig(name="tiny", two_object_fraction=0.25, spread=0.1),
        CaptionedShapesConfig(name="base", resolution=256, train=50000, validation=2000, unseen=2000),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        resolution = self.builder_config.resolution
        objects = {
            "colour": _classes(COLOURS, 2),
            "shape": _classes(SHAPES, 2),
            "size": _classes(SIZES, 2),
            "texture": _classes(TEXTURES, 2),
            "centre": tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
            "radius": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="One or two coloured shapes on a plain background, captioned by a grammar.",
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(resolution, resolution, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "id": np.int64,
                "num_objects": np.int64,
                "background": tfds.features.ClassLabel(names=list(BACKGROUNDS)),
                "relation": tfds.features.ClassLabel(names=list(RELATIONS)),
                **objects,
            }),
            # Records stay in order of `id`; the pipeline shuffles.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                seed=SEED,
                two_object_fraction=self.builder_config.two_object_fraction,
                detail=self.builder_config.detail,
                spread=self.builder_config.spread,
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        config = self.builder_config
        counts = {"train": config.train, "validation": config.validation, "unseen": config.unseen}
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(count):
            scene = scene_at(
                seed=SEED,
                split=split,
                index=index,
                two_object_fraction=config.two_object_fraction,
                spread=config.spread,
            )
            said = scene if split != "train" else abridge(scene, detail=config.detail, seed=SEED, index=index)
            image = encode_png(render(scene, config.resolution))
            yield index, {"image": image, "caption": caption(said), "id": index, **truth(scene)}


def _classes(names: Any, length: int) -> tfds.features.Sequence:
    return tfds.features.Sequence(tfds.features.ClassLabel(names=list(names)), length=length)


def truth(scene: Scene) -> dict[str, Any]:
    """What is known of a scene, as features: class ids in the order of the words in `scenes`, and geometry.

    Returns:
      num_objects int64 []; background and relation, class ids []; colour, shape, size, texture, class ids [2];
      centre float32 [2, 2] as (x, y) and radius float32 [2], in image sides. With one object, relation and the
      second entries are -1.
    """
    missing = [_ABSENT] * (2 - len(scene.kinds))
    centres = [(p.x, p.y) for p in scene.placements] + [(_ABSENT, _ABSENT)] * len(missing)
    return {
        "num_objects": len(scene.kinds),
        "background": list(BACKGROUNDS).index(scene.background),
        "relation": RELATIONS.index(scene.relation) if scene.relation else _ABSENT,
        "colour": [list(COLOURS).index(kind.colour) for kind in scene.kinds] + missing,
        "shape": [SHAPES.index(kind.shape) for kind in scene.kinds] + missing,
        "size": [SIZES.index(kind.size) for kind in scene.kinds] + missing,
        "texture": [TEXTURES.index(kind.texture) for kind in scene.kinds] + missing,
        "centre": np.array(centres, np.float32),
        "radius": np.array([p.radius for p in scene.placements] + missing, np.float32),
    }


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """PNG bytes, at the fastest compression: preparation is short and these pictures compress well anyway."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def prepare(*, data_dir: str, variant: str = "tiny") -> str:
    """Renders and writes a variant below `data_dir`, unless it is there.

    Args:
      data_dir: root of prepared data sets; the records go to `captioned_shapes/<variant>/<version>`.
      variant: "smoke" (64 pixels; 96 / 32 / 32 scenes in train / validation / unseen), "tiny" (64 pixels;
        8,000 / 1,000 / 1,000) or "base" (256 pixels; 50,000 / 2,000 / 2,000). In the first two a quarter of the
        scenes have two objects, and objects stay near where the caption lets one expect them, which minutes of
        training ask for; in "base" half have two, which lie anywhere that the caption allows.

    Returns:
      Directory of the prepared builder.

    Raises:
      InputError: unknown variant.
    """
    known = [config.name for config in CaptionedShapes.BUILDER_CONFIGS]
    if variant not in known:
        raise InputError(f"captioned_shapes has no variant {variant!r}; {nearest(variant, known)}")
    return preparation.write_once(CaptionedShapes(data_dir=data_dir, config=variant))
