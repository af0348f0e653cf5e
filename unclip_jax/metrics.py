"""Where a run's numbers go: a JSONL file, TensorBoard through clu, and the person who watches.

Only process 0 writes. clu's TensorBoard writer imports TensorFlow, so it is imported only when it is asked for.
"""

import io
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from unclip_jax import jsonl

_LOG = logging.getLogger(__name__)
JSONL = "metrics.jsonl"


class Writer:
    """Writes scalars and pictures of a run into its workdir.

    Scalars are rows of `metrics.jsonl`, `{"step": …, name: value, …}`, flushed one by one so that a killed run has
    them. A resumed run appends; the rows of a step are read as one, later values in the place of earlier ones.
    Pictures are PNG files under `pictures/`.
    """

    def __init__(self, workdir: epath.PathLike, *, tensorboard: bool = False):
        self._workdir = epath.Path(workdir)
        self._file: Any = None
        self._board: Any = None
        if jax.process_index() == 0:
            self._workdir.mkdir(parents=True, exist_ok=True)
            path = self._workdir / JSONL
            jsonl.mend(path)
            self._file = path.open("a")
            if tensorboard:
                from clu import metric_writers  # imports TensorFlow: 4 s and 450 MB that other hosts need not spend

                self._board = metric_writers.SummaryWriter(str(self._workdir / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row. Floats are written so that reading them gives the same bits back."""
        if self._file:
            row = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        if self._board:
            self._board.write_scalars(step, dict(values))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes uint8 [h, w, 3] to `pictures/{name}-{step}.png`."""
        if self._file:
            folder = self._workdir / "pictures"
            folder.mkdir(exist_ok=True)
            with (folder / f"{name}-{step:08d}.png").open("wb") as file:
                Image.fromarray(pixels).save(file, format="PNG")
        if self._board:
            self._board.write_images(step, {name: pixels[None]})

    def flush(self) -> None:
        """Waits until TensorBoard's events are on disk."""
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def read(workdir: epath.PathLike) -> dict[int, dict[str, float]]:
    """Returns {step: row} of a run's JSONL; rows that a kill cut short are left out."""
    rows: dict[int, dict[str, float]] = {}
    for row in jsonl.read(epath.Path(workdir) / JSONL):
        step = row.pop("step")
        rows.setdefault(step, {}).update({name: float(value) for name, value in row.items()})
    return dict(sorted(rows.items()))


def average(window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean of each metric over several steps; a pair (sum, count) is weighted by its counts.

    A weighted metric without any count in the window is left out.
    """
    means = {}
    for name in window[-1]:
        values = [np.asarray(step[name], np.float64) for step in window]
        if values[0].ndim == 0:
            means[name] = float(np.mean(values))
        else:
            total, count = np.sum(values, 0)
            if count:
                means[name] = float(total / count)
    return means


class Progress:
    """Shows how far a run is: a live line on a terminal, one line per report in a log file."""

    def __init__(
        self, name: str, *, start: int, total: int, examples_per_step: int, stream: io.TextIOBase | None = None
    ):
        self._stream: Any = stream or sys.stderr
        self._name, self._total, self._start = name, total, start
        self._examples = examples_per_step
        self._last = (time.monotonic(), start)
        self._live = jax.process_index() == 0 and self._stream.isatty()

    def restart_clock(self) -> None:
        """Begins the rate's window anew, after a compilation or an evaluation."""
        self._last = (time.monotonic(), self._last[1])

    def report(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Shows a report and returns the rates: steps and examples per second, per device, seconds left."""
        now = time.monotonic()
        then, before = self._last
        self._last = (now, step)
        rate = (step - before) / max(now - then, 1e-9)
        left = (self._total - step) / rate if rate else math.inf
        rates = {
            "steps_per_second": rate,
            "examples_per_second_per_device": rate * self._examples / jax.device_count(),
            "seconds_left": left,
        }
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        percent = 100 * step / max(self._total, 1)
        line = (
            f"{self._name} {step}/{self._total} ({percent:.0f}%)  {shown}  "
            f"{rate * self._examples:.4g} examples/s  {_clock(left)} left"
        )
        if self._live:
            self._stream.write(f"\r\033[K{line}")
            self._stream.flush()
        elif jax.process_index() == 0:
            _LOG.info("%s", line)
        return rates

    def close(self) -> None:
        """Ends the live line."""
        if self._live:
            self._stream.write("\n")


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
