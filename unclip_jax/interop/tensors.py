"""Tensors in other programs' files, by name, each read only when it is asked for.

Safetensors files, folders of them in shards with an index, and what torch wrote (`torch_files`). Nothing that such a
file says is run, and nothing outside it is opened.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from unclip_jax.errors import InputError

# What a folder may call its one file of weights, or the index of its shards, the best first.
_INDICES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "open_clip_model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# Their names for types; those of fewer than 8 bits, and of 8 bits with a point, are nobody's weights here.
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is somewhere else.

    Attributes:
      shape, dtype: of the array.
      read: returns it, a new one at each call; nothing is kept.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """An array that is here."""
        return cls(array.shape, array.dtype, lambda: array)


Tensors = Mapping[str, Tensor]


def open_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Returns the tensors of a file or of a folder by name; none is read yet.

    Args:
      path: a safetensors file; a file that `torch.save` or `torch.jit.save` wrote; or a folder with one such file, or
        with shards and their index, under the names that transformers, diffusers and OpenCLIP give them.

    Raises:
      InputError: there is no such file, it is damaged, it holds what is no tensor, or an index names a file outside of
        its folder.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r} with weights")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    from unclip_jax.interop import torch_files

    return torch_files.open_tensors(path)


def _open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    for name in _INDICES:
        if (folder / name).is_file():
            return _open_shards(folder / name)
    for name in _FILES:
        if (folder / name).is_file():
            return open_tensors(folder / name)
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(there) == 1:
        return open_tensors(folder / there[0])
    which = f"several, {', '.join(there)}" if there else "none"
    raise InputError(
        f"{str(folder)!r} should hold one file of weights, such as model.safetensors, and holds {which}; name the file"
    )


def _open_shards(index: pathlib.Path) -> dict[str, Tensor]:
    """Reads an index of shards: {"weight_map": {name of a tensor: name of a file beside the index}}."""
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in parts.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the index {str(index)!r} is damaged: its weight_map should map names to files") from error
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if "/" in file or "\\" in file or file in ("", ".", "..") or "\0" in file:
            raise InputError(f"the index {str(index)!r} names the file {file!r}, which is not one of its own folder")
        if file.endswith(".index.json"):
            raise InputError(f"the index {str(index)!r} names another index, {file!r}, where weights should be")
        shard = open_tensors(index.parent / file)
        listed = {name for name, place in places.items() if place == file}
        if listed != set(shard):
            odd = sorted(listed ^ set(shard))
            raise InputError(
                f"the index {str(index)!r} and its file {file!r} disagree on {len(odd)} tensors, such as {odd[0]!r}"
            )
        tensors |= shard
    return tensors


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        # It refuses headers that are too long, and tensors that overlap, leave gaps or end beyond the file.
        with safetensors.safe_open(path, framework="np") as file:
            names = set(file.keys())
        with path.open("rb") as whole:
            (length,) = struct.unpack("<Q", whole.read(8))
            header = json.loads(whole.read(length))
        return {name: _placed(path, name, header[name], 8 + length) for name in names}
    except InputError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error


def _placed(path: pathlib.Path, name: str, entry: Mapping[str, Any], data: int) -> Tensor:
    """Returns the tensor of one entry of a header, whose offsets are from `data` on."""
    kind = entry["dtype"]
    if kind not in _DTYPES:
        raise InputError(f"{str(path)!r}: {name} has the type {kind}; known are {', '.join(_DTYPES)}")
    shape, dtype, (begin, end) = tuple(entry["shape"]), _DTYPES[kind], entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has two sizes")

    def read() -> np.ndarray:
        # Not mapped: pages that were read would count as this process's memory for as long as they are.
        numbers = np.fromfile(path, dtype, math.prod(shape), offset=data + begin)
        if numbers.size != math.prod(shape):
            raise InputError(f"{str(path)!r} ends in the middle of {name}; it was whole when it was opened")
        return numbers.reshape(shape)

    return Tensor(shape, dtype, read)
