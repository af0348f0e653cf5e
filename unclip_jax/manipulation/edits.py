"""Editing by words: a picture is filled again and again, elsewhere and by another prompt (GLIDE, figure 3)."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import numpy as np
from jaxtyping import UInt8

from unclip_jax import unclip
from unclip_jax.data import captions
from unclip_jax.errors import InputError, nearest
from unclip_jax.manipulation import clip_guidance, inpainting, masks
from unclip_jax.predictor import Drawing

_KEYS = ("prompt", "box", "mask")


class Edit(NamedTuple):
    """One step.

    Attributes:
      prompt: what the whole picture is to show after it.
      mask: True where it is to be filled, bool [h, w].
    """

    prompt: str
    mask: masks.Mask


def read(path: str, *, height: int, width: int) -> list[Edit]:
    """Returns the edits in a file, for a picture of this size.

    The file is a JSON list, or has one JSON object a line: {"prompt": "a red star", "box": [8, 8, 24, 24]}, or with
    "mask": a picture file beside it, white where to fill.

    Raises:
      InputError: the file or a mask cannot be read, or is none for this picture; the entry is named.
    """
    file = pathlib.Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the edits in {path!r} cannot be read: {error}") from error
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else [
            json.loads(line) for line in text.splitlines() if line.strip()
        ]  # fmt: skip
    except ValueError as error:
        raise InputError(
            f"{path!r} is no JSON ({error}); write a list, or one object a line: "
            '{"prompt": "a red star", "box": [8, 8, 24, 24]}'
        ) from error
    if not entries:
        raise InputError(f'{path!r} holds no edit; write one object a line: {{"prompt": "…", "box": [8, 8, 24, 24]}}')
    return [_edit(entry, f"edit {number} of {path!r}", file, height, width) for number, entry in enumerate(entries, 1)]


def _edit(entry: object, what: str, file: pathlib.Path, height: int, width: int) -> Edit:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or ("box" in entry) == ("mask" in entry):
        raise InputError(f"{what} is not an object with a prompt, and either a box or a mask: {entry!r}")
    prompt = captions.clean(entry["prompt"])
    if not prompt:
        raise InputError(f"{what} has an empty prompt; describe what the whole picture is to show")
    for key in entry:
        if key not in _KEYS:
            raise InputError(f"{what}: there is no key {key!r}; {nearest(key, _KEYS)}")
    try:
        if "mask" in entry:
            return Edit(prompt, masks.read(str(file.parent / str(entry["mask"])), height=height, width=width))
        corners = entry["box"]
        if not isinstance(corners, list) or any(type(number) is not int for number in corners):
            raise InputError(f"the box {corners!r} is not a list of four whole numbers x0, y0, x1, y1")
        return Edit(prompt, masks.box(corners, height=height, width=width))
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def edit(
    model: unclip.UnCLIP,
    images: UInt8[np.ndarray, "n s s 3"],
    edits: Sequence[Edit],
    *,
    prior: str = "diffusion",
    negative: str | None = None,
    clip_guidance_scale: float = 0.0,
    **drawing: Unpack[Drawing],
) -> list[UInt8[np.ndarray, "n s s 3"]]:
    """Returns the images after each of the edits, which all of them go through.

    Args:
      model: as for `inpainting.inpaint`.
      images: as large as the model's.
      edits: in order, their masks as large.
      clip_guidance_scale: how much a guided model (`clip_guidance.guided`) is led to each prompt; 0 is not.
      prior, negative, drawing: as for `inpainting.inpaint`.

    Raises:
      InputError: there is no edit, or as `inpaint` does.
    """
    if not edits:
        raise InputError("there is no edit; give at least one prompt with a mask")
    for one in edits:
        inpainting.check(model, images, np.stack([one.mask] * len(images)), [one.prompt] * len(images))
    ids = drawing.get("ids")
    numbers = range(len(images)) if ids is None else ids
    made = []
    for order, one in enumerate(edits):
        own: Drawing = {**drawing, "ids": [unclip.image_id(f"edit {order}", int(number)) for number in numbers]}
        if clip_guidance_scale:
            own["extra"] = clip_guidance.towards(model, [one.prompt] * len(images), scale=clip_guidance_scale)
        filled = inpainting.inpaint(
            model,
            images,
            np.stack([one.mask] * len(images)),
            [one.prompt] * len(images),
            prior=prior,
            negative=negative,
            **own,
        )
        images = filled.last
        made.append(images)
    return made
