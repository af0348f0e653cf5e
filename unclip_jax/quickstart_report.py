"""The report of a quickstart: one HTML page with its pictures inside, and PNG files, drawn from `report.json`."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax import captioned_grid, pages
from unclip_jax.errors import InputError

# How the sources of images are called, in the order of the tables.
LABELS = {
    "diffusion": "diffusion prior",
    "ar": "autoregressive prior",
    "none": "text embedding, no prior",
    "render": "real renders",
}
SHORT = {"diffusion": "diffusion prior", "ar": "AR prior", "none": "no prior", "render": "real render"}
COLUMNS = {
    "single": {"colour": "colour", "shape": "shape", "both": "both", "background": "background", "all": "all right"},
    "two": {"colour": "colours", "shape": "shapes", "both": "both", "relation": "relation", "all": "all right"},
}
SPLITS = {"validation": "kinds of objects seen in training", "unseen": "kinds of objects never seen in training"}
STAGES = {
    "clip": "CLIP",
    "prior_diffusion": "Diffusion prior",
    "prior_ar": "Autoregressive prior",
    "decoder": "Decoder",
    "upsampler_1": "First upsampler",
    "upsampler_2": "Second upsampler",
}
_CASCADE = ("decoder", "upsampler_1", "image")


def interval(share: float, n: int) -> float:
    """Half the width of a 95% interval of a share of n (Agresti and Coull, 1998), which is sane at 0 and 1 too."""
    z = 1.96
    centre = (share * n + z * z / 2) / (n + z * z)
    return z * float(np.sqrt(centre * (1 - centre) / (n + z * z)))


def score_tables(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lays the scores out: a table per split and number of objects, a row per source, chance in the last one."""
    tables = []
    for split, scores in figures["accuracy"].items():
        for group, columns in COLUMNS.items():
            rows = [
                {"name": name, "label": label, "cells": _cells(scores[name][group], columns)}
                for name, label in LABELS.items()
                if group in scores.get(name, {})
            ]
            if not rows:
                continue
            first = next(name for name in LABELS if group in scores.get(name, {}))
            shuffled = scores[first]["shuffled"].get(group)
            if shuffled:
                cells = [{"share": shuffled[key], "error": None} for key in columns]
                rows.append({"name": "chance", "label": "chance (captions shuffled)", "cells": cells})
            objects = {"single": "One object", "two": "Two objects"}[group]
            tables.append({
                "title": f"{objects}, {SPLITS.get(split, split)}",
                "n": scores[first][group]["n"],
                "columns": list(columns.values()),
                "rows": rows,
            })  # fmt: skip
    return tables


def _cells(rates: Mapping[str, float], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"share": rates[key], "error": interval(rates[key], int(rates["n"]))} for key in columns]


def headline(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the goal's three figures: measured, wanted, chance."""
    scores = figures["accuracy"]["validation"]["diffusion"]
    if "single" not in scores:
        return []
    chance = scores["shuffled"].get("single", {})
    return [
        {"label": key, "share": scores["single"][key], "goal": goal, "chance": chance.get(key)}
        for key, goal in figures["goal"].items()
    ]


def draw_curves(stages: Mapping[str, Any]) -> bytes:
    """Draws each stage's training loss, raw and smoothed, and the held-out loss; returns a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shown = [name for name in STAGES if name in stages]
    rows = -(-len(shown) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(12, 3.3 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, shown, strict=False):
        curve = stages[name]["curve"]
        axis.plot(curve["step"], curve["loss"], color="#9db4d8", linewidth=1, label="mean of a window")
        axis.plot(curve["step"], curve["smoothed"], color="#2457b3", linewidth=2, label="smoothed")
        held_out = [(row["step"], row["loss"]) for row in stages[name]["evaluations"] if "loss" in row]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o", color="#d9540b", markersize=5, label="held out (EMA)")
        values = [value for value in curve["loss"] if value > 0]
        if values and max(values) > 8 * min(values) and len(values) == len(curve["loss"]):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        axis.set_title(STAGES[name], fontsize=12, loc="left", fontweight="bold")
        axis.set_xlabel("training step")
        axis.set_ylabel("loss")
        axis.grid(color="#e3e6ec", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(shown) :]:
        axis.remove()
    handles, labels = max((axis.get_legend_handles_labels() for axis in figure.axes), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _pixels(path: pathlib.Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def draw_grids(workdir: pathlib.Path, examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Draws the examples: all sources side by side, and for each prior the image after every stage."""
    captions = [example["caption"] for example in examples]
    names = [name for name in LABELS if name in examples[0]["images"]]
    grids = {
        "samples": captioned_grid.draw(
            captions,
            [[_pixels(workdir / example["images"][name]["image"]) for name in names] for example in examples],
            headings=[SHORT[name] for name in names],
            side=128,
        )
    }
    for prior in names[:-1]:
        stages = [stage for stage in _CASCADE if all(stage in example["images"][prior] for example in examples)]
        rows = [[_pixels(workdir / example["images"][prior][stage]) for stage in stages] for example in examples]
        headings = [f"{image.shape[0]} px" for image in rows[0]] if rows else []
        grids[f"samples-{prior}"] = captioned_grid.draw(captions, rows, headings=headings, side=128)
    return grids


def _shown(workdir: pathlib.Path, example: Mapping[str, Any]) -> dict[str, Any]:
    """An example as the page wants it: with pictures as URLs."""
    images = [
        {"label": label, "short": SHORT[name], "name": name, **example["images"][name],
         "url": pages.data_url((workdir / example["images"][name]["image"]).read_bytes())}
        for name, label in LABELS.items() if name in example["images"]
    ]  # fmt: skip
    return {"caption": example["caption"], "split": example["split"], "images": images}


def _cascade(workdir: pathlib.Path, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for example in examples:
        files = example["images"]["diffusion"]
        steps = [workdir / files[stage] for stage in _CASCADE if stage in files]
        pictures = [{"side": _pixels(path).shape[0], "url": pages.data_url(path.read_bytes())} for path in steps]
        rows.append({"caption": example["caption"], "pictures": pictures})
    return rows


def time_rows(figures: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns (what, seconds) of every part, in the order in which they run."""
    seconds = figures["seconds"]
    names = {"data": "Rendering the data set", **STAGES}
    rows = [(label, seconds[name]) for name, label in names.items() if name in seconds]
    rows += [(f"Drawing: {name}", value) for name, value in seconds.items() if name.startswith("samples")]
    return [*rows, ("Scoring", figures["scoring_seconds"])]


def render(workdir: pathlib.Path, figures: Mapping[str, Any], *, curves: bytes) -> str:
    """Returns the page, with everything it shows inside it."""
    examples = figures["examples"]
    splits = dict.fromkeys(example["split"] for example in examples)
    rows = time_rows(figures)
    shown = {name: label for name, label in STAGES.items() if name in figures["stages"]}
    return pages.environment().get_template("quickstart.html").render(
        figures=figures,
        headline=headline(figures),
        tables=score_tables(figures),
        galleries=[
            {"title": SPLITS.get(split, split).capitalize(),
             "examples": [_shown(workdir, example) for example in examples if example["split"] == split]}
            for split in splits
        ],
        cascade=_cascade(workdir, [e for e in examples if e["split"] == next(iter(splits))][4:12:1][:6]),
        curves=pages.data_url(curves),
        stages={label: figures["stages"][name] for name, label in shown.items()},
        times=rows,
        longest=max(seconds for _, seconds in rows),
        configs={label: json.dumps(figures["stages"][name]["config"], indent=1) for name, label in shown.items()},
    )  # fmt: skip


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.html and the PNG files beside report.json; returns the page's path.

    Raises:
      InputError: there is no report.json, or it is not whole.
    """
    path = workdir / "report.json"
    try:
        figures = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); the quickstart writes it when it is done") from error
    try:
        curves = draw_curves(figures["stages"])
        page = render(workdir, figures, curves=curves)
        grids = draw_grids(workdir, figures["examples"])
    except (KeyError, FileNotFoundError) as error:
        raise InputError(
            f"{path} does not fit this program or its pictures are gone ({error!r}); run the quickstart"
        ) from error
    (workdir / "curves.png").write_bytes(curves)
    for name, pixels in grids.items():
        Image.fromarray(pixels).save(workdir / f"{name}.png")
    (workdir / "report.html").write_text(page, encoding="utf-8")
    return workdir / "report.html"
