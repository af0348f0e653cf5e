"""CLIP's embeddings of a data set, made once and kept in files: how they are written, trusted and read.

A folder holds those of one split:

    job.json            what is embedded, by which CLIP, and how; written first
    units/00000.npy     rows of examples [0, U), [U, 2U) and so on, a structured array in NumPy's format
    units/00000.json    the digest of that file, and which examples have no embedding; a unit with it is whole
    embeddings.json     the job and what was written of every unit; written last

A row holds `z_i`, `z_t` and, where pictures may be mirrored, `z_i_mirrored`, all as CLIP's heads return them, not
scaled to length 1, and a CRC-32 of itself. Every file appears by one rename, and what it holds is a function of the
job, so any number of processes may write, be killed and begin again.
"""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int64

from unclip_jax.data import sealed
from unclip_jax.errors import InputError, nearest

FIELDS = ("z_i", "z_t")
MIRRORED = "z_i_mirrored"
# What a number is kept as, and the type of NumPy that holds its bits in a file: NumPy's format knows no bfloat16.
STORAGES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
_FORMAT = 1
JOB, WHOLE, UNITS = "job.json", "embeddings.json", "units"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that the content of the files depends on.

    Attributes:
      data: fingerprint of the split, as `datasets.fingerprint` returns it.
      clip: fingerprint of CLIP's weights.
      network: the section of a config that describes that CLIP.
      tokenizer: digest of the tokenizer that z_t's captions went through.
      width: numbers of an embedding.
      unit: examples of a unit; the last may have fewer.
      storage: a key of STORAGES.
      mirrored: whether the mirrored pictures are embedded, too.
      backend: "cpu", "gpu" or "tpu", whose float32 products differ.
      resize: filter that made the pictures that CLIP saw.
    """

    data: Mapping[str, Any]
    clip: str
    network: Mapping[str, Any]
    tokenizer: str
    width: int
    unit: int
    storage: str
    mirrored: bool
    backend: str
    resize: str = "area"

    def __post_init__(self):
        if self.storage not in STORAGES:
            raise InputError(f"no storage {self.storage!r}; {nearest(self.storage, STORAGES)}")

    @property
    def count(self) -> int:
        """Examples of the split."""
        return int(self.data["examples"])

    @property
    def names(self) -> tuple[str, ...]:
        """Vectors of a row."""
        return (*FIELDS, *((MIRRORED,) if self.mirrored else ()))

    @property
    def row(self) -> np.dtype:
        """Layout of a row; its last number is the checksum of the bytes before it."""
        vectors = [(name, STORAGES[self.storage], (self.width,)) for name in self.names]
        return np.dtype([*vectors, ("crc", "<u4")])

    def units(self) -> int:
        """How many units there are."""
        return -(-self.count // self.unit)

    def examples_of(self, unit: int) -> range:
        """Indices in the split of a unit's examples."""
        return range(unit * self.unit, min((unit + 1) * self.unit, self.count))

    def as_json(self) -> dict[str, Any]:
        """Returns the job as it stands in files."""
        return json.loads(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}))

    @property
    def seal(self) -> str:
        """What tells this job from others, in the reports of its units."""
        return sealed.sealed(self.as_json())["seal"][:16]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Job":
        """Returns the job that `as_json` wrote; raises InputError where it is of another format."""
        fields = {name: value[name] for name in value if name != "format"}
        if value.get("format") != _FORMAT or set(fields) != {field.name for field in dataclasses.fields(cls)}:
            raise InputError(f"it is of format {value.get('format')!r}, and this program reads {_FORMAT}")
        return cls(**fields)


@runtime_checkable
class Embeddings(Protocol):
    """Embeddings by example index; `Stored` of one data set, `Joined` of a mixture."""

    def __len__(self) -> int: ...

    def problem(self, index: int) -> str:
        """Why an example has no embedding; "" where it has one."""

    def rows(
        self, name: str, indices: Int64[np.ndarray, " n"], mirrored: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n d"]:
        """z_i or z_t of some examples, float32; z_i of the mirrored picture where `mirrored`."""


class Stored:
    """The embeddings of a data set, or of a slice of it, read from their files as they are asked for."""

    def __init__(self, folder: str):
        """Opens a finished folder; no row is read yet.

        Raises:
          InputError: the folder is not there, unfinished or damaged.
        """
        root = pathlib.Path(folder)
        whole = sealed.read(root / WHOLE)
        if whole is None:
            raise InputError(_why_not(root))
        self.folder, self.job = folder, Job.from_json(whole["job"])
        self.fingerprint = sealed.sealed(whole)["seal"][:16]
        self._first, self._count = 0, self.job.count
        self._bad = {int(index): reason for unit in whole["units"] for index, reason in unit["bad"].items()}
        self._sizes = [unit["bytes"] for unit in whole["units"]]
        self._tables: dict[int, np.ndarray] = {}
        self._check_sizes()

    def _check_sizes(self) -> None:
        units = pathlib.Path(self.folder) / UNITS
        there = {entry.name: entry.stat().st_size for entry in os.scandir(units)} if units.is_dir() else {}
        for number in range(self.job.units()):
            if there.get(f"{number:05d}.npy") != self._sizes[number]:
                raise InputError(f"{units / f'{number:05d}.npy'} is missing or cut short")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}  # another process maps the files itself

    def sliced(self, first: int, count: int) -> "Stored":
        """Those of `count` examples from the first-th on, numbered from 0."""
        part = object.__new__(Stored)
        part.__dict__.update(self.__dict__, _first=self._first + first, _count=count)
        return part

    def __len__(self) -> int:
        return self._count

    def problem(self, index: int) -> str:
        return self._bad.get(self._first + index, "")

    def rows(
        self, name: str, indices: Int64[np.ndarray, " n"], mirrored: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n d"]:
        made = np.empty((len(indices), self.job.width), np.float32)
        for place, (index, turned) in enumerate(zip(indices.tolist(), mirrored.tolist(), strict=True)):
            column = MIRRORED if turned and name == "z_i" else name
            made[place] = self._row(self._first + index)[column].view(kind_of(self.job.storage))
        return made

    def _row(self, index: int) -> Any:
        number, place = divmod(index, self.job.unit)
        if number not in self._tables:
            self._tables[number] = self._mapped(number)
        row = self._tables[number][place]
        if zlib.crc32(row.tobytes()[:-4]) != row["crc"]:
            raise InputError(
                f"the embeddings of example {index} in {self._path(number)} are damaged; the command that made them "
                "makes that file anew"
            )
        return row

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, UNITS, f"{number:05d}.npy")

    def _mapped(self, number: int) -> np.ndarray:
        """Maps a unit's rows; its header is passed over, for the report says how long the file is."""
        rows = len(self.job.examples_of(number))
        offset = self._sizes[number] - rows * self.job.row.itemsize
        try:
            return np.memmap(self._path(number), self.job.row, "r", offset, (rows,))
        except (OSError, ValueError) as error:
            raise InputError(f"{self._path(number)} cannot be read: {error}") from error


class Joined:
    """The embeddings of several data sets, laid end to end as `sources.Mixture` lays their examples."""

    def __init__(self, parts: Sequence[Embeddings]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[Embeddings, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - (int(self._ends[number - 1]) if number else 0)

    def problem(self, index: int) -> str:
        part, place = self._place(index)
        return part.problem(place)

    def rows(
        self, name: str, indices: Int64[np.ndarray, " n"], mirrored: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n d"]:
        made = []
        for row, index in enumerate(indices.tolist()):
            part, place = self._place(index)
            made.append(part.rows(name, np.array([place]), mirrored[row : row + 1]))
        return np.concatenate(made) if made else self._parts[0].rows(name, indices, mirrored)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (there, here)} of what two jobs, as JSON, do not have in common; that of sections by their keys."""
    apart: dict[str, tuple[Any, Any]] = {}
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            apart |= {f"{key}.{inner}": pair for inner, pair in differences(old, new).items()}
        elif old != new:
            apart[key] = (old, new)
    return apart


def named(wrong: Mapping[str, tuple[Any, Any]]) -> str:
    """Says what `differences` found."""
    return ", ".join(f"{key} ({old!r} there, {new!r} here)" for key, (old, new) in wrong.items())


def kind_of(storage: str) -> np.dtype:
    """Returns the type of NumPy, or of ml_dtypes, that a storage's numbers have."""
    return np.dtype(ml_dtypes.bfloat16 if storage == "bfloat16" else STORAGES[storage])


def missing_units(folder: str, job: Job) -> int:
    """How many units have no report."""
    return sum(report(folder, job, number, verify=False) is None for number in range(job.units()))


def report(folder: str, job: Job, number: int, *, verify: bool) -> dict[str, Any] | None:
    """Returns what was said of a unit when it was written; None where there is none of this job.

    With `verify` also where any bit of the unit has changed since then.
    """
    root = pathlib.Path(folder) / UNITS
    found = sealed.read(root / f"{number:05d}.json")
    rows = root / f"{number:05d}.npy"
    if found is None or found["job"] != job.seal or not rows.exists():
        return None
    if verify and sealed.digest(rows.read_bytes()) != found["digest"]:
        return None
    return found


def _why_not(root: pathlib.Path) -> str:
    begun = sealed.read(root / JOB)
    if begun is None:
        return f"{root} holds no embeddings"
    if (root / WHOLE).exists():
        return f"{root / WHOLE} is damaged"
    job = Job.from_json(begun)
    return f"{root} is not finished, {missing_units(str(root), job)} of {job.units()} units are missing"
