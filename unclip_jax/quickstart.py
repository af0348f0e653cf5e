"""Trains all six stages on rendered scenes, draws from captions, scores the images, and writes a report.

    python -m unclip_jax.quickstart --workdir=runs/quickstart

Every stage is trained by the program that trains it at any size, `python -m unclip_jax.train`, and the images are
made by `python -m unclip_jax.generate`; this only decides what runs when, and on which cores. Stages without need of
each other run side by side, one thread each on a machine with few cores; with an accelerator, one after another.
Stopped by Ctrl-C or SIGTERM it saves (exit code 42), and the same command goes on.

Results are `report.html`, which needs nothing beside it, `report.json` with every figure, and PNG pictures.
`--smoke` runs all of it with a few steps, in a minute or two: it shows that everything works, and makes noise.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from unclip_jax import checkpoint, jobs, programs, quickstart_report, training_jobs
from unclip_jax import config as configs
from unclip_jax import quickstart_results as results
from unclip_jax.data import datasets
from unclip_jax.errors import InputError
from unclip_jax.jobs import Job, Progress
from unclip_jax.stopping import Stopping

_LOG = logging.getLogger("unclip_jax.quickstart")  # __name__ is "__main__" where this is the program
ROOT = pathlib.Path(__file__).resolve().parent.parent
# Ways to draw; the second list for a stack that diffusers' pipelines can draw with, which has no place for others.
PRIORS = ("diffusion", "ar", "none")
EXPORTABLE_PRIORS = ("diffusion", "none")
# Folder of each stage -> (config file, suffix of its variant). In the order in which they are begun: CLIP, for which
# three stages wait, and then the longest first, so that the cores become idle at about the same time.
STAGES = {
    "clip": ("clip", ""),
    "decoder": ("decoder", ""),
    "upsampler_2": ("upsampler", "_2"),
    "upsampler_1": ("upsampler", "_1"),
    "prior_diffusion": ("prior_diffusion", ""),
    "prior_ar": ("prior_ar", ""),
}
# The stack of the variant "diffusers": one prior, one upsampler.
EXPORTABLE = {
    "clip": ("clip", ""),
    "decoder": ("decoder", ""),
    "upsampler_1": ("upsampler", ""),
    "prior_diffusion": ("prior_diffusion", ""),
}


def stack(variant: str) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """Returns the stages that a variant trains, as in STAGES, and the priors by which it then draws."""
    return (EXPORTABLE, EXPORTABLE_PRIORS) if variant == "diffusers" else (STAGES, PRIORS)


def overrides(name: str, options: "Options") -> dict[str, Any]:
    """Returns {key of the config: value} of what the quickstart sets itself for a stage."""
    stage, _ = stack(options.variant)[0][name]
    values: dict[str, Any] = {"data.data_dir": options.data_dir, "seed": options.seed}
    if stage not in ("clip", "upsampler"):
        values["frozen.clip"] = str(options.workdir / "clip")
    return values | (training_jobs.smoke(stage) if options.smoke else {})


def sample_jobs(captions: Sequence[str], *, parts: int, batch_size: int, options: "Options") -> list[Job]:
    """Returns the jobs that draw from the captions by every prior, a part of the captions each.

    Each has a folder that is named after all that the images depend on, so that others are never taken for them.
    """
    made = []
    workdir, seed, cache = options.workdir, options.seed, options.cache
    stages, priors = stack(options.variant)
    models = {
        name: [(workdir / name / "config.json").read_text(), checkpoint.steps_of(workdir / name / checkpoint.FOLDER)]
        for name in stages
    }
    known = [list(captions), parts, batch_size, seed, models, results.versions()]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
    for part in range(parts):
        own = captions[part::parts]
        folder = workdir / "samples" / f"{digest}-{part}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "captions.txt").write_text("\n".join(own) + "\n")
        command = [sys.executable, "-m", "unclip_jax.generate", f"--models={workdir}", f"--out={folder}"]
        command += [f"--prompts={folder / 'captions.txt'}", f"--prior={','.join(priors)}", "--stages=all"]
        command += [f"--seed={seed}", f"--batch_size={batch_size}", f"--compile_cache={cache}"]
        made.append(
            Job(
                name=f"samples {part + 1}/{parts}" if parts > 1 else "samples",
                command=command,
                log=folder / "generate.log",
                finished=(folder / "grid.png").exists,
                progress=functools.partial(_sampling_progress, folder, len(own) * len(priors)),
            )
        )
    return made


def _sampling_progress(folder: pathlib.Path, total: int) -> Progress:
    stems = [path.stem for path in folder.glob("[0-9]*.png")]
    return Progress(sum(stem.rpartition("-")[2].startswith("seed") for stem in stems), total, "images")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller chose; the program's flags."""

    workdir: pathlib.Path
    variant: str
    data_dir: str
    smoke: bool
    seed: int
    captions: int
    cache: str
    schedule: str


def run(options: Options) -> int:
    """Runs what is not done yet, then writes the report; returns an exit code."""
    workdir, began = options.workdir, time.monotonic()
    with jobs.claim(workdir) as lock:
        times = jobs.Times(workdir)
        groups = training_jobs.core_groups(options.schedule, most=len(STAGES) - 1)
        _LOG.info("%d at a time, on cores %s", len(groups), [list(group) if group else "all" for group in groups])
        runner = jobs.Runner(groups=groups, times=times, lock=lock, stop=Stopping())
        try:
            code, figures = _work(options, runner, groups)
        finally:
            if runner.started:  # looking at what is done already is no part of the time it took
                times.add("all", time.monotonic() - began)
        if code != programs.DONE:
            return code
        figures |= {"variant": options.variant, "smoke": options.smoke, "seed": options.seed, "seconds": times.seconds}
        figures["schedule"] = [list(group) if group else [] for group in groups]
        (workdir / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
        page = quickstart_report.write(workdir)
    print(f"{summary(figures)}\n\nThe report is {page}")
    return programs.DONE


def _work(options: Options, runner: jobs.Runner, groups: Sequence[Any]) -> tuple[int, dict[str, Any]]:
    """Trains, draws and measures; returns an exit code and the figures."""
    workdir = options.workdir
    stages, priors = stack(options.variant)
    specs = {name: f"{ROOT / 'configs' / file}.py:{options.variant}{suffix}" for name, (file, suffix) in stages.items()}
    values = {name: overrides(name, options) for name in stages}
    data = configs.load(specs["clip"], values["clip"]).data
    if data.dataset != "captioned_shapes":
        raise InputError(f"{options.variant!r} trains on {data.dataset}; the quickstart scores captioned_shapes alone")
    training = [training_jobs.rendering(data, workdir=workdir)]
    training += [
        training_jobs.training(name, specs[name], values[name], workdir=workdir, cache=options.cache) for name in stages
    ]
    code = runner.run(training)
    if code != programs.DONE:
        return code, {}
    directory = datasets.prepare(data.dataset, data_dir=options.data_dir, variant=data.variant)
    # Kinds seen in training are the measure; half as many captions of unseen ones show how far it generalises.
    counts = {"validation": options.captions, "unseen": max(options.captions // 2, 2)}
    real = {split: results.renders(directory, split, count=count) for split, count in counts.items()}
    prompts = list(dict.fromkeys(item.caption for items in real.values() for item in items))
    batch_size = 4 if options.smoke else 32 if groups[0] else 128
    # Each process compiles for itself; a smoke test has nothing else to do.
    parts = 1 if options.smoke else len(groups)
    sampling = sample_jobs(prompts, parts=parts, batch_size=batch_size, options=options)
    code = runner.run(sampling)
    if code != programs.DONE:
        return code, {}
    folders = [job.log.parent for job in sampling]
    return code, measure(workdir, real=real, directory=directory, folders=folders, stages=list(stages), priors=priors)


def measure(
    workdir: pathlib.Path,
    *,
    real: Mapping[str, Sequence[results.Render]],
    directory: str,
    folders: Sequence[pathlib.Path],
    stages: Sequence[str],
    priors: Sequence[str],
) -> dict[str, Any]:
    """Scores the samples and gathers curves and times."""
    began = time.monotonic()
    samples = results.Samples.read(folders)
    times = jobs.Times(workdir).seconds
    scores = results.accuracy(samples, real, priors)
    first = next(iter(real.values()))[0].caption
    side = samples.pixels([first], priors[0]).shape[1]
    return {
        "accuracy": scores,
        "goal": results.GOAL,
        "side": side,
        "oracle": results.oracle_accuracy(directory, side=side),
        "examples": results.examples(workdir, samples, real, priors),
        "stages": {name: results.stage_summary(workdir / name, times.get(name, 0.0)) for name in stages},
        "sampling": samples.timings,
        "scoring_seconds": time.monotonic() - began,
        "machine": results.machine(),
        "versions": results.versions(),
    }


def summary(figures: Mapping[str, Any]) -> str:
    """Returns the headline numbers as a few lines of text."""
    lines = [f"{'single objects':24}  colour   shape    both"]
    scores = figures["accuracy"]["validation"]
    for name, label in quickstart_report.LABELS.items():
        rates = scores.get(name, {}).get("single")
        if rates:
            lines.append(f"{label:24}  " + "  ".join(f"{rates[key]:6.1%}" for key in ("colour", "shape", "both")))
    chance = scores["diffusion"]["shuffled"].get("single")
    if chance:
        cells = "  ".join(f"{chance[key]:6.1%}" for key in ("colour", "shape", "both"))
        lines.append(f"{'chance':24}  {cells}")
    return "\n".join(lines)


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the trained stages and the report.")
    flags.DEFINE_string("config_variant", "tiny", "Variant of every stage's config; diffusers is what can be exported.")
    flags.DEFINE_string("data_dir", "~/unclip_data", "Root of prepared data sets.")
    flags.DEFINE_bool("smoke", False, "A few steps of everything, to see that it works.")
    flags.DEFINE_integer("seed", 0, "Seed of training and sampling.", 0, 2**31 - 1)
    flags.DEFINE_integer("captions", 160, "Captions to draw from and score; half as many more of unseen kinds.", 2)
    flags.DEFINE_enum("schedule", "auto", ["auto", "cores", "sequential"], "Jobs side by side, or one after another.")
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    programs.start_logging()
    chosen = Options(
        workdir=pathlib.Path(options.workdir).expanduser().absolute(),
        variant=options.config_variant,
        data_dir=str(pathlib.Path(options.data_dir).expanduser().absolute()),
        smoke=options.smoke,
        seed=options.seed,
        captions=min(options.captions, 6) if options.smoke else options.captions,
        cache=options.compile_cache and str(pathlib.Path(options.compile_cache).expanduser().absolute()),
        schedule=options.schedule,
    )
    return run(chosen)


if __name__ == "__main__":
    define_flags()
    programs.run(main)
