"""Named protocols of evaluation: all that a number like "COCO FID-30k" depends on beside the model, and a digest of it.

"FID on 30,000 captions of COCO" has been measured in at least eight ways, which differ in captions, reference images,
how a photograph becomes a square, and how a square becomes the 299 pixels that Inception reads; each moves the result
by more than papers differ. So there are no options here, only names: whoever wants something else gives it another
name. The digest of a protocol stands in every result.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from unclip_jax.data import sealed
from unclip_jax.errors import InputError, nearest

# COCO's validation set of 2014.
COCO_IMAGES, COCO_CAPTIONS = 40_504, 202_654


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured.

    Attributes:
      name: a key of PROTOCOLS.
      source: where captions and real images come from: "coco-val2014", "captioned_shapes" or "emoji".
      captions: how they are chosen, a key of `rows.CHOICES`.
      count: images to generate, one for each row; 0 for as many captions as the source has.
      images: reference images that the source must have; 0 for as many as it has.
      without_near_duplicates: whether images that are near one of the model's own training set are taken out of the
        reference, by a file that names them (`near_duplicates`).
      real: how a real image becomes pixels, a key of `inception_paths.REAL`.
      size: pixels a side of a generated image.
      inception: how pixels become what Inception reads, a key of `inception_paths.INCEPTION`.
      metrics: keys of `measures.METRICS`.
    """

    name: str
    source: str
    captions: str
    count: int
    images: int
    without_near_duplicates: bool = False
    real: str
    size: int
    inception: str
    metrics: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns the description as it stands in files."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the description."""
        return sealed.sealed(self.as_json())["seal"][:16]


_ALL = (
    "fid", "sfid", "fid_infinity", "kid", "cmmd", "inception_score", "precision_recall", "clip_score", "r_precision",
)  # fmt: skip
_COCO = Protocol(
    name="coco30k-openai",
    source="coco-val2014",
    captions="one-an-image",
    count=30_000,
    images=COCO_IMAGES,
    real="centre-crop-256",
    size=256,
    inception="graph",
    metrics=_ALL,
)
_SHAPES = Protocol(
    name="captioned_shapes",
    source="captioned_shapes",
    captions="in-order",
    count=5_000,
    images=5_000,
    real="square-64",
    size=64,
    inception="graph",
    metrics=(*_ALL, "oracle"),
)
_NAMED = (
    # As DALL-E, GLIDE and unCLIP describe theirs, as far as they do: 30,000 captions of the validation set, all of its
    # images, cropped, as references.
    _COCO,
    # The same without what the model may have seen in training.
    dataclasses.replace(_COCO, name="coco30k-openai-filtered", without_near_duplicates=True),
    # GigaGAN's, which clean-fid's resizing is part of.
    dataclasses.replace(_COCO, name="coco30k-clean", real="lanczos-256", inception="clean"),
    # MLPerf's for Stable Diffusion, but for the size of generated images, 512 there.
    dataclasses.replace(
        _COCO,
        name="coco30k-mlperf",
        captions="pandas-2023",
        images=30_000,
        real="squeezed-512-jpeg-75",
        inception="torch",
        metrics=("fid", "clip_score"),
    ),
    _SHAPES,
    # A fifth of its captions, for sweeps.
    dataclasses.replace(_SHAPES, name="captioned_shapes-1k", count=1_000),
    # A minute's worth, to see that all of it works.
    dataclasses.replace(_SHAPES, name="captioned_shapes-smoke", count=96, images=128),
    Protocol(
        name="emoji",
        source="emoji",
        captions="in-order",
        count=0,
        images=0,
        real="square-64",
        size=64,
        inception="graph",
        metrics=_ALL,
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _NAMED}


def named(name: str) -> Protocol:
    """Returns a protocol by its name; raises InputError for one that there is not."""
    if name not in PROTOCOLS:
        raise InputError(f"there is no protocol {name!r}; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def together(names: Sequence[str]) -> list[Protocol]:
    """Returns protocols that one set of images is scored by.

    Raises:
      InputError: there is none, or no such one, or they are of other data or sizes.
    """
    if not names:
        raise InputError(f"config.protocols is empty; name some of {', '.join(PROTOCOLS)}")
    found = [named(name) for name in names]
    for protocol in found[1:]:
        if (protocol.source, protocol.size) != (found[0].source, found[0].size):
            raise InputError(
                f"{found[0].name} and {protocol.name} are of other data or sizes; evaluate them in folders of their own"
            )
    return found
