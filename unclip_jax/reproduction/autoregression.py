"""Sections 2.2 and 5.2: the autoregressive prior against the diffusion prior, in quality and in cost."""

import numpy as np

from unclip_jax import description, unclip
from unclip_jax.reproduction import records
from unclip_jax.reproduction.records import Comparison, Record, Row
from unclip_jax.reproduction.studio import Studio

PARTS = ("clip", "decoder", "prior_diffusion", "prior_ar")
_SCALE = 1.5
LABELS = {"diffusion": "diffusion prior", "ar": "AR prior"}


def run(studio: Studio) -> Record:
    """Draws the same captions from the same noise by both priors, and counts what these cost."""
    made = {prior: [studio.drawn(prior, seed, scale=_SCALE) for seed in studio.seeds] for prior in LABELS}
    right = {prior: studio.right(images) for prior, images in made.items()}
    true = studio.embeddings("true", 0)
    near = {
        prior: np.array([(studio.embeddings(prior, seed) * true).sum(1) for seed in studio.seeds]) for prior in LABELS
    }
    rows: list[Row] = []
    trained: dict[str, float] = {}
    for prior, label in LABELS.items():
        rows.append(records.row(label, "colour and shape right", right[prior], percent=True))
        rows.append(records.row(label, "cosine to the picture's z_i", near[prior].astype(np.float64)))
        rate = rates(studio, prior)
        half = 1.96 * rate.std(ddof=1) / np.sqrt(len(rate))
        rows.append(Row(label, "embeddings a second, on this machine", float(rate.mean()), float(half)))
        config = studio.chain("clip", unclip.PRIORS[prior] or "").part(unclip.PRIORS[prior] or "").config
        counted = description.describe(config)
        trained[prior] = float(counted.train_flops)
        drawing = counted.sampling_flops_per_example["sample_z_i"]
        rows.append(Row(label, "operations to draw an embedding, millions", drawing / 1e6, 0.0))
        rows.append(Row(label, "operations of training, 10¹²", trained[prior] / 1e12, 0.0))
    quantities = list(dict.fromkeys(one.quantity for one in rows))
    rows.sort(key=lambda one: quantities.index(one.quantity))
    picture = studio.grid({label: made[prior][0] for prior, label in LABELS.items()})
    return Record(
        name="autoregression",
        title="Autoregressive or diffusion prior",
        section="2.2 and 5.2, Table 1",
        claim="The diffusion prior makes better images than the autoregressive one, and takes less work to train.",
        paper=(
            ("unCLIP preferred to GLIDE for photorealism, AR prior", "47.1 ± 3.1%"),
            ("the same, diffusion prior", "48.9 ± 3.1%"),
            ("for caption similarity, AR prior", "41.1 ± 3.0%"),
            ("the same, diffusion prior", "45.3 ± 3.0%"),
        ),
        how=f"Held-out captions of one object, guidance {_SCALE:g} of the decoder; an oracle reads colour and shape. "
        "Operations are counted from the programs, as the configs train and sample; a rate is of one process.",
        rows=tuple(rows),
        comparisons=(
            records.difference("right: diffusion prior, less AR prior", right["diffusion"], right["ar"]),
            Comparison("training: AR over diffusion prior, less 1", trained["ar"] / trained["diffusion"] - 1, 0.0),
        ),
        blocked="",
        pictures=(studio.save("autoregression", "The same captions and noise", picture),),
        seeds=studio.seeds,
    )


def rates(studio: Studio, prior: str) -> np.ndarray:
    """Returns embeddings a second, once for each seed, float64 [seeds], compilation apart."""
    name = unclip.PRIORS[prior] or ""

    def make() -> dict[str, np.ndarray]:
        model = studio.chain("clip", name)
        found = []
        for seed in studio.seeds:
            before = model.timings[name].seconds
            model.sample_prior(studio.captions, prior=prior, seed=seed)
            found.append(len(studio.captions) / (model.timings[name].seconds - before))
        return {"rates": np.array(found)}

    return studio.cell("rates", {"prior": prior, "seeds": studio.seeds}, ["clip", name], make)["rates"]
