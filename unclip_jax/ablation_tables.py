"""From the cells of the ablations to tables: means over captions and seeds with 95% intervals, as Markdown.

A caption is drawn with every seed, so its draws are no independent samples: they are averaged first, and the intervals
are those of the mean over captions (normal approximation, as in appendix B). Every setting draws the same captions from
the same noise, so differences are taken caption by caption, which leaves out what captions differ in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Z = 1.96  # of a normal distribution, 95% lies within so many deviations
VERDICTS = ("colour", "shape", "both")


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns mean and half width of its 95% interval, of [seeds, captions] values."""
    captions = values.mean(0)
    return float(captions.mean()), float(Z * captions.std(ddof=1) / np.sqrt(len(captions)))


def combine(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a setting's numbers from its cells, one a seed: name -> [mean, half width], or [mean] alone."""
    made: dict[str, Any] = {
        name: list(interval(np.array([cell["verdicts"][name] for cell in cells]))) for name in VERDICTS
    }
    for name in ("cosine", "norm"):
        if name in cells[0]:
            made[name] = list(interval(np.array([cell[name] for cell in cells])))
    for name in ("variance", "spread"):
        if name in cells[0]:
            made[name] = [float(np.mean([cell[name] for cell in cells]))]
    return made


def difference(cells: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns [mean, half width] of "both" of the first less that of the others, caption by caption."""
    first, second = (np.array([cell["verdicts"]["both"] for cell in group]) for group in (cells, others))
    return list(interval(first - second))


def priors_table(rows: Sequence[Mapping[str, Any]], *, reference: str) -> list[str]:
    """Lays out what each way to condition the decoder gives, by guidance scale, as lines of Markdown.

    Args:
      rows: each with "label", "guidance_scale", the numbers of `combine`, and perhaps "difference".
      reference: label of the row that differences are from.
    """
    lines = [
        f"| the decoder reads | guidance | colour % | shape % | both % | both, less that of {reference} |",
        "|---|---|---|---|---|---|",
    ]
    best = {row["label"]: max(r["both"][0] for r in rows if r["label"] == row["label"]) for row in rows}
    for row in rows:
        both = _percent(row["both"])
        if row["both"][0] == best[row["label"]]:
            both = f"**{both}**"
        apart = _percent(row["difference"], signed=True) if "difference" in row else ""
        cells = [
            row["label"],
            f"{row['guidance_scale']:g}",
            _percent(row["colour"]),
            _percent(row["shape"]),
            both,
            apart,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def variances_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lays out what each variance of the diffusion prior's sampler gives, by steps, as lines of Markdown."""
    lines = [
        "| variance | steps | cosine | length | variance | spread | colour % | shape % | both % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [_number(row["cosine"]), _number(row["norm"]), f"{row['variance'][0]:.3f}", f"{row['spread'][0]:.3f}"]
        cells = [row["label"], row["timesteps"], *numbers, *(_percent(row[name]) for name in VERDICTS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def order(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Returns (label, both) at each label's best guidance scale, the best first."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["label"]] = max(best.get(row["label"], 0.0), row["both"][0])
    return sorted(best.items(), key=lambda item: -item[1])


def _percent(value: Sequence[float], *, signed: bool = False) -> str:
    mean, half = (100 * number for number in value)
    return f"{mean:{'+' if signed else ''}.1f} ± {half:.1f}"


def _number(value: Sequence[float]) -> str:
    return f"{value[0]:.4f} ± {value[1]:.4f}"
