"""Writes safetensors files tensor by tensor, so that no more than one of them is in memory beside the weights.

The format (huggingface/safetensors, README): the length of a JSON header in 8 bytes, little-endian; the header, name ->
dtype, shape and where the numbers begin and end; then the numbers, C-contiguous, without gaps.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from unclip_jax.artifacts.folders import Folder
from unclip_jax.errors import InputError
from unclip_jax.interop.tensors import Tensor

_NAMES = {
    np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
    np.dtype(jnp.bfloat16): "BF16", np.dtype(np.int64): "I64", np.dtype(np.int32): "I32", np.dtype(np.uint32): "U32",
    np.dtype(np.uint8): "U8", np.dtype(np.bool_): "BOOL",
}  # fmt: skip
# What --dtype names.
DTYPES = {
    "float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16),
}  # fmt: skip


def converted(tensors: Mapping[str, Tensor], dtype: np.dtype) -> dict[str, Tensor]:
    """Returns tensors whose numbers with a point are rounded, to nearest even, to another type when they are read.

    Reading raises InputError where a number is too large for the type: it would become infinite.
    """

    def one(name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype == dtype or not jnp.issubdtype(tensor.dtype, jnp.floating):
            return tensor

        def read() -> np.ndarray:
            exact = tensor.read()
            with np.errstate(over="ignore"):
                rounded = exact.astype(dtype)
            if not np.isfinite(rounded).all():
                raise InputError(
                    f"{name} holds numbers up to {np.abs(exact).max():g}, which {dtype} lacks; use float32 or bfloat16"
                )
            return rounded

        return Tensor(tensor.shape, dtype, read)

    return {name: one(name, tensor) for name, tensor in tensors.items()}


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write(
    folder: Folder,
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Writes one file; `poll` is called before each tensor is read."""
    # The widest types first, so that each tensor begins at a multiple of its type's size.
    ordered = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in ordered:
        begin, end = end, end + size(tensors[key])
        kind = _NAMES[tensors[key].dtype]
        header[key] = {"dtype": kind, "shape": list(tensors[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Numbers begin at a multiple of 64: readers map the file, and vector units round otherwise where arrays lie askew.
    text += b" " * (-(len(text) + 8) % 64)
    with folder.file(name) as put:
        put(len(text).to_bytes(8, "little"))
        put(text)
        for key in ordered:
            poll()
            array = np.asarray(tensors[key].read(), tensors[key].dtype, order="C")
            assert array.shape == tuple(tensors[key].shape), key
            put(array.reshape(-1).view(np.uint8))


def write_shards(
    folder: Folder,
    stem: str,
    tensors: Mapping[str, Tensor],
    *,
    limit: int,
    metadata: Mapping[str, str] | None = None,
    poll: Callable[[], None] = lambda: None,
) -> list[str]:
    """Writes `stem`.safetensors, or where that would exceed `limit` bytes several files and their index.

    The index is that of the Hugging Face libraries: `stem`.safetensors.index.json with total_size and weight_map.

    Returns:
      The names of the files with tensors. A tensor larger than `limit` has a file of its own.
    """
    shards = _shards(tensors, limit)
    if len(shards) == 1:
        write(folder, f"{stem}.safetensors", tensors, metadata=metadata, poll=poll)
        return [f"{stem}.safetensors"]
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, keys in zip(names, shards, strict=True):
        write(folder, name, {key: tensors[key] for key in keys}, metadata=metadata, poll=poll)
    places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(size(tensor) for tensor in tensors.values())
    folder.json(f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return names


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Sequence[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for key, tensor in tensors.items():
        if shards[-1] and held + size(tensor) > limit:
            shards.append([])
            held = 0
        shards[-1].append(key)
        held += size(tensor)
    return shards
