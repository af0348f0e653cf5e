"""Scenes of one or two coloured shapes, and the grammar of their captions.

A scene is a description (what the caption says) and a placement per object (what it leaves open: where, how big
exactly, turned how far). Descriptions and captions determine each other: `parse_caption(caption(d)) == d`. A caption
may also say less than is seen (`abridge`), as people's captions do.

    a large green triangle on a white background
    a small striped red star left of a large blue circle on a grey background
    an orange heart

Lengths are fractions of the image's side; x runs right and y runs down. Nothing here knows of pixels; those are
`data/scene_rendering.py`. This module needs NumPy alone.
"""

import dataclasses
import functools
import re

import numpy as np

from unclip_jax.errors import InputError, nearest

SIZES = ("small", "large")
# sRGB. Hues lie far apart, so that the darker shade of a texture (below) still has the hue of its own colour only.
COLOURS = {
    "red": (222, 28, 36),
    "orange": (255, 136, 0),
    "yellow": (248, 222, 24),
    "green": (32, 164, 54),
    "cyan": (30, 206, 220),
    "blue": (36, 72, 226),
    "purple": (132, 36, 178),
    "pink": (255, 116, 188),
}
TEXTURES = ("solid", "striped", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
# Backgrounds have little saturation: no object can vanish in one.
BACKGROUNDS = {"white": (246, 246, 246), "grey": (136, 136, 140), "black": (18, 18, 20), "beige": (222, 208, 184)}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "validation", "unseen")

# Half the side of an object's bounding box. Two objects must fit side by side: each is smaller than one alone.
RADII = {1: {"small": 0.21, "large": 0.34}, 2: {"small": 0.15, "large": 0.21}}
_RADIUS_JITTER = 0.05  # relative
_ANGLE_JITTER = np.deg2rad(9.0)  # a square never looks like another shape for it
_MARGIN = 0.025  # between an object and the image's edge
_GAP = 0.04  # between the bounding boxes of two objects
_CENTRE_JITTER = {"small": 0.16, "large": 0.1}  # of an object alone, about the centre
_SIDE_JITTER = 0.08  # of two objects, across the line that joins them: less than their distance along it


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a caption says of one object: words of `SIZES`, `TEXTURES`, `COLOURS` and `SHAPES`.

    Size and colour may be "": not said. A shape is always named, and an object is solid unless a texture is.
    """

    size: str
    texture: str
    colour: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption says of a scene.

    Attributes:
      kinds: one or two objects, in the caption's order.
      relation: how the first object lies to the second, a word of `RELATIONS`; "" with one object.
      background: a word of `BACKGROUNDS`, or "": not said.
    """

    kinds: tuple[Kind, ...]
    relation: str
    background: str


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an object is: centre (x, y) and half extent in image sides, and its turn in radians, clockwise."""

    x: float
    y: float
    radius: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Scene(Description):
    """A description with one placement per object: enough to render it at any resolution."""

    placements: tuple[Placement, ...]


def is_unseen(kind: Kind) -> bool:
    """Whether an object is kept out of the splits `train` and `validation`.

    The rule holds back one colour of every shape (colour index + shape index divisible by 8: "red circle", "pink
    square", ...) and, whatever their colour, striped stars and checkered hearts. Every colour, shape and texture
    is therefore still seen in other company.
    """
    colour, shape = list(COLOURS).index(kind.colour), SHAPES.index(kind.shape)
    return (colour + shape) % len(COLOURS) == 0 or (kind.texture, kind.shape) in _UNSEEN_TEXTURED


_UNSEEN_TEXTURED = frozenset({("striped", "star"), ("checkered", "heart")})


@functools.cache
def _kinds(group: str) -> tuple[Kind, ...]:
    """Every kind of a group ("seen" or "unseen"), solid ones twice: half of all objects have no texture."""
    kinds = []
    for size in SIZES:
        for texture in ("solid", *TEXTURES):
            for colour in COLOURS:
                for shape in SHAPES:
                    kind = Kind(size, texture, colour, shape)
                    if is_unseen(kind) == (group == "unseen"):
                        kinds.append(kind)
    return tuple(kinds)


def sample_scene(
    rng: np.random.Generator, *, split: str = "train", two_object_fraction: float = 0.5, spread: float = 1.0
) -> Scene:
    """Draws a scene.

    Args:
      rng: the only source of chance.
      split: "train" and "validation" hold no object for which `is_unseen`; in "unseen" each scene holds one (of two
        objects, one drawn at random).
      two_object_fraction: probability of two objects, in [0, 1]. Two objects never share a colour.
      spread: how much of the room that a caption leaves them objects use, in [0, 1]; 0 puts one object in the middle
        and shares the room of two evenly. Where an object is cannot be read from a caption, and until a decoder has
        settled where, it cannot use what it knows of the shape: short runs learn shapes from scenes of little spread.

    Returns:
      The scene; its objects lie inside the image and their bounding boxes are disjoint.

    Raises:
      InputError: unknown split, or a fraction or spread outside [0, 1].
    """
    if split not in SPLITS:
        raise InputError(f"captioned_shapes has no split {split!r}; {nearest(split, SPLITS)}")
    if not 0.0 <= two_object_fraction <= 1.0:
        raise InputError(f"two_object_fraction is {two_object_fraction}; it must lie in [0, 1]")
    if not 0.0 <= spread <= 1.0:
        raise InputError(f"spread is {spread}; it must lie in [0, 1]")
    special = _kinds("unseen" if split == "unseen" else "seen")
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    first = special[rng.integers(len(special))]
    if rng.random() >= two_object_fraction:
        return Scene((first,), "", background, (_place_alone(rng, first, spread),))
    others = _kinds("seen")
    second = others[rng.integers(len(others))]
    while second.colour == first.colour:
        second = others[rng.integers(len(others))]
    kinds = (first, second) if rng.random() < 0.5 else (second, first)
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    return Scene(kinds, relation, background, _place_pair(rng, kinds, relation, spread))


def placed(description: Description, rng: np.random.Generator, *, spread: float = 1.0) -> Scene:
    """Draws where the objects of a description lie: a scene that its caption is true of.

    Args:
      description: one that says everything: sizes, colours and the background.
      rng, spread: as of `sample_scene`.

    Raises:
      InputError: something is left unsaid, or the spread lies outside [0, 1].
    """
    if not description.background or not all(kind.size and kind.colour for kind in description.kinds):
        said = caption(description)
        raise InputError(f"{said!r} cannot be drawn: say the size and colour of each object, and the background")
    if not 0.0 <= spread <= 1.0:
        raise InputError(f"spread is {spread}; it must lie in [0, 1]")
    kinds, relation = description.kinds, description.relation
    alone = len(kinds) == 1
    where = (_place_alone(rng, kinds[0], spread),) if alone else _place_pair(rng, kinds, relation, spread)
    return Scene(kinds, relation, description.background, where)


def scene_at(
    *, seed: int, split: str, index: int, two_object_fraction: float = 0.5, spread: float = 1.0
) -> Scene:
    """Scene `index` of a split: a function of its arguments alone, whichever other scenes are made."""
    if split not in SPLITS:
        raise InputError(f"captioned_shapes has no split {split!r}; {nearest(split, SPLITS)}")
    entropy = np.random.SeedSequence([seed, SPLITS.index(split), index])
    rng = np.random.Generator(np.random.Philox(entropy))
    return sample_scene(rng, split=split, two_object_fraction=two_object_fraction, spread=spread)


def _radius(rng: np.random.Generator, kind: Kind, count: int) -> float:
    return RADII[count][kind.size] * (1.0 + _RADIUS_JITTER * rng.uniform(-1.0, 1.0))


def _place_alone(rng: np.random.Generator, kind: Kind, spread: float) -> Placement:
    radius = _radius(rng, kind, 1)
    reach = spread * _CENTRE_JITTER[kind.size]
    x, y = 0.5 + reach * rng.uniform(-1.0, 1.0, 2)
    return Placement(float(x), float(y), radius, _ANGLE_JITTER * rng.uniform(-1.0, 1.0))


def _place_pair(
    rng: np.random.Generator, kinds: tuple[Kind, ...], relation: str, spread: float
) -> tuple[Placement, ...]:
    """Shares the room that two objects leave along the line of their relation at random: before, between, after."""
    radii = [_radius(rng, kind, 2) for kind in kinds]
    forward = relation in ("left of", "above")
    near, far = radii if forward else radii[::-1]
    room = 1.0 - 2.0 * (_MARGIN + near + far) - _GAP
    even = room * np.array([1 / 3, 2 / 3])
    before, upto = even + spread * (np.sort(rng.uniform(0.0, room, 2)) - even)
    near_along = _MARGIN + before + near
    far_along = _MARGIN + upto + 2.0 * near + _GAP + far
    along = (near_along, far_along) if forward else (far_along, near_along)
    across = 0.5 + spread * _SIDE_JITTER * rng.uniform(-1.0, 1.0, 2)
    angles = _ANGLE_JITTER * rng.uniform(-1.0, 1.0, 2)
    horizontal = relation in ("left of", "right of")
    return tuple(
        Placement(*((float(a), float(c)) if horizontal else (float(c), float(a))), radius, float(angle))
        for a, c, radius, angle in zip(along, across, radii, angles, strict=True)
    )


def abridge(description: Description, *, detail: float, seed: int, index: int) -> Description:
    """Leaves out each size, each colour and the background with probability 1 - detail, each on its own.

    Full captions teach CLIP no shapes for a long time: with 8 colours, 2 sizes, 3 textures and 4 backgrounds, hardly
    any two captions of a batch differ in the shape alone, so that something else always tells them apart.

    Args:
      description: of a scene.
      detail: in [0, 1]; 1 leaves nothing out.
      seed, index: what is left out is a function of them alone.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(SPLITS), index])))

    def said(word: str) -> str:
        return word if rng.random() < detail else ""

    kinds = tuple(dataclasses.replace(k, size=said(k.size), colour=said(k.colour)) for k in description.kinds)
    return Description(kinds, description.relation, said(description.background))


def caption(description: Description) -> str:
    """The one caption of a scene or description, lower case, without a full stop."""
    phrases = [_phrase(kind) for kind in description.kinds]
    where = f" on a {description.background} background" if description.background else ""
    return f" {description.relation} ".join(phrases) + where


def _phrase(kind: Kind) -> str:
    texture = "" if kind.texture == "solid" else kind.texture
    words = " ".join(word for word in (kind.size, texture, kind.colour, kind.shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _pattern() -> re.Pattern[str]:
    textures = [texture for texture in TEXTURES if texture != "solid"]
    adjectives = "".join(f"(?:({'|'.join(words)}) )?" for words in (SIZES, textures, COLOURS))
    kind = f"an? {adjectives}({'|'.join(SHAPES)})"
    return re.compile(f"{kind}(?: ({'|'.join(RELATIONS)}) {kind})?(?: on a ({'|'.join(BACKGROUNDS)}) background)?")


_CAPTION = _pattern()


def parse_caption(text: str) -> Description:
    """Reads a caption back into the description it was made from.

    Raises:
      InputError: the text is not a sentence of the grammar.
    """
    match = _CAPTION.fullmatch(text.strip().lower())
    if match is None:
        raise InputError(
            f"{text[:120]!r} is not a caption of captioned_shapes; one looks like "
            "'a small striped red star left of a large blue circle on a grey background'"
        )
    words = match.groups(default="")
    first, relation, second, background = words[:4], words[4], words[5:9], words[9]
    kinds = tuple(
        Kind(size, texture or "solid", colour, shape)
        for size, texture, colour, shape in ((first, second) if relation else (first,))
    )
    return Description(kinds, relation, background)
