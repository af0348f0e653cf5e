"""Sums what `goodput.Recorder` wrote: which share of the wall clock, from the first start to the end, made progress.

Goodput is the time of steps that were kept over all of the time; everything else is badput, by what it was. Three kinds
are found here, from all starts together:

- "redone": steps behind which a later start began again. A start that begins at step b takes back every step after b
  that an earlier one did; of a row that spans b, the share of its steps. A step that a kill cut short is redone, too.
- "idle": from a start's last row to the next start's beginning. A kill's last seconds, which nobody wrote, are here.
- "other": what no row tells, and kinds that this version does not know.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from unclip_jax import goodput, jsonl

REDONE, IDLE, OTHER = "redone", "idle", "other"
# In the order of tables and pictures. STEP holds kept steps only.
BUCKETS = (
    goodput.STEP, goodput.DATA, goodput.SAVE, goodput.EVALUATION, goodput.COMPILE, goodput.INIT, goodput.RESTORE,
    REDONE, IDLE, OTHER,
)  # fmt: skip


class Piece(NamedTuple):
    """A stretch of the wall clock that went to one bucket: Unix time and length in seconds."""

    began: float
    seconds: float
    bucket: str


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of the program in the workdir.

    Attributes:
      number: 1 for the first.
      began: Unix time.
      ended: Unix time of its last sign of life.
      steps: (from, to] that it did, None where it did not get as far.
      how: its last words, None if it was killed or still runs.
      facts: what it told of itself: devices, parameters, changes to the config.
    """

    number: int
    began: float
    ended: float
    steps: tuple[int, int] | None
    how: str | None
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Where all the time went; `seconds` has every bucket, and they add up to `total`."""

    starts: Sequence[Start]
    pieces: Sequence[Piece]
    seconds: Mapping[str, float]
    steps_redone: int

    @property
    def began(self) -> float:
        """Unix time of the first start."""
        return min(start.began for start in self.starts)

    @property
    def ended(self) -> float:
        """Unix time of the last sign of life."""
        return max(start.ended for start in self.starts)

    @property
    def total(self) -> float:
        """Seconds from the first start to the last sign of life."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of steps that were kept, in [0, 1]."""
        return self.seconds[goodput.STEP] / self.total if self.total else 0.0


class _Row(NamedTuple):
    run: int
    began: float
    seconds: float
    kind: str
    steps: tuple[int, int] | None
    rest: Mapping[str, Any]


def _parsed(row: Mapping[str, Any]) -> _Row | None:
    """Returns a row as numbers, None if it is not one of ours."""
    rest = dict(row)
    try:
        began = datetime.datetime.fromisoformat(rest.pop("began")).timestamp()
        run, seconds, kind = int(rest.pop("run")), float(rest.pop("seconds")), str(rest.pop("kind"))
        steps = rest.pop("steps", None)
        between = None if steps is None else (int(steps[0]), int(steps[1]))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return _Row(run, began, seconds, kind, between, rest) if math.isfinite(seconds) and seconds >= 0 else None


def _start(number: int, rows: Sequence[_Row]) -> Start:
    ranges = [row.steps for row in rows if row.steps]
    facts: dict[str, Any] = {}
    how = None
    for row in rows:
        if row.kind == goodput.START:
            facts |= row.rest
        if row.kind == goodput.END:
            how = str(row.rest.get("how", ""))
    return Start(
        number=number,
        began=min(row.began for row in rows),
        ended=max(row.began + row.seconds for row in rows),
        steps=(min(first for first, _ in ranges), max(last for _, last in ranges)) if ranges else None,
        how=how,
        facts=facts,
    )


def sum_up(rows: Iterable[Mapping[str, Any]]) -> Sums | None:
    """Returns the sums over the rows of one host, None where there are none."""
    by_run: dict[int, list[_Row]] = {}
    for parsed in map(_parsed, rows):
        if parsed:
            by_run.setdefault(parsed.run, []).append(parsed)
    if not by_run:
        return None
    starts = [_start(number, by_run[number]) for number in sorted(by_run)]
    pieces: list[Piece] = []
    redone = 0
    for i, start in enumerate(starts):
        kept_until = min((later.steps[0] for later in starts[i + 1 :] if later.steps), default=None)
        for row in by_run[start.number]:
            pieces += _pieces(row, start, kept_until, last=i + 1 == len(starts))
        if start.steps and kept_until is not None:
            redone += max(0, start.steps[1] - max(kept_until, start.steps[0]))
        if i:
            gap = start.began - max(earlier.ended for earlier in starts[:i])
            pieces += [Piece(start.began - gap, gap, IDLE)] if gap > 0 else []
    pieces.sort()
    seconds = dict.fromkeys(BUCKETS, 0.0)
    for piece in pieces:
        seconds[piece.bucket] += piece.seconds
    wall = max(start.ended for start in starts) - min(start.began for start in starts)
    seconds[OTHER] += max(0.0, wall - sum(seconds.values()))
    return Sums(starts, pieces, seconds, redone)


def _pieces(row: _Row, start: Start, kept_until: int | None, *, last: bool) -> list[Piece]:
    """Returns where a row's seconds went; those of steps are kept up to `kept_until`, None if nobody came back."""
    if row.kind in (goodput.START, goodput.END):
        return []
    if row.kind != goodput.STEP:
        return [Piece(row.began, row.seconds, row.kind if row.kind in goodput.KINDS else OTHER)]
    first, to = row.steps or (0, 0)
    if to == first:  # in the middle of a step, which its start may or may not have finished
        finished = start.steps is not None and first < start.steps[1]
        if not finished:
            return [Piece(row.began, row.seconds, OTHER if start.how else goodput.STEP if last else REDONE)]
        to = first + 1
    kept = to - first if kept_until is None else min(max(kept_until - first, 0), to - first)
    good = row.seconds * kept / (to - first)
    parts = [Piece(row.began, good, goodput.STEP), Piece(row.began + good, row.seconds - good, REDONE)]
    return [part for part in parts if part.seconds > 0]


def read(workdir: epath.PathLike) -> dict[int, Sums]:
    """Returns the sums of each host that wrote rows into a workdir."""
    found = {}
    for path in epath.Path(workdir).glob("goodput*.jsonl"):
        number = path.stem.removeprefix("goodput").removeprefix("-") or "0"
        sums = sum_up(jsonl.read(path)) if number.isdigit() else None
        if sums:
            found[int(number)] = sums
    return dict(sorted(found.items()))


def shares(sums: Sums, bins: int) -> list[dict[str, float]]:
    """Cuts the whole time into equal bins; returns for each the seconds of every bucket that is in it."""
    width = max(sums.ended - sums.began, 1e-9) / bins
    found: list[dict[str, float]] = [{} for _ in range(bins)]
    for piece in sums.pieces:
        at, end = piece.began - sums.began, piece.began - sums.began + piece.seconds
        while at < end:
            number = min(int(at / width), bins - 1)
            until = end if number == bins - 1 else min(end, (number + 1) * width)
            until = max(until, math.nextafter(at, math.inf))
            found[number][piece.bucket] = found[number].get(piece.bucket, 0.0) + until - at
            at = until
    return found
