"""Results of an evaluation as people read them: an HTML page with sample grids, Markdown, a sentence, plots."""

import base64
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax import pages
from unclip_jax.data import images

SHOWN = 16  # rows of the page's grid
_PUBLISHED = "inception-2015-12-05"
_COLOURS = ("#2457b3", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def page(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page, with everything it shows inside it.

    Args:
      results: what an evaluation came to.
      samples: rows to show: "caption", "real" and "drawn", an image at each point.
    """
    points = results["points"]
    networks = {kind for one in points for found in one["protocols"].values() for kind in found}
    seconds = results["seconds"]
    environment = pages.environment()
    environment.filters["stated"] = stated
    return environment.get_template("evaluation.html").render(
        results=results,
        points=points,
        names=list(results["protocols"]),
        unlike=sorted(networks - {_PUBLISHED}),
        warnings=_warnings(results),
        tiles=tiles(results),
        curves=curves(results),
        tables=_tables(results),
        headings=[_heading(point, points) for point in points],
        columns=["real image", *(_heading(point, points) for point in points)],
        samples=[
            {"caption": row["caption"], "urls": [_url(image) for image in (row["real"], *row["drawn"])]}
            for row in samples
        ],
        side=samples[0]["drawn"][0].shape[0] if samples else 0,
        abreast=max(1, 4 // (1 + len(points))),
        bad=[{"point": point["name"], **image} for point in points for image in point["bad"]["images"]],
        longest=max([*seconds.values(), 1e-9]),
        protocols={name: json.dumps(one, indent=1) for name, one in results["protocols"].items()},
        manifest=json.dumps(results["manifest"], indent=1, ensure_ascii=False),
    )  # fmt: skip


def stated(value: float, error: float | None) -> tuple[str, str]:
    """Returns a value and its standard error as text: the error with two digits, the value with as many places."""
    if not error or not math.isfinite(error) or not 1e-6 < error < 1e4:
        return pages.number(value), pages.number(error) if error else ""
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{places}f}", f"{error:,.{places}f}"


def _url(image: np.ndarray) -> str:
    return pages.data_url(images.encode_png(image))


def _warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing these numbers with others."""
    found = []
    for name, one in results["references"].items():
        if one["deficient"]:
            found.append(
                f"{name}: {one['images']:,} real images are no more than the {one['width']:,} dimensions of their "
                "features, so that distances are mostly bias."
            )
    own = results["manifest"]["models"].get("clip", {}).get("digest", "")[:8]
    if own and any(name.endswith(f"CLIP {own}") for name in results["references"]):
        found.append(f"CLIP {own} is the one that these models were trained with, which flatters their CLIP scores.")
    count = sum(point["bad"]["count"] for point in results["points"])
    if count:
        found.append(f"{count} image{'s are' if count > 1 else ' is'} no image; named below, and counted as drawn.")
    return found


def _heading(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    several = len({one["prior"] for one in points}) > 1
    return f"{point['decoder']:g}, prior {point['prior']:g}" if several else f"guidance {point['decoder']:g}"


def _best(results: Mapping[str, Any], protocol: str, network: str, key: str) -> tuple[Mapping[str, Any], Any] | None:
    """Returns (measure, its point) with the best value, of a key."""
    found = [
        (measure, point)
        for point in results["points"]
        for measure in point["protocols"].get(protocol, {}).get(network, ())
        if measure["key"] == key
    ]
    if not found:
        return None
    sign = 1 if found[0][0]["better"] == "lower" else -1
    return min(found, key=lambda pair: sign * pair[0]["value"])


def _first(results: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Returns the first protocol and its networks, that of published numbers first."""
    protocol = next(iter(results["protocols"]))
    networks = list(results["points"][0]["protocols"][protocol])
    return protocol, sorted(networks, key=lambda name: name != _PUBLISHED)


def tiles(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the headline numbers: of the first protocol, at the point where each is best."""
    protocol, networks = _first(results)
    made: list[dict[str, str]] = []
    several = len(results["points"]) > 1
    for key in ("fid", "kid", "recall", "clip_score", "oracle_both"):
        for network in networks:
            best = _best(results, protocol, network, key)
            if best is None or any(tile["key"] == key for tile in made):
                continue
            measure, point = best
            value, error = stated(measure["value"], measure["standard_error"])
            note = f"± {error}" if error else ""
            where = f"best at {_heading(point, results['points'])}" if several else measure["about"]
            made.append(
                {
                    "key": key,
                    "what": measure["name"],
                    "value": value,
                    "note": ", ".join(part for part in (note, where) if part),
                }
            )
    return made


def curves(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns, for each protocol and network, the distance by guidance: a plot's URL and the rows of its table."""
    if len(results["points"]) < 2:
        return []
    made = []
    differences = {(one["of"], one["point"]): one for one in results["differences"]}
    for protocol in results["protocols"]:
        for network in results["points"][0]["protocols"][protocol]:
            rows = []
            for point in results["points"]:
                measure = next(one for one in point["protocols"][protocol][network] if one["key"] == "fid")
                rows.append(
                    {
                        "decoder": point["decoder"],
                        "prior": point["prior"],
                        "value": measure["value"],
                        "error": measure["standard_error"],
                        "difference": differences.get((f"{protocol} {network}", point["name"])),
                        "name": measure["name"],
                        "best": False,
                    }
                )
            min(rows, key=lambda row: row["value"])["best"] = True
            rows.sort(key=lambda row: (row["prior"], row["decoder"]))
            title = f"{protocol}: {rows[0]['name']}"
            several = len({row["prior"] for row in rows}) > 1
            made.append(
                {"title": title, "rows": rows, "priors": several, "url": draw(rows, label=rows[0]["name"])}
            )
    return made


def plots(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns file name -> SVG of each curve of a sweep."""
    found = [base64.b64decode(curve["url"].partition(",")[2]) for curve in curves(results)]
    return {f"guidance{f'-{number}' if number else ''}.svg": content for number, content in enumerate(found)}


def draw(rows: Sequence[Mapping[str, Any]], *, label: str) -> str:
    """Draws a distance with its standard errors by guidance, a line for each guidance of the prior; an SVG's URL.

    It is figure 11 of Ramesh et al. (2022). Where the prior alone varies, that is the axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axis_of, line_of = ("decoder", "prior")
    if len({row["decoder"] for row in rows}) == 1:
        axis_of, line_of = line_of, axis_of
    figure, axis = pyplot.subplots(figsize=(8.2, 3.9), layout="constrained")
    lines = sorted({row[line_of] for row in rows})
    for number, scale in enumerate(lines):
        own = sorted((row for row in rows if row[line_of] == scale), key=lambda row: row[axis_of])
        axis.errorbar(
            [row[axis_of] for row in own],
            [row["value"] for row in own],
            yerr=[row["error"] for row in own],
            color=_COLOURS[number % len(_COLOURS)],
            marker="o",
            markersize=5,
            linewidth=1.8,
            capsize=3,
            label=f"guidance of the {line_of} {scale:g}",
        )
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=9)
    axis.set_xlabel(f"guidance scale of the {axis_of}", fontsize=10, color="#5d6675")
    axis.set_ylabel(label, fontsize=10, color="#5d6675")
    axis.set_xticks(sorted({row[axis_of] for row in rows}))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(color="#eceff4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    url = pages.svg(figure)
    pyplot.close(figure)
    return url


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    made = []
    points = results["points"]
    for protocol in results["protocols"]:
        for network, measures in points[0]["protocols"][protocol].items():
            about = results["references"][f"{protocol} {network}"]
            by_point = [point["protocols"][protocol][network] for point in points]
            rows = [
                {**measure, "cells": [found[place] for found in by_point]} for place, measure in enumerate(measures)
            ]
            made.append(
                {
                    "title": f"{protocol}, {network}",
                    "digest": results["manifest"]["protocols"][protocol],
                    "references": about["images"],
                    "removed": results["removed"][protocol],
                    "rows": rows,
                }
            )
    return made


def markdown(results: Mapping[str, Any]) -> str:
    """Returns a table of Markdown, a row for each point, protocol and network."""
    keys: dict[str, str] = {}
    lines = []
    for point in results["points"]:
        for protocol, found in point["protocols"].items():
            for network, measures in found.items():
                cells = {}
                for measure in measures:
                    value, error = stated(measure["value"], measure["standard_error"])
                    keys[measure["key"]] = measure["key"].replace("_", " ")
                    cells[measure["key"]] = f"{value} ± {error}" if error else value
                steps = ", ".join(f"{name} {one['step']}" for name, one in results["manifest"]["models"].items())
                about = [protocol, results["manifest"]["protocols"][protocol], network, steps]
                about += [f"{point['decoder']:g}/{point['prior']:g}", f"{results['manifest']['rows']['count']}"]
                lines.append((about, cells))
    heads = ["protocol", "digest", "features", "steps", "guidance (decoder/prior)", "images", *keys.values()]
    rows = [[*about, *(cells.get(key, "") for key in keys)] for about, cells in lines]
    table = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def sentence(results: Mapping[str, Any], workdir: pathlib.Path) -> str:
    """Returns the main number, where it is best, in words."""
    protocol, networks = _first(results)
    best = _best(results, protocol, networks[0], "fid")
    assert best is not None  # every protocol has a distance
    measure, point = best
    value, error = stated(measure["value"], measure["standard_error"])
    where = f" at guidance {point['decoder']:g}" if len(results["points"]) > 1 else ""
    count = results["manifest"]["rows"]["count"]
    return f"{protocol}: {measure['name']} {value} ± {error}{where}, {count} images; {workdir / 'results.html'}"


def followed(workdir: pathlib.Path, part: str) -> str:
    """Writes followed.md, a table of all checkpoints that were scored; returns a sentence."""
    rows = []
    for path in sorted(workdir.glob(f"{part}-*/results.json")):
        results = json.loads(path.read_text())
        rows.append((results["manifest"]["models"][part]["step"], markdown(results).splitlines()))
    if not rows:
        return f"{workdir}: no checkpoint of {part} was there to be scored"
    lines = [*rows[0][1][:2], *(line for _, found in sorted(rows) for line in found[2:])]
    (workdir / "followed.md").write_text("\n".join(lines) + "\n")
    return f"the run of {part} has ended; {len(rows)} of its checkpoints are scored in {workdir / 'followed.md'}"
