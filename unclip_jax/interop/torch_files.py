"""Tensors out of files that `torch.save` or `torch.jit.save` wrote, without torch and without running what they say.

Such a file is a zip archive: a pickle that describes the tensors, and each storage, uncompressed, as a member of its
own. A pickle is a program, which names functions and calls them; the reader here knows the few names that rebuild
tensors, answers each with a harmless stand-in of its own, and refuses the file at any other. Storages stay in the file
until their tensors are read.

This is the one module that reads pickles. The facts: torch's `serialization.py` and `_utils.py`, PEP 307.
"""

import collections
import functools
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.interop.tensors import Tensor

_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_ZIP = b"PK\x03\x04"
# The pickle of a stack of 2,062 tensors has 0.4 MB.
_LONGEST_PICKLE = 1 << 26
_DEEPEST, _MOST = 100, 1_000_000  # of nested dictionaries, and of things in them


class _Storage(NamedTuple):
    """Numbers in a file: where the first lies, how many there are, and of what type."""

    path: pathlib.Path
    begin: int
    numbers: int
    dtype: np.dtype


class _StandIn:
    """What a name in a pickle stands for here: to be called, and nothing else can be done with it."""

    __slots__ = ("_answer",)

    def __init__(self, answer):
        object.__setattr__(self, "_answer", answer)

    def __call__(self, *arguments):
        return self._answer(*arguments)

    def __setattr__(self, name, value):
        raise TypeError("a name's meaning cannot be changed")

    def __setstate__(self, state):
        raise TypeError("a name's meaning cannot be changed")


class _Dictionary(dict):
    """An OrderedDict; what else is set on it, such as a state dict's `_metadata`, is dropped."""

    def __setstate__(self, state):
        pass


class _Module:
    """A module of TorchScript: its tensors and parts by name. Its code, elsewhere in the archive, is never read."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise TypeError("a module's state should be a dictionary")
        self.state = state


def _dictionary(*arguments):
    if arguments:
        raise TypeError("an OrderedDict should begin empty")
    return _Dictionary()


def _strided(storage: Any, offset: Any, shape: Any, strides: Any, *_) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage."""
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > 16:
        raise TypeError("a tensor should have a storage, and as many strides as axes")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError("a tensor's offset, shape and strides should be whole numbers, none negative")
    shape, strides = tuple(shape), tuple(strides)
    size = math.prod(shape)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if size and (last >= storage.numbers or size > storage.numbers):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.numbers} numbers")
    return Tensor(shape, storage.dtype, functools.partial(_read, storage, offset, shape, strides))


def _read(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    count = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    width = storage.dtype.itemsize
    numbers = np.fromfile(storage.path, storage.dtype, count, offset=storage.begin + offset * width)
    if len(numbers) != count:
        raise InputError(f"{str(storage.path)!r} ends in the middle of a tensor; it was whole when it was opened")
    return np.lib.stride_tricks.as_strided(numbers, shape, [stride * width for stride in strides])


def _parameter(tensor: Any, *_) -> Tensor:
    """`torch._utils._rebuild_parameter`: the tensor that it wraps."""
    if not isinstance(tensor, Tensor):
        raise TypeError("a parameter should be a tensor")
    return tensor


_REBUILT = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor"): _strided,
    ("torch._utils", "_rebuild_tensor_v2"): _strided,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    # Lists of TorchScript, which say the type of their elements.
    **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
}


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of tensors; any name that is not torch's for a tensor is refused."""

    def __init__(self, file, storage_of):
        super().__init__(file)
        self._storage_of = storage_of

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILT:
            return _StandIn(_REBUILT[module, name])
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Module", (_Module,), {})
        raise InputError(
            f"it names {module}.{name}, which is no tensor, so it is read no further and nothing of it was run; save "
            "the weights alone (their state dict), or as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *_ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(count) is not int or count < 0:
            raise TypeError("a persistent id should be ('storage', type, key, device, count)")
        return self._storage_of(str(key), dtype, count)


def open_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name; see `tensors.open_tensors`.

    Names of nested dictionaries and modules are joined by dots; in lists, numbers are the names. Of a training
    checkpoint only the entry `state_dict` counts, where there is one.

    Raises:
      InputError: the file is damaged, or its pickle names what is no tensor.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP))
            file.seek(0)
            value = _from_zip(path, file) if magic == _ZIP else _from_sequence(path, file)
        if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
            value = value["state_dict"]
        found: dict[str, Tensor] = {}
        for name, tensor in _named(value, "", 0, [0]):
            if name in found:
                raise ValueError(f"two tensors have the name {name!r}")
            found[name] = tensor
    except Exception as error:  # a pickle can make its reader raise anything
        raise InputError(f"{str(path)!r} is no file of tensors that can be trusted: {error}") from error
    if not found:
        raise InputError(f"{str(path)!r} holds no tensors")
    return found


def _named(value: Any, name: str, depth: int, count: list[int]) -> Iterator[tuple[str, Tensor]]:
    count[0] += 1
    if depth > _DEEPEST or count[0] > _MOST:
        raise ValueError("its dictionaries are nested too deeply, or hold too much")
    if isinstance(value, Tensor):
        yield name, value
        return
    parts = value.state if isinstance(value, _Module) else value
    if isinstance(parts, list | tuple):
        parts = dict(enumerate(parts))
    if isinstance(parts, dict):
        for key, part in parts.items():
            yield from _named(part, f"{name}.{key}" if name else str(key), depth + 1, count)


def _from_zip(path: pathlib.Path, file: io.BufferedReader) -> Any:
    """Reads the archive that torch writes since 1.6."""
    places = _places(file)
    descriptions = [name for name in places if name in ("data.pkl", f"{name.split('/')[0]}/data.pkl")]
    if len(descriptions) != 1:
        raise ValueError(f"it should describe its tensors in one data.pkl, not in {len(descriptions)}")
    (described,) = descriptions
    prefix = described.removesuffix("data.pkl")
    begin, length = places[described]
    if length > _LONGEST_PICKLE:
        raise ValueError(f"its pickle has {length} bytes; tensors are described in far fewer")
    if f"{prefix}byteorder" in places and _bytes(file, *places[f"{prefix}byteorder"]) != b"little":
        raise ValueError("its numbers are not stored little end first")

    def storage_of(key: str, dtype: np.dtype, count: int) -> _Storage:
        if f"{prefix}data/{key}" not in places:
            raise ValueError(f"it has no storage {key!r}")
        begin, length = places[f"{prefix}data/{key}"]
        if length != count * dtype.itemsize:
            raise ValueError(f"its storage {key!r} has {length} bytes, not {count} numbers of {dtype.itemsize}")
        return _Storage(path, begin, count, dtype)

    return _Unpickler(io.BytesIO(_bytes(file, begin, length)), storage_of).load()


def _places(file: io.BufferedReader) -> dict[str, tuple[int, int]]:
    """Returns where the bytes of each uncompressed member of an archive begin, and how many there are.

    Raises:
      ValueError: members overlap or reach beyond the file.
    """
    end = os.fstat(file.fileno()).st_size
    places: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                continue  # code and debugging; torch never compresses a storage
            if member.filename in places:
                raise ValueError(f"two of its members have the name {member.filename!r}")
            header = _bytes(file, member.header_offset, 30)
            if header[:4] != _ZIP:
                raise ValueError(f"its member {member.filename!r} is not where its directory says")
            name, extra = struct.unpack("<HH", header[26:30])
            places[member.filename] = (member.header_offset + 30 + name + extra, member.file_size)
    reached = 0
    for name, (begin, length) in sorted(places.items(), key=lambda place: place[1]):
        if begin < reached or begin + length > end:
            raise ValueError(f"its member {name!r} overlaps another or reaches beyond the file")
        reached = begin + length
    return places


def _bytes(file: io.BufferedReader, begin: int, length: int) -> bytes:
    file.seek(begin)
    found = file.read(length)
    if len(found) != length:
        raise ValueError("it is cut off")
    return found


_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def _from_sequence(path: pathlib.Path, file: io.BufferedReader) -> Any:
    """Reads what torch wrote before 1.6: five pickles, then each storage with its length in front."""
    used: dict[str, tuple[np.dtype, int]] = {}
    begins: dict[str, int] = collections.defaultdict(int)

    def promised(key: str, dtype: np.dtype, count: int) -> _Storage:
        if used.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"its storage {key!r} has two types or lengths")
        return _Storage(path, begins[key], count, dtype)

    begin = file.tell()
    magic, protocol, system = (_Unpickler(file, promised).load() for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or system.get("little_endian") is not True:
        raise ValueError("it is neither an archive nor the older format of torch")
    begin = file.tell()
    _Unpickler(file, promised).load()
    keys = _Unpickler(file, promised).load()
    end = os.fstat(file.fileno()).st_size
    for key in keys:
        (count,) = struct.unpack("<q", _bytes(file, file.tell(), 8))
        dtype, expected = used[key]
        begins[key] = file.tell()
        if count != expected or begins[key] + count * dtype.itemsize > end:
            raise ValueError(f"its storage {key!r} is not as long as it should be")
        file.seek(count * dtype.itemsize, os.SEEK_CUR)
    if set(used) != set(keys):
        raise ValueError("some of its storages are missing")
    file.seek(begin)
    return _Unpickler(file, promised).load()  # again, now that places are known
