"""The data set `emoji`: every emoji that an installed colour font draws, captioned by its Unicode name.

Real pictures in a small number, for trying the stages on something that no grammar made. Nothing is downloaded:
pictures come from the font, names from Python's `unicodedata`. Emoji younger than Python's Unicode tables have no
name there and are left out, as are sequences (flags, families) and marks that only modify others (skin tones).
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from unclip_jax.data import preparation
from unclip_jax.errors import InputError

FONT_VARIABLE = "UNCLIP_JAX_EMOJI_FONT"
_WELL_KNOWN = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu: fonts-noto-color-emoji
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
)
# Bitmap fonts open at the sizes that they hold alone: 109 is Noto's, 160 Apple's; outline fonts take the first.
_PIXEL_SIZES = (109, 160, 136, 128, 96, 64)
# Of the symbols that are emoji: pictographs, arrows and squares, "!?" marks, the wavy dash, the letter i.
_CATEGORIES = frozenset({"So", "Sm", "Po", "Pd", "Ll"})
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # halves of flags
_NO_CHARACTER = "\U0010ffff"  # never assigned: what a font draws for it, it draws for all that it lacks
_ANY_EMOJI = "\U0001f600"
_VALIDATION_SHARE = 20


def find_font(font: str = "") -> str:
    """Path of a colour-emoji font: `font` if given, else $UNCLIP_JAX_EMOJI_FONT, else what the system has.

    Raises:
      InputError: the file named does not exist, or no font was found; says which package has one.
    """
    named = font or os.environ.get(FONT_VARIABLE, "")
    if named:
        if not os.path.isfile(named):
            raise InputError(f"there is no emoji font at {named!r} (given as font= or ${FONT_VARIABLE})")
        return named
    for candidate in (*_WELL_KNOWN, *_fonts_of_fontconfig()):
        path = os.path.expanduser(candidate)
        if os.path.isfile(path):
            return path
    raise InputError(
        "no colour-emoji font is installed: on Debian or Ubuntu run `apt-get install fonts-noto-color-emoji`, or "
        f"point ${FONT_VARIABLE} (or font=) at a NotoColorEmoji.ttf"
    )


def _fonts_of_fontconfig() -> list[str]:
    if shutil.which("fc-list") is None:
        return []
    listed = subprocess.run(["fc-list", "--format=%{file}\n"], capture_output=True, text=True, check=False).stdout
    return sorted(path for path in listed.splitlines() if "coloremoji" in path.lower().replace(" ", ""))


class EmojiFont:
    """Draws emoji of one font file.

    Attributes:
      path, sha256: the file.
      side: pixels a side of its square pictures (136 for Noto, whose bitmaps are 136 x 128).
    """

    def __init__(self, path: str):
        """Opens a font.

        Raises:
          InputError: no font file, or one without pictures in colour.
        """
        self.path = path
        self.sha256 = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
        self._font = _open(path)
        left, top, right, bottom = self._font.getbbox(_ANY_EMOJI)
        self.side = int(max(right - left, bottom - top))
        self._missing = self._draw(_NO_CHARACTER, ink=0) if self.side else None
        if not self.side or self.render(_ANY_EMOJI) is None:
            raise InputError(f"{path!r} is no colour-emoji font: it has no coloured U+1F600 (grinning face)")

    def render(self, character: str) -> UInt8[np.ndarray, "s s 3"] | None:
        """The picture of one character, where the font places it, on white; None where the font has none in colour."""
        drawn = self._draw(character, ink=0)
        if drawn is None or (self._missing is not None and np.array_equal(drawn, self._missing)):
            return None
        # Glyphs without colours of their own take the ink's; .notdef boxes of ordinary fonts are of that kind.
        again = self._draw(character, ink=200)
        if again is None or not np.array_equal(drawn, again):
            return None
        return drawn

    def _draw(self, character: str, *, ink: int) -> np.ndarray | None:
        """None where nothing is drawn or the text layout fails (line separators)."""
        try:
            left, top, right, bottom = self._font.getbbox(character)
        except RuntimeError:
            return None
        picture = Image.new("RGBA", (self.side, self.side), (255, 255, 255, 0))
        x = (self.side - (right - left)) // 2 - left
        y = (self.side - (bottom - top)) // 2 - top
        ImageDraw.Draw(picture).text(
            (x, y), character, font=self._font, fill=(ink, ink, ink, 255), embedded_color=True
        )
        if picture.getchannel("A").getbbox() is None:
            return None
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def _open(path: str) -> ImageFont.FreeTypeFont:
    for size in _PIXEL_SIZES:
        try:
            return ImageFont.truetype(path, size)
        except OSError:
            continue
    raise InputError(f"{path!r} does not open as a font at any of the sizes {_PIXEL_SIZES}")


def named_characters() -> Iterator[tuple[str, str]]:
    """(character, caption) of all characters that could be emoji, in code point order; captions are distinct."""
    for code_point in range(0x80, sys.maxunicode + 1):
        character = chr(code_point)
        if unicodedata.category(character) not in _CATEGORIES or code_point in _REGIONAL_INDICATORS:
            continue
        name = unicodedata.name(character, "")
        if name and not name.startswith("EMOJI COMPONENT"):  # swatches of hair, for sequences
            yield character, name.lower()


def split_of(caption: str) -> str:
    """"validation" for about one name in twenty, "train" for the others: by the name's SHA-256, so for good."""
    digest = hashlib.sha256(caption.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") % _VALIDATION_SHARE == 0 else "train"


@dataclasses.dataclass(kw_only=True)
class EmojiConfig(tfds.core.BuilderConfig):
    """Which font is drawn; its name holds all that the records depend on, so that none is taken for another."""

    font: str = ""


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Builder of `emoji`; use `prepare`, which finds the font."""

    VERSION = tfds.core.Version("1.0.0")

    @functools.cached_property
    def _font(self) -> EmojiFont:
        return EmojiFont(self.builder_config.font)

    @functools.cached_property
    def _pictures(self) -> list[tuple[str, str, UInt8[np.ndarray, "s s 3"]]]:
        drawn = ((character, caption, self._font.render(character)) for character, caption in named_characters())
        return [(character, caption, image) for character, caption, image in drawn if image is not None]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji of a colour font, captioned by their Unicode names.",
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "id": np.int64,
                "code_point": np.int64,
            }),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        self.info.metadata.update(
            font=self._font.path, font_sha256=self._font.sha256, count=len(self._pictures),
            unicode=unicodedata.unidata_version,
        )
        splits = [split_of(caption) for _, caption, _ in self._pictures]
        if not {"train", "validation"} <= set(splits):
            raise InputError(f"{self._font.path!r} draws {len(splits)} emoji, too few for training and validation")
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        members = (entry for entry in self._pictures if split_of(entry[1]) == split)
        for index, (character, caption, image) in enumerate(members):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            record = {"image": buffer.getvalue(), "caption": caption, "id": index, "code_point": ord(character)}
            yield index, record


def prepare(*, data_dir: str, font: str = "") -> str:
    """Draws and writes the emoji below `data_dir`, unless they are there.

    Args:
      data_dir: root of prepared data sets.
      font: file of a colour-emoji font; "" takes the one that `find_font` finds.

    Returns:
      Directory of the prepared builder, `emoji/<font>-<its SHA-256>-unicode<version>/<version>`. Its metadata names
      font, font_sha256, count and unicode. Splits: train, and validation with about 5% of the names (`split_of`).

    Raises:
      InputError: no colour-emoji font is found.
    """
    path = find_font(font)
    opened = EmojiFont(path)
    stem = pathlib.Path(path).stem.lower().replace(" ", "")
    name = f"{stem}-{opened.sha256[:8]}-unicode{unicodedata.unidata_version}"
    with preparation.quiet():
        builder = Emoji(data_dir=data_dir, config=EmojiConfig(name=name, font=path))
    return preparation.write_once(builder)
