"""Reads safetensors files with NumPy alone; exports carry a copy of this file."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

_KINDS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16,
          "I64": "i8", "I32": "i4", "U32": "u4", "U8": "u1", "BOOL": "?"}  # fmt: skip


def read(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields names and arrays, mapped into memory: 8 bytes hold the length of a JSON header, numbers come after it."""
    content = np.memmap(path, np.uint8, "r")
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    for name, about in json.loads(content[8:begin].tobytes()).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            numbers = content[begin + first : begin + last].view(_KINDS[about["dtype"]])
            yield name, numbers.reshape(about["shape"])
