"""The tokenizer against a byte-pair encoder written here from the definition, and against hostile captions."""

import importlib.resources
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from unclip_jax.data import tokenizer as tokenizer_lib
from unclip_jax.data.vocabulary import training
from unclip_jax.errors import InputError

FOLDER = importlib.resources.files("unclip_jax.data.vocabulary")
CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.Tokenizer("tiny")


class Oracle:
    """Byte-pair encoding as Sennrich et al. (2016) define it: join the best-ranked neighbours until none are left.

    Splits ASCII text only, into runs of letters, single digits and runs of other signs.
    """

    def __init__(self):
        self.ids = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
        lines = (FOLDER / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        self.ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}

    def words(self, caption):
        words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower())
        return [number for word in words for number in self._word(word)]

    def _word(self, word):
        parts = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [(self.ranks[pair], pair) for pair in zip(parts, parts[1:], strict=False) if pair in self.ranks]
            if not pairs:
                return [self.ids[part] for part in parts]
            best = min(pairs)[1]
            joined, position = [], 0
            while position < len(parts):
                if tuple(parts[position : position + 2]) == best:
                    joined.append("".join(best))
                    position += 2
                else:
                    joined.append(parts[position])
                    position += 1
            parts = joined


def test_equals_an_independent_byte_pair_encoder(tokenizer):
    oracle = Oracle()
    captions = [*training.shape_captions(50, seed=9), *training.emoji_names()[::7]]
    captions += ["A Zebra; eats 123 (pieces) of strange-looking cake", "mississippi aaaaaaa banana", "x!?x ,,, ..."]
    for caption, row in zip(captions, tokenizer.encode(captions, 64), strict=True):
        words = oracle.words(caption)[:62]
        expected = [tokenizer.sot, *words, tokenizer.eot] + [0] * (62 - len(words))
        assert row.tolist() == expected, caption


def test_layout_and_special_ids(tokenizer):
    assert (tokenizer.sot, tokenizer.eot, tokenizer.vocab_size) == (2046, 2047, 2048)
    empty, word = tokenizer.encode(["", "red"], 5).tolist()
    assert empty == [2046, 2047, 0, 0, 0]
    assert word[0] == 2046 and word[2:] == [2047, 0, 0]
    assert tokenizer.encode([], 5).shape == (0, 5)


def test_truncation_keeps_the_first_words_and_ends_with_eot(tokenizer):
    caption = "a small striped red star left of a large blue circle on a grey background"
    full = tokenizer.encode([caption], CONTEXT)[0]
    for length in range(3, CONTEXT):
        cut = tokenizer.encode([caption], length)[0]
        ends = min(length - 1, int(np.argmax(full == tokenizer.eot)))
        assert cut[ends] == tokenizer.eot
        np.testing.assert_array_equal(cut[:ends], full[:ends])
    with pytest.raises(InputError, match="3 or more"):
        tokenizer.encode([caption], 2)


@pytest.mark.parametrize("marker", ["<|endoftext|>", "<|startoftext|>"])
def test_special_tokens_in_a_caption_are_text(tokenizer, marker):
    row = tokenizer.encode([f"a {marker} b"], CONTEXT)[0]
    assert np.sum(row == tokenizer.eot) == 1 and np.sum(row == tokenizer.sot) == 1
    assert tokenizer.decode(row).replace(" ", "") == f"a{marker}b"


@pytest.mark.parametrize(
    "caption", ["a red circle", "h\u00e9llo w\u00f6rld", "\u65e5\u672c", "\U0001f389", "\u043f\u0440\u0438\u0432\u0435"]
)
def test_any_script_comes_back(tokenizer, caption):
    assert tokenizer.decode(tokenizer.encode([caption], 64)[0]) == caption


def test_hostile_captions_are_fast_and_valid(tokenizer):
    tokenizer.encode(["warm"], CONTEXT)
    begin = time.perf_counter()
    ids = tokenizer.encode(["x" * 10**7, "ab " * 3 * 10**6, "\ud800", "\x00", "'" * 10**6], CONTEXT)
    assert time.perf_counter() - begin < 1.0
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    np.testing.assert_array_equal(np.sum(ids == tokenizer.eot, axis=1), 1)


def test_a_context_of_24_holds_emoji_names_and_scenes(tokenizer):
    captions = [*training.emoji_names(), *training.shape_captions(500, seed=3)]
    lengths = np.argmax(tokenizer.encode(captions, 64) == tokenizer.eot, axis=1) + 1
    assert lengths.max() <= CONTEXT


def copy_vocabulary(folder, change=lambda symbols: symbols):
    symbols = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(change(symbols)), encoding="utf-8")
    (folder / "merges.txt").write_bytes((FOLDER / "merges.txt").read_bytes())


def test_the_same_vocabulary_from_other_files(tokenizer, tmp_path):
    copy_vocabulary(tmp_path)
    from_folder = tokenizer_lib.Tokenizer(str(tmp_path))
    symbols = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = [line.split(" ") for line in (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]]
    (tmp_path / "single").mkdir()
    model = {"model": {"type": "BPE", "vocab": symbols, "merges": merges}}
    (tmp_path / "single" / "tokenizer.json").write_text(json.dumps(model), encoding="utf-8")
    from_single = tokenizer_lib.Tokenizer(str(tmp_path / "single"))
    assert tokenizer.digest == from_folder.digest == from_single.digest
    caption = ["a large checkered heart"]
    np.testing.assert_array_equal(tokenizer.encode(caption, 9), from_single.encode(caption, 9))


def swap(symbols):
    return {**symbols, "a</w>": symbols["b</w>"], "b</w>": symbols["a</w>"]}


def shorten(symbols):
    return dict(list(symbols.items())[:-1])


@pytest.mark.parametrize("change", [shorten, lambda s: [*s], lambda s: {**s, "!": "x"}, lambda s: {**s, "!": 5}])
def test_a_damaged_vocabulary_is_refused(tmp_path, change):
    copy_vocabulary(tmp_path, change)
    with pytest.raises(InputError, match="damaged|cannot be read"):
        tokenizer_lib.Tokenizer(str(tmp_path))


def test_a_vocabulary_of_openais_size_must_give_openais_ids(tmp_path):
    # A whole, well-formed vocabulary of the right size that is not OpenAI's.
    symbols = training.byte_symbols()
    symbols += [symbol + "</w>" for symbol in symbols]
    first = [symbol for symbol in symbols[:256] if not symbol.isspace()]
    merges = [(a, b) for a in first for b in first][: 49408 - 514]
    symbols += [a + b for a, b in merges] + list(training.SPECIALS)
    (tmp_path / "vocab.json").write_text(json.dumps({s: n for n, s in enumerate(symbols)}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(f"{a} {b}" for a, b in merges), encoding="utf-8")
    with pytest.raises(InputError, match="a photo of a cat"):
        tokenizer_lib.Tokenizer(str(tmp_path))


def test_a_missing_folder_is_an_error_and_no_look_up(tmp_path):
    for name in ["openai/clip-vit-base-patch32", str(tmp_path / "nowhere")]:
        with pytest.raises(InputError, match="not a folder"):
            tokenizer_lib.Tokenizer(name)
    with pytest.raises(InputError, match="neither"):
        tokenizer_lib.Tokenizer(str(tmp_path))


def test_the_digest_tells_vocabularies_apart(tokenizer, tmp_path):
    copy_vocabulary(tmp_path, swap)
    assert tokenizer_lib.Tokenizer(str(tmp_path)).digest != tokenizer.digest


def test_import_is_light():
    heavy = ("transformers", "torch", "tensorflow")
    program = f"import sys, unclip_jax.data.tokenizer; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
