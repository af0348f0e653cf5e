"""What cleaning promises for any text: one short line of well-formed Unicode, in a time that does not grow."""

import time
import unicodedata

import pytest

from unclip_jax.data import captions


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("a red circle", "a red circle"),
        ("  a\t red\r\n\n circle ", "a red circle"),
        ("a\u00a0red\u3000circle", "a red circle"),
        ("cafe\u0301", "caf\u00e9"),
        ("a \ud800red\udfff circle", "a red circle"),
        ("a\x00 r\x1bed \x7fcircle", "a red circle"),
        ("a \u202ered\u202c circle\ufeff", "a red circle"),
        ("\u200b \x00 \n", ""),
        ("", ""),
        ("\U0001f468\u200d\U0001f680", "\U0001f468\u200d\U0001f680"),
        ("\u65e5\u672c \U0001f389", "\u65e5\u672c \U0001f389"),
    ],
)
def test_cleans(dirty, expected):
    assert captions.clean(dirty) == expected


def test_cap_keeps_whole_words_and_length():
    words = "word " * 1000
    cleaned = captions.clean(words)
    assert 990 <= len(cleaned) <= 1000 and set(cleaned.split(" ")) == {"word"}
    assert captions.clean("x" * 5000) == "x" * 1000


def test_any_text_becomes_clean_text_and_stays_so():
    points = [chr(point) for point in range(0, 0x11000, 7)]
    for start in range(0, len(points), 500):
        cleaned = captions.clean("".join(points[start : start + 500]))
        cleaned.encode("utf-8")
        assert unicodedata.is_normalized("NFC", cleaned)
        assert captions.clean(cleaned) == cleaned
        assert len(cleaned) <= 1000 and "\n" not in cleaned


def test_time_does_not_grow_with_the_caption():
    begin = time.perf_counter()
    captions.clean("x" * 10**7)
    captions.clean("ab " * 3 * 10**6)
    assert time.perf_counter() - begin < 0.5
