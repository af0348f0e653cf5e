"""CLIP score and CLIP R-precision: how well images fit their captions, in the eyes of a CLIP.

"CLIP score" is at least seven things in public code, which differ by the CLIP, by words before the caption, by a factor
and by whether a negative cosine counts as 0; `DEFINITIONS` has them, and a score is reported under a definition's
`name`, which says all four. The CLIP must not be the one that the prior or the decoder was trained on: guidance by a
CLIP raises that CLIP's score while people see no improvement (Nichol et al., 2021).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from unclip_jax.data import order
from unclip_jax.errors import InputError, nearest
from unclip_jax.evaluation import feature_sets, uncertainty
from unclip_jax.evaluation.feature_sets import Features
from unclip_jax.evaluation.uncertainty import Measured

OTHERS = 99  # wrong captions beside the true one in R-precision
SEED = 2023  # of their draw; part of the metric
_GATHERED = 1 << 24  # numbers of drawn embeddings that are held at once: 128 MB


@dataclasses.dataclass(frozen=True)
class Definition:
    """What somebody calls the CLIP score.

    Attributes:
      model: the CLIP, as its publishers name it.
      prefix: what stands in front of each caption.
      scale: factor of the cosine.
      floor: whether a negative cosine counts as 0.
    """

    model: str
    prefix: str = ""
    scale: float = 1.0
    floor: bool = False

    @property
    def name(self) -> str:
        """Model, prefix and scale: 'CLIP score (OpenAI ViT-B/16, no prefix, 100 cos)'."""
        prefix = repr(self.prefix) if self.prefix else "no prefix"
        cosine = "max(cos, 0)" if self.floor else "cos"
        return f"CLIP score ({self.model}, {prefix}, {cosine if self.scale == 1 else f'{self.scale:g} {cosine}'})"

    def captions(self, captions: Sequence[str]) -> list[str]:
        """Returns what CLIP is to read."""
        return [self.prefix + caption for caption in captions]

    def measured(self, z_image: Features, z_text: Features) -> Measured:
        """Returns the mean score; `z_text` are embeddings of `captions`. See the function of that name."""
        return measured(z_image, z_text, self.scale, floor=self.floor)

    def of_model(self, model: str) -> "Definition":
        """Returns the same prefix and scale by another CLIP, such as one that was trained here."""
        return dataclasses.replace(self, model=model)


_DEPICTS = "A photo depicts "

DEFINITIONS: dict[str, Definition] = {
    "glide": Definition("OpenAI ViT-B/16", scale=100.0),  # Nichol et al., 2021: logits, so the learned scale of 100
    "karlo": Definition("OpenAI ViT-B/16"),
    "t2ib": Definition("OpenAI ViT-B/32"),
    # Hessel et al., 2021, section 3
    "hessel": Definition("OpenAI ViT-B/32", prefix=_DEPICTS, scale=2.5, floor=True),
    "gigagan": Definition("OpenCLIP ViT-g/14", prefix=_DEPICTS),  # and DMD2
    "torchmetrics": Definition("OpenAI ViT-L/14", scale=100.0, floor=True),  # its default model
    "mlperf": Definition("OpenCLIP ViT-H/14"),
}


def named(name: str) -> Definition:
    """Returns a definition of the table.

    Raises:
      InputError: there is none of that name.
    """
    if name not in DEFINITIONS:
        raise InputError(f"there is no CLIP score {name!r}; {nearest(name, DEFINITIONS)}")
    return DEFINITIONS[name]


def score(z_image: Features, z_text: Features, scale: float = 1.0, *, floor: bool = False) -> float:
    """Returns the mean over pairs of scale * cos; see `measured`."""
    return measured(z_image, z_text, scale, floor=floor).value


def measured(z_image: Features, z_text: Features, scale: float = 1.0, *, floor: bool = False) -> Measured:
    """Returns the mean over pairs of scale * cos(image, caption), or of scale * max(cos, 0).

    Args:
      z_image, z_text: embeddings of images and of their captions, float [n, d], of any length.
      scale, floor: see `Definition`.

    Raises:
      InputError: other numbers of images than captions, widths that differ, rows that are zeros or not finite.
    """
    images, texts = _paired(z_image, z_text)
    cosines = (images * texts).sum(1)
    return uncertainty.mean(scale * (np.maximum(cosines, 0.0) if floor else cosines))


def draw(captions: Sequence[str], *, others: int = OTHERS, seed: int = SEED) -> Int64[np.ndarray, "n others"]:
    """Draws the wrong captions that each image's true one is told from.

    Args:
      captions: n, one for each image; they may repeat.
      others: how many are drawn for an image: different from its own and from each other as texts.
      seed: of the draw, which is the same for ever: a keyed permutation of the distinct captions for each row.

    Returns:
      Rows of `captions`, int64 [n, others].

    Raises:
      InputError: there are not as many distinct captions.
    """
    places: dict[str, int] = {}
    for caption in captions:
        places.setdefault(caption, len(places))
    if len(places) <= others:
        raise InputError(
            f"R-precision tells a caption from {others} others, but there are {len(places)} different captions in all"
        )
    place = np.array([places[caption] for caption in captions])
    _, rows = np.unique(place, return_index=True)  # the first of each distinct caption
    count = len(captions)
    positions = np.arange(count, dtype=np.int64)[:, None] * len(rows) + np.arange(others + 1)
    _, drawn = order.shuffled(positions.reshape(-1), count=len(rows), seed=seed)
    drawn = drawn.reshape(count, others + 1)
    # One more than needed was drawn: where the true caption is among them it goes, and else the last.
    own = drawn == place[:, None]
    own[:, -1] |= ~own.any(1)
    return rows[drawn[~own].reshape(count, others)]


def r_precision(z_image: Features, z_text: Features, drawn: Int64[np.ndarray, "n others"]) -> float:
    """Returns the share of images that are nearest to their own caption; see `measured_r_precision`."""
    return measured_r_precision(z_image, z_text, drawn).value


def measured_r_precision(z_image: Features, z_text: Features, drawn: Int64[np.ndarray, "n others"]) -> Measured:
    """Returns the share of images whose own caption has a larger cosine than all that were drawn beside it.

    As in Park et al. (2021), with CLIP in the place of an encoder trained on the data. Where k of the others are as
    near as the own caption it counts 1 / (k + 1), so that a CLIP that says always the same is at chance.

    Args:
      z_image, z_text: embeddings of images and of their own captions, float [n, d].
      drawn: rows of `z_text` that are wrong for each image, from `draw`.

    Raises:
      InputError: as `measured`, or `drawn` does not belong to these rows.
    """
    images, texts = _paired(z_image, z_text)
    count = len(images)
    if len(drawn) != count or not drawn.size or drawn.min() < 0 or drawn.max() >= count:
        raise InputError(f"the drawn captions are not those of {count} images; draw them from the same captions")
    hits = np.zeros(count)
    size = max(1, _GATHERED // (drawn.shape[1] * texts.shape[1]))
    for start in range(0, count, size):
        rows = slice(start, start + size)
        own = (images[rows] * texts[rows]).sum(1, keepdims=True)
        others = (texts[drawn[rows]] * images[rows, None]).sum(2)
        hits[rows] = (others <= own).all(1) / (1 + (others == own).sum(1))
    return uncertainty.mean(hits)


def _paired(z_image: Features, z_text: Features) -> tuple[Float64[np.ndarray, "_ _"], Float64[np.ndarray, "_ _"]]:
    if len(z_image) != len(z_text):
        raise InputError(f"{len(z_image)} images and {len(z_text)} captions are no pairs; give one caption an image")
    images = feature_sets.unit(z_image, what="the images' embeddings")
    texts = feature_sets.unit(z_text, what="the captions' embeddings")
    if images.shape[1] != texts.shape[1]:
        raise InputError(
            f"the images' embeddings have {images.shape[1]} dimensions, the captions' {texts.shape[1]}: they are of "
            "two CLIPs"
        )
    return images, texts
