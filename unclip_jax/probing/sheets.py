"""Contact sheets of what probing found: pictures with the numbers that belong to them beside them."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from unclip_jax import captioned_grid
from unclip_jax.probing.typographic import Attack

Sheet = UInt8[np.ndarray, "_ _ 3"]


def components(
    images: UInt8[np.ndarray, "n k s s 3"],
    originals: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    kept: Sequence[int],
    shares: Sequence[float],
    labels: Sequence[str],
) -> Sheet:
    """Draws rows of reconstructions from ever more components, from all of z_i, and the picture itself (Figure 7).

    Args:
      images: as `components.drawn` returns them, one column for each of `kept` and one for z_i.
      originals: the n pictures.
      kept: numbers of components.
      shares: of the variance that they keep, in [0, 1].
      labels: a line for each picture.
    """
    rows = [[*row, square] for row, square in zip(images, originals, strict=True)]
    headings = [f"{count} ({share:.0%})" for count, share in zip(kept, shares, strict=True)] + ["z_i", "picture"]
    return captioned_grid.draw(labels, rows, headings=headings)


def attacks(found: Attack, labels: Sequence[str], text: str) -> Sheet:
    """Draws each picture and its attacked self with CLIP's probabilities, then what is drawn of each (Figure 6)."""
    captions, rows = [], []
    for number in range(len(found.pictures)):
        cases = (
            ("as it is", found.pictures, found.before, found.drawn_before),
            (f"“{text}” written on it", found.attacked, found.after, found.drawn_after),
        )
        for what, shown, odds, drawn in cases:
            said = ", ".join(f"{label} {share:.1%}" for label, share in zip(labels, odds[number], strict=True))
            captions.append(f"{what}: {said}")
            rows.append([shown[number], *drawn[number]])
    return captioned_grid.draw(captions, rows, headings=["CLIP sees", "drawn from z_i"])


def bindings(
    captions: Sequence[str],
    scenes: UInt8[np.ndarray, "n s s 3"],
    drawn: Mapping[str, Sequence[UInt8[np.ndarray, "n _ _ 3"]]],
) -> Sheet:
    """Draws each scene, then what each source makes of it, all draws of one source side by side (Figure 15).

    Args:
      captions: of n scenes.
      scenes: their renders.
      drawn: source -> images of each seed.
    """
    columns = [scenes, *(images for several in drawn.values() for images in several)]
    rows = [[images[row] for images in columns] for row in range(len(scenes))]
    headings = ["scene"]
    for source, several in drawn.items():
        headings += ["" if number != len(several) // 2 else source for number in range(len(several))]
    return captioned_grid.draw(captions, rows, headings=headings)
