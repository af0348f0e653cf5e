"""Reads a folder of pictures with `captions.jsonl` ({"file_name": ..., "caption": ...} a line) or `captions.csv`.

The file is read line by line, so it may be larger than memory, and cut into chunks that workers read on their own.
"""

import csv
import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from unclip_jax.data.records import (
    CAPTION_FIELDS,
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    PICTURE_EXTENSIONS,
    Bad,
    Fault,
    Record,
    Unit,
    field,
    label,
    parse_object,
)
from unclip_jax.errors import InputError

CAPTION_FILES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
FILE_FIELDS = ("file_name", "file", "image")


def find_chunks(path: str, *, entries_per_chunk: int) -> list[Unit]:
    """Cuts a caption file into units of so many entries, by reading through it once.

    Raises:
      InputError: the file has no entry, or a CSV's first line names no file or no caption column.
    """
    kind = path.rpartition(".")[2]
    digest = hashlib.sha256()
    starts = []
    with open(path, "rb") as file:
        if kind == "csv":
            _csv_header(file, path)
        count = 0
        for entry in _entries(file, kind):
            if count % entries_per_chunk == 0:
                starts.append((entry.offset, entry.line))
            count += 1
        file.seek(0)
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    if not count:
        raise InputError(f"{path} has no entries")
    return [
        Unit(
            index=index,
            kind=kind,
            path=path,
            first_id=index * entries_per_chunk,
            offset=offset,
            line=line,
            entries=min(entries_per_chunk, count - index * entries_per_chunk),
            digest=digest.hexdigest(),
        )
        for index, (offset, line) in enumerate(starts)
    ]


@dataclasses.dataclass
class _Entry:
    """One entry of a caption file: where it begins, and its line of JSON, its CSV fields, or what is wrong with it."""

    offset: int
    line: int
    value: str | list[str] | Fault


class _Lines:
    """Physical lines of a file of limited length, as text, with the offset and number of the next one."""

    def __init__(self, file: BinaryIO, line: int = 0):
        self.file, self.line, self.offset = file, line, file.tell()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        data = self.file.readline(MAX_TEXT_BYTES)
        if not data:
            raise StopIteration
        while not data.endswith(b"\n") and (rest := self.file.readline(MAX_TEXT_BYTES)):
            # Too long: run on to its end, and let the parser see what cannot be valid.
            data = b"\0" + (b"\n" if rest.endswith(b"\n") else b"")
        self.offset, self.line = self.file.tell(), self.line + 1
        return data.decode("utf-8", "surrogateescape")


def _entries(file: BinaryIO, kind: str, line: int | None = None) -> Iterator[_Entry]:
    """Yields the entries from the file's position on; empty lines are none."""
    lines = _Lines(file, (1 if kind == "csv" else 0) if line is None else line)
    rows: Iterable = lines if kind == "jsonl" else csv.reader(lines)
    iterator = iter(rows)
    while True:
        offset, number = lines.offset, lines.line
        try:
            value = next(iterator)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader has lost its place; the next physical line is as good a guess as any.
            value, iterator = Fault(f"is no valid CSV: {error}"), iter(csv.reader(lines))
        if isinstance(value, str):
            value = value if isinstance(value, Fault) else value.strip().removeprefix("\ufeff")
        if value:
            yield _Entry(offset, number, value)


def _csv_header(file: BinaryIO, path: str) -> list[str]:
    """Reads the first line of a CSV and returns its column names."""
    first = file.readline(MAX_TEXT_BYTES).decode("utf-8-sig", "replace")
    names = [name.strip() for name in next(csv.reader([first]), [])]
    if not set(FILE_FIELDS) & set(names) or not set(CAPTION_FIELDS) & set(names):
        raise InputError(
            f"the first line of {path} has to name a column {' or '.join(FILE_FIELDS)} and a column "
            f"{' or '.join(CAPTION_FIELDS)}; it reads {first[:100].strip()!r}"
        )
    return names


def read_entries(unit: Unit) -> Iterator[Record | Bad]:
    """Reads the entries of one chunk of a caption file with their pictures."""
    source, folder = os.path.basename(unit.path), os.path.dirname(unit.path)
    with open(unit.path, "rb") as file:
        names = _csv_header(file, unit.path) if unit.kind == "csv" else []
        file.seek(unit.offset)
        for count, entry in enumerate(_entries(file, unit.kind, unit.line)):
            if count == unit.entries:
                return
            try:
                yield _read_entry(entry.value, names=names, source=source, folder=folder)
            except InputError as error:
                yield Bad(source, f"line {entry.line + 1}", str(error))


def _read_entry(value: str | list[str], *, names: list[str], source: str, folder: str) -> Record:
    if isinstance(value, Fault):
        raise InputError(value)
    fields = parse_object(value) if isinstance(value, str) else dict(zip(names, value, strict=False))
    name, caption = field(fields, FILE_FIELDS), field(fields, CAPTION_FIELDS)
    if any("\udc80" <= character <= "\udcff" for character in name + caption):
        raise InputError("is not UTF-8")
    return Record(source, name, _read_picture(folder, name), caption, label(fields))


def _read_picture(folder: str, name: str) -> bytes:
    """Reads a picture inside the folder; a caption file may have been made to point elsewhere."""
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        raise InputError(f"{name[:100]!r} points outside the folder")
    if name.rpartition(".")[2].lower() not in PICTURE_EXTENSIONS:
        raise InputError(f"{name[:100]!r} is none of {', '.join(PICTURE_EXTENSIONS)}")
    try:
        # Non-blocking, for opening a named pipe would wait for ever.
        with open(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{name[:100]!r} is no file")
            if status.st_size > MAX_PICTURE_BYTES:
                raise InputError(f"{name[:100]!r} has {status.st_size} bytes; at most {MAX_PICTURE_BYTES} are read")
            return file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name[:100]!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
