"""Reads captioned pictures out of tar shards, as img2dataset and webdataset write them: nothing extracted, nothing run.

An example is members `KEY.jpg|jpeg|png|webp` and `KEY.txt` or `KEY.json` (its "caption", and for what has a class its
"label") next to each other. Members
are streamed, so a member's name is no path to anything: only the part of its last component before the first dot is
kept, as a key. Links, devices and other extensions are passed over and counted.

The tar reader is our own few lines because Python's `tarfile` takes a damaged header in mid-file for the end of the
archive, silently, and reads extended headers of any size into memory.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

from unclip_jax.data.records import (
    CAPTION_EXTENSIONS,
    CAPTION_FIELDS,
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    PICTURE_EXTENSIONS,
    Bad,
    Fault,
    Ignored,
    Record,
    field,
    label,
    parse_object,
)
from unclip_jax.errors import InputError

_BLOCK = 512


def read_tar(path: str) -> Iterator[Record | Bad | Ignored]:
    """Reads the examples of a tar shard in one pass; where it is damaged, what stands before the damage is kept."""
    source = os.path.basename(path)
    prefix, members, seen = "", dict[str, bytes | Fault](), set[str]()
    for name, value in _examples_members(path, source):
        if isinstance(value, Bad | Ignored):
            yield value
            continue
        found, extension = _split_name(name)
        if found != prefix:
            if members:
                yield _example(source, prefix, members, seen)
            prefix, members = found, {}
        # The same member twice: no telling which is meant.
        members[extension] = Fault(f"has two members .{extension}") if extension in members else value
    if members:
        yield _example(source, prefix, members, seen)


def _split_name(name: str) -> tuple[str, str]:
    """'a/b/0001.JPG' -> ('a/b/0001', 'jpg'), as webdataset splits names: at the first dot of the last component."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}/{stem}", extension.lower()


def _examples_members(path: str, source: str) -> Iterator[tuple[str, bytes | Fault | Bad | Ignored]]:
    """Yields (name, bytes) of the members that can belong to an example; all others as what they are."""
    try:
        with open(path, "rb") as file:
            for name, kind, size in _members(file):
                stem, extension = _split_name(name)
                wanted = extension in PICTURE_EXTENSIONS + CAPTION_EXTENSIONS and stem.rpartition("/")[2]
                if kind not in (b"0", b"\0", b"7") or not wanted:
                    # Folders are part of any archive; they are not worth a count.
                    if kind != b"5":
                        yield name, Ignored(source, name)
                    continue
                most = MAX_PICTURE_BYTES if extension in PICTURE_EXTENSIONS else MAX_TEXT_BYTES
                if size > most:
                    yield name, Fault(f".{extension} has {size} bytes; at most {most} are read")
                else:
                    yield name, _read_exactly(file, size)
    except _Damaged as damage:
        yield "", Bad(source, "", f"the archive is damaged: {damage}; what stands before that is kept")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


class _Damaged(Exception):
    """The archive cannot be followed any further."""


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _Damaged(f"it ends at byte {file.tell()}, within a member")
    return data


def _members(file: BinaryIO) -> Iterator[tuple[str, bytes, int]]:
    """Yields (name, type, size) of each member with the file at its first byte (POSIX.1-2001 ustar, pax, GNU names)."""
    end = os.fstat(file.fileno()).st_size
    at, long_name, pax = 0, "", dict[str, str]()
    while True:
        file.seek(at)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise _Damaged(f"it ends at byte {at} without an end marker")
        if not any(header):
            return
        name, kind, size = _parse_header(header, at)
        if kind in (b"L", b"x", b"g", b"K"):
            if size > MAX_TEXT_BYTES:
                raise _Damaged(f"an extended header at byte {at} has {size} bytes")
            extended = _read_exactly(file, size)
            if kind == b"L":
                long_name = extended.rstrip(b"\0").decode("utf-8", "replace")
            elif kind == b"x":
                pax = _parse_pax(extended)
            at += _BLOCK + -(-size // _BLOCK) * _BLOCK
            continue
        name = pax.get("path") or long_name or name
        if pax.get("size", "").isdecimal():
            size = int(pax["size"][:20])
        long_name, pax = "", {}
        # Links and devices carry no data, whatever their header says.
        size = 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else size
        if at + _BLOCK + size > end:
            raise _Damaged(f"it ends at byte {end}, but its member at byte {at} has {size} bytes")
        yield name, kind, size
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _parse_header(header: bytes, at: int) -> tuple[str, bytes, int]:
    try:
        checksum = int(header[148:156].strip(b" \0") or b"0", 8)
        size_field = header[124:136]
        if size_field[0] & 0x80:  # GNU's base 256, for members of 8 GiB and more
            size = int.from_bytes(size_field[1:], "big")
        else:
            size = int(size_field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Damaged(f"no tar header at byte {at}") from None
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum or size < 0:
        raise _Damaged(f"no tar header at byte {at}")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "replace"), header[156:157], size


def _parse_pax(data: bytes) -> dict[str, str]:
    """Parses 'LENGTH KEY=VALUE\\n' records; stops at the first that is none."""
    values, at = {}, 0
    while at < len(data):
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = data[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        values[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at += int(length)
    return values


def _example(source: str, prefix: str, members: dict[str, bytes | Fault], seen: set[str]) -> Record | Bad:
    """Makes one example of the members that share a name."""
    key = prefix.rpartition("/")[2]
    pictures = [members[extension] for extension in PICTURE_EXTENSIONS if extension in members]
    text = next((extension for extension in CAPTION_EXTENSIONS if extension in members), "")
    beside = "in an archive the members of one example have to stand next to each other"
    if prefix in seen:
        return Bad(source, key, f"the key comes twice; {beside}")
    seen.add(prefix)
    if not pictures:
        return Bad(source, key, f"has a caption but no picture; {beside}")
    if len(pictures) > 1:
        return Bad(source, key, "has more than one picture")
    if not text:
        return Bad(source, key, f"has no caption; {beside}")
    picture, caption = pictures[0], members[text]
    if isinstance(picture, Fault) or isinstance(caption, Fault):
        return Bad(source, key, picture if isinstance(picture, Fault) else str(caption))
    try:
        return Record(source, key, picture, _read_caption(caption, text), _read_label(members.get("json", b"")))
    except InputError as error:
        return Bad(source, key, str(error))


def _read_caption(data: bytes, extension: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"its .{extension} is not UTF-8") from None
    if extension == "txt":
        return text
    return field(parse_object(text), CAPTION_FIELDS)


def _read_label(data: bytes | Fault) -> str:
    """What a .json says, which nobody needs where a .txt has the caption: where it says nothing there is no label."""
    try:
        return label(parse_object(data.decode("utf-8-sig"))) if data and isinstance(data, bytes) else ""
    except (UnicodeDecodeError, InputError):
        return ""
