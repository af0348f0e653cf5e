"""The report of training runs: one HTML page with curves, pictures and where the time went, and a summary in words.

A run may be going on, have been killed, or have ended. It is read as it is: rows that are half written are left out,
pictures that are not whole are passed over. Nothing is written but the page.
"""

import dataclasses
import datetime
import io
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table
from etils import epath
from PIL import Image
from rich.markup import escape

from unclip_jax import goodput, goodput_sums, metrics, pages, run_curves
from unclip_jax.errors import InputError

MEANING = {
    goodput.STEP: "training steps that were kept",
    goodput.DATA: "the device waited for data",
    goodput.SAVE: "the loop waited for a checkpoint",
    goodput.EVALUATION: "evaluation",
    goodput.COMPILE: "compiling the train step",
    goodput.INIT: "starting the process, reading data, new weights",
    goodput.RESTORE: "reading a checkpoint",
    goodput_sums.REDONE: "steps that a later start had to do again",
    goodput_sums.IDLE: "nothing ran, between two starts",
    goodput_sums.OTHER: "anything else",
}
_MOST_PICTURES = 6  # of one kind; the first, the last, and some between
_SIDE = 640  # pixels a side that pictures are shown at, at most
_SILENCE = 10 * goodput.HEARTBEAT_SECONDS  # a process that lives writes more often
_MOST_WORDS = 20_000  # of a file of failures
# Drawn first, and under which names the rows have them.
_MAIN = ("loss", "grad_norm", "learning_rate", "examples_per_second")
_UNINTERESTING = {"skipped_steps", "streak", "steps_per_second", "seconds_left", "examples_per_second_per_device"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run's folder tells.

    Attributes:
      workdir: the folder.
      config: its config.json, {} if there is none.
      rows: step -> scalars.
      hosts: where each host's time went; the first one's stands for the run.
    """

    workdir: epath.Path
    config: Mapping[str, Any]
    rows: Mapping[int, Mapping[str, float]]
    hosts: Mapping[int, goodput_sums.Sums]

    @property
    def sums(self) -> goodput_sums.Sums | None:
        """Where process 0's time went."""
        return self.hosts.get(0)

    @property
    def step(self) -> int:
        """The last step that anybody wrote of."""
        starts = self.sums.starts if self.sums else ()
        return max([*self.rows, *(start.steps[1] for start in starts if start.steps)], default=0)

    def fact(self, name: str) -> Any:
        """Returns what the newest start that knows it told of itself, None if none did."""
        starts = self.sums.starts if self.sums else ()
        return next((start.facts[name] for start in reversed(starts) if name in start.facts), None)

    @property
    def state(self) -> str:
        """In words, how it stands with the run."""
        if not self.sums:  # of a version that did not record it
            total = self.config.get("total_steps")
            return "done" if isinstance(total, int) and self.step >= total > 0 else "unknown"
        last = self.sums.starts[-1]
        if last.how is None:
            return "running" if abs(time.time() - last.ended) < _SILENCE else "killed"
        return last.how if last.how in ("done", "stopped") else "failed"


def is_run(workdir: epath.Path) -> bool:
    """Whether a folder is a training run's."""
    return (workdir / metrics.JSONL).exists() or goodput.path_of(workdir, 0).exists()


def find(workdir: epath.PathLike) -> list[Run]:
    """Returns the run in a folder, or those in the folders right beneath it.

    Raises:
      InputError: there is none.
    """
    folder = epath.Path(workdir)
    if not folder.exists():
        raise InputError(f"--workdir={workdir} does not exist; give the folder of a training run or of a quickstart")
    if is_run(folder):
        return [read(folder)]
    beneath = sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path)) if folder.is_dir() else []
    if not beneath:
        raise InputError(
            f"--workdir={workdir} holds neither {metrics.JSONL} of a training run, nor folders with one, nor "
            "report.json of a quickstart"
        )
    return [read(path) for path in beneath]


def read(workdir: epath.PathLike) -> Run:
    """Reads one run's folder.

    Raises:
      InputError: its files are not a training run's.
    """
    workdir, config = epath.Path(workdir), {}
    try:
        rows = metrics.read(workdir)
        if (workdir / "config.json").exists():
            config = json.loads((workdir / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("config.json holds no object")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{workdir} is not the folder of a training run: {error!r} in its files") from error
    return Run(workdir, config, rows, goodput_sums.read(workdir))


def curves(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Returns groups of curves: title -> [{name, url, last, step}]: the newest value, and at which step.

    What was measured once has no curve: its `url` is "".
    """
    rows = {step: dict(row) for step, row in run.rows.items()}
    batch = run.config.get("batch_size")
    for row in rows.values():
        if "steps_per_second" in row and isinstance(batch, int):
            row["examples_per_second"] = row["steps_per_second"] * batch
    names = dict.fromkeys(name.removeprefix("mean/") for row in rows.values() for name in row)
    evaluated = [name for name in names if name.startswith("evaluation/")]
    others = [name for name in names if name not in {*_MAIN, *evaluated, *_UNINTERESTING}]
    groups = {
        "Training": [name for name in _MAIN if name in names],
        "Evaluation": evaluated,
        "More of what training reports": others,
    }
    found = {title: [_curve(run, rows, name) for name in group] for title, group in groups.items()}
    return {title: [curve for curve in group if curve] for title, group in found.items() if any(group)}


def _curve(run: Run, rows: Mapping[int, Mapping[str, float]], name: str) -> dict[str, Any] | None:
    single, mean = run_curves.series(rows, name), run_curves.series(rows, f"mean/{name}")
    points = mean or single
    if not points:
        return None
    log = name in ("loss", "grad_norm")
    url = ""
    if len(points) > 1:
        url = run_curves.draw_curve(points, behind=single if mean else [], restarts=restarts(run), log=log)
    step, last = points[-1]
    return {"name": name.removeprefix("evaluation/").replace("_", " "), "url": url, "last": last, "step": step}


def restarts(run: Run) -> list[int]:
    """Returns the steps at which a later start went on; none where they are too many to be told apart."""
    starts = run.sums.starts[1:] if run.sums else ()
    steps = sorted({start.steps[0] for start in starts if start.steps})
    return steps if len(steps) <= 40 else []


def pictures(run: Run) -> list[dict[str, Any]]:
    """Returns what evaluators drew: [{name, count, shown: [{step, url}]}], oldest first."""
    by_name: dict[str, list[tuple[int, epath.Path]]] = {}
    folder = run.workdir / "pictures"
    for path in folder.iterdir() if folder.exists() else ():
        if match := re.fullmatch(r"(.+)-(\d+)\.png", path.name):
            by_name.setdefault(match[1], []).append((int(match[2]), path))
    found = []
    for name, files in sorted(by_name.items()):
        files.sort()
        last = len(files) - 1
        most = min(len(files), _MOST_PICTURES)
        picked = sorted({round(i * last / max(most - 1, 1)) for i in range(most)}) if last else [0]
        shown = [{"step": files[i][0], "url": _picture(files[i][1])} for i in picked]
        found.append({"name": name, "count": len(files), "shown": [one for one in shown if one["url"]]})
    return [group for group in found if group["shown"]]


def _picture(path: epath.Path) -> str:
    """Returns a picture's URL, "" if it is not whole (yet)."""
    try:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return pages.data_url(buffer.getvalue())


def warnings(run: Run) -> list[dict[str, str]]:
    """Returns what somebody should look at: [{title, text}], text being a file's words or ""."""
    found = []
    skipped = max((int(row.get("skipped_steps", 0)) for row in run.rows.values()), default=0)
    if skipped:
        steps = "1 step was" if skipped == 1 else f"{skipped} steps were"
        found.append((f"{steps} skipped, for their loss or gradient was not finite", ""))
    if infinite := [step for step, row in run.rows.items() if not math.isfinite(row.get("loss", 0.0))]:
        found.append((f"the loss was not finite at step {', '.join(map(str, infinite[:10]))}", ""))
    folder = run.workdir / "checkpoints"
    if damaged := sorted(path.name for path in folder.glob("damaged-*")) if folder.exists() else []:
        found.append((f"damaged checkpoints were passed over: {', '.join(damaged)}", ""))
    failures = run.workdir / "failures"
    for path in sorted(failures.glob("*.txt")) if failures.exists() else ():
        text = path.read_bytes().decode(errors="replace")
        words = text if len(text) <= _MOST_WORDS else f"…\n{text[-_MOST_WORDS:]}"  # the newest are at the end
        found.append((f"what host {path.stem} failed of", words))
    for start in run.sums.starts if run.sums else ():
        if start.how not in (None, "done", "stopped"):
            found.append((f"start {start.number} failed: {start.how}", ""))
    if run.sums and run.sums.total - (run.sums.ended - run.sums.began) > 1:
        found.append(("starts overlap in time: two processes worked in this folder at once, or clocks differ", ""))
    return [{"title": title, "text": text} for title, text in found]


def start_rows(run: Run) -> list[dict[str, Any]]:
    """Returns a row per start for the table."""
    starts = run.sums.starts if run.sums else ()
    return [
        {
            "number": start.number,
            "began": start.began,
            "seconds": start.ended - start.began,
            "steps": start.steps,
            "how": start.how if start.how is not None else run.state if start is starts[-1] else "killed",
            "where": f"{start.facts.get('devices', '?')} × {start.facts.get('device', '?')}",
        }
        for start in starts
    ]


def changes(sums: goodput_sums.Sums) -> list[tuple[int, str, str, str]]:
    """Returns (start, key, before, after) of what starts changed in the config."""
    found = []
    for start in sums.starts:
        changed = start.facts.get("changed")
        for key, pair in changed.items() if isinstance(changed, dict) else ():
            before, after = pair if isinstance(pair, list) and len(pair) == 2 else ("?", pair)
            found.append((start.number, str(key), str(before), str(after)))
    return found


def time_rows(sums: goodput_sums.Sums) -> list[dict[str, Any]]:
    """Returns a row per bucket that took any time: what, how long, which share."""
    return [
        {"bucket": bucket, "meaning": MEANING[bucket], "seconds": sums.seconds[bucket],
         "share": sums.seconds[bucket] / sums.total, "colour": run_curves.COLOURS[bucket]}
        for bucket in goodput_sums.BUCKETS if sums.seconds[bucket] >= 5e-4 * sums.total
    ]  # fmt: skip


def overview(run: Run) -> dict[str, Any]:
    """Returns the few figures that a person wants first."""
    total = run.fact("total_steps") or run.config.get("total_steps")
    left = run_curves.series(run.rows, "seconds_left")
    losses = run_curves.series(run.rows, "mean/loss") or run_curves.series(run.rows, "loss")
    return {
        "name": run.workdir.name,
        "stage": run.config.get("stage", "?"),
        "state": run.state,
        "step": run.step,
        "total_steps": total,
        "seconds_left": left[-1][1] if left and run.state == "running" else None,
        "loss": losses[-1][1] if losses else None,
        "parameters": run.fact("parameters"),
        "goodput": run.sums.goodput if run.sums else None,
        "seconds": run.sums.total if run.sums else None,
        "ended": run.sums.ended if run.sums else None,
        "batch_size": run.config.get("batch_size"),
    }


def _shown(run: Run) -> dict[str, Any]:
    sums = run.sums
    return {
        "overview": overview(run),
        "warnings": warnings(run),
        "curves": curves(run),
        "restarts": len(restarts(run)),
        "pictures": pictures(run),
        "times": time_rows(sums) if sums and sums.total else [],
        "timeline": run_curves.draw_timeline(sums) if sums and sums.total else "",
        "starts": start_rows(run),
        "steps_redone": sums.steps_redone if sums else 0,
        "changes": changes(sums) if sums else [],
        "hosts": [
            {"host": host, "data": one.seconds[goodput.DATA], "share": one.seconds[goodput.DATA] / (one.total or 1),
             "ended": one.ended} for host, one in run.hosts.items()
        ] if len(run.hosts) > 1 else [],
        "config": json.dumps(run.config, indent=1),
    }  # fmt: skip


def render(runs: Sequence[Run], *, title: str) -> str:
    """Returns the page, with everything it shows inside it."""
    now = datetime.datetime.now(datetime.UTC).timestamp()
    return (
        pages.environment().get_template("runs.html").render(title=title, runs=[_shown(run) for run in runs], now=now)
    )


def tables(runs: Sequence[Run]) -> list[rich.table.Table]:
    """Returns the summary for a terminal: a table of the runs, and where the time of each went."""
    summary = _table("run", "stage", "state", "step", "loss", "goodput", "time")
    for figures in map(overview, runs):
        steps = f"{figures['step']:,}" + (f"/{figures['total_steps']:,}" if figures["total_steps"] else "")
        summary.add_row(
            escape(figures["name"]), escape(str(figures["stage"])), figures["state"], steps,
            "–" if figures["loss"] is None else pages.number(figures["loss"]),
            "–" if figures["goodput"] is None else f"{100 * figures['goodput']:.1f}%",
            "–" if figures["seconds"] is None else pages.duration(figures["seconds"]),
        )  # fmt: skip
    found = [summary]
    for run in runs:
        if run.sums and run.sums.total:
            times = _table(f"where the time of {escape(run.workdir.name)} went", "time", "share")
            for row in time_rows(run.sums):
                times.add_row(row["meaning"], pages.duration(row["seconds"]), f"{100 * row['share']:.1f}%")
            found.append(times)
    return found


def _table(*columns: str) -> rich.table.Table:
    return rich.table.Table(*columns, box=rich.box.SIMPLE_HEAD, pad_edge=False)
