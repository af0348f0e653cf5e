"""Sections 2.2 and 4: what the leading principal components of z_i hold (Figure 7)."""

import numpy as np

from unclip_jax.probing import components, rank, sheets
from unclip_jax.reproduction import records
from unclip_jax.reproduction.records import Comparison, Record, Row
from unclip_jax.reproduction.studio import Studio

PARTS = ("clip", "decoder")
_SHOWN = 6


def run(studio: Studio) -> Record:
    """Draws pictures from ever more components of their z_i, from the same x_T, and has the oracle read them."""
    fitted = components.fit([studio.reference])
    kept = components.counts(studio.reference.shape[1])
    z_i = studio.embeddings("true", 0)

    def drawn(seed: int) -> np.ndarray:
        def make() -> dict[str, np.ndarray]:
            model = studio.chain("clip", "decoder", decoder={"method": "ddim", "eta": 0.0})
            return {"images": components.drawn(model, fitted, z_i, kept, seed=seed)}

        return studio.cell("components", {"seed": seed, "kept": kept}, ["clip", "decoder"], make)["images"]

    made = [drawn(seed) for seed in studio.seeds]
    headings = [*map(str, kept), "all of z_i"]
    right = {
        what: {
            heading: studio.right([np.ascontiguousarray(images[:, column]) for images in made], what)
            for column, heading in enumerate(headings)
        }
        for what in ("colour", "shape")
    }
    shares = np.cumsum(fitted.variances) / fitted.variances.sum()
    rows = [Row(f"{count} components", "variance kept", float(shares[count - 1]), 0.0, percent=True) for count in kept]
    for what, found in right.items():
        rows += [records.row(heading, f"{what} right", values, percent=True) for heading, values in found.items()]
    needed = rank.of_variances(fitted.variances).components
    rows.append(Row("components that lose less than 1%", f"of {len(shares)}", float(needed), 0.0))
    few, every, colour, shape = headings[0], headings[-1], right["colour"], right["shape"]
    sheet = sheets.components(
        made[0][:_SHOWN], list(studio.real(made[0].shape[2])[:_SHOWN]),
        kept, [float(shares[count - 1]) for count in kept],
        studio.captions[:_SHOWN],
    )  # fmt: skip
    return Record(
        name="components",
        title="What the leading components hold",
        section="2.2 and 4, Figure 7",
        claim="A third of the components give embeddings back with less than 1% of error; fewer keep what is coarse, "
        "and details come with the later ones.",
        paper=(("components that lose less than 1%", "319 of 1,024"), ("drawn from", "20 to 320 components")),
        how="Components of the validation pictures' z_i; drawn without captions by DDIM from one x_T for each picture. "
        "Colour and shape are read by the oracle at each count.",
        rows=tuple(rows),
        comparisons=(
            Comparison("a third of the dimensions, less the components needed", len(shares) / 3 - needed, 0.0),
            records.difference(f"shape right: {every}, less {few} components", shape[every], shape[few]),
            records.difference(f"colour right: {every}, less {few} components", colour[every], colour[few]),
        ),
        blocked="",
        pictures=(studio.save("components", "From ever more components", sheet),),
        seeds=studio.seeds,
    )
