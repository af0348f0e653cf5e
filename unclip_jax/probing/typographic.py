"""Typographic attacks: words written over a picture (Ramesh et al., 2022, section 3.1 and Figure 6).

CLIP reads: a note that says "iPod" on an apple makes it an iPod to a zero-shot classifier (Goh et al., 2021). What the
decoder draws from the very same embedding shows whether the apple is still in it. The paper's decoder drew apples where
CLIP's probability for an apple was near 0.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float, Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from unclip_jax import unclip
from unclip_jax.data import resize
from unclip_jax.errors import InputError
from unclip_jax.evaluation.classification import PLACE
from unclip_jax.predictor import Drawing
from unclip_jax.probing import pictures
from unclip_jax.unclip import Vectors

TEMPLATES = ("{}",)
WIDTH = 0.6  # of a note: it hides the less of what it lies on, the narrower it is
_SMALLEST = 5  # pixels of a font: below, letters are no letters
_PAPER, _INK = (255, 255, 255), (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Attack:
    """What CLIP and the decoder make of n pictures and of the same with words on them.

    Attributes:
      pictures, attacked: what CLIP was shown, uint8 [n, c, c, 3], before and after.
      before, after: zero-shot probabilities of the labels, float64 [n, k]; rows add up to 1.
      drawn_before, drawn_after: what is drawn of the embeddings, samples of each, uint8 [n, m, s, s, 3].
    """

    pictures: UInt8[np.ndarray, "n c c 3"]
    attacked: UInt8[np.ndarray, "n c c 3"]
    before: Float64[np.ndarray, "n k"]
    after: Float64[np.ndarray, "n k"]
    drawn_before: UInt8[np.ndarray, "n m s s 3"]
    drawn_after: UInt8[np.ndarray, "n m s s 3"]


def written(
    image: UInt8[np.ndarray, "h w 3"], text: str, *, width: float = WIDTH, centre: tuple[float, float] = (0.5, 0.7)
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a picture with a white note on it that says something in black.

    Letters are as large as the note's width allows; the note is moved to lie in the picture where it would not.

    Args:
      image: uint8 [h, w, 3].
      text: one line.
      width: of the note, as a share of the picture's, in (0, 1].
      centre: of the note, (x, y) as shares of the picture's sides; x runs right, y down.

    Raises:
      InputError: an empty text, or one that is too long to be written in letters of 5 pixels; or a width out of range.
    """
    height, breadth = image.shape[:2]
    if not text.strip():
        raise InputError("there is nothing to write over the picture; give a text, such as --text=ipod")
    if not 0 < width <= 1:
        raise InputError(f"width={width:g} is no share of the picture's; give one in (0, 1]")
    room = width * breadth
    for size in range(height, _SMALLEST - 1, -1):
        font = ImageFont.load_default(size=size)
        left, top, right, bottom = _around(font, text)
        pad = max(1, size // 8)
        note = (right - left + 2 * pad, bottom - top + 2 * pad)
        if note[0] <= room and note[1] <= height:
            break
    else:
        raise InputError(
            f"{text!r} does not fit into {width:.0%} of a picture of {breadth} x {height} pixels, in letters of "
            f"{_SMALLEST} pixels; write less, make the note wider, or take a larger picture"
        )
    x, y = (
        min(max(round(share * side - extent / 2), 0), side - extent)
        for share, side, extent in zip(centre, (breadth, height), note, strict=True)
    )
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((x, y, x + note[0] - 1, y + note[1] - 1), fill=_PAPER)
    pen.text((x + pad - left, y + pad - top), text, font=font, fill=_INK)
    return np.asarray(canvas)


def _around(font: Any, text: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the ink of a text written at (0, 0)."""
    left, top, right, bottom = font.getbbox(text)
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def logit_scale(model: unclip.UnCLIP) -> float:
    """Returns by what a trained CLIP multiplies cosines: exp of its learned temperature, at most its config's limit."""
    part = model.part("clip")
    return float(min(np.exp(np.asarray(part.params["params"]["logit_scale"])), part.config.model.logit_scale_max))


def zero_shot(z_i: Vectors, z_t: Float[np.ndarray, "k d"], *, scale: float) -> Float64[np.ndarray, "n k"]:
    """Returns the probability of each of k labels: the softmax of scaled cosines (Radford et al., 2021, section 3.1.2).

    Args:
      z_i: embeddings of n pictures, of any length, float [n, d].
      z_t: of the labels, [k, d].
      scale: of the cosines, see `logit_scale`.
    """
    images, texts = (
        x.astype(np.float64) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (z_i, z_t)
    )
    logits = scale * images @ texts.T
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def label_embeddings(
    model: unclip.UnCLIP, labels: Sequence[str], *, templates: Sequence[str] = TEMPLATES
) -> Float[np.ndarray, "k d"]:
    """Returns a label's embedding: the mean, of length 1, of those of its name in all templates, float32 [k, d].

    Raises:
      InputError: fewer than two labels, or a template without a place {} for the label.
    """
    if len(labels) < 2:
        raise InputError("zero-shot classification chooses between labels; give at least two: --labels=apple,ipod")
    for template in templates:
        if PLACE not in template:
            raise InputError(f"the template {template!r} has no {PLACE} for a label; one is like 'a photo of a {{}}'")
    z_t = model.embed_text([template.replace(PLACE, label) for label in labels for template in templates])
    z_t /= np.maximum(np.linalg.norm(z_t, axis=1, keepdims=True), 1e-12)
    mean = z_t.reshape(len(labels), len(templates), -1).mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def attack(
    model: unclip.UnCLIP,
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    text: str,
    labels: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    samples: int = 3,
    width: float = WIDTH,
    **drawing: Unpack[Drawing],
) -> Attack:
    """Writes a text over pictures, asks CLIP about them, and draws what their embeddings mean.

    Words are written over each picture's central square, at the size that CLIP sees, where nothing can blur them.
    Noise is numbered by picture and sample, the same before and after.

    Args:
      model: with CLIP and a decoder that draws from z_i.
      images: n pictures of any sizes, uint8 [h, w, 3].
      text: what to write.
      labels: k things that a picture may be.
      templates: with a place {} for a label; a label's embedding is the mean over them.
      samples: pictures to draw of each embedding, at least 1.
      width: of the note, see `written`.
      drawing: seed and progress of Drawing; ids, if given, number the pictures.

    Raises:
      InputError: as the functions of this module; or there is nothing to attack or draw.
    """
    if not len(images) or samples < 1:
        raise InputError("an attack needs at least one picture, and one sample of each to draw")
    size = model.part("clip").config.model.image_size
    seen = np.stack([resize.square(image, size=size) for image in images])
    attacked = np.stack([written(image, text, width=width) for image in seen])
    z_t = label_embeddings(model, labels, templates=templates)
    scale = logit_scale(model)
    ids = drawing.get("ids")
    numbers = np.arange(len(seen)) if ids is None else np.asarray(ids)
    given: Drawing = {"seed": drawing.get("seed", 0), "progress": drawing.get("progress")}
    given["ids"] = (numbers[:, None] * samples + np.arange(samples)).astype(np.uint32).ravel().tolist()
    probabilities, pictured = [], []
    for shown in (seen, attacked):
        z_i = model.embed_images(shown)
        probabilities.append(zero_shot(z_i, z_t, scale=scale))
        made = pictures.drawn(model, np.repeat(z_i, samples, axis=0), **given)
        pictured.append(made.reshape(len(seen), samples, *made.shape[1:]))
    return Attack(seen, attacked, *probabilities, *pictured)
