"""What the quickstart measured: samples scored by the oracle, curves, times; all of it goes into report.json."""

import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax import checkpoint, metrics
from unclip_jax import config as configs
from unclip_jax.data import datasets, resize
from unclip_jax.data.scenes import parse_caption
from unclip_jax.errors import InputError
from unclip_jax.evaluation import oracle

# Of the quickstart: single objects, diffusion prior. Shown beside what was measured.
GOAL = {"colour": 0.85, "shape": 0.70, "both": 0.60}
_EXAMPLES = {"single": 8, "two": 8}
_ORACLE_RENDERS = 512
# Weight of the newest point in a smoothed curve.
_SMOOTHING = 0.25

Pixels = UInt8[np.ndarray, "n h w 3"]


@dataclasses.dataclass(frozen=True)
class Render:
    """A real picture of the data set: its caption and PNG bytes."""

    caption: str
    png: bytes


def renders(directory: str, split: str, *, count: int) -> list[Render]:
    """Returns the first `count` examples of a split that have different captions; fewer where there are no more."""
    source = datasets.open_source(directory, split)
    found: dict[str, Render] = {}
    for index in range(len(source)):
        if len(found) == count:
            break
        record = source[index]
        caption = bytes(record["caption"]).decode()
        found.setdefault(caption, Render(caption, bytes(record["image"])))
    return list(found.values())


def pixels_of(items: Sequence[Render], *, side: int) -> Pixels:
    """Decodes renders at `side` pixels, uint8 [n, side, side, 3]."""
    decoded = [np.asarray(Image.open(io.BytesIO(item.png)).convert("RGB")) for item in items]
    return np.stack([resize.square(image, size=side) for image in decoded])


@dataclasses.dataclass(frozen=True)
class Samples:
    """The images that the generation jobs wrote.

    Attributes:
      files: (prompt, prior) -> {stage: path}, the last stage's under "image".
      timings: part -> summed numbers of all jobs.
    """

    files: dict[tuple[str, str], dict[str, pathlib.Path]]
    timings: dict[str, Any]

    @classmethod
    def read(cls, folders: Sequence[pathlib.Path]) -> "Samples":
        """Reads what `generate` left in several folders."""
        files: dict[tuple[str, str], dict[str, pathlib.Path]] = {}
        timings: dict[str, Any] = {}
        for folder in folders:
            manifest = json.loads((folder / "manifest.json").read_text())
            for row in manifest["images"]:
                stem = folder / row["file"].removesuffix(".png")
                stages = {path.stem.rpartition("-")[2]: path for path in folder.glob(f"{stem.name}-*.png")}
                files[row["prompt"], row["prior"]] = {**stages, "image": folder / row["file"]}
            for part, numbers in manifest["timings"].items():
                if isinstance(numbers, Mapping):
                    sums = timings.setdefault(part, dict.fromkeys(numbers, 0))
                    timings[part] = {key: sums[key] + value for key, value in numbers.items()}
        return cls(files, timings)

    def pixels(self, captions: Sequence[str], prior: str) -> Pixels:
        """Returns the last stage's images of captions, uint8 [n, s, s, 3].

        Raises:
          InputError: an image is missing.
        """
        lacking = [caption for caption in captions if (caption, prior) not in self.files]
        if lacking:
            raise InputError(
                f"there is no image of {lacking[0]!r} by prior {prior}; remove the folder samples, run again"
            )
        images = [Image.open(self.files[caption, prior]["image"]).convert("RGB") for caption in captions]
        return np.stack([np.asarray(image) for image in images])


def accuracy(samples: Samples, real: Mapping[str, Sequence[Render]], priors: Sequence[str]) -> dict[str, Any]:
    """Scores every split's samples by each prior against their captions, and the same captions' real renders.

    Returns:
      split -> {prior or "render": what `oracle.score` returns}.
    """
    result: dict[str, Any] = {}
    for split, items in real.items():
        captions = [item.caption for item in items]
        made = {prior: samples.pixels(captions, prior) for prior in priors}
        side = next(iter(made.values())).shape[1]
        made["render"] = pixels_of(items, side=side)
        result[split] = {name: oracle.score(images, captions) for name, images in made.items()}
    return result


def oracle_accuracy(directory: str, *, side: int) -> dict[str, Any]:
    """How well the oracle reads real renders at the size of the samples: on up to 512 that were not trained on."""
    items = renders(directory, "validation", count=_ORACLE_RENDERS)
    score = oracle.score(pixels_of(items, side=side), [item.caption for item in items])
    return {group: score[group] for group in ("single", "two") if group in score}


def examples(
    workdir: pathlib.Path, samples: Samples, real: Mapping[str, Sequence[Render]], priors: Sequence[str]
) -> list[dict[str, Any]]:
    """Picks the first captions of each kind, unselected, to be shown; saves their real renders; reads each image."""
    shown = []
    folder = workdir / "samples" / "renders"
    folder.mkdir(parents=True, exist_ok=True)
    for split, items in real.items():
        kinds: dict[str, list[Render]] = {"single": [], "two": []}
        for item in items:
            kinds["single" if len(parse_caption(item.caption).kinds) == 1 else "two"].append(item)
        for kind, members in kinds.items():
            for number, item in enumerate(members[: _EXAMPLES[kind]]):
                path = folder / f"{split}-{kind}-{number:02d}.png"
                path.write_bytes(item.png)
                row: dict[str, Any] = {"caption": item.caption, "split": split, "kind": kind}
                row["images"] = {"render": {"image": str(path.relative_to(workdir))}}
                for prior in priors:
                    files = samples.files[item.caption, prior]
                    row["images"][prior] = {stage: os.path.relpath(file, workdir) for stage, file in files.items()}
                for files in row["images"].values():
                    files |= _reading(workdir / files["image"], item.caption, kind)
                shown.append(row)
    return shown


def _reading(path: pathlib.Path, caption: str, kind: str) -> dict[str, Any]:
    """What the oracle reads in one picture, in words, and whether that is what the caption says."""
    image = np.asarray(Image.open(path).convert("RGB"))[None]
    reading = oracle.read(image)
    words = " and ".join(f"{found.colour} {found.shape}" for found in reading[0].objects[:3]) or "nothing"
    return {"reads": words, "right": oracle.score_readings(reading, [caption])[kind]["all"] == 1.0}


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average that begins as a plain mean."""
    result: list[float] = []
    for number, value in enumerate(values):
        weight = max(_SMOOTHING, 1 / (number + 1))
        result.append(value if not result else result[-1] + weight * (value - result[-1]))
    return result


def stage_summary(workdir: pathlib.Path, seconds: float) -> dict[str, Any]:
    """What a stage's run left behind: its curve, its last evaluation, its config and the time it took."""
    rows = metrics.read(workdir)
    curve = [(step, row["mean/loss"]) for step, row in rows.items() if "mean/loss" in row]
    config = configs.from_json((workdir / "config.json").read_text())
    evaluations = [
        {"step": step, **{key.removeprefix("evaluation/"): row[key] for key in row if key.startswith("evaluation/")}}
        for step, row in rows.items()
        if any(key.startswith("evaluation/") for key in row)
    ]
    return {
        "stage": config.stage,
        "steps": max(checkpoint.steps_of(workdir / checkpoint.FOLDER), default=0),
        "batch_size": config.batch_size,
        "seconds": seconds,
        "curve": {
            "step": [step for step, _ in curve],
            "loss": [loss for _, loss in curve],
            "smoothed": smoothed([loss for _, loss in curve]),
        },
        "evaluations": evaluations,
        "config": config.to_dict(),
    }


def machine() -> dict[str, Any]:
    """Where it ran: processor, cores that this process may use, memory, system."""
    processor = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, Any] = {"processor": processor, "cores": cores, "system": platform.platform()}
    if "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return found


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that the numbers depend on."""
    found = {"python": platform.python_version()}
    for library in ("unclip_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy"):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[library] = "not installed"
    return found
