"""Folders of generated images, read as the images of each caption."""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

from unclip_jax.data import captions as captions_lib
from unclip_jax.data import folders
from unclip_jax.data.records import Bad
from unclip_jax.errors import InputError

MANIFEST = "manifest.json"  # what `generate` writes


def read(path: str) -> dict[str, list[pathlib.Path]]:
    """Returns the images of each caption, in the order in which they are listed.

    Args:
      path: a folder that `generate` wrote, or one with `captions.jsonl` or `captions.csv`, or such a file. Where
        `generate` drew by several priors, `folder@prior` is the images of one of them.

    Returns:
      caption, cleaned as the networks read it -> files.

    Raises:
      InputError: there is no such folder or list, a row of it names no caption or no picture, or several priors.
    """
    whole, _, prior = path.rpartition("@")
    if not whole or pathlib.Path(path).expanduser().exists():
        whole, prior = path, ""
    place = pathlib.Path(whole).expanduser()
    if place.is_dir():
        named = [place / name for name in (MANIFEST, *folders.CAPTION_FILES) if (place / name).exists()]
        if not named:
            raise InputError(f"{place} has no {MANIFEST} and none of {', '.join(folders.CAPTION_FILES)}")
        place = named[0]
    elif not place.exists():
        raise InputError(f"there is no folder {place}; write --model=NAME=FOLDER")
    if place.name == MANIFEST:
        return _by_caption(_manifest_rows(place, prior), place)
    if prior:
        raise InputError(f"{place} knows no priors; leave out @{prior}")
    return _by_caption(_listed_rows(place), place)


def _manifest_rows(path: pathlib.Path, prior: str) -> list[tuple[str, str]]:
    try:
        rows: Sequence[Mapping[str, str]] = json.loads(path.read_text(encoding="utf-8"))["images"]
        priors = sorted({row["prior"] for row in rows})
        named = [(row["prompt"], row["file"]) for row in rows if row["prior"] == (prior or row["prior"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no list of images by unclip_jax.generate") from error
    if prior and prior not in priors:
        raise InputError(f"{path} lists no images by the prior {prior!r}, but by {', '.join(priors)}")
    if len(priors) > 1 and not prior:
        raise InputError(f"{path} lists images by {', '.join(priors)}; name one, as in {path.parent}@{priors[0]}")
    return named


def _listed_rows(path: pathlib.Path) -> list[tuple[str, str]]:
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"{path} is none of {', '.join((MANIFEST, *folders.CAPTION_FILES))}")
    rows = []
    for unit in folders.find_chunks(str(path), entries_per_chunk=sys.maxsize):
        for entry in folders.read_entries(unit):
            if isinstance(entry, Bad):
                raise InputError(f"{path}, {entry.key}: {entry.reason}")
            rows.append((entry.caption, entry.key))
    return rows


def _by_caption(rows: Sequence[tuple[str, str]], path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    found: dict[str, list[pathlib.Path]] = {}
    for caption, name in rows:
        cleaned, file = captions_lib.clean(caption), path.parent / name
        if not cleaned:
            raise InputError(f"{path} has an empty caption, for {name}")
        if not file.is_file() or not file.resolve().is_relative_to(path.parent.resolve()):
            raise InputError(f"{path} lists {name}, which is not there")
        found.setdefault(cleaned, []).append(file)
    if not found:
        raise InputError(f"{path} lists no images")
    return found
