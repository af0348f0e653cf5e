"""Work in fixed units, each a file: what many processes make in any order, killed at any time, and one puts together.

A folder holds the rows of one manifest:

    job.json            the manifest; written first
    units/00000.npz     arrays of rows [0, U), [U, 2U) and so on, and the numbers of these rows
    units/00000.json    the run that it belongs to, SHA-256 and length of that file, and rows that are bad, with why

What a unit holds is a function of the manifest, so it is the same whoever makes it. Every file appears by one rename.
A unit whose file does not match its report is made anew; one of another run is an error.
"""

import io
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from unclip_jax.data import sealed
from unclip_jax.data.embeddings import differences
from unclip_jax.errors import InputError

_LOG = logging.getLogger(__name__)
JOB, UNITS = "job.json", "units"
_ROWS = "row"


def run_id(manifest: Mapping[str, Any]) -> str:
    """Returns the digest of a manifest, which is its run's id: 16 hexadecimal digits."""
    return sealed.sealed(json.loads(json.dumps(manifest)))["seal"][:16]


def claim(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest, or checks that the one there is the same.

    Raises:
      InputError: it is another; the fields that differ are named.
    """
    wanted = json.loads(json.dumps(manifest))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and (strange := [entry.name for entry in path.parent.iterdir() if _is_strange(entry)]):
            raise InputError(f"{path.parent} holds {strange[0]} and no run of this program; choose another --workdir")
        there = sealed.read(path)
        if there is None:
            sealed.write(path, sealed.sealed(wanted))
            return
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written: {error}; choose another --workdir") from error
    wrong = differences(there, wanted)
    if wrong:
        said = "; ".join(f"{key} was {_short(old)}, is {_short(new)}" for key, (old, new) in wrong.items())
        raise InputError(f"{path.parent} belongs to another run ({said}); choose another --workdir")


def _is_strange(entry: pathlib.Path) -> bool:
    return ".partial-" not in entry.name and entry.name not in (UNITS, "reference", "failures", "points")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


class Units:
    """The units of one manifest, in one folder."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any], *, rows: int, unit_rows: int):
        """Names them; nothing is written before `begin`."""
        self.folder, self.manifest, self.id = folder, manifest, run_id(manifest)
        self._rows, self._unit_rows = rows, unit_rows

    def __len__(self) -> int:
        return -(-self._rows // self._unit_rows)

    def rows_of(self, number: int) -> range:
        """Returns the numbers of a unit's rows."""
        return range(number * self._unit_rows, min((number + 1) * self._unit_rows, self._rows))

    def begin(self) -> None:
        """Claims the folder; raises InputError where it holds something else."""
        claim(self.folder / JOB, self.manifest)
        (self.folder / UNITS).mkdir(exist_ok=True)

    def _path(self, number: int, kind: str) -> pathlib.Path:
        return self.folder / UNITS / f"{number:05d}.{kind}"

    def report(self, number: int) -> dict[str, Any] | None:
        """Returns what was said of a unit when it was written; None where there is none.

        Raises:
          InputError: it is of another run.
        """
        found = sealed.read(self._path(number, "json"))
        if found is not None and found["run"] != self.id:
            raise InputError(
                f"{self._path(number, 'json')} is a unit of run {found['run']}, and this is run {self.id}; move it away"
            )
        return found

    def is_whole(self, number: int) -> bool:
        """Whether a unit is there, bit for bit as it was written; says so in the log where it is damaged."""
        found = self.report(number)
        if found is None:
            return False
        try:
            data = self._path(number, "npz").read_bytes()
        except OSError:
            data = b""
        if sealed.digest(data) == found["digest"]:
            return True
        _LOG.warning(
            "%s is damaged (%d bytes of %d) and is made anew", self._path(number, "npz"), len(data), found["bytes"]
        )
        self._path(number, "json").unlink(missing_ok=True)
        return False

    def missing(self) -> list[int]:
        """Returns the numbers of units that are not there whole."""
        return [number for number in range(len(self)) if not self.is_whole(number)]

    def write(
        self,
        number: int,
        arrays: Mapping[str, np.ndarray],
        bad: Mapping[int, str] | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a unit: its arrays first, then what says that they are whole.

        Args:
          number: of the unit.
          arrays: name -> array, whose first axis are the unit's rows.
          bad: row -> why it is bad.
          cost: what it took, such as seconds; no part of what the unit is.

        Raises:
          InputError: somebody else wrote the same unit with other content, or the disk cannot be written.
        """
        rows = np.array(self.rows_of(number), np.int64)
        wrong = {name: x.shape for name, x in arrays.items() if x.shape[:1] != rows.shape}
        assert not wrong, wrong
        data = _packed({_ROWS: rows, **arrays})
        digest = sealed.digest(data)
        before = self.report(number)
        if before is not None and before["digest"] != digest and self.is_whole(number):
            raise InputError(
                f"{self._path(number, 'npz')} was made twice and came out differently: these machines do not compute "
                "alike; let machines of one kind do all of a run"
            )
        said = {"run": self.id, "digest": digest, "bytes": len(data), "cost": dict(cost or {})}
        said["bad"] = {str(row): why for row, why in sorted((bad or {}).items())}
        try:
            with sealed.Replacing(self._path(number, "npz")) as file:
                file.write(data)
            sealed.write(self._path(number, "json"), sealed.sealed(said))
        except OSError as error:
            raise InputError(f"{self.folder / UNITS} cannot be written: {error}") from error

    def read(self, number: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns arrays of a unit by name.

        Raises:
          InputError: it is not there, or not as it was written.
        """
        found, path = self.report(number), self._path(number, "npz")
        data = path.read_bytes() if path.exists() else b""
        if found is None or sealed.digest(data) != found["digest"]:
            raise InputError(f"{path} is missing or damaged; the same command makes it anew")
        with np.load(io.BytesIO(data)) as arrays:
            return {name: arrays[name] for name in (_ROWS, *names)}

    def each(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Yields the arrays of every unit in order, once it has proven that every row is there exactly once.

        Raises:
          InputError: a row is missing, there twice, or none of this run's.
        """
        seen = np.zeros(self._rows, np.int64)
        for number in range(len(self)):
            rows = self.read(number, ())[_ROWS]
            foreign = rows[(rows < 0) | (rows >= self._rows)]
            if foreign.size:
                raise InputError(f"{self._path(number, 'npz')} holds row {foreign[0]}, which this run has not")
            np.add.at(seen, rows, 1)
        for row in np.flatnonzero(seen != 1)[:1].tolist():
            how = "is missing" if not seen[row] else f"is there {seen[row]} times"
            raise InputError(f"row {row} of {self._rows} {how} in {self.folder / UNITS}; nothing is reduced over it")
        for number in range(len(self)):
            yield self.read(number, names)

    def gathered(self, *names: str) -> dict[str, np.ndarray]:
        """Returns arrays of all rows in their order; raises as `each`."""
        whole: dict[str, np.ndarray] = {}
        for arrays in self.each(names):
            for name in names:
                values = arrays[name]
                if name not in whole:
                    whole[name] = np.empty((self._rows, *values.shape[1:]), values.dtype)
                whole[name][arrays[_ROWS]] = values
        return whole

    def reports(self) -> list[dict[str, Any]]:
        """Returns what was said of the units that are there, in order."""
        return [report for number in range(len(self)) if (report := self.report(number)) is not None]

    def bad(self) -> dict[int, str]:
        """Returns row -> why, of all bad rows."""
        return {int(row): why for report in self.reports() for row, why in report["bad"].items()}

    def cost(self) -> dict[str, float]:
        """Returns what all units took, added up."""
        total: dict[str, float] = {}
        for report in self.reports():
            for name, value in report["cost"].items():
                total[name] = total.get(name, 0.0) + value
        return total


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns an npz file; the same bytes for the same arrays, for it holds no time."""
    buffer, save = io.BytesIO(), cast(Any, np.savez)
    save(buffer, **arrays)
    return buffer.getvalue()
