"""Writes a study: a folder with a page for raters, and the key that says which model made what, outside of it.

The page is a file that a browser opens without a server or a network. Its images lie beside it and are loaded one
question ahead, so that thousands of questions are as quick as ten. They are written anew, under numbers in random
order and without the text that `generate` puts into its files: nothing in the folder names a model.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.console
import rich.progress
from jaxtyping import UInt8
from PIL import Image

from unclip_jax import pages
from unclip_jax.data import images as images_lib
from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.human_study.questions import KINDS, Question

PAGE, IMAGES, SCRIPT, KEY = "page", "images", "study.js", "key.json"
FORMAT = 1
# A grid is shown some 600 pixels wide: larger pictures in it would only fill the disk.
_GRID_CELL, _GRID_GAP = 160, 4
_GRID_PAPER = 255


@dataclasses.dataclass(frozen=True)
class Study:
    """What the key holds.

    Attributes:
      study: names the study, in the page and in its answers.
      seed: of everything drawn.
      size: pixels a side that images were resized to; 0 where they were left as they are.
      models: name -> where its images came from.
      questions: in the page's order; the first has the number 1.
    """

    study: str
    seed: int
    size: int
    models: dict[str, str]
    questions: list[Question]


def write(out: pathlib.Path, questions: Sequence[Question], *, models: dict[str, str], seed: int, size: int) -> Study:
    """Writes `out`/page and `out`/key.json; `out` appears whole or not at all.

    Args:
      out: a folder that is not there yet.
      questions: of `draw`.
      models: name -> where its images came from, for the key.
      seed: which the questions were drawn with.
      size: pixels a side that all images are resized to; 0 leaves them as they are.

    Raises:
      InputError: `out` is there already, an image cannot be read, or images have different sizes and `size` is 0.
    """
    if out.exists():
        raise InputError(f"{out} is there already; a study is never overwritten, for its answers would be lost")
    # Models as a list: their order says which of two is asked about, and the file's objects are sorted.
    content = {"seed": seed, "size": size, "models": list(models.items())}
    content["questions"] = [dataclasses.asdict(question) for question in questions]
    # The seed is part of what is digested, so that names of models cannot be found by trying.
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / PAGE / IMAGES).mkdir(parents=True)
    names = _write_images(partial / PAGE / IMAGES, questions, seed=seed, size=size)
    (partial / PAGE / "index.html").write_text(_html(name, questions, names), encoding="utf-8")
    script = importlib.resources.files("unclip_jax") / "templates" / "human_study.js"
    (partial / PAGE / SCRIPT).write_bytes(script.read_bytes())
    sealed.write(partial / KEY, sealed.sealed({"format": FORMAT, "study": name, **content}))
    partial.rename(out)
    return Study(name, seed, size, models, list(questions))


def read_key(path: pathlib.Path) -> Study:
    """Returns what a study's key.json holds.

    Raises:
      InputError: there is no such file, or it is damaged or no key.
    """
    content = sealed.read(path)
    if content is None or content.get("format") != FORMAT:
        raise InputError(f"{path} is missing, damaged or no key of a study; it is the {KEY} beside the folder {PAGE}")
    questions = [Question.read(row) for row in content["questions"]]
    return Study(content["study"], content["seed"], content["size"], dict(content["models"]), questions)


def grid(images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "s t 3"]:
    """Returns a square grid of n² images of one size, on white, each at most 160 pixels wide."""
    columns = round(len(images) ** 0.5)
    height, width = images[0].shape[:2]
    scale = min(1, _GRID_CELL / max(height, width))
    height, width = round(height * scale), round(width * scale)
    sides = [columns * side + (columns - 1) * _GRID_GAP for side in (height, width)]
    paper = np.full((*sides, 3), _GRID_PAPER, np.uint8)
    for place, image in enumerate(images):
        top, left = (place // columns) * (height + _GRID_GAP), (place % columns) * (width + _GRID_GAP)
        paper[top : top + height, left : left + width] = _resized(image, width, height)
    return paper


def _resized(image: UInt8[np.ndarray, "h w 3"], width: int, height: int) -> UInt8[np.ndarray, "_ _ 3"]:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _write_images(
    folder: pathlib.Path, questions: Sequence[Question], *, seed: int, size: int
) -> dict[tuple[str, ...], str]:
    """Writes what stands on any side of a question, each once; returns its files -> name on the page."""
    sides = sorted({files for question in questions for files in (question.left_images, question.right_images)})
    order = np.random.default_rng((seed, 1)).permutation(len(sides))
    names, first = {}, (sides[0][0], (0, 0))
    console = rich.console.Console(stderr=True)
    for number, place in enumerate(rich.progress.track(order, "images", console=console, transient=True), 1):
        shown = []
        for file in sides[place]:
            pixels = _read_image(file)
            if size:
                pixels = _resized(pixels, size, size)
            first = (file, pixels.shape[:2]) if first[1] == (0, 0) else first
            if pixels.shape[:2] != first[1]:
                (a, b), (c, d) = first[1], pixels.shape[:2]
                raise InputError(
                    f"{first[0]} has {b}x{a} pixels and {file} {d}x{c}; give --size, the pixels a side at which all "
                    "are shown, or raters would know models by their sizes"
                )
            shown.append(pixels)
        names[sides[place]] = f"{IMAGES}/{number:06d}.png"
        picture = grid(shown) if len(shown) > 1 else shown[0]
        (folder.parent / names[sides[place]]).write_bytes(images_lib.encode_png(picture))
    return names


def _read_image(file: str) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return images_lib.decode(pathlib.Path(file).read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _html(study: str, questions: Sequence[Question], names: dict[tuple[str, ...], str]) -> str:
    rows = []
    for number, question in enumerate(questions, 1):
        row: dict[str, Any] = {"id": number, "kind": question.kind}
        row |= {"left": names[question.left_images], "right": names[question.right_images]}
        rows.append(row | ({"caption": question.caption} if KINDS[question.kind].shows_caption else {}))
    kinds = {kind: dataclasses.asdict(KINDS[kind]) for kind in {question.kind for question in questions}}
    content = {"format": FORMAT, "study": study, "kinds": kinds, "questions": rows}
    return pages.environment().get_template("human_study.html").render(content=content, script=SCRIPT)
