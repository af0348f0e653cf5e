"""A folder of results: pictures with what made them, known by their names, so that a stopped command goes on."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax import picture_files, provenance
from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.manipulation import motion

MANIFEST = "manifest.json"


class Results:
    """Writes pictures into a folder that belongs to one command and its options, and knows which are there."""

    def __init__(self, folder: str, *, record: Mapping[str, Any]):
        """Takes a folder that is empty, not there, or holds results of the same record, which manifest.json holds.

        Raises:
          InputError: it holds something else.
        """
        self.folder = pathlib.Path(folder).expanduser()
        self.record = json.loads(json.dumps(record))
        path = self.folder / MANIFEST
        if path.exists():
            self._check_same(path)
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} holds something else than results of this command; use another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.finish({})

    def _check_same(self, path: pathlib.Path) -> None:
        try:
            there = dict(json.loads(path.read_text())["record"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no list of results of this program; use another --out") from error
        keys = sorted(key for key in {**there, **self.record} if there.get(key) != self.record.get(key))
        if keys:
            named = "; ".join(f"{key} was {there.get(key)!r}, is {self.record.get(key)!r}" for key in keys)
            raise InputError(f"{self.folder} holds results made otherwise ({named}); use another --out")

    def has(self, name: str) -> bool:
        """Whether a whole picture of this name is there; a damaged one is made again."""
        return self.read(name) is not None

    def read(self, name: str) -> np.ndarray | None:
        """Returns a picture, uint8 [h, w, 3], or None where there is no whole one."""
        try:
            with Image.open(self.folder / f"{name}.png") as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError:
            return None

    def whole(self, name: str) -> np.ndarray:
        """Returns a picture that was written.

        Raises:
          InputError: it was damaged or taken away since.
        """
        pixels = self.read(name)
        if pixels is None:
            raise InputError(f"{self.folder / name}.png was there and is not any more; use another --out")
        return pixels

    def save(self, name: str, pixels: np.ndarray, text: Mapping[str, str]) -> None:
        """Writes uint8 [h, w, 3] as name.png, with text beside what every picture carries."""
        marks = provenance.marks(f"unclip_jax {self.record['versions']['unclip_jax']}")
        made = {**text, **marks, "unclip_jax": json.dumps(self.record, sort_keys=True)}
        picture_files.save(self.folder / f"{name}.png", pixels, made)

    def save_motion(self, name: str, frames: motion.Frames, formats: Sequence[str], *, fps: float) -> None:
        """Writes frames as name.gif and name.mp4, where these are among the formats."""
        if "gif" in formats:
            motion.write_gif(self.folder / f"{name}.gif", frames, fps=fps)
        if "mp4" in formats:
            motion.write_mp4(self.folder / f"{name}.mp4", frames, fps=fps)

    def finish(self, content: Mapping[str, Any]) -> None:
        """Writes manifest.json: the record, and what there is to say of the results."""
        whole = {"record": self.record, **content}
        with sealed.Replacing(self.folder / MANIFEST) as file:
            file.write((json.dumps(whole, indent=1) + "\n").encode())
