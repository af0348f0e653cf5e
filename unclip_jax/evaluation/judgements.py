"""Tables of what people said of images: ratings, or which of two they prefer.

A table is a CSV (its first line names the columns) or JSON lines, of image files and numbers, or an NPZ of embeddings:

    ratings  image, rating                       NPZ: embeddings [n, d], rating [n]
    pairs    first, second, preferred            NPZ: first [n, d], second [n, d], preferred [n]

`preferred` is 1 where the first image is, 0 where the second, 0.5 for a tie. Files are named from the table's folder
on. An NPZ may say in `clip` which CLIP made its embeddings. Further columns are passed over.
"""

import csv
import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from unclip_jax.errors import InputError, nearest
from unclip_jax.evaluation.affine_probes import PAIRS, RATINGS

# Kind -> (columns of images, column of the number), and names of arrays in an NPZ in the place of the former.
COLUMNS = {RATINGS: (("image",), "rating"), PAIRS: (("first", "second"), "preferred")}
_ARRAYS = {RATINGS: ("embeddings",), PAIRS: ("first", "second")}


@dataclasses.dataclass(frozen=True)
class Table:
    """What people said, of image files or of embeddings.

    Attributes:
      files: for each column of images, n of them; or none.
      embeddings: the same as float [n, d]; or none.
      values: what was said, float64 [n]; None where the table does not say.
      clip: which CLIP made the embeddings; "" where the table does not say, or has files.
    """

    files: tuple[list[pathlib.Path], ...] = ()
    embeddings: tuple[Float[np.ndarray, "_ _"], ...] = ()
    values: Float[np.ndarray, "_"] | None = None
    clip: str = ""

    @property
    def embedded(self) -> bool:
        """Whether it holds embeddings, not files."""
        return bool(self.embeddings)


def read(path: str, kind: str, *, answered: bool = True) -> Table:
    """Reads a table.

    Args:
      path: of a .csv, .jsonl or .npz file.
      kind: RATINGS or PAIRS.
      answered: whether it has to say what people said; otherwise that column may be missing.

    Raises:
      InputError: no such file, another format, a column or value that is missing, or none at all.
    """
    file = pathlib.Path(path).expanduser()
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    try:
        if file.suffix == ".npz":
            return _arrays(file, kind, answered=answered)
        if file.suffix not in readers:
            raise InputError(f"the table {path!r} has to be a .csv, .jsonl or .npz file")
        return _files(file, readers[file.suffix](file), kind, answered=answered)
    except (OSError, UnicodeDecodeError, csv.Error, zipfile.BadZipFile) as error:
        raise InputError(f"the table {path!r} cannot be read: {error}") from error


def _csv_rows(file: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _json_rows(file: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"line {number} of {str(file)!r} is no JSON object")
        yield row


def _files(file: pathlib.Path, rows: Iterator[Mapping[str, Any]], kind: str, *, answered: bool) -> Table:
    names, value = COLUMNS[kind]
    sides: list[list[pathlib.Path]] = [[] for _ in names]
    values: list[float] = []
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {str(file)!r}"
        for name, side in zip(names, sides, strict=True):
            side.append(file.parent / str(_column(row, name, where)))
        if answered or value in row:
            values.append(_number(_column(row, value, where), value, where))
    if not sides[0]:
        raise InputError(f"the table {str(file)!r} has no rows")
    if values and len(values) != len(sides[0]):
        raise InputError(f"{len(values)} of {len(sides[0])} rows of {str(file)!r} have {value!r}; give all of them one")
    return Table(files=tuple(sides), values=np.array(values, np.float64) if values else None)


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    found = row.get(name)
    if found is None or found == "":
        known = [key for key in row if isinstance(key, str)]
        raise InputError(f"{where} has no {name!r}" + ("" if name in row else f"; {nearest(name, known)}"))
    return found


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"{where}: {name} is {value!r}, no number")
    return number


def _arrays(file: pathlib.Path, kind: str, *, answered: bool) -> Table:
    names, value = _ARRAYS[kind], COLUMNS[kind][1]
    with zipfile.ZipFile(file), np.load(file) as arrays:  # the former, for NumPy takes what is no archive for a pickle
        wanted = [*names, value] if answered or value in arrays else list(names)
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise InputError(f"{str(file)!r} has no array {missing[0]!r}; {nearest(missing[0], list(arrays))}")
        try:
            found = {name: np.asarray(arrays[name]) for name in wanted}
            clip = str(arrays["clip"]) if "clip" in arrays else ""
        except ValueError as error:  # Python objects, which NumPy does not unpack
            raise InputError(f"the table {str(file)!r} cannot be read: {error}") from error
    for name, array in found.items():
        wrong = array.dtype.kind not in "fiu" or array.ndim != (1 if name == value else 2)
        if wrong or len(array) != len(found[names[0]]) or not len(array):
            raise InputError(
                f"{name!r} of {str(file)!r} is {array.dtype} {list(array.shape)}; numbers are needed, of n rows "
                f"{'each one' if name == value else 'of d each'}"
            )
    sides = tuple(_floats(found[name]) for name in names)
    return Table(embeddings=sides, values=found[value].astype(np.float64) if value in found else None, clip=clip)


def _floats(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.kind == "f" else array.astype(np.float64)
