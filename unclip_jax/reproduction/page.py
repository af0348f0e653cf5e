"""The report: one HTML page with all experiments, their numbers beside the paper's, and their pictures inside."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax import pages
from unclip_jax.reproduction.records import FAILS, HOLDS, UNKNOWN, Record, Row
from unclip_jax.reproduction.studio import EXPERIMENTS

CLASSES = {HOLDS: "good", FAILS: "bad", UNKNOWN: "soft"}


def html(workdir: pathlib.Path, found: Sequence[Record], figures: Mapping[str, Any]) -> str:
    """Returns the page.

    Args:
      workdir: below which the pictures lie.
      found: the experiments in order.
      figures: what is said of all: captions, seeds, seconds, machine, models, smoke.
    """
    shown = [
        {
            "record": record,
            "verdict": record.verdict,
            "class": CLASSES[record.verdict],
            "tables": [
                {"quantity": quantity, "rows": [{"label": row.label, "value": stated(row)} for row in rows]}
                for quantity, rows in itertools.groupby(record.rows, key=lambda row: row.quantity)
            ],
            "comparisons": [
                {"what": one.what, "value": f"{one.value:+.4g} ± {one.half:.2g}" if one.half else f"{one.value:+.4g}"}
                for one in record.comparisons
            ],
            "pictures": [
                {"title": one.title, "url": pages.data_url((workdir / EXPERIMENTS / one.file).read_bytes())}
                for one in record.pictures
            ],
        }
        for record in found
    ]
    counts = {verdict: sum(record.verdict == verdict for record in found) for verdict in CLASSES}
    template = pages.environment().get_template("reproduction.html")
    return template.render(experiments=shown, counts=counts, classes=CLASSES, figures=figures)


def stated(row: Row) -> str:
    """Returns a number with its interval as people write it."""
    if row.percent:
        return f"{100 * row.value:.1f}%" + (f" ± {100 * row.half:.1f}" if row.half else "")
    return pages.number(row.value) + (f" ± {row.half:.2g}" if row.half else "")


def lines(found: Sequence[Record]) -> list[str]:
    """Returns a line for each experiment: its verdict and title."""
    return [f"{record.verdict:28} {record.title} ({record.section})" for record in found]
