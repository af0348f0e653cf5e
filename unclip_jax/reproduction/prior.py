"""Section 5.1: is a prior needed, when the decoder might read z_t?"""

import numpy as np

from unclip_jax.evaluation import frechet
from unclip_jax.reproduction import records
from unclip_jax.reproduction.records import Comparison, Record
from unclip_jax.reproduction.studio import Studio, by_caption

PARTS = ("clip", "decoder", "prior_diffusion", "decoder_text")
_SCALE = 1.5
# Label -> (what stands in z_i's place, decoder).
ROWS = {
    "z_i of the diffusion prior": ("diffusion", "decoder"),
    "z_t, a decoder trained on it": ("none", "decoder_text"),
    "z_t, unCLIP's decoder": ("none", "decoder"),
}


def run(studio: Studio) -> Record:
    """Draws the same captions from the same noise by a prior's z_i, and by z_t in its place."""
    first, *others = ROWS
    made = {
        label: [studio.drawn(source, seed, scale=_SCALE, decoder=decoder) for seed in studio.seeds]
        for label, (source, decoder) in ROWS.items()
    }
    right = {label: studio.right(images) for label, images in made.items()}
    reference = frechet.moments(studio.reference)
    distances = {
        label: by_caption(frechet.measured(studio.features(np.concatenate(images)), reference), len(studio.seeds))
        for label, images in made.items()
    }
    rows = [records.row(label, "colour and shape right", values, percent=True) for label, values in right.items()]
    rows += [records.distance(label, found) for label, found in distances.items()]
    comparisons = []
    for label in others:
        comparisons.append(records.difference(f"right: {first}, less {label}", right[first], right[label]))
        apart = distances[label].minus(distances[first])
        comparisons.append(Comparison.of(f"Fréchet distance: {label}, less {first}", apart))
    picture = studio.grid({label: images[0] for label, images in made.items()})
    return Record(
        name="prior",
        title="A prior, or none",
        section="5.1, Figure 8",
        claim="Images of a prior's z_i are better than those of z_t: of a decoder trained on z_t, and far better than "
        "those of unCLIP's decoder that is given z_t it never saw.",
        paper=(
            ("FID, prior's z_i", "7.99"), ("FID, decoder trained on z_t", "9.16"), ("FID, z_t zero-shot", "16.55"),
            ("people prefer the prior to a decoder of z_t, photorealism", "57.0 ± 3.1%"),
            ("the same, caption similarity", "53.1 ± 3.1%"),
        ),
        how=f"Held-out captions of one object, guidance {_SCALE:g}; an oracle reads colour and shape. Distances are "
        "between features of this run's own CLIP, so they compare rows and nothing else.",
        rows=tuple(rows),
        comparisons=tuple(comparisons),
        blocked="",
        pictures=(studio.save("prior", "The same captions and noise", picture),),
        seeds=studio.seeds,
    )  # fmt: skip
