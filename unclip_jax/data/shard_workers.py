"""Writes the units of an `image_text` data set in worker processes, and shows how far they are."""

import concurrent.futures
import concurrent.futures.process
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from multiprocessing.sharedctypes import Synchronized

import rich.console
import rich.progress

from unclip_jax.data import image_text
from unclip_jax.data.image_text import Settings, UnitReport
from unclip_jax.data.records import Unit
from unclip_jax.errors import InputError

LOG_SECONDS = 30.0
# Set in each worker by the pool: how many examples all workers have done.
_counter: "Synchronized[int] | None" = None


def write_units(
    units: list[Unit], settings: Settings, *, directory: str, workers: int
) -> Generator[UnitReport, None, None]:
    """Yields the report of every unit, in order; those finished earlier are read, the others written."""
    reports = {unit.index: report for unit in units if (report := image_text.read_report(directory, unit))}
    missing = [unit for unit in units if unit.index not in reports]
    progress = _Progress(len(units), len(reports))
    try:
        if workers == 1 or len(missing) < 2:
            yield from _write_here(units, reports, settings, directory=directory, progress=progress)
        else:
            workers = min(workers, len(missing))
            yield from _write_in_pool(units, reports, settings, directory=directory, workers=workers, progress=progress)
    finally:
        progress.close()


def _write_here(
    units: list[Unit], reports: dict[int, UnitReport], settings: Settings, *, directory: str, progress: "_Progress"
) -> Generator[UnitReport, None, None]:
    def count_example() -> None:
        progress.show(examples=progress.examples + 1, done=len(reports))

    for unit in units:
        if unit.index not in reports:
            reports[unit.index] = image_text.write_unit(unit, settings, directory=directory, on_example=count_example)
        yield reports[unit.index]


def _write_in_pool(
    units: list[Unit],
    reports: dict[int, UnitReport],
    settings: Settings,
    *,
    directory: str,
    workers: int,
    progress: "_Progress",
) -> Generator[UnitReport, None, None]:
    # Spawned, not forked: a fork of a process with threads (ArrayRecord's) can deadlock.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    others = set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        futures = {
            pool.submit(_work, unit, settings, directory): unit.index for unit in units if unit.index not in reports
        }
        try:
            for unit in units:
                while unit.index not in reports:
                    for future in concurrent.futures.wait(futures, 0.5, concurrent.futures.FIRST_COMPLETED).done:
                        reports[futures.pop(future)] = future.result()
                    progress.show(examples=counter.value, done=len(reports))
                yield reports[unit.index]
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                "a worker was killed, perhaps for want of memory; the same command with fewer --workers goes on"
            ) from None
        finally:
            if futures:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()


def _start_worker(counter: "Synchronized[int]") -> None:
    global _counter
    _counter = counter
    # Ctrl-C reaches the whole process group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Ends the worker when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit, settings: Settings, directory: str) -> UnitReport:
    return image_text.write_unit(unit, settings, directory=directory, on_example=_count_example)


def _count_example() -> None:
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += 1


class _Progress:
    """A bar on a terminal, a line every `LOG_SECONDS` in a log file; on stderr."""

    def __init__(self, total: int, done: int):
        self.total, self.first, self.examples = total, done, 0
        self.start = self.shown = time.monotonic()
        self.bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            self.bar = rich.progress.Progress(
                *rich.progress.Progress.get_default_columns(), console=rich.console.Console(stderr=True)
            )
            self.task = self.bar.add_task("shards", total=total, completed=done)
            self.bar.start()

    def show(self, *, examples: int, done: int) -> None:
        """Shows how many examples were made since the start and how many shards are done in all."""
        self.examples, now = examples, time.monotonic()
        rate = self.examples / max(now - self.start, 1e-9)
        if self.bar is not None:
            text = f"{done} of {self.total} shards, {self.examples} examples, {rate:.0f}/s"
            self.bar.update(self.task, completed=done, description=text)
        elif now - self.shown > LOG_SECONDS:
            self.shown = now
            made = done - self.first
            left = (self.total - done) * (now - self.start) / made / 60 if made else math.nan
            print(
                f"prepare: {done} of {self.total} shards, {self.examples} examples, {rate:.0f} per second"
                + (f", {left:.0f} min left" if made else ""),
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
