"""CLIP's byte-pair encoding (Sennrich et al., 2016, on bytes) without other code; exports carry a copy."""

import json
import pathlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

_CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")


class Encoder:
    """Encodes text by the vocabulary in a folder: vocab.json and merges.txt, in CLIP's format."""

    def __init__(self, folder: pathlib.Path):
        self.ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        # A byte that prints stands for itself; the others for the characters from 256 on.
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        self.letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}

    def __call__(self, captions: Sequence[str], length: int) -> np.ndarray:
        """Returns ids [start] words [end] 0 0 …, int32 [n, length], of captions that are clean; what is long is cut."""
        return np.array([self._row(caption, length) for caption in captions], np.int32)

    def _row(self, text: str, length: int) -> list[int]:
        found = [number for word in words("".join(c.lower() for c in text)) for number in self._pieces(word)]
        row = [len(self.ids) - 2, *found[: length - 2], len(self.ids) - 1]
        return row + [0] * (length - len(row))

    def _pieces(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = zip(parts, parts[1:], strict=False)
            rank, pair = min((self.ranks.get(pair, len(self.ranks)), pair) for pair in pairs)
            if rank == len(self.ranks):
                break
            joined = []
            while parts:
                both = tuple(parts[:2]) == pair
                joined.append("".join(parts[: 1 + both]))
                del parts[: 1 + both]
            parts = joined
        return [self.ids[part] for part in parts]


def words(text: str) -> list[str]:
    """Splits text into contractions' ends, runs of letters, single digits and runs of other signs; spaces go."""
    found, last = [], ""
    position = 0
    while position < len(text):
        ending = _CONTRACTION.match(text, position)
        kind = "space" if text[position].isspace() else unicodedata.category(text[position])[0]
        kind = kind if kind in ("space", "L", "N") else "other"
        if ending and last != "other":
            found.append(ending.group())
            position, last = ending.end(), ""
            continue
        if kind == last and kind in ("L", "other"):
            found[-1] += text[position]
        elif kind != "space":
            found.append(text[position])
        position, last = position + 1, kind
    return found
