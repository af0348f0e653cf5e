"""PNG files in plain Python (ISO/IEC 15948), with text inside; exports carry a copy of this file."""

import struct
import zlib
from typing import Any


def encode(pixels: Any, text: dict[str, str]) -> bytes:
    """Returns the PNG of a uint8 array [h, w, 3], with a text chunk for each keyword."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    notes = [_chunk(b"iTXt", key.encode("latin-1") + bytes(5) + value.encode()) for key, value in text.items()]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), *notes, _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
