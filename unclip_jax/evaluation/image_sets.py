"""Sets of images as others keep them: ADM's npz of one array, and folders of picture files.

An npz may hold 50,000 images of 256 x 256 pixels, 10 GB. It is a zip archive of .npy files, each a short header and
then the numbers, so both directions go through it in batches, and no more than one is in memory.
"""

import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from unclip_jax.data import images, sealed
from unclip_jax.errors import InputError

ARRAY = "arr_0"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Batch = UInt8[np.ndarray, "_ _ _ 3"]
Prepare = Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "h2 w2 3"]]


def write_npz(path: str | os.PathLike, batches: Iterable[Batch], count: int) -> None:
    """Writes images as ADM's evaluation reads them: uint8 [count, h, w, 3] as `arr_0`, uncompressed.

    The file appears whole or not at all.

    Args:
      path: of the file.
      batches: the images in order, in batches of any sizes.
      count: how many they are in all.

    Raises:
      InputError: there are more or fewer, or they are of different sizes.
    """
    with sealed.Replacing(pathlib.Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        write_member(archive, batches, count, where=str(path))


def write_member(archive: zipfile.ZipFile, batches: Iterable[Batch], count: int, *, where: str) -> None:
    """Writes `arr_0` into an npz that is being written; arguments as of `write_npz`."""
    written, shape = 0, None
    # Without a date of its own: the same images are the same bytes. Past 4 GiB a zip archive has longer fields.
    with archive.open(zipfile.ZipInfo(f"{ARRAY}.npy"), "w", force_zip64=True) as member:
        for batch in batches:
            if shape is None:
                shape = batch.shape[1:]
                _write_header(member, (count, *shape))
            if batch.shape[1:] != shape:
                raise InputError(f"{where}: images of {batch.shape[1:]} and of {shape} cannot stand in one array")
            written += len(batch)
            if written > count:
                break
            member.write(np.ascontiguousarray(batch).data)
        if written != count or shape is None:
            raise InputError(
                f"{where}: {count} images were announced and {'more' if written > count else written} came"
            )


def _write_header(member: Any, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def read(path: str | os.PathLike, *, batch_size: int = 64, prepare: Prepare | None = None) -> Iterator[Batch]:
    """Yields the images of an npz with `arr_0`, or of a folder in natural order ("9.png" before "10.png").

    Args:
      path: of the npz or folder.
      batch_size: images at a time; the last batch may be smaller.
      prepare: applied to each image, such as one of `preprocessing`; without it a folder's images must be of one size.

    Yields:
      uint8 [b, h, w, 3] in [0, 255].

    Raises:
      InputError: there is no such file, an image cannot be read (named), sizes differ (named), or an npz holds
        something else or ends early.
    """
    path = pathlib.Path(path).expanduser()
    batches = _read_folder(path, batch_size, prepare) if path.is_dir() else _read_npz(path, batch_size)
    if path.is_dir() or prepare is None:
        return batches
    return (np.stack([prepare(image) for image in batch]) for batch in batches)


def count(path: str | os.PathLike) -> int:
    """Returns how many images `read` will yield; raises InputError where it could not begin."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return len(files(path))
    with _Array(path) as array:
        return array.shape[0]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns a folder's picture files in natural order; raises InputError where there are none."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise InputError(f"{folder} holds no pictures; files that end in {', '.join(SUFFIXES)} are read")
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Runs of digits compare as numbers; at last the name itself, for "1.png" and "01.png" are two."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def _read_folder(folder: pathlib.Path, batch_size: int, prepare: Prepare | None) -> Iterator[Batch]:
    paths = files(folder)
    first: tuple[int, ...] | None = None
    for start in range(0, len(paths), batch_size):
        batch = []
        for path in paths[start : start + batch_size]:
            image = _read_picture(path)
            image = image if prepare is None else prepare(image)
            first = first or image.shape
            if image.shape != first:
                raise InputError(
                    f"{path} has {image.shape[1]}x{image.shape[0]} pixels and {paths[0].name} {first[1]}x{first[0]}; "
                    "images of one set must have one size: crop them as a protocol says"
                )
            batch.append(image)
        yield np.stack(batch)


def _read_picture(path: pathlib.Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return images.decode(path.read_bytes())
    except (InputError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_npz(path: pathlib.Path, batch_size: int) -> Iterator[Batch]:
    with _Array(path) as array:
        yield from array.batches(batch_size)


class _Array:
    """The array of images in an npz, open."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is neither a folder of pictures nor an npz of images: {error}; give one of these"
            ) from error
        try:
            self._member = self._archive.open(f"{ARRAY}.npy")
            self.shape = self._read_header(self._member)
        except KeyError:
            names = ", ".join(name.removesuffix(".npy") for name in self._archive.namelist()) or "nothing"
            self._archive.close()
            raise InputError(f"{path} has no array {ARRAY!r} with images; it holds {names}") from None
        except BaseException:
            self._archive.close()
            raise

    def _read_header(self, member: Any) -> tuple[int, ...]:
        try:
            version = np.lib.format.read_magic(member)
            shape, fortran, dtype = _HEADERS[version](member)
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{self._path}: {ARRAY} does not begin as an array does: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise InputError(
                f"{self._path}: {ARRAY} is {dtype}{list(shape)}{', Fortran order' if fortran else ''}; images are "
                "uint8[count, height, width, 3] in C order"
            )
        return shape

    def __enter__(self) -> "_Array":
        return self

    def __exit__(self, *_) -> None:
        self._member.close()
        self._archive.close()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields all images; the archive's checksum is compared when the last was read."""
        length = math.prod(self.shape[1:])
        for start in range(0, self.shape[0], batch_size):
            rows = min(batch_size, self.shape[0] - start)
            data = self._read(self._member, rows * length)
            if len(data) < rows * length:
                raise InputError(
                    f"{self._path} ends within image {start + len(data) // max(length, 1)} of the {self.shape[0]} that "
                    "it announces; write it again"
                )
            yield np.frombuffer(data, np.uint8).reshape(rows, *self.shape[1:])
        if self._read(self._member, 1):
            raise InputError(f"{self._path}: {ARRAY} is longer than the {self.shape[0]} images that it announces")

    def _read(self, member: BinaryIO | Any, size: int) -> bytes:
        try:
            return member.read(size)
        except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
            raise InputError(f"{self._path} is damaged: {error}; write it again") from error


def write_folder(path: str | os.PathLike, batches: Iterable[Batch], names: Sequence[str | int]) -> None:
    """Writes images as a folder of PNG files, for programs that read such.

    Args:
      path: of the folder; it must not exist, or be empty.
      batches: the images in order, in batches of any sizes.
      names: of each image's file without ".png", such as the images' ids.

    Raises:
      InputError: the folder holds something, two names are equal, or there are more or fewer images.
    """
    folder = pathlib.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and not empty; name a folder that is not")
    if len(set(map(str, names))) != len(names):
        raise InputError("two images would be written to one file; give each its own name")
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for batch in batches:
        if written + len(batch) > len(names):
            raise InputError(f"{folder}: more images came than the {len(names)} that have names")
        for image in batch:
            with sealed.Replacing(folder / f"{names[written]}.png") as file:
                file.write(images.encode_png(image))
            written += 1
    if written != len(names):
        raise InputError(f"{folder}: {written} images came for {len(names)} names")
