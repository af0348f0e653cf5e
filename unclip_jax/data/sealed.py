"""Files that appear whole or not at all, and JSON that carries its own digest."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an object with its own digest, so that a flipped bit in it is no other object."""
    text = json.dumps(value, sort_keys=True)
    return {**value, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns what was sealed; None where the file is not there or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        seal = value.pop("seal")
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    return value if sealed(value)["seal"] == seal else None


def write(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a sealed object in the place of what is there."""
    with Replacing(path) as file:
        file.write(json.dumps(value, sort_keys=True).encode())


class Replacing:
    """Opens a file that takes the place of `path` when the block ends without an error."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial-{os.uname().nodename}-{os.getpid()}")

    def __enter__(self):
        self._file = self._partial.open("wb")
        return self._file

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)


def digest(data: bytes) -> str:
    """Returns the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()
