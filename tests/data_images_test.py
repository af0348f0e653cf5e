"""Strict decoding: right pixels, or one clear error, for every kind of picture that a crawl brings.

The expected pixels come from the file formats' definitions (EXIF orientation, PNG's tRNS, alpha over white),
worked out by hand; the hostile files are written here byte by byte.
"""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import images
from unclip_jax.errors import InputError

# Four corners of distinct colours: red, green / blue, yellow, as an upright viewer sees them.
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def quadrants(height=32, width=48):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = YELLOW
    return pixels


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, bit_depth, colour_type, rows, *extra):
    """A PNG written by hand: rows are bytes without the filter byte; extra are (kind, payload) before IDAT."""

    def chunk(kind, payload):
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*item) for item in extra)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def riff(*chunks):
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def segment(marker, payload):
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def near(pixels, expected, tolerance=6):
    return np.abs(pixels.astype(int) - np.asarray(expected)).max() <= tolerance


def corners(pixels):
    """Colours at the centres of the four quadrants: upper left, upper right, lower left, lower right."""
    h, w = pixels.shape[:2]
    return [pixels[y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]


# ---------------------------------------------------------------- right pixels


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 95}),
        ("JPEG", {"progressive": True, "quality": 95}),
    ],
)
def test_plain_pictures(kind, options):
    pixels = images.decode(encoded(quadrants(), kind, **options))
    assert pixels.shape == (32, 48, 3) and pixels.dtype == np.uint8
    assert near(np.array(corners(pixels)), [RED, GREEN, BLUE, YELLOW])
    if kind != "JPEG":
        assert np.array_equal(pixels, quadrants())


# EXIF 2.32, tag 0x0112: where the stored first row and first column lie in the picture that the viewer sees.
STORED_FOR_ORIENTATION = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # the camera lay on its side: turning the stored rows clockwise shows it upright
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_FOR_ORIENTATION[orientation](quadrants()))
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    pixels = images.decode(encoded(stored, kind, exif=exif, **options))
    assert pixels.shape == (32, 48, 3)
    assert near(np.array(corners(pixels)), [RED, GREEN, BLUE, YELLOW])


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_senseless_orientation_is_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(images.decode(encoded(quadrants(), "PNG", exif=exif)), quadrants())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_picture():
    jpeg = encoded(quadrants(), "JPEG", quality=95)
    damaged = jpeg[:2] + segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40) + jpeg[2:]
    assert near(np.array(corners(images.decode(damaged))), [RED, GREEN, BLUE, YELLOW])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(kind):
    rgba = np.dstack([quadrants(), np.full((32, 48), 255, np.uint8)])
    rgba[:16, :24, 3] = 0  # red, quite transparent: white
    rgba[:16, 24:, 3] = 51  # green at 1/5: 0.2 * 0 + 0.8 * 255 = 204 in red and blue
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = images.decode(encoded(rgba, kind, **options))
    assert near(np.array(corners(pixels)), [(255, 255, 255), (204, 255, 204), BLUE, YELLOW], tolerance=1)


def test_grey_with_alpha_is_composited_on_white():
    pixels = images.decode(png(2, 1, 8, 4, [bytes([100, 0, 100, 255])]))
    assert pixels.tolist() == [[[255] * 3, [100] * 3]]


def test_palette_with_transparent_entries_on_white():
    palette = (b"PLTE", bytes([*RED, *GREEN, *BLUE]))
    pixels = images.decode(png(3, 1, 8, 3, [bytes([0, 1, 2])], palette, (b"tRNS", bytes([0, 255]))))
    assert pixels.tolist() == [[[255] * 3, list(GREEN), list(BLUE)]]


def test_palette_without_transparency():
    palette = (b"PLTE", bytes([*RED, *GREEN, *BLUE]))
    assert images.decode(png(3, 1, 8, 3, [bytes([2, 1, 0])], palette)).tolist() == [
        [list(BLUE), list(GREEN), list(RED)]
    ]


def test_grey_of_16_bits_is_scaled_not_clipped():
    levels = [0, 128, 257 * 127, 257 * 200 + 100, 65535]
    row = b"".join(struct.pack(">H", level) for level in levels)
    assert images.decode(png(5, 1, 16, 0, [row]))[0, :, 1].tolist() == [round(level / 257) for level in levels]


def test_colour_of_16_bits():
    row = struct.pack(">6H", 257 * 10, 257 * 20, 257 * 30, 257 * 40, 257 * 50, 257 * 60)
    assert images.decode(png(2, 1, 16, 2, [row])).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize(
    "bit_depth, colour_type, row, key, expected",
    [
        (1, 0, bytes([0b01000000]), (1,), [[0] * 3, [255] * 3]),
        (1, 0, bytes([0b01000000]), (0,), [[255] * 3, [255] * 3]),
        (2, 0, bytes([0b01100000]), (1,), [[255] * 3, [170] * 3]),
        (4, 0, bytes([0x3C]), (3,), [[255] * 3, [204] * 3]),
        (8, 0, bytes([100, 50]), (100,), [[255] * 3, [50] * 3]),
        (16, 0, struct.pack(">2H", 1000, 1001), (1000,), [[255] * 3, [4] * 3]),
        (8, 2, bytes([1, 2, 3, 1, 2, 4]), (1, 2, 3), [[255] * 3, [1, 2, 4]]),
        (16, 2, struct.pack(">6H", *[257 * 9] * 3, *[257 * 8] * 3), (257 * 9,) * 3, [[255] * 3, [8] * 3]),
    ],
)
def test_transparent_colour_of_png_on_white(bit_depth, colour_type, row, key, expected):
    chunk = (b"tRNS", b"".join(struct.pack(">H", value) for value in key))
    assert images.decode(png(2, 1, bit_depth, colour_type, [row], chunk)).tolist() == [expected]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind):
    pixels = images.decode(encoded(np.full((16, 16), 77, np.uint8), kind))
    assert pixels.shape == (16, 16, 3) and near(pixels, 77, tolerance=1)


def test_cmyk_jpeg():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    assert near(images.decode(encoded(ink, "JPEG", quality=95)), RED)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in (GREEN, BLUE))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], duration=100, **options)
    assert np.array_equal(images.decode(data), np.broadcast_to(np.uint8(GREEN), (16, 16, 3)))


@pytest.mark.parametrize("width, height", [(1, 1), (2, 3), (5, 5), (8, 8), (9, 17)])
def test_interlaced_png(width, height):
    """Adam7 by hand (PNG specification, section 8.2): seven reduced pictures, one after the other."""
    pixels = np.arange(width * height * 3).reshape(height, width, 3).astype(np.uint8)
    passes = [pixels[0::8, 0::8], pixels[0::8, 4::8], pixels[4::8, 0::4], pixels[0::4, 2::4]]
    passes += [pixels[2::4, 0::2], pixels[0::2, 1::2], pixels[1::2, :]]
    rows = [row.tobytes() for part in passes if part.size for row in part]
    data = bytearray(png(width, height, 8, 2, rows))
    data[28] = 1  # interlace method
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert np.array_equal(images.decode(bytes(data)), pixels)


def test_one_pixel():
    assert images.decode(png(1, 1, 8, 2, [bytes([9, 8, 7])])).tolist() == [[[9, 8, 7]]]


def test_garbage_after_the_end_is_ignored():
    assert np.array_equal(images.decode(encoded(quadrants(), "PNG") + b"<script>"), quadrants())


# ---------------------------------------------------------------- refused


def many_scans():
    jpeg = encoded(quadrants(256, 256), "JPEG", progressive=True)
    scan = jpeg.rindex(b"\xff\xda")
    return jpeg[:scan] + jpeg[scan:-2] * 2000 + jpeg[-2:]


def bad_crc():
    data = bytearray(encoded(quadrants(), "PNG"))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)


PNG, JPEG, WEBP = (encoded(quadrants(), kind) for kind in ("PNG", "JPEG", "WEBP"))
SOF = struct.pack(">BHHB", 8, 65500, 65500, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
REFUSED = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html>404 Not Found</html>", "not a JPEG, PNG or WebP"),
    "text": (b"hello", "not a JPEG, PNG or WebP"),
    "zeros": (bytes(1000), "not a JPEG, PNG or WebP"),
    "gif": (encoded(quadrants(), "GIF"), "not a JPEG, PNG or WebP"),
    "bmp": (encoded(quadrants(), "BMP"), "not a JPEG, PNG or WebP"),
    "tiff": (encoded(quadrants(), "TIFF"), "not a JPEG, PNG or WebP"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG or WebP"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG or WebP"),
    "pickle": (b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.", "not a JPEG, PNG or WebP"),
    "riff audio": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "not a JPEG, PNG or WebP"),
    "bomb of one bit per pixel": (png(20032, 20032, 1, 0, [bytes(2504)] * 20032), "20032x20032"),
    "bomb of 100 megapixels": (png(10000, 10000, 8, 0, [bytes(10000)] * 10000), "10000x10000"),
    "long thin bomb": (png(1_000_000, 1, 1, 0, [bytes(125_000)]), "1000000x1"),
    "png header lies": (png(65000, 65000, 8, 2, [b""]), "65000x65000"),
    "png of 2^31 pixels a side": (png(2**31 - 1, 2**31 - 1, 8, 2, [b""]), "2147483647x2147483647"),
    "jpeg header lies": (b"\xff\xd8" + segment(0xC0, SOF) + JPEG[2:], "65500x65500"),
    "jpeg second header lies": (
        JPEG[: JPEG.index(b"\xff\xda")] + segment(0xC0, SOF) + JPEG[JPEG.index(b"\xff\xda") :],
        "65500",
    ),
    "webp canvas lies": (riff((b"VP8X", bytes(4) + b"\xff\xff\xff\xff\xff\xff")), "16777216x16777216"),
    "webp lossless lies": (riff((b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(20))), "16384x16384"),
    "webp unknown chunk": (riff((b"EVIL", bytes(20))), "unknown chunk"),
    "png with fewer rows than it says": (png(64, 64, 8, 2, [bytes(192)] * 63), "rows end early"),
    "png of no width": (png(0, 5, 8, 2, [b""]), "0x5"),
    "png of an impossible depth": (png(2, 1, 7, 2, [bytes(6)]), "truncated or corrupt"),
    "png without palette": (png(2, 1, 8, 3, [bytes(2)]), "truncated or corrupt"),
    "png without header": (PNG[:8] + PNG[33:], "does not begin with its header"),
    "bad crc": (bad_crc(), "truncated or corrupt"),
    "png half": (PNG[: len(PNG) // 2], "truncated"),
    "png without end": (PNG[:-12], "truncated"),
    "png of 20 bytes": (PNG[:20], "ends within its header"),
    "jpeg half": (JPEG[: len(JPEG) // 2], "truncated|ends within"),
    "jpeg two bytes short": (JPEG[:-2], "truncated"),
    "jpeg of 5 bytes": (JPEG[:5], "ends within its header"),
    "jpeg without frame": (b"\xff\xd8" + segment(0xDA, bytes(10)) + b"\xff\xd9", "0x0"),
    "jpeg with a short segment": (b"\xff\xd8\xff\xe0\0\0" * 1000, "ends within its header|corrupt"),
    "jpeg of thousands of scans": (many_scans(), "scans"),
    "webp half": (WEBP[: len(WEBP) // 2], "truncated or corrupt"),
    "webp of 22 bytes": (WEBP[:22], "ends within its header"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence_fast_and_small(name):
    data, message = REFUSED[name]
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        images.decode(data)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.5 and peak < 2**25, (seconds, peak)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_every_truncation_of_every_kind_is_refused_or_whole():
    """No prefix of a file may decode to other pixels than the whole file."""
    for data in (
        encoded(quadrants(16, 16), "PNG"),
        encoded(quadrants(16, 16), "JPEG"),
        encoded(quadrants(16, 16), "WEBP"),
    ):
        whole = images.decode(data)
        for length in range(len(data)):
            try:
                assert np.array_equal(images.decode(data[:length]), whole)
            except InputError:
                pass


def test_random_damage_raises_nothing_but_input_errors():
    rng = np.random.default_rng(0)
    for data in (PNG, JPEG, WEBP):
        for _ in range(200):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), rng.integers(1, 8)):
                damaged[at] = rng.integers(256)
            try:
                pixels = images.decode(bytes(damaged))
            except InputError:
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 3


def test_limits_are_the_callers():
    data = encoded(quadrants(), "PNG")
    with pytest.raises(InputError, match="48x32"):
        images.decode(data, max_side=47)
    with pytest.raises(InputError, match="48x32"):
        images.decode(data, max_pixels=48 * 32 - 1)
    assert images.decode(data, max_pixels=48 * 32, max_side=48).shape == (32, 48, 3)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_header_tells_format_and_size(kind, options):
    assert images.read_header(encoded(quadrants(), kind, **options)) == (kind.lower(), 48, 32)
    with_alpha = Image.fromarray(quadrants()).convert("RGBA")
    with_alpha.putalpha(7)
    if kind != "JPEG":
        assert images.read_header(encoded(with_alpha, kind, **options)) == (kind.lower(), 48, 32)


def test_encoders():
    pixels = quadrants()
    assert np.array_equal(images.decode(images.encode_png(pixels)), pixels)
    assert near(images.decode(images.encode_jpeg(pixels)), pixels, tolerance=4)
