"""Reads colour, shape and relation of `captioned_shapes` from pixels alone, and scores images against captions.

Nothing here knows how a scene was drawn: the background is the median of the border, objects are what differs from
it, an object's colour is the nearest of the palette, and its shape is the best match among blurred silhouettes of
all shapes, brought to one place and scale. It reads real renders rightly (a test holds it to 98%), so that its
verdict on generated images says something about the images.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from unclip_jax.data.scene_rendering import SHADE, shape_coverage
from unclip_jax.data.scenes import BACKGROUNDS, COLOURS, SHAPES, Description, parse_caption
from unclip_jax.errors import InputError

# A pixel belongs to an object where it differs from the background by this much (sRGB distance; noise stays below),
# and by this share of the greatest difference near it: blur then bridges no gap, and dark halves of textures stay.
_MIN_DISTANCE = 44.0
_MIN_CONTRAST = 0.36
_NEAR = 0.1  # image sides
# Smaller ones are specks: shares of the image, and of the largest object in it.
_MIN_AREA = 0.006
_MIN_SHARE = 0.12
# Stains are large but faint: an object differs somewhere by more than this from the background.
_MIN_PEAK = 64.0
# Objects that touch are told apart by colour: least share of the rarer one, least distance of centres in box sides.
_SPLIT_SHARE = 0.15
_SPLIT_DISTANCE = 0.3
# Silhouettes: points a side of their grid, and its half width in the silhouette's root-mean-square radius.
_GRID = 28
_REACH = 2.2
_ANGLES_DEGREES = (-12.0, -6.0, 0.0, 6.0, 12.0)
# Blur of the templates in the same unit: generated edges are soft, and small objects have few pixels.
_BLURS = (0.06, 0.18, 0.32)
_ROTATIONS = 8  # of the captions, to measure chance


@dataclasses.dataclass(frozen=True)
class ReadObject:
    """One object as read from an image.

    Attributes:
      colour, shape: words of `COLOURS` and `SHAPES`.
      x, y: its centre in image sides; y runs down.
      area: share of the image.
      match: correlation with the best silhouette, at most 1; real renders of 64 pixels reach 0.95 and more.
    """

    colour: str
    shape: str
    x: float
    y: float
    area: float
    match: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an image shows: a word of `BACKGROUNDS`, and its objects, largest first (none, or more than two, too)."""

    background: str
    objects: tuple[ReadObject, ...]


def relation(first: ReadObject, second: ReadObject) -> str:
    """How the first object lies to the second, a word of `RELATIONS`, by the axis on which they are further apart."""
    if abs(first.x - second.x) >= abs(first.y - second.y):
        return "left of" if first.x < second.x else "right of"
    return "above" if first.y < second.y else "below"


def read(images: UInt8[np.ndarray, "b h w 3"]) -> list[Reading]:
    """Reads every image.

    Args:
      images: sRGB pixels [0, 255], 32 to 256 a side.

    Returns:
      One reading per image.

    Raises:
      InputError: images of fewer than 16 pixels a side, where nobody could tell the shapes apart.
    """
    count, height, width, _ = images.shape
    if min(height, width) < 16:
        raise InputError(f"the oracle got images of {height}x{width} pixels; it needs at least 16x16")
    if not count:
        return []
    pixels = images.astype(np.float32)
    backgrounds = _backgrounds(pixels)
    distance = np.linalg.norm(pixels - backgrounds[:, None, None], axis=-1)
    contrast, mask = _contrast(distance)
    found: list[tuple[int, str, float, float, float]] = []
    silhouettes = []
    for image, rows, columns, member in _components(mask, distance, pixels):
        votes = _line_distances(pixels[image, rows, columns][_inner(member)]).argmin(1)
        colour = list(COLOURS)[int(np.bincount(votes).argmax())]
        silhouette, x, y = _silhouette(contrast[image, rows, columns], member)
        silhouettes.append(silhouette)
        x, y = (columns.start + x + 0.5) / width, (rows.start + y + 0.5) / height
        found.append((image, colour, x, y, float(member.sum()) / (height * width)))
    shapes = _shapes(np.stack(silhouettes)) if found else []
    objects: list[list[ReadObject]] = [[] for _ in range(count)]
    for (image, colour, x, y, area), (shape, match) in zip(found, shapes, strict=True):
        objects[image].append(ReadObject(colour, shape, x, y, area, match))
    words = _nearest(backgrounds, np.array(list(BACKGROUNDS.values()), np.float32), list(BACKGROUNDS))
    return [
        Reading(word, tuple(sorted(members, key=lambda member: -member.area)))
        for word, members in zip(words, objects, strict=True)
    ]


def _backgrounds(pixels: Float[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b 3"]:
    """Median of a border two pixels wide: objects stay clear of most of it."""
    count = len(pixels)
    strips = (pixels[:, :2], pixels[:, -2:], pixels[:, 2:-2, :2], pixels[:, 2:-2, -2:])
    return np.median(np.concatenate([strip.reshape(count, -1, 3) for strip in strips], axis=1), axis=1)


def _contrast(
    distance: Float[np.ndarray, "b h w"],
) -> tuple[Float[np.ndarray, "b h w"], Bool[np.ndarray, "b h w"]]:
    """Distance from the background relative to the greatest nearby, in [0, 1], and the pixels of objects."""
    size = 2 * int(round(_NEAR * distance.shape[-1] / 2.0)) + 1
    greatest = np.maximum(ndimage.maximum_filter(distance, size=(1, size, size)), _MIN_DISTANCE)
    contrast = distance / greatest
    return contrast, (contrast > _MIN_CONTRAST) & (distance > _MIN_DISTANCE)


def _components(
    mask: Bool[np.ndarray, "b h w"], distance: Float[np.ndarray, "b h w"], pixels: Float[np.ndarray, "b h w 3"]
) -> list[tuple[int, slice, slice, Bool[np.ndarray, "r c"]]]:
    """Objects of all images: image, rows and columns of a box with a pixel to spare, members in that box."""
    within = np.zeros((3, 3, 3), bool)
    within[1] = True  # pixels of one image touch, also at corners; images do not
    labels, _ = ndimage.label(mask, structure=within)
    objects = []
    for label, (images, rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        image = images.start
        rows = slice(max(0, rows.start - 1), rows.stop + 1)
        columns = slice(max(0, columns.start - 1), columns.stop + 1)
        member = labels[image, rows, columns] == label
        if member.sum() < _MIN_AREA * mask[0].size:
            continue
        if np.quantile(distance[image, rows, columns][member], 0.9) < _MIN_PEAK:
            continue
        for part in _split(pixels[image, rows, columns], member):
            objects.append((image, rows, columns, part))
    largest: dict[int, int] = {}
    for image, _, _, member in objects:
        largest[image] = max(largest.get(image, 0), int(member.sum()))
    return [found for found in objects if found[3].sum() >= _MIN_SHARE * largest[found[0]]]


def _split(patch: Float[np.ndarray, "r c 3"], member: Bool[np.ndarray, "r c"]) -> list[Bool[np.ndarray, "r c"]]:
    """Parts two objects that touch, which have different colours and different centres; returns one part if it is one.

    Edges mixed with the background may take another colour too, but lie around the same centre.
    """
    inner = _inner(member)
    votes = np.bincount(_line_distances(patch[inner]).argmin(1), minlength=len(COLOURS))
    second, first = np.argsort(votes)[-2:]
    if votes[second] < _SPLIT_SHARE * votes.sum():
        return [member]
    distances = _line_distances(patch[member])
    nearer_first = np.zeros_like(member)
    nearer_first[member] = distances[:, first] <= distances[:, second]
    parts = [_largest_piece(nearer_first), _largest_piece(member & ~nearer_first)]
    if min(part.sum() for part in parts) < _SPLIT_SHARE * member.sum():
        return [member]
    centres = [np.argwhere(part).mean(0) for part in parts]
    if np.abs(centres[0] - centres[1]).max() < _SPLIT_DISTANCE * max(member.shape):
        return [member]
    return parts


def _largest_piece(mask: Bool[np.ndarray, "r c"]) -> Bool[np.ndarray, "r c"]:
    labels, count = ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else mask


def _inner(member: Bool[np.ndarray, "r c"]) -> Bool[np.ndarray, "r c"]:
    """The deepest two fifths of an object: edges are mixed with the background."""
    depth = ndimage.distance_transform_cdt(np.pad(member, 1))[1:-1, 1:-1]
    return depth >= np.quantile(depth[member], 0.6)


def _line_distances(colours: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n p"]:
    """Distance of pixels to each of the palette's colours, darkened at will: a texture takes a colour to its shade."""
    light = np.array(list(COLOURS.values()), np.float32)
    line = (1.0 - SHADE) * light
    offset = colours[:, None] - SHADE * light
    along = np.clip((offset * line).sum(-1) / (line * line).sum(-1), 0.0, 1.0)
    return np.linalg.norm(offset - along[..., None] * line, axis=-1)


def _silhouette(
    contrast: Float[np.ndarray, "r c"], member: Bool[np.ndarray, "r c"]
) -> tuple[Float[np.ndarray, "g g"], float, float]:
    """An object's soft outline at standard place and scale, and its centroid (x, y) in pixels of the box."""
    around = ndimage.binary_dilation(member, np.ones((3, 3), bool))
    soft = np.where(around, np.clip(contrast / (2.0 * _MIN_CONTRAST), 0.0, 1.0), 0.0)
    return _standardise(soft)


def _standardise(soft: Float[np.ndarray, "r c"]) -> tuple[Float[np.ndarray, "g g"], float, float]:
    """Resamples about the centroid, in units of the root-mean-square radius."""
    total = soft.sum()
    rows, columns = np.arange(soft.shape[0]), np.arange(soft.shape[1])
    y, x = float(soft.sum(1) @ rows / total), float(soft.sum(0) @ columns / total)
    variance = (soft.sum(1) @ (rows - y) ** 2 + soft.sum(0) @ (columns - x) ** 2) / total
    points = np.linspace(-_REACH, _REACH, _GRID) * np.sqrt(max(float(variance), 0.25))
    grid = np.meshgrid(y + points, x + points, indexing="ij")
    return ndimage.map_coordinates(soft, grid, order=1, mode="constant"), x, y


@functools.cache
def _templates() -> tuple[Float[np.ndarray, "t g"], Int[np.ndarray, "t"]]:
    """Standardised silhouettes of every shape, turned and blurred a little, as unit vectors; and their shapes."""
    side, step = 129, 0.025
    axis = (np.arange(side) - side // 2) * step
    vectors, shapes = [], []
    for index, degrees in itertools.product(range(len(SHAPES)), _ANGLES_DEGREES):
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        u = cos * axis[None, :] + sin * axis[:, None]
        v = cos * axis[:, None] - sin * axis[None, :]
        sharp = shape_coverage(SHAPES[index], u, v, step=step)
        radius = np.sqrt((sharp * (u * u + v * v)).sum() / sharp.sum())
        for blur in _BLURS:
            vectors.append(_standardise(ndimage.gaussian_filter(sharp, blur * radius / step))[0].ravel())
            shapes.append(index)
    return _unit(np.stack(vectors)), np.array(shapes)


def _unit(vectors: Float[np.ndarray, "n g"]) -> Float[np.ndarray, "n g"]:
    centred = vectors - vectors.mean(1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)


def _shapes(silhouettes: Float[np.ndarray, "n g g"]) -> list[tuple[str, float]]:
    """The best-correlated shape of each silhouette, and that correlation."""
    templates, shapes = _templates()
    correlation = _unit(silhouettes.reshape(len(silhouettes), -1)) @ templates.T
    best = correlation.argmax(1)
    return [(SHAPES[shapes[t]], float(c[t])) for t, c in zip(best, correlation, strict=True)]


def _nearest(colours: Float[np.ndarray, "b 3"], palette: Float[np.ndarray, "p 3"], words: Sequence[str]) -> list[str]:
    distance = np.linalg.norm(colours[:, None] - palette, axis=-1)
    return [words[index] for index in distance.argmin(1)]


def score(images: UInt8[np.ndarray, "b h w 3"], captions: Sequence[str]) -> dict[str, Any]:
    """Reads images and scores them against their captions; see `score_readings`."""
    return score_readings(read(images), captions)


def score_readings(readings: Sequence[Reading], captions: Sequence[str]) -> dict[str, Any]:
    """How often images show what their captions say.

    Args:
      readings: of the images, as `read` returns them.
      captions: one per image, sentences of `captioned_shapes`.

    Returns:
      {"single": rates, "two": rates, "shuffled": {"single": rates, "two": rates}}: captions of one object and of two,
      a group without captions left out; "shuffled" scores the same images against other images' captions of their
      group (the mean over 8 rotations), which is what an image that ignores its caption would get.
      Rates are shares in [0, 1] beside the number "n" of images:
        colour, shape, both: of the captions' objects. One object is judged by the largest in the image; two by the
          two largest, paired with the caption's so that most colours, then most shapes, agree.
        count: of images with exactly as many objects as the caption has.
        background: of images with the caption's background.
        relation (two only): of images whose paired objects lie as the caption says.
        all: of images with count, every colour and shape, and the relation right.

    Raises:
      InputError: as many readings as captions are needed; or a caption is not of the grammar.
    """
    if len(readings) != len(captions):
        raise InputError(f"{len(readings)} images cannot be scored against {len(captions)} captions; give one for each")
    descriptions = [parse_caption(caption) for caption in captions]
    rates: dict[str, Any] = {}
    shuffled: dict[str, Any] = {}
    for name, objects in (("single", 1), ("two", 2)):
        group = [index for index, description in enumerate(descriptions) if len(description.kinds) == objects]
        if not group:
            continue
        shown, said = [readings[index] for index in group], [descriptions[index] for index in group]
        rates[name] = _rates(shown, said)
        shifts = sorted({len(group) * k // (_ROTATIONS + 1) for k in range(1, _ROTATIONS + 1)} - {0})
        if shifts:
            turned = [_rates(shown, said[shift:] + said[:shift]) for shift in shifts]
            shuffled[name] = {key: float(np.mean([rate[key] for rate in turned])) for key in turned[0]}
            shuffled[name]["n"] = len(group)
    return {**rates, "shuffled": shuffled}


def _rates(readings: Sequence[Reading], descriptions: Sequence[Description]) -> dict[str, Any]:
    verdicts = [_verdict(reading, said) for reading, said in zip(readings, descriptions, strict=True)]
    return {"n": len(verdicts), **{key: float(np.mean([v[key] for v in verdicts])) for key in verdicts[0]}}


def _verdict(reading: Reading, said: Description) -> dict[str, float]:
    """What of one caption its image shows, each from 0 to 1."""
    count = len(said.kinds)
    pairings = itertools.permutations(reading.objects[:count])
    seen = max(pairings, key=lambda pairing: _agreement(pairing, said))
    pairs = list(zip(seen, said.kinds, strict=False))
    colours = [shown.colour == kind.colour for shown, kind in pairs]
    shapes = [shown.shape == kind.shape for shown, kind in pairs]
    both = [colour and shape for colour, shape in zip(colours, shapes, strict=True)]
    verdict = {
        "colour": sum(colours) / count,
        "shape": sum(shapes) / count,
        "both": sum(both) / count,
        "count": float(len(reading.objects) == count),
        "background": float(reading.background == said.background),
    }
    everything = verdict["count"] * (sum(both) == count)
    if count == 2:
        verdict["relation"] = float(len(seen) == 2 and relation(*seen) == said.relation)
        everything *= verdict["relation"]
    return {**verdict, "all": everything}


def _agreement(pairing: Sequence[ReadObject], said: Description) -> tuple[int, int]:
    pairs = list(zip(pairing, said.kinds, strict=False))
    return (
        sum(shown.colour == kind.colour for shown, kind in pairs),
        sum(shown.shape == kind.shape for shown, kind in pairs),
    )
