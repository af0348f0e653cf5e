"""Section 3.1: variations of a picture, by how much fresh noise DDIM is given (Figure 3)."""

import functools
import itertools

import numpy as np

from unclip_jax.evaluation import uncertainty
from unclip_jax.manipulation.latents import Codec, Latents
from unclip_jax.reproduction import records
from unclip_jax.reproduction.records import Comparison, Record, Row
from unclip_jax.reproduction.studio import Studio

PARTS = ("clip", "decoder")
ETAS = (0.0, 0.5, 1.0)
_STEPS, _CHANCE = 50, 1 / 56


def run(studio: Studio) -> Record:
    """Encodes pictures as (z_i, x_T) and draws them again with more and more fresh noise."""
    made = {eta: [_drawn(studio, eta, seed) for seed in studio.seeds] for eta in ETAS}
    apart = {eta: uncertainty.mean(_apart(several)) for eta, several in made.items()}
    right = {eta: studio.right(several) for eta, several in made.items()}
    rows = [
        Row(f"eta {eta:g}", "difference of two draws, RMS of 255", one.value, 1.96 * one.standard_error)
        for eta, one in apart.items()
    ]
    rows += [records.row(f"eta {eta:g}", "colour and shape right", one, percent=True) for eta, one in right.items()]
    comparisons = [
        Comparison.of(f"difference of two draws: eta {more:g}, less eta {less:g}", apart[more].minus(apart[less]))
        for less, more in itertools.pairwise(ETAS)
    ]
    last = ETAS[-1]
    chance = np.full_like(right[last], _CHANCE)
    comparisons.append(records.difference(f"right at eta {last:g}, less chance", right[last], chance))
    side = made[last][0].shape[1]
    columns = {"picture": studio.real(side)}
    for eta, several in made.items():
        columns |= {f"{eta:g}, {number}": images for number, images in enumerate(several[:3])}
    return Record(
        name="variations",
        title="Variations by eta",
        section="3.1, Figure 3",
        claim="With eta 0 a picture comes back; the larger eta is, the more draws differ, and what they share is what "
        "CLIP sees in the picture.",
        paper=(("variations", "samples, without numbers"),),
        how=f"Pictures of one object as (z_i, x_T) by DDIM inversion of the decoder, {_STEPS} steps, without captions; "
        "the oracle looks for the picture's colour and shape in what is drawn again.",
        rows=tuple(rows),
        comparisons=tuple(comparisons),
        blocked="",
        pictures=(studio.save("variations", "eta, seed", studio.grid(columns)),),
        seeds=studio.seeds,
    )


@functools.cache
def _codec(studio: Studio) -> Codec:
    """One for all cells, for its programs are compiled once."""
    return Codec(studio.chain("clip", "decoder"), steps=_STEPS, last="decoder")


def _drawn(studio: Studio, eta: float, seed: int) -> np.ndarray:
    def encode() -> dict[str, np.ndarray]:
        codec = _codec(studio)
        latents = codec.encode(list(studio.real(codec.sides["decoder"]))).latents
        return {"z_i": latents.z_i, "x_T": latents.x_T["decoder"]}

    def make() -> dict[str, np.ndarray]:
        found = studio.cell("latents", {"steps": _STEPS}, ["clip", "decoder"], encode)
        latents = Latents(found["z_i"], {"decoder": found["x_T"]}, ("",) * len(found["z_i"]))
        return {"images": _codec(studio).draw(latents, eta=eta, seed=seed)["decoder"]}

    return studio.cell("variations", {"eta": eta, "seed": seed, "steps": _STEPS}, ["clip", "decoder"], make)["images"]


def _apart(several: list[np.ndarray]) -> np.ndarray:
    """Root-mean-square difference of the draws of each picture, the mean over pairs of seeds."""
    pairs = [
        np.sqrt(np.square(a.astype(np.float64) - b).mean((1, 2, 3))) for a, b in itertools.combinations(several, 2)
    ]
    return np.mean(pairs, axis=0)
