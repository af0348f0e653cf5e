"""Decodes the bytes of untrusted pictures: strictly, to the pixels a viewer would show, or not at all.

Every size is read from the header by the few lines below before a decoder sees the file, so a picture that
would unpack to gigabytes costs microseconds. Only JPEG, PNG and WebP are let through: each further format is
another C library open to whoever wrote the file. Neither JAX nor TensorFlow is imported.
"""

import io
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.errors import InputError

# 33.5 megapixels decode within about 300 MB; MAX_SIDE is just above WebP's own limit of 16383.
MAX_PIXELS = 2**25
MAX_SIDE = 2**14
# Encoders write about 10 scans; a hostile JPEG can ask for thousands of passes over one picture.
MAX_JPEG_SCANS = 100

# EXIF orientation (tag 0x0112, values 2..8) -> what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
# Start-of-frame markers of JPEG: C0..CF without DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def read_header(data: bytes) -> tuple[str, int, int]:
    """Reads format and size of a picture from its header alone.

    Returns:
      ("jpeg" | "png" | "webp", width, height) as stored, that is before EXIF orientation.

    Raises:
      InputError: the bytes are no JPEG, PNG or WebP, or end within the header.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return "jpeg", *_jpeg_size(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            kind, width, height = struct.unpack_from(">4sII", data, 12)
            if kind == b"IHDR":
                return "png", width, height
            raise InputError("this PNG does not begin with its header; the file is corrupt")
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return "webp", *_webp_size(data)
    except (struct.error, IndexError):
        raise InputError(f"the picture ends within its header, after {len(data)} bytes") from None
    if not data:
        raise InputError("the picture is empty (0 bytes); it has to be a JPEG, PNG or WebP")
    raise InputError(f"not a JPEG, PNG or WebP: the bytes begin with {data[:12]!r}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Returns the largest (width, height) that any frame header before the first scan claims."""
    width = height = 0
    at = 2
    while True:
        while data[at] != 0xFF:
            at += 1
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker == 0xDA:
            return width, height
        if marker in (0x00, 0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            continue  # these stand alone, without a length
        if marker in _JPEG_FRAMES:
            frame_height, frame_width = struct.unpack_from(">HH", data, at + 3)
            width, height = max(width, frame_width), max(height, frame_height)
        at += struct.unpack_from(">H", data, at)[0]


def _jpeg_scans(data: bytes) -> int:
    """How often the marker of a scan stands in the file; looking for pairs of bytes takes `bytes.count` far longer."""
    stored = np.frombuffer(data, np.uint8)
    markers = np.flatnonzero(stored[:-1] == 0xFF)
    return int(np.count_nonzero(stored[markers + 1] == 0xDA))


def _webp_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) of the canvas (WebP container specification, RFC 9649, section 2)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise InputError(f"this WebP begins with an unknown chunk {kind!r}; the file is corrupt")


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG, PNG or WebP to upright sRGB pixels on white.

    EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled by 255/65535, CMYK,
    palettes and grey become RGB, and of an animation the first frame is taken. Colour profiles are not applied.

    Args:
      data: the whole encoded file.
      max_pixels: most pixels (width x height) that the header may announce.
      max_side: longest side that the header may announce, in pixels.

    Returns:
      uint8 [h, w, 3] in [0, 255], read-only.

    Raises:
      InputError: another format, too large, truncated or corrupt.
    """
    kind, width, height = read_header(data)
    _check_size(width, height, max_pixels=max_pixels, max_side=max_side)
    if kind == "jpeg" and _jpeg_scans(data) > MAX_JPEG_SCANS:
        raise InputError(f"this JPEG has more than {MAX_JPEG_SCANS} scans; no camera or editor writes that")
    if kind == "png":
        _check_png_rows(data, width, height)
    try:
        with Image.open(io.BytesIO(data), formats=(kind.upper(),)) as image:
            # The decoder's own reading of the header counts too, in case a crafted file has two.
            _check_size(*image.size, max_pixels=max_pixels, max_side=max_side)
            image.load()
            orientation = _orientation(image)
            opaque = _on_white(image, bit_depth=data[24] if kind == "png" else 8)
    except InputError:
        raise
    except Exception as error:
        # Pillow lets OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError and more escape on bad
        # bytes; whatever it is, the picture is what is wrong.
        raise InputError(f"this {kind.upper()} of {width}x{height} is truncated or corrupt: {error}") from error
    if orientation in _UPRIGHT:
        opaque = opaque.transpose(_UPRIGHT[orientation])
    # Not np.array: on pictures of a megapixel every further copy takes as long as a tenth of the decoding.
    return np.asarray(opaque)


def _check_size(width: int, height: int, *, max_pixels: int, max_side: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"the picture's header says {width}x{height} pixels; the file is corrupt")
    if max(width, height) > max_side or width * height > max_pixels:
        raise InputError(
            f"the picture has {width}x{height} pixels; at most {max_side} on a side and {max_pixels} in all are decoded"
        )


# Samples per pixel of PNG's colour types, and the passes of its interlacing: first column, first row, steps.
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _check_png_rows(data: bytes, width: int, height: int) -> None:
    """Refuses a PNG whose compressed stream ends before its last row: Pillow would show the missing rows black."""
    if b"IEND" not in data:
        raise InputError("this PNG is truncated: its end marker is missing")
    bit_depth, colour_type, _, _, interlaced = data[24:29]
    bits = bit_depth * _PNG_SAMPLES.get(colour_type, 0)
    missing = 0
    for left, top, step_x, step_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        missing += max(rows, 0) * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    stream, at = zlib.decompressobj(), 8
    try:
        while missing > 0 and at < len(data) and not stream.eof:
            length, chunk = struct.unpack_from(">I4s", data, at)
            compressed = data[at + 8 : at + 8 + length] if chunk == b"IDAT" else b""
            while missing > 0 and compressed and not stream.eof:
                # In pieces, for a chunk of a few kilobytes can unpack to gigabytes.
                missing -= len(stream.decompress(compressed, 2**20))
                compressed = stream.unconsumed_tail
            at += 12 + length
    except (struct.error, zlib.error) as error:
        raise InputError(f"this PNG of {width}x{height} is truncated or corrupt: {error}") from error
    if missing > 0:
        raise InputError(f"this PNG of {width}x{height} is truncated or corrupt: its rows end early")


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1..8; 1 (upright) where there is none or EXIF itself is damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # Damaged metadata of any kind must not cost a picture whose pixels are whole.
        return 1


def _on_white(image: Image.Image, *, bit_depth: int) -> Image.Image:
    """Returns the loaded image as mode RGB, transparency composited on white."""
    if image.mode.startswith("I"):
        return _wide_grey_on_white(image)
    colour_key = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB") and colour_key is not None:
        return _colour_key_on_white(image, colour_key, bit_depth=bit_depth)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_grey_on_white(image: Image.Image) -> Image.Image:
    """16-bit grey: Pillow's own conversion clips at 255 instead of scaling."""
    levels = np.asarray(image).astype(np.uint32)
    grey = ((levels * 255 + 32767) // 65535).astype(np.uint8)
    colour_key = image.info.get("transparency")
    if colour_key is not None:
        grey[levels == colour_key] = 255
    return Image.fromarray(grey).convert("RGB")


def _colour_key_on_white(image: Image.Image, colour_key: int | tuple[int, ...], *, bit_depth: int) -> Image.Image:
    """PNG's tRNS chunk for grey and RGB: the one colour that is transparent, given at the file's own bit depth."""
    pixels = np.array(image.convert("RGB"))
    key = np.atleast_1d(np.asarray(colour_key, np.int64))
    # 16-bit RGB arrives as its high bytes, so there the key can only be compared by its high byte.
    key = key >> 8 if bit_depth == 16 else key * 255 // (2**bit_depth - 1)
    pixels[np.all(pixels == key, axis=-1)] = 255
    return Image.fromarray(pixels)


def encode_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encodes uint8 RGB pixels as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_jpeg(pixels: UInt8[np.ndarray, "h w 3"], *, quality: int = 95) -> bytes:
    """Encodes uint8 RGB pixels as JPEG without chroma subsampling, which would blur the colours of small pictures."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
