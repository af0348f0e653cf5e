"""Several programs side by side: each on cores of its own, in order of need, with one display and one way to stop.

Small networks on a CPU gain little from a second thread, so two stages side by side train faster than one after the
other on all cores. A job starts when the jobs it needs are done and cores are free; the list's order decides.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from unclip_jax import programs
from unclip_jax.errors import InputError
from unclip_jax.stopping import Polled

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
_PLAIN_SECONDS = 20.0  # between two lines about a job in a log
_STOP_SECONDS = 180.0  # for children to save
# glibc gives large arrays back to the system after each step and asks for them again for the next: with huge pages and
# high thresholds a step of a small U-Net took 10 to 16% less CPU time. Other C libraries ignore it.
_MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8294967296"
_LOCK, _TIMES = ".lock", "times.json"
_ERROR_LINES = 12


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a job is: units done of total, and a few words."""

    done: int
    total: int
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
      name: shown, and the key of its time.
      command: program and arguments.
      log: file for its output, appended to.
      finished: whether there is nothing left to do.
      progress: how far it is.
      needs: names of jobs that must be done first.
    """

    name: str
    command: Sequence[str]
    log: pathlib.Path
    finished: Callable[[], bool]
    progress: Callable[[], Progress]
    needs: tuple[str, ...] = ()


def core_groups(cores: Sequence[int], *, most: int) -> list[tuple[int, ...]]:
    """Deals cores out to at most `most` groups of equal size; cores left over stay idle."""
    count = max(min(len(cores), most), 1)
    size = max(len(cores) // count, 1)
    return [tuple(cores[group * size : (group + 1) * size]) for group in range(count)]


def environment(group: Sequence[int] | None) -> dict[str, str]:
    """Returns the environment of a process on a group of cores; None leaves the threads to the libraries."""
    alone = {"UNCLIP_HOSTS": "one"}  # each job is a run of its own, whatever it was started beside
    result = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1", **alone}
    if group is not None and len(group) == 1:
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "multi_thread_eigen" not in flag]
        result["XLA_FLAGS"] = " ".join([*flags, "--xla_cpu_multi_thread_eigen=false"])
        result |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        result.setdefault("GLIBC_TUNABLES", _MALLOC)
    return result


@contextlib.contextmanager
def on_cores(group: Sequence[int] | None) -> Iterator[None]:
    """Binds this thread to some cores, which processes that are started meanwhile inherit; where the system can."""
    if group is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, group)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[int]:
    """Holds the workdir against a second run; yields a descriptor that children keep open, so they hold it as well.

    Raises:
      InputError: another run, or a process that it left behind, is at work there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / _LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another run is at work in {workdir}, or a process that it started; wait for it, or end it first"
            ) from error
        yield file.fileno()


class Times:
    """Seconds that each job has taken over all attempts, kept in times.json."""

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / _TIMES
        self.seconds: dict[str, float] = {}
        if self._path.exists():
            try:
                self.seconds = {name: float(value) for name, value in json.loads(self._path.read_text()).items()}
            except (ValueError, AttributeError):
                _LOG.warning("%s is damaged; times before now are lost", self._path)

    def add(self, name: str, seconds: float) -> None:
        """Adds to a job's time."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.seconds, indent=1) + "\n")
        temporary.replace(self._path)


@dataclasses.dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    group: int
    began: float


class Runner:
    """Runs jobs over groups of cores; `started` counts the processes that it has started."""

    def __init__(self, *, groups: Sequence[Sequence[int] | None], times: Times, lock: int, stop: Polled):
        self._groups, self._times, self._lock, self._stop = groups, times, lock, stop
        self._running: list[_Running] = []
        self.started = 0

    def run(self, jobs: Sequence[Job]) -> int:
        """Runs every job that is not finished; returns an exit code.

        Raises:
          InputError: a job failed; the others were stopped, and saved what they had.
        """
        done = {job.name for job in jobs if job.finished()}
        for name in (job.name for job in jobs if job.name in done):
            _LOG.info("%s is done already", name)
        waiting = [job for job in jobs if job.name not in done]
        display = _display(jobs, done, self._times)
        try:
            while waiting or self._running:
                if self._stop.poll():
                    return self._stopped()
                self._start_those_ready(waiting, done)
                for entry in [entry for entry in self._running if entry.process.poll() is not None]:
                    code = self._ended(entry)
                    if code == programs.REQUEUE:
                        return self._stopped()
                    if code != programs.DONE:
                        self._end_others()
                        raise InputError(_failure(entry.job, code))
                    done.add(entry.job.name)
                display.show({entry.job.name: time.monotonic() - entry.began for entry in self._running}, done)
                time.sleep(_POLL_SECONDS)
        finally:
            self._end_others()
            display.close()
        return programs.DONE

    def _start_those_ready(self, waiting: list[Job], done: set[str]) -> None:
        for group in range(len(self._groups)):
            if any(entry.group == group for entry in self._running):
                continue
            ready = next((job for job in waiting if done.issuperset(job.needs)), None)
            if ready is None:
                return
            waiting.remove(ready)
            self._running.append(self._start(ready, group))

    def _start(self, job: Job, group: int) -> _Running:
        self.started += 1
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        cores = self._groups[group]
        with on_cores(cores):
            # A session of its own: Ctrl-C reaches this program alone, which then asks each child once.
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(cores),
                start_new_session=True,
                pass_fds=(self._lock,),
            )
        return _Running(job, process, log, group, time.monotonic())

    def _ended(self, entry: _Running) -> int:
        self._running.remove(entry)
        entry.log.close()
        self._times.add(entry.job.name, time.monotonic() - entry.began)
        return entry.process.returncode

    def _stopped(self) -> int:
        _LOG.info("stopping; what was trained is saved, and the same command goes on from there")
        self._end_others()
        return programs.REQUEUE

    def _end_others(self) -> None:
        for entry in self._running:
            entry.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for entry in list(self._running):
            try:
                entry.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                _LOG.warning("%s did not stop within %.0f s and is killed", entry.job.name, _STOP_SECONDS)
                entry.process.kill()
                entry.process.wait()
            self._ended(entry)


def _failure(job: Job, code: int) -> str:
    """Says what failed, with the error's own sentence where it has one, else the end of its log."""
    lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines[-_ERROR_LINES:] if line.startswith("error: ")]
    tail = said[-1].removeprefix("error: ") if said else "\n    " + "\n    ".join(lines[-_ERROR_LINES:])
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return f"{job.name} {how}: {tail}\nIts log is {job.log}; the same command goes on from where it was."


def _display(jobs: Sequence[Job], done: set[str], times: Times) -> "_Plain | _Live":
    return _Live(jobs, done, times) if sys.stderr.isatty() else _Plain(jobs, done, times)


class _Plain:
    """Lines for a log: when a job starts, now and then how far it is, when it is done."""

    def __init__(self, jobs: Sequence[Job], done: set[str], times: Times):
        self._jobs, self._done, self._times = {job.name: job for job in jobs}, set(done), times
        self._said: dict[str, float] = {}

    def show(self, running: Mapping[str, float], done: set[str]) -> None:
        for name in done - self._done:
            _LOG.info("%s: done in %.1f s", name, self._times.seconds.get(name, 0.0))
        self._done |= done
        for name, seconds in running.items():
            if name not in self._said:
                _LOG.info("%s: started, log %s", name, self._jobs[name].log)
                self._said[name] = seconds
            elif seconds - self._said[name] >= _PLAIN_SECONDS:
                progress = self._jobs[name].progress()
                _LOG.info("%s: %d/%d  %s", name, progress.done, progress.total, progress.words)
                self._said[name] = seconds

    def close(self) -> None:
        """Nothing is left open."""


class _Live:
    """A table on a terminal, a row per job, redrawn in place."""

    def __init__(self, jobs: Sequence[Job], done: set[str], times: Times):
        import rich.console
        import rich.live

        self._jobs, self._times = jobs, times
        console = rich.console.Console(stderr=True)
        self._live = rich.live.Live(self._table({}, done), console=console, refresh_per_second=4)
        self._live.start()

    def _table(self, running: Mapping[str, float], done: set[str]) -> Any:
        import rich.progress_bar
        import rich.table

        table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("", "progress", "", "", "time"):
            table.add_column(heading)
        for job in self._jobs:
            progress = job.progress() if job.name in running else Progress(int(job.name in done), 1)
            seconds = running.get(job.name, 0.0) + self._times.seconds.get(job.name, 0.0)
            bar = rich.progress_bar.ProgressBar(total=max(progress.total, 1), completed=progress.done, width=28)
            words = {True: "done", False: "waits"}[job.name in done]
            count = f"{progress.done}/{progress.total}" if job.name in running else words
            table.add_row(job.name, bar, count, progress.words, f"{seconds:.0f} s" if seconds else "")
        return table

    def show(self, running: Mapping[str, float], done: set[str]) -> None:
        self._live.update(self._table(running, done))

    def close(self) -> None:
        self._live.stop()
