"""Section 7: attributes are bound to objects worse by unCLIP than by GLIDE (Figures 14 and 15)."""

import numpy as np

from unclip_jax.evaluation import uncertainty
from unclip_jax.probing import binding, sheets
from unclip_jax.reproduction.records import Comparison, Record, Row
from unclip_jax.reproduction.studio import Studio

PARTS = ("clip", "decoder", "prior_diffusion", "decoder_glide")
_SHOWN = 8
_NEEDED = 0.05  # share of images that must show both colours, or there is nothing to bind
# Source -> the decoder that draws it.
SOURCES = {binding.OWN: "decoder", binding.BOTH: "decoder", binding.CAPTION: "decoder_glide"}


def run(studio: Studio) -> Record:
    """Draws scenes of two objects again, by unCLIP and by GLIDE, and counts what is exchanged."""
    given = binding.problems(max(8, 2 * (len(studio.captions) // 2)), seed=0)
    made = {source: [_drawn(studio, given, source, seed) for seed in studio.seeds] for source in SOURCES}
    verdicts = {
        source: [binding.counted(images, given.captions) for images in several] for source, several in made.items()
    }
    found = {source: binding.shares(several) for source, several in verdicts.items()}
    rows = [
        Row(source, label, one[name].value, 1.96 * one[name].standard_error, percent=True)
        for name, label in (("colours", "both colours there"), ("exchanged", "colours exchanged"),
                            ("present", "colours and shapes there"), ("bound", "all bound as said"))
        for source, one in found.items()
    ]  # fmt: skip
    for source, one in found.items():
        if one["colours"].value:
            ratio = one["exchanged_of_colours"]
            half = 1.96 * ratio.standard_error
            rows.append(Row(source, "exchanged, of those with both colours", ratio.value, half, percent=True))
    lacking = [source for source, one in found.items() if one["colours"].value < _NEEDED]
    comparisons: tuple[Comparison, ...] = ()
    if not lacking:
        comparisons = (
            Comparison.of("exchanged of those with both colours: unCLIP, less GLIDE", _apart(verdicts)),
            Comparison.of("images with exchanged colours, from a picture's own z_i", found[binding.OWN]["exchanged"]),
        )
    few = slice(0, _SHOWN)
    shown = {source: [images[few] for images in several] for source, several in made.items()}
    sheet = sheets.bindings(given.captions[few], given.pictures[few], shown)
    return Record(
        name="attributes",
        title="Attributes and objects",
        section="7, Figures 14 and 15",
        claim="GLIDE binds attributes to objects better than unCLIP. The decoder mixes them up even when it draws a "
        "picture's own z_i again, so the embedding does not say which belongs to which.",
        paper=(("“a red cube on top of a blue cube” and reconstructions", "samples, without numbers"),),
        how="Scenes of two objects in pairs that differ by an exchange of the two colours alone, drawn from their own "
        "z_i, by prior and caption, and by GLIDE; the oracle reads colours, shapes and how the objects lie.",
        rows=tuple(rows),
        comparisons=comparisons,
        blocked=f"fewer than {_NEEDED:.0%} of the images by {lacking[0]} show both colours" if lacking else "",
        pictures=(studio.save("attributes", "Two objects, drawn again", sheet),),
        seeds=studio.seeds,
    )  # fmt: skip


def _drawn(studio: Studio, given: binding.Problems, source: str, seed: int) -> np.ndarray:
    decoder = SOURCES[source]
    names = [decoder] if source == binding.CAPTION else ["clip", decoder]
    names += ["prior_diffusion"] if source == binding.BOTH else []

    def make() -> dict[str, np.ndarray]:
        return {"images": binding.redrawn(studio.chain(*names), given, source, seed=seed)}

    setting = {"source": source, "seed": seed, "captions": given.captions}
    return studio.cell("binding", setting, names, make)["images"]


def _apart(verdicts: dict[str, list[dict[str, np.ndarray]]]) -> uncertainty.Estimate:
    """How much larger a share of those with both colours unCLIP exchanges than GLIDE does, scene by scene."""
    value, influences = 0.0, 0.0
    for sign, source in ((1, binding.BOTH), (-1, binding.CAPTION)):
        found = verdicts[source]
        exchanged, colours = (np.mean([one[name] for one in found], axis=0) for name in ("exchanged", "colours"))
        ratio = exchanged.mean() / colours.mean()
        value += sign * float(ratio)
        influences = influences + sign * (exchanged - ratio * colours) / colours.mean()
    measured = uncertainty.Measured(value, np.asarray(influences))
    return uncertainty.Estimate(value, measured.standard_error)
