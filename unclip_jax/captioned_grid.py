"""Pictures of pictures: rows of images with their captions drawn beside them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_MARGIN, _GAP = 10, 6
_CAPTION_WIDTH = 300
_INK, _PAPER, _FAINT = (28, 30, 36), (255, 255, 255), (110, 114, 124)


def draw(
    captions: Sequence[str],
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    *,
    headings: Sequence[str] = (),
    side: int = 0,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draws one row per caption: the caption, wrapped, then its images.

    Args:
      captions: one per row.
      rows: images of each row, of any sizes; all are shown `side` pixels wide.
      headings: above the columns of images.
      side: pixels a side that images are shown at; 0 takes 96, or the images' own size if that is larger, up to 256.

    Returns:
      The picture, uint8.
    """
    side = side or min(max(96, max((image.shape[1] for row in rows for image in row), default=0)), 256)
    font, bold = ImageFont.load_default(size=14), ImageFont.load_default(size=13)
    columns = max((len(row) for row in rows), default=0)
    top = _MARGIN + (24 if headings else 0)
    width = 2 * _MARGIN + _CAPTION_WIDTH + columns * (side + _GAP)
    height = top + len(rows) * (side + _GAP) + _MARGIN - _GAP
    canvas = Image.new("RGB", (width, max(height, 1)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    left = _MARGIN + _CAPTION_WIDTH
    for column, heading in enumerate(headings):
        pen.text((left + column * (side + _GAP) + side / 2, _MARGIN), heading, font=bold, fill=_FAINT, anchor="ma")
    for number, (caption, images) in enumerate(zip(captions, rows, strict=True)):
        y = top + number * (side + _GAP)
        lines = wrap(caption, font, _CAPTION_WIDTH - 2 * _MARGIN)[: max(side // 18, 1)]
        pen.multiline_text((_MARGIN, y + side / 2), "\n".join(lines), font=font, fill=_INK, anchor="lm", spacing=4)
        for column, image in enumerate(images):
            canvas.paste(enlarged(image, side), (left + column * (side + _GAP), y))
    return np.asarray(canvas)


def enlarged(image: UInt8[np.ndarray, "h w 3"], side: int) -> Image.Image:
    """Returns the image at `side` pixels: whole pixels where it fits a whole number of times, else smooth."""
    picture = Image.fromarray(image)
    exact = side % picture.width == 0
    return picture.resize((side, side), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Splits a text into lines no wider than `width` pixels; a word that is wider stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
