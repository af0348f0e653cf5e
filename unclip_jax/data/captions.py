"""Cleaning of captions: whatever text a data set or a user brings becomes one short, plain line."""

import re
import unicodedata

# About what the longest context of the paper's models, 256 tokens (Table 3), holds of English. Without a cap a caption
# of 1e7 characters keeps the tokenizer busy for 20 s.
MAX_CHARACTERS = 1000

_SPACE = re.compile(r"\s+")
# Zero-width joiner and non-joiner are format characters (Cf) that emoji and Indic and Persian words are spelled with.
_KEPT_FORMATS = frozenset("‌‍")
_DROPPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Cn"})


def clean(caption: str) -> str:
    """Returns the caption as one line of at most `MAX_CHARACTERS` characters in Unicode normal form C.

    White space is folded to single spaces and trimmed; control characters, invisible format characters, lone
    surrogates and unassigned code points are dropped. Cleaning a clean caption changes nothing, and the time taken
    does not grow with the caption.

    Args:
      caption: any Python string.

    Returns:
      Text that encodes to UTF-8; "" where nothing is left.
    """
    # No visible character of a sensible caption is lost by cutting early: four times the cap leaves room for what the
    # next steps drop or compose.
    text = caption[: 4 * MAX_CHARACTERS]
    text = _SPACE.sub(" ", text)
    text = "".join(c for c in text if c in _KEPT_FORMATS or unicodedata.category(c) not in _DROPPED_CATEGORIES)
    text = _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()
    return _cut(text)


def _cut(text: str) -> str:
    """Cuts to the cap at the end of a word where one is near, so that no half word is read as another word."""
    if len(text) <= MAX_CHARACTERS:
        return text
    head = text[:MAX_CHARACTERS]
    if text[MAX_CHARACTERS] != " ":
        space = head.rfind(" ")
        if space >= MAX_CHARACTERS // 2:
            head = head[:space]
    # A cut may part a letter from its accent; normal form C then still holds, since the head was already composed.
    return head.strip()
