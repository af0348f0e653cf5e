"""What of "a red square above a blue square" is lost in z_i (Ramesh et al., 2022, section 7, Figures 14 and 15).

The paper finds that unCLIP binds attributes to objects worse than GLIDE does, and that reconstructions "mix up objects
and attributes", since CLIP's embedding does not bind them. Here scenes of two objects are rendered, drawn again from
their own z_i and from what a prior makes of their captions, and read by the oracle: an image that shows just the two
colours and the two shapes that it should has the attributes *present*; one in which they also belong together and lie
as the caption says has them *bound*. Where they are present and not bound they were *mixed up*. Small models draw
colours long before shapes, so colours are counted alone, too: both there, one for each object, and *exchanged* where
they lie the other way round.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
from jaxtyping import Float64, UInt8

from unclip_jax import unclip
from unclip_jax.data import scene_rendering, scenes
from unclip_jax.data.scenes import Description, Kind, Scene
from unclip_jax.errors import InputError
from unclip_jax.evaluation import oracle, uncertainty
from unclip_jax.evaluation.oracle import Reading
from unclip_jax.evaluation.uncertainty import Estimate
from unclip_jax.predictor import Drawing
from unclip_jax.probing import pictures

# What is drawn: from the picture's own embedding, from a prior's, from that and the caption, from the caption alone.
OWN, PRIOR, BOTH, CAPTION = "own z_i", "prior's z_i", "prior's z_i + caption", "caption alone"
SOURCES = (OWN, PRIOR, BOTH, CAPTION)
VERDICTS = ("present", "bound", "mixed", "colours", "exchanged")
# What is mixed up, as a share of the images that show what could be: of a guess, exchanged colours are half.
RATIOS = {"mixed_of_present": ("mixed", "present"), "exchanged_of_colours": ("exchanged", "colours")}
_RENDERED = 64  # pixels a side of scenes


@dataclasses.dataclass(frozen=True)
class Problems:
    """Scenes of two objects.

    Attributes:
      captions: n sentences of `captioned_shapes`.
      pictures: n renders, uint8 [n, s, s, 3].
    """

    captions: tuple[str, ...]
    pictures: UInt8[np.ndarray, "n s s 3"]

    def __len__(self) -> int:
        return len(self.captions)


def problems(count: int, *, seed: int = 0, side: int = _RENDERED) -> Problems:
    """Draws scenes of two large, solid objects; every other one has two objects of one shape.

    Kinds are of those that the training split has. Half of the captions are the other half's with the two colours
    exchanged, so that nothing but binding tells these apart.

    Args:
      count: how many, at least 2; rounded up to an even number.
      seed: of all that is drawn.
      side: pixels of the renders, at least 16.
    """
    if count < 2:
        raise InputError(f"{count} scenes are too few to count in; give at least 2")
    rng = np.random.default_rng(seed)
    found: list[Description] = []
    while len(found) < count:
        first, second = rng.choice(len(scenes.COLOURS), 2, replace=False)
        colours = [list(scenes.COLOURS)[index] for index in (first, second)]
        alike = len(found) % 4 == 0
        shapes = [scenes.SHAPES[index] for index in rng.choice(len(scenes.SHAPES), 2, replace=False)]
        shapes = [shapes[0]] * 2 if alike else shapes
        relation = scenes.RELATIONS[rng.integers(len(scenes.RELATIONS))]
        background = list(scenes.BACKGROUNDS)[rng.integers(len(scenes.BACKGROUNDS))]
        pair = [
            Description(
                tuple(Kind("large", "solid", colour, shape) for colour, shape in zip(order, shapes, strict=True)),
                relation,
                background,
            )
            for order in (colours, colours[::-1])
        ]
        if not any(scenes.is_unseen(kind) for one in pair for kind in one.kinds):
            found += pair
    return rendered([scenes.placed(one, rng, spread=0.5) for one in found], side=side)


def of_captions(captions: Sequence[str], *, seed: int = 0, side: int = _RENDERED) -> Problems:
    """Renders captions of two objects; what a caption leaves out is drawn: a size is large, a background white.

    Raises:
      InputError: a caption is no sentence of `captioned_shapes`, has one object or one colour, or leaves a colour out.
    """
    rng, found = np.random.default_rng(seed), []
    for caption in captions:
        said = scenes.parse_caption(caption)
        if len(said.kinds) != 2:
            raise InputError(f"{caption!r} has one object, and binding needs two")
        if said.kinds[0].colour == said.kinds[1].colour:
            raise InputError(f"the objects of {caption!r} need two colours, for these tell which is which")
        kinds = tuple(dataclasses.replace(kind, size=kind.size or "large") for kind in said.kinds)
        whole = dataclasses.replace(said, kinds=kinds, background=said.background or "white")
        found.append(scenes.placed(whole, rng, spread=0.5))
    made = rendered(found, side=side)
    return dataclasses.replace(made, captions=tuple(captions))


def rendered(found: Sequence[Scene], *, side: int = _RENDERED) -> Problems:
    """Returns scenes as captions and pictures."""
    images = np.stack([scene_rendering.render(scene, side) for scene in found])
    return Problems(tuple(scenes.caption(scene) for scene in found), images)


def verdict(reading: Reading, said: Description) -> dict[str, float]:
    """Returns each of VERDICTS for one image, 0 or 1; see the module. The two objects said have different colours."""
    shown = reading.objects
    colours = sorted(one.colour for one in shown) == sorted(kind.colour for kind in said.kinds)
    ordered = [one for kind in said.kinds for one in shown if one.colour == kind.colour]
    lie = oracle.relation(*ordered) if colours else ""
    shapes = [one.shape for one in ordered], [kind.shape for kind in said.kinds]
    present = colours and sorted(shapes[0]) == sorted(shapes[1])
    bound = present and shapes[0] == shapes[1] and lie == said.relation
    return {
        "present": float(present),
        "bound": float(bound),
        "mixed": float(present and not bound),
        "colours": float(colours),
        "exchanged": float(colours and lie == scenes.OPPOSITE[said.relation]),
    }


def counted(images: UInt8[np.ndarray, "n s s 3"], captions: Sequence[str]) -> dict[str, Float64[np.ndarray, "n"]]:
    """Returns the verdicts of images: each of VERDICTS -> 0 or 1 for each.

    Raises:
      InputError: not as many captions as images, or images of fewer than 16 pixels.
    """
    if len(images) != len(captions):
        raise InputError(f"{len(images)} images cannot be held against {len(captions)} captions; give one for each")
    found = [
        verdict(reading, scenes.parse_caption(caption))
        for reading, caption in zip(oracle.read(images), captions, strict=True)
    ]
    return {name: np.array([one[name] for one in found]) for name in VERDICTS}


def redrawn(
    model: unclip.UnCLIP, given: Problems, source: str, *, prior: str = "diffusion", **drawing: Unpack[Drawing]
) -> UInt8[np.ndarray, "n s s 3"]:
    """Draws scenes again.

    Args:
      model: with what the source needs.
      given: n scenes.
      source: one of SOURCES: from the pictures' own embeddings, from a prior's of the captions, from these and the
        captions, or from the captions alone, as GLIDE does.
      prior: a key of `unclip.PRIORS`, where the source has one.
      drawing: see Drawing.

    Raises:
      InputError: an unknown source, or the model lacks a part for it.
    """
    if source not in SOURCES:
        raise InputError(f"there is no source {source!r} of images; there are {', '.join(SOURCES)}")
    if source == CAPTION:
        return pictures.drawn(model, None, given.captions, **drawing)
    if source == OWN:
        return pictures.drawn(model, model.embed_images(given.pictures), **drawing)
    z_i = model.sample_prior(given.captions, prior=prior, **drawing)
    return pictures.drawn(model, z_i, given.captions if source == BOTH else None, **drawing)


def shares(verdicts: Sequence[Mapping[str, Float64[np.ndarray, "n"]]]) -> dict[str, Estimate]:
    """Returns each of VERDICTS with its standard error, from the verdicts of several seeds on the same scenes.

    A scene's draws are no independent samples: they are averaged first, and errors are over scenes. Those of RATIOS
    are by linearisation; a ratio is NaN where nothing is there that could be mixed up.
    """
    means = {name: np.mean([one[name] for one in verdicts], axis=0) for name in VERDICTS}
    found: dict[str, Estimate] = {}
    for name, values in means.items():
        measured = uncertainty.mean(values)
        found[name] = Estimate(measured.value, measured.standard_error)
    for name, (part, whole) in RATIOS.items():
        there = found[whole].value
        ratio = found[part].value / there if there else float("nan")
        apart = uncertainty.mean((means[part] - ratio * means[whole]) / there).standard_error if there else float("nan")
        found[name] = Estimate(ratio, apart)
    return found
