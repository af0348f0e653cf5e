"""Where a run's time goes, written as it passes and summed over all of its starts, kills included.

`Recorder` keeps one clock: at every moment the process is doing one kind of thing, so the seconds of its rows add up to
its wall clock. Rows are sums over windows, not over steps; they are appended to `workdir/goodput.jsonl` (host h > 0:
`goodput-h.jsonl`) when the loop reports, when something long begins, and every half a minute by a thread, so that a
kill takes no more than that with it:

    {"run": 2, "host": 0, "began": "2026-11-21T18:48:49.12+00:00", "seconds": 4.1, "kind": "step", "steps": [40, 50]}

`run` counts the starts of the program in this workdir, `steps` are (from, to]: 41 to 50 were done. Within a window the
kinds are laid end to end: their sums are right, their order is not kept.

**What "step" means.** A step is given to the device and runs while the host goes on, at most one step ahead; to wait
for the device at each would cost what this is to find. So "step" is the loop's time that is nothing else: over a
window, the device's time to within one step. For the same reason waiting for data costs nothing while the device still
computes. A thread waits for the steps in the loop's place and notes when the device ran dry; only what `next(batches)`
takes after that is "data". "compile" is the first call of the train step; other programs compile within "init",
"evaluation" or "save". "save" is what the loop waits for, not what goes on in the background.
"""

import contextlib
import datetime
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from unclip_jax import hosts, jsonl, programs

_LOG = logging.getLogger(__name__)
# What a process can be doing. "idle", "redone" and "other" are found afterwards, by `goodput_sums`.
INIT, RESTORE, COMPILE, DATA, STEP, SAVE, EVALUATION = (
    "init", "restore", "compile", "data", "step", "save", "evaluation"
)  # fmt: skip
KINDS = (INIT, RESTORE, COMPILE, DATA, STEP, SAVE, EVALUATION)
START, END = "start", "end"  # rows without a duration: what began, and the last words
HEARTBEAT_SECONDS = 30.0
WINDOW_SECONDS = 0.5  # no rows more often than this
_IMPORTED = time.monotonic()


def path_of(workdir: epath.PathLike, host: int) -> epath.Path:
    """Returns where a host writes its rows."""
    return epath.Path(workdir) / (f"goodput-{host}.jsonl" if host else "goodput.jsonl")


def process_began() -> float:
    """Returns `time.monotonic()` of this process's beginning, where Linux tells it; else of this module's import."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22, since boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    began = time.monotonic() - age
    # A sandbox may tell nonsense; importing this package takes seconds, not an hour.
    return began if ticks and _IMPORTED - 3600 < began <= _IMPORTED else _IMPORTED


class Recorder:
    """The clock of one process. Safe to use before `open`; nothing that goes wrong with its file ends a run."""

    def __init__(self, *, since: float | None = None, heartbeat_seconds: float = HEARTBEAT_SECONDS):
        """Begins to count, as "init", from `since` (of `time.monotonic`), by default from now."""
        now = time.monotonic()
        self._clock = time.time() - now  # one offset for the whole run: a clock that is set does not bend durations
        self._window = self._mark = now if since is None else since
        self._kind = INIT
        self._sums: dict[str, float] = {}
        self._from: int | None = None  # until it is known where the run begins
        self._step = 0
        self._path: epath.Path | None = None
        self._total_steps: int | None = None
        self._lock = threading.RLock()
        self._heartbeat = heartbeat_seconds
        self._stop = threading.Event()
        self._given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._unfinished = 0
        self._ran_dry = self._mark
        self._threads: list[threading.Thread] = []

    def open(self, workdir: epath.PathLike, **facts: Any) -> None:
        """Begins this start's rows in the workdir, which exists.

        Args:
          workdir: of the run.
          **facts: what a reader may want to know of this start, JSON: `total_steps`, `devices`, `changed`, ….
        """
        self._host = jax.process_index()
        path = path_of(workdir, self._host)
        try:
            jsonl.mend(path)
            before = [row["run"] for row in jsonl.read(path) if isinstance(row.get("run"), int)]
        except OSError as error:
            _LOG.warning("%s cannot be read, so this run's time is not recorded: %s", path, error)
            return
        self._run = max(before, default=0) + 1
        self._total_steps = facts.get("total_steps")
        self._path = path
        self._append([{**self._row(START, self._window, 0.0), **facts}])
        self.flush()

    def _row(self, kind: str, began: float, seconds: float) -> dict[str, Any]:
        utc = datetime.datetime.fromtimestamp(began + self._clock, datetime.UTC).isoformat(timespec="microseconds")
        row = {"run": self._run, "host": self._host, "began": utc, "seconds": round(seconds, 6), "kind": kind}
        return row if self._from is None else {**row, "steps": [self._from, self._step]}

    def _append(self, rows: list[dict[str, Any]]) -> None:
        try:
            jsonl.append(self._path, rows)
        except OSError as error:  # a full disk ends a run where it matters, at a checkpoint
            _LOG.warning("%s cannot be written: %s", self._path, error)

    def _fold(self) -> None:
        """Adds the time since the last mark to the kind of thing that is being done."""
        now = time.monotonic()
        seconds, kind = now - self._mark, self._kind
        if kind == DATA:  # waiting beside a busy device costs nothing
            starved = 0.0 if self._unfinished else now - max(self._mark, min(self._ran_dry, now))
            self._sums[STEP] = self._sums.get(STEP, 0.0) + seconds - starved
            seconds = starved
        self._sums[kind] = self._sums.get(kind, 0.0) + seconds
        self._mark = now

    @contextlib.contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Counts its body as `kind`, and not as what is around it."""
        with self._lock:
            if kind not in (DATA, STEP):
                self.flush(after=WINDOW_SECONDS)  # what begins may take long and end in a kill
            self._fold()
            outer, self._kind = self._kind, kind
        try:
            yield
        finally:
            with self._lock:
                self._fold()
                self._kind = outer

    def at(self, step: int) -> None:
        """Says where the run begins, after restoring: what earlier starts did beyond it is lost."""
        with self._lock:
            self.flush()
            self._from = self._step = step

    def given(self, step: int, output: Any) -> None:
        """Says that the device was given this step; `output.block_until_ready()` waits for it, and is not donated."""
        with self._lock:
            if self._kind == INIT:  # from the first step on, what is nothing else is the loop's own time
                self._fold()
                self._kind = STEP
            self._step = step
            if self._threads:
                self._unfinished += 1
        if self._threads:
            self._given.put(output)

    def report(self) -> None:
        """Writes what has passed, unless there was a row just now: for the loop, where it reports."""
        self.flush(after=WINDOW_SECONDS)

    def flush(self, *, after: float = 0.0) -> None:
        """Writes what has passed since the last rows, if that is at least `after` seconds."""
        with self._lock:
            if self._path is None or time.monotonic() - self._window < after:
                return
            self._fold()
            rows, began = [], self._window
            for kind, seconds in self._sums.items():
                if seconds > 0:
                    rows.append(self._row(kind, began, seconds))
                    began += seconds
            self._append(rows)
            self._sums, self._window = {}, self._mark
            if self._from is not None:
                self._from = self._step

    def __enter__(self) -> "Recorder":
        """Starts the threads: one that writes every few seconds, one that waits for the device."""
        for target in (self._beat, self._watch):
            thread = threading.Thread(target=target, name=f"goodput{target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        hosts.before_leaving(self._leave)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Writes the last words: done, stopped, or what went wrong."""
        self._stop.set()
        self._given.put(None)
        self._threads[0].join()
        self._threads = []
        how = "done" if self._total_steps and self._step >= self._total_steps else "stopped"
        if error is not None and not isinstance(error, SystemExit):
            how = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with self._lock:
            self._end(how)

    def _leave(self, status: int) -> None:
        """Writes the last words of a process that ends without coming back here."""
        if self._lock.acquire(timeout=1.0):  # who has it may hang, in a write
            try:
                self._end("stopped" if status == programs.REQUEUE else f"exit code {status}")
            finally:
                self._lock.release()

    def _end(self, how: str) -> None:
        self.flush()
        if self._path is not None:
            self._append([{**self._row(END, self._mark, 0.0), "how": how}])
            self._path = None  # nothing comes after it

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat / 2):
            self.flush(after=self._heartbeat / 2)

    def _watch(self) -> None:
        while (output := self._given.get()) is not None:
            with contextlib.suppress(RuntimeError):  # a step that fails: the loop meets the same error
                output.block_until_ready()
            with self._lock:
                self._unfinished -= 1
                self._ran_dry = time.monotonic()
