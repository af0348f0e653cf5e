"""Sections 5.3 to 5.5: what guidance costs unCLIP and a GLIDE that was trained alike, in diversity and in likeness."""

import numpy as np

from unclip_jax import ablation_tables
from unclip_jax.evaluation import frechet, manifolds, uncertainty
from unclip_jax.evaluation.uncertainty import Estimate, Measured
from unclip_jax.reproduction import records
from unclip_jax.reproduction.records import Comparison, Record, Row
from unclip_jax.reproduction.studio import Images, Studio, by_caption, spread

PARTS = ("clip", "decoder", "prior_diffusion", "decoder_glide")
SCALES = (1.0, 1.5, 3.0)
MODELS = {"unCLIP": ("diffusion", "decoder"), "GLIDE": ("dropped", "decoder_glide")}
_CHANCE = 1 / 56  # of 8 colours and 7 shapes

Drawn = dict[tuple[str, float], list[Images]]


def drawn(studio: Studio) -> Drawn:
    """Returns (model, scale) -> the images of each seed."""
    return {
        (model, scale): [studio.drawn(source, seed, scale=scale, decoder=decoder) for seed in studio.seeds]
        for model, (source, decoder) in MODELS.items()
        for scale in SCALES
    }


def unable(studio: Studio, made: Drawn) -> str:
    """Returns why the two cannot be compared: one that does not draw what captions say has no fidelity to trade."""
    for model in MODELS:
        best = max(ablation_tables.interval(studio.right(made[model, scale])) for scale in SCALES)
        if best[0] - best[1] <= _CHANCE:
            return (
                f"{model}'s images are no more like their captions ({best[0]:.1%} ± {best[1]:.1%} have the colour and "
                f"shape) than by chance ({_CHANCE:.1%})"
            )
    return ""


def run(studio: Studio) -> Record:
    """Sweeps guidance over the same captions and noise, and over the same z_i for unCLIP."""
    made = drawn(studio)
    features = {key: [studio.features(one) for one in images] for key, images in made.items()}
    reference = frechet.moments(studio.reference)
    seeds = len(studio.seeds)
    diversity = {key: uncertainty.mean(spread(several)) for key, several in features.items()}
    distances = {
        key: by_caption(frechet.measured(np.concatenate(several), reference), seeds)
        for key, several in features.items()
    }
    rows: list[Row] = []
    for key, images in made.items():
        rows.append(records.row(_label(*key), "colour and shape right", studio.right(images), percent=True))
    for key, found in diversity.items():
        rows.append(Row(_label(*key), "diversity: 1 - cosine of two draws", found.value, 1.96 * found.standard_error))
    rows += [records.distance(_label(*key), found) for key, found in distances.items()]
    low, high = SCALES[0], SCALES[-1]
    comparisons = (
        Comparison.of("diversity that guidance costs: GLIDE, less unCLIP", _rise(diversity, high, low)),
        Comparison.of("Fréchet distance that guidance adds: GLIDE, less unCLIP", _rise(distances, low, high)),
        Comparison.of(
            f"diversity at guidance {high:g}: unCLIP, less GLIDE",
            diversity["unCLIP", high].minus(diversity["GLIDE", high]),
        ),
    )
    pictures = []
    for model in MODELS:
        columns = {f"{scale:g}, {seed}": made[model, scale][seed] for scale in SCALES for seed in range(min(seeds, 3))}
        pictures.append(studio.save("guidance", f"{model}: guidance, seed", studio.grid(columns)))
    return Record(
        name="guidance",
        title="Guidance against diversity and distance",
        section="5.3 and 5.4, Figures 9 to 11",
        claim="Guidance costs GLIDE diversity, and past a small scale likeness to the data; unCLIP, whose z_i is fixed "
        "before guidance comes, much less.",
        paper=(
            ("unCLIP preferred to GLIDE for diversity, diffusion prior", "70.5 ± 2.8%"),
            ("zero-shot COCO FID, unCLIP at 1.25", "10.39"),
            ("zero-shot COCO FID, GLIDE at 1.5", "12.24"),
        ),
        how="A decoder of captions alone (GLIDE), with the steps, batches and network of unCLIP's decoder. Draws of a "
        "caption differ by seed; diversity and distance are by features of this run's own CLIP.",
        rows=tuple(rows),
        comparisons=comparisons,
        blocked=unable(studio, made),
        pictures=tuple(pictures),
        seeds=studio.seeds,
    )


def recall(studio: Studio) -> Record:
    """Looks at the same sweep for what of the data is still drawn (Figure 13)."""
    made = drawn(studio)
    seeds = len(studio.seeds)
    real = studio.reference
    found: dict[tuple[str, float], dict[str, Estimate]] = {}
    for key, images in made.items():
        features = np.concatenate([studio.features(one) for one in images])
        found[key] = manifolds.measured(real, features, groups=min(20, len(features) // 4))
    rows = []
    for name in ("recall", "precision"):
        rows += [
            Row(_label(*key), name, one[name].value, 1.96 * one[name].standard_error, percent=True)
            for key, one in found.items()
        ]
    rows += [
        records.row(_label(*key), "colour and shape right", studio.right(images), percent=True)
        for key, images in made.items()
    ]
    low, high = SCALES[0], SCALES[-1]
    lost = {model: found[model, low]["recall"].value - found[model, high]["recall"].value for model in MODELS}
    # Scales and models have errors of their own: taken as independent, which is too careful for the same captions.
    errors = [found[model, scale]["recall"].standard_error for model in MODELS for scale in (low, high)]
    apart = Estimate(lost["GLIDE"] - lost["unCLIP"], float(np.sqrt(np.square(errors).sum())))
    return Record(
        name="recall",
        title="Recall against quality",
        section="5.5, Figure 13",
        claim="With more guidance GLIDE's images become better and lose recall of the data; unCLIP's become better "
        "without that loss.",
        paper=(("both", "a figure of aesthetic score by recall, without numbers"),),
        how=f"The sweep of the experiment before, {seeds} draws of each caption against {len(real)} real pictures, "
        "third neighbours, features of this run's own CLIP. Quality is what the oracle finds right of the captions.",
        rows=tuple(rows),
        comparisons=(
            Comparison.of("recall that guidance costs: GLIDE, less unCLIP", apart),
        ),
        blocked=unable(studio, made),
        pictures=(),
        seeds=studio.seeds,
    )


def _label(model: str, scale: float) -> str:
    return f"{model}, guidance {scale:g}"


def _rise(found: dict[tuple[str, float], Measured], start: float, end: float) -> Estimate:
    """How much more a number rises from one scale to another for GLIDE than for unCLIP, caption by caption."""
    signed = [(1, "GLIDE", end), (-1, "GLIDE", start), (-1, "unCLIP", end), (1, "unCLIP", start)]
    influences = np.sum([sign * found[model, scale].influences for sign, model, scale in signed], axis=0)
    value = sum(sign * found[model, scale].value for sign, model, scale in signed)
    return Estimate(value, Measured(value, influences).standard_error)
