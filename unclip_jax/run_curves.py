"""Pictures of a run's numbers, as SVG inside the page: a curve per metric, and what its time went to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax import goodput, goodput_sums, pages

MOST_POINTS = 800  # of a curve; the page of a run of a million steps is as light as that of a short one
_BINS = 300
# Okabe and Ito's colours, which the colour-blind can tell apart, and greys for what is nobody's work.
COLOURS = {
    goodput.STEP: "#009e73", goodput.DATA: "#e69f00", goodput.SAVE: "#0072b2", goodput.EVALUATION: "#56b4e9",
    goodput.COMPILE: "#cc79a7", goodput.INIT: "#8a8f98", goodput.RESTORE: "#5b4a9c", goodput_sums.REDONE: "#d55e00",
    goodput_sums.IDLE: "#d5d9e0", goodput_sums.OTHER: "#f0e442",
}  # fmt: skip
Points = Sequence[tuple[int, float]]


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Returns at most `most` of the points, among them the first, the last and every stretch's lowest and highest."""
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(stretches):
        span = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(span, key=lambda n: points[n][1]), max(span, key=lambda n: points[n][1])}
    return [points[n] for n in sorted(kept)]


def series(rows: Mapping[int, Mapping[str, float]], name: str) -> Points:
    """Returns (step, value) of the rows that have a finite one."""
    return [(step, row[name]) for step, row in rows.items() if math.isfinite(row.get(name, math.nan))]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, height), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, colors="#5d6675")
    axis.spines[["left", "bottom"]].set_color("#c3c9d3")
    return figure, axis


def _closed(figure: Any) -> str:
    from matplotlib import pyplot

    url = pages.svg(figure)
    pyplot.close(figure)
    return url


def draw_curve(points: Points, *, behind: Points = (), restarts: Sequence[int] = (), log: bool = False) -> str:
    """Draws one metric by step; returns an SVG's URL.

    Args:
      points: the curve.
      behind: the same metric, noisier, drawn faintly.
      restarts: steps at which a later start went on, marked.
      log: whether a logarithmic axis is wanted, where all values are positive and it shows more.
    """
    from matplotlib import ticker

    figure, axis = _figure(3.8, 2.4)
    few = len(points) <= 25
    if behind and behind != points:
        axis.plot(*zip(*thinned(behind), strict=True), color="#b9c8e4", linewidth=0.9)
    axis.plot(
        *zip(*thinned(points), strict=True), color="#2457b3", linewidth=1.7, marker="o" if few else "", markersize=3.5
    )
    for step in restarts:
        axis.axvline(step, color="#d55e00", linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.7)
    values = [value for _, value in [*points, *behind]]
    if log and min(values) > 0 and max(values) > 8 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=7))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axis.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
        if max(values) == min(values):
            axis.set_ylim(*sorted((0.9 * values[0], 1.1 * values[0])) if values[0] else (-1, 1))
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.grid(color="#eceff4", linewidth=0.8)
    axis.set_axisbelow(True)
    return _closed(figure)


def draw_timeline(sums: goodput_sums.Sums) -> str:
    """Draws, along the wall clock, which share of each moment went where, and where starts began; an SVG's URL."""
    length = max(sums.ended - sums.began, 1e-9)
    unit, word = next(
        (unit, word)
        for unit, word in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if length >= 3 * unit or unit == 1
    )
    bins = goodput_sums.shares(sums, _BINS)
    edges = [i * length / _BINS / unit for i in range(_BINS + 1)]
    figure, axis = _figure(11.4, 1.9)
    columns = [[100 * share.get(bucket, 0.0) / (length / _BINS) for share in bins] for bucket in goodput_sums.BUCKETS]
    axis.stackplot(
        edges,
        [[*column, column[-1]] for column in columns],
        colors=[COLOURS[bucket] for bucket in goodput_sums.BUCKETS],
        step="post",
        linewidth=0,
    )
    marked = sums.starts if len(sums.starts) <= 60 else ()
    axis.plot(
        [(start.began - sums.began) / unit for start in marked], [104] * len(marked), "v", color="#1b1f27",
        markersize=4.5, clip_on=False,
    )  # fmt: skip
    axis.set_xlim(0, length / unit)
    axis.set_ylim(0, 100)
    axis.set_yticks([0, 50, 100], ["0%", "50%", "100%"])
    axis.set_xlabel(f"{word} since the first start", fontsize=9, color="#5d6675")
    return _closed(figure)
