"""The folder that an export writes: there whole or not at all, and never in the place of something else."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from unclip_jax.errors import InputError

MANIFEST = "manifest.json"
_MARK = ".unclip_jax_export"


class Folder:
    """A folder that is being written.

    Attributes:
      path: where it is for now.
      files: name, with "/" between folders -> sha256 and bytes of what was written.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Callable[[Any], None]]:
        """Opens a file to write piece by piece: yields write(bytes or a contiguous array)."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with open(path, "xb") as file:

            def write(content: Any) -> None:
                nonlocal size
                view = memoryview(content).cast("B")
                digest.update(view)
                file.write(view)
                size += len(view)

            yield write
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = {"sha256": digest.hexdigest(), "bytes": size}

    def text(self, name: str, content: str) -> None:
        """Writes a small file."""
        with self.file(name) as write:
            write(content.encode())

    def json(self, name: str, content: Any) -> None:
        """Writes a small file of JSON."""
        self.text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def manifest(self, content: Mapping[str, Any]) -> None:
        """Writes manifest.json: `content`, the files written so far, and a digest of both."""
        whole = {**content, "files": dict(self.files)}
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        (self.path / MANIFEST).write_text(json.dumps({**whole, "digest": digest}, indent=1) + "\n")


@contextlib.contextmanager
def writing(out: str) -> Iterator[Folder]:
    """Yields a folder to write; it becomes `out` when the block ends, by one rename.

    It is made beside `out`, under a hidden name. What an export that was killed left there is removed first.

    Raises:
      InputError: `out` holds something, cannot be made, or another export is writing it.
    """
    target = pathlib.Path(out).expanduser().absolute()
    check(out)
    begun = target.with_name(f".{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if begun.exists() and any(begun.iterdir()) and not (begun / _MARK).is_file():
            raise InputError(f"{begun} is in the way and holds what no export left there; move it away")
        begun.mkdir(exist_ok=True)
        mark = open(begun / _MARK, "w")
    except OSError as error:
        raise InputError(f"--out={out} cannot be made: {error}") from error
    with mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another export is writing {out}; wait for it, or use another --out") from error
        _empty(begun)
        try:
            yield Folder(begun)
            (begun / _MARK).unlink()
            begun.rename(target)
        except BaseException:
            shutil.rmtree(begun, ignore_errors=True)
            raise


def check(out: str) -> None:
    """Raises InputError where `out` is something already; an empty folder is nothing."""
    target = pathlib.Path(out).expanduser().absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"--out={out} is a file or a link; name a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"--out={out} holds something already, which an export would overwrite; use another folder")


def _empty(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if path.name != _MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def read_manifest(folder: str) -> dict[str, Any]:
    """Returns the manifest of an export.

    Raises:
      InputError: there is none, or it was altered.
    """
    path = pathlib.Path(folder).expanduser() / MANIFEST
    try:
        content = json.loads(path.read_text())
        said = content.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder!r} is no export: its {MANIFEST} cannot be read ({error})") from error
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != said:
        raise InputError(f"{path} was altered or is damaged; use another copy of the export")
    return content


def plain(name: str) -> bool:
    """Whether a name is that of a file of its own folder, on any system."""
    return re.fullmatch(r"\w[\w.-]*", name) is not None
