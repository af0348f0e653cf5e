"""The paper's experiments in miniature, from a quickstart's models: one page with verdicts, numbers and pictures.

    python -m unclip_jax.reproduce --workdir=runs/reproduction --models=runs/quickstart

Trains what the experiments compare with and is not there yet, below the workdir, with the steps and batches of the part
that it stands against: GLIDE's decoder of captions alone, a decoder of text embeddings, a CLIP with SAM. Then does the
experiments of `unclip_jax/reproduction/`, side by side, and writes `report.html`, which needs nothing beside it, and
`report.json`. Stopped by Ctrl-C or SIGTERM it saves (exit code 42), and the same command goes on; what is there is not
made again. `--smoke` trains a few steps of each, to see that everything works.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from unclip_jax import checkpoint, jobs, programs, training_jobs
from unclip_jax import config as configs
from unclip_jax import quickstart_results as results
from unclip_jax.ablation_cells import Plan
from unclip_jax.data import datasets, sealed
from unclip_jax.errors import InputError, nearest
from unclip_jax.jobs import Job, Progress
from unclip_jax.reproduction import experiments, page
from unclip_jax.reproduction.studio import CELLS, EXTRA, Studio
from unclip_jax.stopping import Stopping

_LOG = logging.getLogger("unclip_jax.reproduce")  # __name__ is "__main__" where this is the program
ROOT = pathlib.Path(__file__).resolve().parent.parent
# Part of EXTRA -> config file, variant, and what is set in it besides budget and data.
TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "decoder_glide": ("decoder", "tiny_glide", {}),
    "decoder_text": ("decoder", "tiny_text", {}),
    "clip_sam": ("clip", "tiny", {"sam.rho": 0.1}),
}
# In which a part may differ from the one that it stands against: what it reads, drops or takes SAM's steps by.
_MAY_DIFFER = ("condition", "drop.", "clip.", "frozen.", "model.embed_dim", "model.clip_tokens", "sam.")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller chose; the program's flags."""

    workdir: pathlib.Path
    models: pathlib.Path
    only: tuple[str, ...]
    captions: int
    seeds: int
    seed: int
    batch_size: int
    smoke: bool
    cache: str
    schedule: str


def check(options: Options) -> None:
    """Raises what would stop it later, before anything is written.

    Raises:
      InputError: an unknown experiment, too few seeds, or models that lack a part or are of other data.
    """
    for name in options.only:
        if name not in experiments.TABLE:
            raise InputError(f"there is no experiment {name!r}; {nearest(name, experiments.TABLE)}")
    if options.seeds < 3:
        raise InputError(f"--seeds={options.seeds}: error bars need at least 3 seeds of sampling")
    needed = {part for name in options.only for part in experiments.TABLE[name].parts} - set(EXTRA)
    for name in sorted(needed | {"clip"}):
        if not checkpoint.steps_of(options.models / name / checkpoint.FOLDER):
            raise InputError(
                f"{options.models} holds no trained {name}; python -m unclip_jax.quickstart --workdir={options.models} "
                "trains what the experiments start from"
            )
    data = config_of(options, "clip").data
    if data.dataset != "captioned_shapes":
        raise InputError(
            f"{options.models} was trained on {data.dataset}, and the oracle that counts reads captioned_shapes alone"
        )


def config_of(options: Options, name: str) -> ConfigDict:
    """Returns the config that a part of the models was trained by."""
    return configs.from_json((options.models / name / "config.json").read_text())


def spec(name: str) -> str:
    """Returns the config, file:variant, of a part that is trained here."""
    file, variant, _ = TRAINED[name]
    return f"{ROOT / 'configs' / file}.py:{variant}"


def overrides(name: str, options: Options) -> dict[str, Any]:
    """Returns {key of the config: value} for a part that is trained here: the budget of what it stands against.

    Raises:
      InputError: with these it would still be another network than what it stands against.
    """
    like = config_of(options, EXTRA[name])
    values: dict[str, Any] = {"data.data_dir": like.data.data_dir, "data.variant": like.data.variant, "seed": like.seed}
    values |= {"total_steps": configs.total_steps(like), "batch_size": like.batch_size, **TRAINED[name][2]}
    if name == "decoder_text":
        values["frozen.clip"] = str(options.models / "clip")
    if options.smoke:
        few = training_jobs.smoke(EXTRA[name])
        return values | few | ({"sam.pairs": few["batch_size"]} if "sam.rho" in values else {})
    made = configs.load(spec(name), values)
    allowed = (*_MAY_DIFFER, *configs.FREE_ON_RESUME)
    apart = [key for key in configs.difference(like, made) if not key.startswith(allowed)]
    if apart:
        raise InputError(
            f"{options.models / EXTRA[name]} is not of the variant 'tiny', beside which {name} is trained: they differ "
            f"in {', '.join(apart)}; give --models of such a quickstart, or --only experiments without {name}"
        )
    return values


def training(options: Options) -> list[Job]:
    """Returns the jobs that train what the chosen experiments need and the models have not."""
    needed = {part for name in options.only for part in experiments.TABLE[name].parts}
    made = []
    for name in (name for name in TRAINED if name in needed):
        job = training_jobs.training(
            name, spec(name), overrides(name, options), workdir=options.workdir, cache=options.cache
        )
        made.append(dataclasses.replace(job, needs=("data",)))  # the CLIP that it may read is trained
    return made


def drawing(studio: Studio, options: Options) -> list[Job]:
    """Returns the jobs that do the experiments, one each."""
    made = []
    for name in options.only:
        command = [sys.executable, "-m", "unclip_jax.reproduction", f"--workdir={options.workdir}"]
        command += [f"--models={options.models}", f"--experiment={name}", f"--compile_cache={options.cache}"]
        after = experiments.TABLE[name].after
        made.append(
            Job(
                name=name,
                command=command,
                log=options.workdir / f"{name}.log",
                finished=functools.partial(_is_found, studio, name),
                progress=functools.partial(_cells, options.workdir),
                needs=(after,) if after in options.only else (),
            )
        )
    return made


def _is_found(studio: Studio, name: str) -> bool:
    return experiments.found(studio, name) is not None


def _cells(workdir: pathlib.Path) -> Progress:
    return Progress(0, 1, f"{len(list((workdir / CELLS).glob('*.npz')))} cells of all")


def run(options: Options) -> int:
    """Trains and draws what is not done yet, then writes the report; returns an exit code."""
    check(options)
    trained = training(options)
    workdir, began = options.workdir, time.monotonic()
    with jobs.claim(workdir) as lock:
        times = jobs.Times(workdir)
        groups = training_jobs.core_groups(options.schedule, most=len(options.only))
        runner = jobs.Runner(groups=groups, times=times, lock=lock, stop=Stopping())
        try:
            code = _work(options, runner, trained)
        finally:
            if runner.started:
                times.add("all", time.monotonic() - began)
        if code != programs.DONE:
            return code
        studio = Studio(workdir, options.models, Plan.read(workdir), lambda: None)
        write(studio, options, seconds=times.seconds.get("all", 0.0))
    print(f"Verdicts, numbers and pictures: {workdir / 'report.html'}")
    return programs.DONE


def _work(options: Options, runner: jobs.Runner, trained: Sequence[Job]) -> int:
    data = config_of(options, "clip").data
    rendering = training_jobs.rendering(data, workdir=options.workdir)
    code = runner.run([rendering, *trained])
    if code != programs.DONE:
        return code
    plan = Plan(
        directory=datasets.prepare(data.dataset, data_dir=data.data_dir, variant=data.variant),
        captions=options.captions,
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        batch_size=options.batch_size,
        settings=(),
    )
    plan.write(options.workdir)
    studio = Studio(options.workdir, options.models, plan, lambda: None)
    _ = studio.pictures  # there may not be so many
    return runner.run(drawing(studio, options))


def write(studio: Studio, options: Options, *, seconds: float) -> None:
    """Writes report.html and report.json of experiments that are done, and prints a line for each."""
    found = {name: there for name in options.only if (there := experiments.found(studio, name)) is not None}
    said = [record for record, _ in found.values()]
    figures = {
        "models": str(options.models), "captions": len(studio.captions), "seeds": list(studio.seeds),
        "smoke": options.smoke, "seconds": seconds, "machine": results.machine(), "versions": results.versions(),
    }  # fmt: skip
    with sealed.Replacing(studio.workdir / "report.html") as file:
        file.write(page.html(studio.workdir, said, figures).encode())
    every = [
        {**dataclasses.asdict(record), "verdict": record.verdict, "seconds": took} for record, took in found.values()
    ]
    with sealed.Replacing(studio.workdir / "report.json") as file:
        file.write((json.dumps({**figures, "experiments": every}, indent=1) + "\n").encode())
    print("\n".join(page.lines(said)))


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("workdir", "runs/reproduction", "Folder of what is trained here, and of the report.")
    flags.DEFINE_string("models", "runs/quickstart", "Folder with the workdirs of a quickstart's trained parts.")
    flags.DEFINE_list("only", list(experiments.TABLE), "Experiments to do; by default all.")
    flags.DEFINE_integer("captions", 100, "Captions of one object to draw, each with every seed.", lower_bound=4)
    flags.DEFINE_integer("seeds", 3, "Seeds of sampling, at least 3.")
    flags.DEFINE_integer("seed", 0, "The first of them.", 0, 2**31 - 1)
    flags.DEFINE_integer("batch_size", 50, "Images made at once.", lower_bound=1)
    flags.DEFINE_bool("smoke", False, "A few steps of what is trained here, to see that it works.")
    flags.DEFINE_enum("schedule", "auto", ["auto", "cores", "sequential"], "Jobs side by side, or one after another.")
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    programs.start_logging()
    chosen = Options(
        workdir=pathlib.Path(options.workdir).expanduser().absolute(),
        models=pathlib.Path(options.models).expanduser().absolute(),
        only=tuple(dict.fromkeys(options.only)),
        captions=options.captions,
        seeds=options.seeds,
        seed=options.seed,
        batch_size=options.batch_size,
        smoke=options.smoke,
        cache=options.compile_cache and str(pathlib.Path(options.compile_cache).expanduser().absolute()),
        schedule=options.schedule,
    )
    return run(chosen)


if __name__ == "__main__":
    define_flags()
    programs.run(main)
