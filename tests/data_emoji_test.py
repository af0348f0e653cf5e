"""emoji: on a small colour font made here, so that the facts do not depend on what is installed."""

import hashlib
import io
import pathlib
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import tensorflow_datasets as tfds
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from unclip_jax.data import emoji
from unclip_jax.errors import InputError

PREPARE = """
import sys
from unclip_jax.data import emoji
print(emoji.prepare(data_dir=sys.argv[1], font=sys.argv[2]))
"""
RED, BLUE = (220, 20, 30), (20, 40, 230)
# In colour: name and colour; the neutral face falls into validation. The font also draws a sun without colours, half
# of a flag, and a swatch of hair, which are no emoji of the set.
COLOURED = {0x1F600: ("grinning face", RED), 0x1F680: ("rocket", BLUE), 0x1F610: ("neutral face", RED)}
SUN, FLAG_HALF, HAIR = 0x2600, 0x1F1E6, 0x1F9B0


def box(left: int, bottom: int, right: int, top: int):
    pen = TTGlyphPen(None)
    pen.moveTo((left, bottom))
    for point in ((left, top), (right, top), (right, bottom)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()


@pytest.fixture(scope="module")
def font(tmp_path_factory) -> str:
    """A font with layers of colour (COLR): boxes 600 units wide and 400 high in an em of 1,000."""
    characters = {code: f"u{code:X}" for code in (*COLOURED, SUN, FLAG_HALF, HAIR)}
    names = [".notdef", "layer", *characters.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(characters)
    builder.setupGlyf({name: box(200, 100, 800, 500) for name in names})
    builder.setupHorizontalMetrics({name: (1000, 200) for name in names})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.setupCOLR({name: [("layer", int(code == 0x1F680))] for code, name in characters.items() if code != SUN})
    builder.setupCPAL([[tuple(c / 255 for c in (*colour, 255)) for colour in (RED, BLUE)]])
    path = tmp_path_factory.mktemp("font") / "Boxes Color.ttf"
    builder.save(path)
    return str(path)


@pytest.fixture(scope="module")
def prepared(font, tmp_path_factory) -> str:
    command = [sys.executable, "-c", PREPARE, str(tmp_path_factory.mktemp("data")), font]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_records_are_the_coloured_glyphs_with_their_names(prepared, font):
    builder = tfds.builder_from_directory(prepared)
    found = {}
    for split in ("train", "validation"):
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        for index in range(len(source)):
            record = source[index]
            assert record["id"] == index
            assert emoji.split_of(record["caption"].decode()) == split
            found[record["code_point"]] = (record["caption"].decode(), Image.open(io.BytesIO(record["image"])))
    assert {code: name for code, (name, _) in found.items()} == {code: name for code, (name, _) in COLOURED.items()}
    for code, (_, picture) in found.items():
        pixels = np.asarray(picture)
        assert picture.mode == "RGB" and pixels.shape[0] == pixels.shape[1]
        assert tuple(pixels[0, 0]) == (255, 255, 255)
        assert tuple(pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]) == COLOURED[code][1]
    metadata = dict(builder.info.metadata)
    digest = hashlib.sha256(pathlib.Path(font).read_bytes()).hexdigest()
    assert (metadata["font"], metadata["font_sha256"], metadata["count"]) == (font, digest, 3)
    assert digest[:8] in prepared


def test_prepared_once_is_left_alone(prepared, font):
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(prepared).iterdir()}
    assert emoji.prepare(data_dir=str(pathlib.Path(prepared).parents[2]), font=font) == prepared
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(prepared).iterdir()} == before


def test_picture_is_square_and_whole(font):
    picture = emoji.EmojiFont(font).render("\U0001f680")
    assert picture is not None
    side = picture.shape[0]
    assert picture.shape == (side, side, 3)
    drawn = np.argwhere((picture != 255).any(-1))
    height, width = drawn.max(0) - drawn.min(0) + 1
    # The em is as wide as the picture.
    assert abs(width / side - 0.6) < 0.03 and abs(height / side - 0.4) < 0.03
    assert drawn.min() > 0 and drawn.max() < side - 1


def test_glyphs_without_colour_missing_or_empty_have_no_picture(font):
    opened = emoji.EmojiFont(font)
    for character in (chr(SUN), "\U0001f601", " ", "\u2029"):
        assert opened.render(character) is None


def test_split_is_by_name_and_about_one_in_twenty():
    names = [name for _, name in emoji.named_characters()]
    assert len(names) == len(set(names)) and "grinning face" in names
    share = np.mean([emoji.split_of(name) == "validation" for name in names])
    assert abs(share - 0.05) < 4 * np.sqrt(0.05 * 0.95 / len(names))


def test_without_a_font_the_package_is_named(monkeypatch):
    monkeypatch.delenv(emoji.FONT_VARIABLE, raising=False)
    monkeypatch.setattr(emoji, "_WELL_KNOWN", ())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        emoji.prepare(data_dir="nowhere")


def test_font_may_be_named_by_the_environment(monkeypatch, font):
    monkeypatch.setenv(emoji.FONT_VARIABLE, font)
    assert emoji.find_font() == font
    monkeypatch.setenv(emoji.FONT_VARIABLE, "/no/such/font.ttf")
    with pytest.raises(InputError, match="/no/such/font.ttf"):
        emoji.find_font()


def test_fonts_without_colour_and_other_files_are_refused(tmp_path):
    plain = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    with pytest.raises(InputError, match="no colour-emoji font"):
        emoji.prepare(data_dir=str(tmp_path), font=str(plain))
    text = tmp_path / "font.ttf"
    text.write_text("not a font")
    with pytest.raises(InputError, match="does not open as a font"):
        emoji.prepare(data_dir=str(tmp_path), font=str(text))


def test_the_system_either_has_a_font_of_many_emoji_or_says_which_to_install(monkeypatch):
    monkeypatch.delenv(emoji.FONT_VARIABLE, raising=False)
    try:
        opened = emoji.EmojiFont(emoji.find_font())
    except InputError as error:
        assert "fonts-noto-color-emoji" in str(error)
        return
    faces = [opened.render(chr(code)) for code in range(0x1F600, 0x1F640)]
    assert all(face is not None for face in faces)
    assert len({face.tobytes() for face in faces if face is not None}) == len(faces)
