"""What raters are asked: the three kinds of question, and which images stand on which side of each."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.errors import InputError, nearest

LEFT, RIGHT, NOT_SURE = "left", "right", "not_sure"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of question, as in section 5.2 of the paper.

    Attributes:
      title: its name on the page.
      question: what is asked of each pair.
      instructions: paragraphs that raters read before the first one.
      shows_caption: whether raters read the caption.
      images: on each side; more than one are drawn as a square grid.
      not_sure: whether "Not sure" is an answer; it counts as half a win for either side.
    """

    title: str
    question: str
    instructions: tuple[str, ...]
    shows_caption: bool = False
    images: int = 1
    not_sure: bool = True


# The paper has "Not sure" in all three. Whether its raters read the caption of a grid it does not say; here they do
# not, for they would judge whether a grid fits it.
KINDS = {
    "photorealism": Kind(
        title="Realism",
        question="Which image looks more like a photograph?",
        instructions=(
            "You will see two images side by side. Choose the one that could more easily be a real photograph.",
            "Look at shapes, textures, light and small details. Whether you like what is shown does not matter.",
        ),
    ),
    "caption_similarity": Kind(
        title="Caption",
        question="Which image matches the caption better?",
        instructions=(
            "You will read a caption above two images. Choose the image that shows better what the caption says.",
            "Look at which things are there, how many, their colours, and how they are placed. How real or beautiful "
            "an image is does not matter.",
        ),
        shows_caption=True,
    ),
    "diversity": Kind(
        title="Variety",
        question="Which group of images is more varied?",
        instructions=(
            "You will see two groups of sixteen images. Choose the group whose images differ more from one another.",
            "Look at content, viewpoint, arrangement, colours and style. How good the single images are does not "
            "matter.",
        ),
        images=16,
    ),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One comparison: the models on both sides, and the files of their images."""

    kind: str
    caption: str
    left: str
    right: str
    left_images: tuple[str, ...]
    right_images: tuple[str, ...]

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Question":
        """Returns the question that `dataclasses.asdict` made `row` of, by way of JSON."""
        files = {side: tuple(row[side]) for side in ("left_images", "right_images")}
        return cls(row["kind"], row["caption"], row["left"], row["right"], **files)


def draw(
    models: Mapping[str, Mapping[str, Sequence[pathlib.Path]]], *, kinds: Sequence[str], captions: int, seed: int
) -> list[Question]:
    """Draws a study: for each kind, every two models and every caption one question, in random order.

    Of each two models and kind, either stands on the left as often as the other; where the number of captions is odd,
    one of them once more. Pairs show the first image of a caption, grids its first 16.

    Args:
      models: name -> {caption: files}.
      kinds: names of `KINDS`, in the order in which raters meet them.
      captions: how many to draw of those that all models have images for; 0 takes them all.
      seed: the same models, options and seed make the same study.

    Raises:
      InputError: unknown kinds, fewer than two models, or too few captions with enough images by every model.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"there is no question of {kind!r}; {nearest(kind, KINDS)}")
    if len(set(kinds)) != len(kinds) or not kinds:
        raise InputError("give each kind of question once, at least one; for example --questions=photorealism")
    if len(models) < 2:
        raise InputError("a study compares at least two models; give --model=NAME=FOLDER for each")
    rng = np.random.default_rng(seed)
    drawn = _draw_captions(models, kinds, captions, rng)
    questions = []
    for kind in kinds:
        of_kind = []
        for first, second in itertools.combinations(models, 2):
            swapped = np.arange(len(drawn)) % 2 == rng.integers(2)
            for caption, swap in zip(drawn, rng.permutation(swapped), strict=True):
                left, right = (second, first) if swap else (first, second)
                files = [tuple(map(str, models[name][caption][: KINDS[kind].images])) for name in (left, right)]
                of_kind.append(Question(kind, caption, left, right, *files))
        questions += [of_kind[place] for place in rng.permutation(len(of_kind))]
    return questions


def _draw_captions(
    models: Mapping[str, Mapping[str, Sequence[pathlib.Path]]],
    kinds: Sequence[str],
    count: int,
    rng: np.random.Generator,
) -> list[str]:
    shared = sorted(set.intersection(*(set(images) for images in models.values())))
    names = ", ".join(models)
    if not shared:
        raise InputError(f"there is no caption that {names} all have images of")
    needed = max(KINDS[kind].images for kind in kinds)
    enough = [caption for caption in shared if min(len(images[caption]) for images in models.values()) >= needed]
    if needed > 1 and len(enough) < max(count, 1):
        raise InputError(
            f"{len(enough)} captions have the {needed} images by each of {names} that a question of diversity shows; "
            f"make more (generate --samples={needed}), or leave it out: --questions=photorealism,caption_similarity"
        )
    if len(enough) < count:
        raise InputError(f"--captions={count} are not there: {names} share {len(enough)}")
    return [enough[place] for place in rng.permutation(len(enough))[: count or None]]
