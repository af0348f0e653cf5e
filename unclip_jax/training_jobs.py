"""Jobs that make data and train stages, each by its own program, and the cores that they run on.

What is finished is not begun again: a training run that has the last step of its config, a data set that is there.
"""

import functools
import glob
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from unclip_jax import checkpoint, jobs, metrics
from unclip_jax import config as configs
from unclip_jax.data.captioned_shapes import CaptionedShapes
from unclip_jax.jobs import Job, Progress

# What makes a run a smoke test: a few steps of small networks, in which compilation takes all the time.
_SMOKE = {
    "total_steps": 4, "batch_size": 8, "data.variant": "smoke", "log.every_percent": 25.0,
    "checkpoint.every_percent": 50.0, "evaluation.every_percent": 0.0,
}  # fmt: skip
_SMOKE_UNET = {"channels": 32, "attention_resolutions": (), "depth": 1, "channel_mult": (1, 1)}
_SMOKE_STAGES: dict[str, dict[str, Any]] = {
    "clip": {},
    "decoder": {f"model.unet.{key}": value for key, value in _SMOKE_UNET.items()} | {"sampling.timesteps": "2"},
    "upsampler": {f"unet.{key}": value for key, value in _SMOKE_UNET.items()} | {"sampling.timesteps": "2"},
    "prior_diffusion": {"model.depth": 1, "sampling.timesteps": "2"},
    "prior_ar": {"model.depth": 1, "fit_examples": 96, "model.components": 8},
}


def smoke(stage: str) -> dict[str, Any]:
    """Returns {key of the config: value} that makes a stage's `tiny` run a smoke test."""
    return _SMOKE | _SMOKE_STAGES[stage]


def training(name: str, spec: str, values: Mapping[str, Any], *, workdir: pathlib.Path, cache: str) -> Job:
    """Returns the job that trains a stage; it is finished where the last step of this very config is saved.

    Args:
      name: of the job and of its folder below `workdir`.
      spec: config file and variant.
      values: {key of the config: value} to set in it.
      workdir: of the whole.
      cache: folder of compiled programs, or "".
    """
    config, folder = configs.load(spec, values), workdir / name
    total = configs.total_steps(config)
    command = [sys.executable, "-m", "unclip_jax.train", f"--config={spec}", f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in values.items()]
    return Job(
        name=name,
        command=[*command, f"--compile_cache={cache}"],
        log=folder / "train.log",
        finished=functools.partial(_is_trained, folder, config, total),
        progress=functools.partial(_training_progress, folder, total),
        needs=("data", "clip") if "frozen.clip" in values else ("data",),
    )


def _is_trained(folder: pathlib.Path, config: ConfigDict, total: int) -> bool:
    path = folder / "config.json"
    if not path.exists() or total not in checkpoint.steps_of(folder / checkpoint.FOLDER):
        return False
    return not configs.difference(configs.from_json(path.read_text()), config)


def _training_progress(folder: pathlib.Path, total: int) -> Progress:
    rows = metrics.read(folder)
    last = next((step for step in reversed(rows) if "mean/loss" in rows[step]), 0)
    if not last:
        return Progress(0, total, "compiles")
    left = rows[last].get("seconds_left", 0.0)
    return Progress(last, total, f"loss {rows[last]['mean/loss']:.4g}  {left:.0f} s left")


def rendering(data: ConfigDict, *, workdir: pathlib.Path) -> Job:
    """Returns the job that renders the data set that `config.data` names."""
    there = pathlib.Path(data.data_dir).expanduser() / data.dataset / data.variant / str(CaptionedShapes.VERSION)
    command = [sys.executable, "-m", "unclip_jax.prepare", f"--source={data.dataset}", f"--variant={data.variant}"]
    return Job(
        name="data",
        command=[*command, f"--out={pathlib.Path(data.data_dir).expanduser()}"],
        log=workdir / "data.log",
        finished=(there / "dataset_info.json").exists,
        progress=lambda: Progress(0, 1, "renders"),
    )


def accelerated() -> bool:
    """Whether JAX finds more than a CPU. It is asked in a process of its own, for it takes an accelerator's memory."""
    devices = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not any(glob.glob(pattern) for pattern in devices):
        return False
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True, check=False
    )
    return asked.returncode == 0 and asked.stdout.split()[-1:] != ["cpu"]


def core_groups(how: str, *, most: int) -> list[tuple[int, ...] | None]:
    """Returns the cores of each of at most `most` jobs at a time; [None] is one job at a time, on everything."""
    if how == "sequential" or (how == "auto" and accelerated()):
        return [None]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return list(jobs.core_groups(cores, most=most))
