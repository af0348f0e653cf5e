"""Captioned pictures as strangers hand them over: still encoded, named, and good, bad or no part of it."""

import dataclasses
import json

from unclip_jax.errors import InputError

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")
CAPTION_FIELDS = ("caption", "text")
LABEL_FIELD = "label"

MAX_PICTURE_BYTES = 2**26
# img2dataset's JSON carries EXIF and URLs beside the caption; a line of captions.jsonl may do the same.
MAX_TEXT_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of a source that one worker reads in one go: a tar shard, or some consecutive lines of a caption file.

    Attributes:
      index: place in the source, from 0; the order of the result.
      kind: "tar", "jsonl" or "csv".
      path: the tar or caption file.
      size: bytes of the tar shard; 0 for caption files, whose content `digest` pins down.
      first_id: id of the unit's first record; ids of different units never meet.
      offset, line, entries: where the first entry begins, in bytes and lines from 0, and how many there are.
      digest: SHA-256 of the caption file.
    """

    index: int
    kind: str
    path: str
    size: int = 0
    first_id: int = 0
    offset: int = 0
    line: int = 0
    entries: int = 0
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """A picture, still encoded, with its caption and label as they were found; the label is "" where there is none."""

    source: str
    key: str
    image: bytes
    caption: str
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Bad:
    """What could not be used: an example by its key or line, or with an empty key the rest of a damaged archive."""

    source: str
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Ignored:
    """A member that is no part of an example: a link, a device, another extension, a hidden file."""

    source: str
    name: str


class Fault(str):
    """Why a member is unusable, standing in for its bytes."""


def parse_object(text: str) -> dict:
    """Parses a JSON object; raises InputError where the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("its JSON is not valid") from None
    if not isinstance(value, dict):
        raise InputError("its JSON is not an object {...}")
    return value


def field(entry: dict, names: tuple[str, ...]) -> str:
    """Returns the first of these fields that holds text; raises InputError where none does."""
    for name in names:
        if isinstance(value := entry.get(name), str) and value.strip():
            return value
    raise InputError(f"has no text in a field {' or '.join(map(repr, names))}")


def label(entry: dict) -> str:
    """Returns what the field `label` holds, a class by name or number; "" where it holds nothing of the kind."""
    value = entry.get(LABEL_FIELD)
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
