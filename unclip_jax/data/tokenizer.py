"""Captions to token ids: CLIP's byte-pair tokenizer (transformers), checked by known answers before it is used.

A folder with GPT-2's vocabulary makes GLIDE's tokenizer instead: captions in lower case, without start and end token.

transformers 5 answers an old or misspelt call, or a missing folder, with a tokenizer that maps everything to one id
and raises nothing. So the files are read here, the symbols are handed over as values, no hub is ever asked, and the
result must give answers that are known beforehand.
"""

import gzip
import hashlib
import importlib.resources
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from unclip_jax.data import captions as captions_lib
from unclip_jax.data.vocabulary import training as vocabulary_training
from unclip_jax.errors import InputError

if TYPE_CHECKING:
    import tokenizers

_START, _END = vocabulary_training.SPECIALS

# Vocabulary size -> (caption, ids). OpenAI's are those of its published `clip.tokenize`; ours those of the committed
# files, checked against an independent implementation of byte-pair encoding in tests/data_tokenizer_test.py.
_OPENAI_SIZE = 49408
# GLIDE's are those that GPT-2's published encoder gives, whose files it comes with.
_GLIDE_SIZE = 50257
_KNOWN_ANSWERS = {
    _GLIDE_SIZE: (("hello world", (31373, 995)), ("An oil painting", (272, 3056, 12036))),
    _OPENAI_SIZE: (("a photo of a cat", (320, 1125, 539, 320, 2368)), ("a photo of a dog", (320, 1125, 539, 320, 1929)))
}
_TINY_ANSWERS = (
    ("a small striped red star left of a large blue circle", (320, 548, 582, 537, 646, 697, 563, 320, 558, 630, 660)),
    ("grinning face with smiling eyes", (1383, 672, 610, 877, 915)),
)
_TINY_DIGEST = "ea98de301e9f531b49f647db238aff50d936fa58c18e4d9ebed185266a6994a6"

# What the two files of a vocabulary may be called: symbols, merges.
_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("encoder.json.gz", "vocab.bpe.gz"))
_LONGEST = 1 << 26  # bytes of either; OpenAI's has 1 MB

Merges = list[tuple[str, str]]


class Tokenizer:
    """CLIP's tokenizer over one vocabulary, or GLIDE's.

    Attributes:
      vocab_size: number of ids.
      sot: id that starts every caption, `vocab_size - 2`; not GLIDE's.
      eot: id that ends every caption, `vocab_size - 1`; GLIDE's are filled up with it.
      bare: whether captions have neither, as GLIDE's.
      digest: hexadecimal SHA-256 of symbols and merges; equal vocabularies have equal digests, whatever their files.
    """

    def __init__(self, vocabulary: str):
        """Loads a vocabulary and checks it.

        Args:
          vocabulary: "tiny" for the small one that comes with this package, or a folder that holds `vocab.json` and
            `merges.txt` (or `tokenizer.json`) of OpenAI's CLIP or of another vocabulary in its format; or GPT-2's, for
            GLIDE, which may also be called `encoder.json` and `vocab.bpe`, gzipped or not.

        Raises:
          InputError: if the folder or a file is missing or damaged, or if a known caption gets the wrong ids.
        """
        symbols, merges = _read(_folder(vocabulary))
        self.bare = _START not in symbols and not any(symbol.endswith("</w>") for symbol in symbols)
        _check_symbols(symbols, merges, vocabulary, bare=self.bare)
        self.vocab_size = len(symbols)
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1
        self.digest = _digest(symbols, merges)
        if vocabulary == "tiny" and self.digest != _TINY_DIGEST:
            raise InputError("the vocabulary 'tiny' of this installation is damaged: install unclip_jax again")
        self._vocabulary = vocabulary
        self._backend = _glide_tokenizer(symbols, merges) if self.bare else _clip_tokenizer(symbols, merges)
        answers = _TINY_ANSWERS if vocabulary == "tiny" else _KNOWN_ANSWERS.get(self.vocab_size, ())
        for caption, expected in answers:
            found = self._words([caption])[0]
            if tuple(found) != expected:
                raise InputError(f"vocabulary {vocabulary!r} gives {caption!r} the ids {found}, not {list(expected)}")

    def encode(self, captions: Sequence[str], context_length: int) -> Int32[np.ndarray, "b n"]:
        """Returns ids `[SOT] words [EOT] 0 0 ...`, int32 [b, context_length], each in [0, vocab_size).

        Captions are cleaned first (`captions.clean`). Words that do not fit are cut and EOT stays last, as in
        OpenAI's `clip.tokenize(truncate=True)`. `<|endoftext|>` inside a caption is text like any other. Id 0 after
        EOT is padding, although 0 is also a symbol ("!"): nothing after the first EOT is ever read. GLIDE's are
        `words EOT EOT ...`, where EOT is padding, and no more than the words where they fill the context.

        Raises:
          InputError: if `context_length` has no room for SOT, one word and EOT.
        """
        if context_length < 3:
            raise InputError(f"a context of {context_length} tokens holds no word: it must be 3 or more")
        ids = np.full((len(captions), context_length), self.eot if self.bare else 0, np.int32)
        for row, words in zip(ids, self._words(captions), strict=True):
            if self.bare:
                row[: len(words)] = words[:context_length]
                continue
            kept = words[: context_length - 2]
            row[0] = self.sot
            row[1 : 1 + len(kept)] = kept
            row[1 + len(kept)] = self.eot
        return ids

    def decode(self, ids: Sequence[int] | Int32[np.ndarray, " n"]) -> str:
        """Returns the text of ids up to the first EOT, without SOT: lower case, one space between words."""
        words = []
        for number in ids:
            if number == self.eot:
                break
            if self.bare or number != self.sot:
                words.append(int(number))
        return self._backend.decode(words, skip_special_tokens=False)

    def _words(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns each cleaned caption's ids, without SOT and EOT."""
        if not captions:
            return []
        cleaned = [captions_lib.clean(caption) for caption in captions]
        # The Rust tokenizer itself, not the Python call around it, which sets truncation and padding anew at every call
        # and so fails ("already borrowed") when loader threads share it.
        return [encoded.ids for encoded in self._backend.encode_batch_fast(cleaned, add_special_tokens=False)]

    def files(self) -> dict[str, str]:
        """Returns name -> content of the files that make the same tokenizer again, `vocab.json` and `merges.txt`."""
        symbols, merges = _read(_folder(self._vocabulary))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        return {"vocab.json": json.dumps(symbols, ensure_ascii=False), "merges.txt": "\n".join(lines)}

    def save(self, folder: pathlib.Path) -> None:
        """Writes these files into a folder."""
        for name, content in self.files().items():
            (folder / name).write_text(content, encoding="utf-8")

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str]]:
        # Loader processes read and check the vocabulary themselves.
        return Tokenizer, (self._vocabulary,)


def _clip_tokenizer(symbols: dict[str, int], merges: Any) -> "tokenizers.Tokenizer":
    # Late, as it costs a second; and never online: a vocabulary is a file that is here.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    backend = transformers.CLIPTokenizer(vocab=symbols, merges=merges).backend_tokenizer
    # "<|endoftext|>" in a caption is text.
    backend.encode_special_tokens = True
    return backend


def _folder(vocabulary: str) -> pathlib.Path:
    if vocabulary == "tiny":
        return pathlib.Path(str(importlib.resources.files(vocabulary_training.__package__)))
    return pathlib.Path(vocabulary).expanduser()


def _glide_tokenizer(symbols: dict[str, int], merges: Any) -> "tokenizers.Tokenizer":
    """GPT-2's byte pairs of lower-case text: words with the space before them, no symbol for the end of a word."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE(vocab=symbols, merges=merges))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read(folder: pathlib.Path) -> tuple[dict[str, int], Merges]:
    """Reads symbols and merges from `vocab.json` and `merges.txt` (or GLIDE's names), or from `tokenizer.json`."""
    if not folder.is_dir():
        raise InputError(
            f"vocabulary {str(folder)!r} is not a folder: it must be 'tiny' or a folder with vocab.json and merges.txt"
        )
    try:
        names = next((pair for pair in _FILES if all((folder / name).is_file() for name in pair)), None)
        if names:
            symbols = json.loads(_text(folder / names[0]))
            # Not splitlines: symbols may hold characters that it takes for line ends.
            lines = _text(folder / names[1]).split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            symbols = model["vocab"]
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        else:
            raise InputError(f"folder {str(folder)!r} holds neither vocab.json and merges.txt nor tokenizer.json")
        return {str(symbol): int(number) for symbol, number in symbols.items()}, [(a, b) for a, b in merges]
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the vocabulary in {str(folder)!r} cannot be read: {error}") from error


def _text(path: pathlib.Path) -> str:
    """Reads a file, gzipped where its name says so; a longer one than any vocabulary is no vocabulary."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise ValueError(f"{path.name} has more than {_LONGEST} bytes")
    return content.decode("utf-8")


def _check_symbols(symbols: dict[str, int], merges: Merges, vocabulary: str, *, bare: bool) -> None:
    """Checks that the files are whole and in CLIP's format."""

    def require(condition: bool, wrong: str) -> None:
        if not condition:
            raise InputError(f"vocabulary {vocabulary!r} is damaged or not CLIP's: {wrong}")

    size = len(symbols)
    require(sorted(symbols.values()) == list(range(size)), f"the ids of its {size} symbols are not 0 to {size - 1}")
    for symbol, number in (((_END, size - 1),) if bare else ((_START, size - 2), (_END, size - 1))):
        require(symbols.get(symbol) == number, f"{symbol} should be id {number}, not {symbols.get(symbol)}")
    # Without all bytes, some text would map to the unknown symbol, which in CLIP is EOT.
    letters = vocabulary_training.byte_symbols()
    letters = [*letters] if bare else [*letters, *(letter + "</w>" for letter in letters)]
    missing = [symbol for symbol in letters if symbol not in symbols]
    require(not missing, f"it lacks {len(missing)} of the {len(letters)} byte symbols")
    lost = [a + b for a, b in merges if a + b not in symbols]
    require(not lost, f"the result of {len(lost)} merges is no symbol, such as {lost[:1]}")
    expected = size - len(letters) - (1 if bare else 2)
    require(len(merges) == expected, f"it has {len(merges)} merges where its size asks for {expected}")


def _digest(symbols: dict[str, int], merges: Merges) -> str:
    ordered = sorted(symbols, key=symbols.__getitem__)
    return hashlib.sha256(json.dumps([ordered, merges]).encode()).hexdigest()
