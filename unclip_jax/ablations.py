"""What the decoder should be conditioned on (section 5.1), and the variances of the prior's sampler, in miniature.

    python -m unclip_jax.ablations --workdir=runs/ablations

Trains on `captioned_shapes`, with equal budgets, two priors and three decoders: unCLIP's (z_i and caption), GLIDE's
(caption alone) and one on text embeddings. Then draws from the validation captions of one object in every setting, with
several seeds, and has the oracle say whether colour and shape are right, at the decoder's own 16 pixels, where it reads
every real picture rightly. For the diffusion prior it compares Analytic-DPM with the fixed variances and with DDIM.

Stopped by Ctrl-C or SIGTERM it saves (exit code 42), and the same command goes on; what is there is not made again.
Results are `results.md` and `results.json`. `--smoke` runs all of it with a few steps, and makes noise.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from unclip_jax import ablation_cells, ablation_tables, checkpoint, jobs, programs, training_jobs
from unclip_jax import config as configs
from unclip_jax import quickstart_results as results
from unclip_jax.ablation_cells import Plan, Setting
from unclip_jax.data import datasets
from unclip_jax.errors import InputError
from unclip_jax.evaluation import oracle
from unclip_jax.jobs import Job, Progress
from unclip_jax.stages import base
from unclip_jax.stopping import Stopping

_LOG = logging.getLogger("unclip_jax.ablations")  # __name__ is "__main__" where this is the program
ROOT = pathlib.Path(__file__).resolve().parent.parent
# Folder of each part -> (config file, variant). GLIDE's decoder needs no CLIP and trains beside it.
PARTS = {
    "clip": ("clip", "tiny"),
    "decoder_glide": ("decoder", "tiny_glide"),
    "decoder": ("decoder", "tiny"),
    "decoder_text": ("decoder", "tiny_text"),
    "prior_ar": ("prior_ar", "tiny"),
    "prior_diffusion": ("prior_diffusion", "tiny"),
}
# Parts -> the part whose number of steps and batch size they take, so that those compared learn from as many examples.
BUDGETS = {"decoder_glide": "decoder", "decoder_text": "decoder", "prior_ar": "prior_diffusion"}
# (label, decoder, what it reads in z_i's place), in the paper's order; and what a perfect prior would give.
ROWS = (
    ("the caption alone, unCLIP's decoder", "decoder", "dropped"),
    ("the caption alone, GLIDE's decoder", "decoder_glide", "dropped"),
    ("z_t, unCLIP's decoder (zero-shot)", "decoder", "none"),
    ("z_t, a decoder trained on it", "decoder_text", "none"),
    ("z_i of the AR prior", "decoder", "ar"),
    ("z_i of the diffusion prior", "decoder", "diffusion"),
    ("z_i of the caption's own picture", "decoder", "true"),
)
REFERENCE = "z_i of the diffusion prior"
VARIANCES = {
    "optimal (Analytic-DPM)": "analytic",
    "beta~ (fixed small)": "ddpm_small",
    "beta (fixed large)": "ddpm_large",
    "none (DDIM)": "ddim",
}
# The paper's: Analytic-DPM, 64 strided steps (table 3); its config's two candidates.
_METHOD, _TIMESTEPS = "analytic", "64"
_VARIANCE_SCALE = 1.5
_STATISTICS_EXAMPLES = 512


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller chose; the program's flags."""

    workdir: pathlib.Path
    data_dir: str
    smoke: bool
    seed: int
    captions: int
    seeds: int
    guidance_scales: tuple[float, ...]
    steps: tuple[str, ...]
    cache: str
    schedule: str


def overrides(name: str, options: Options) -> dict[str, Any]:
    """Returns {key of the config: value} of what this sets itself for a part."""
    stage, _ = PARTS[name]
    values: dict[str, Any] = {"data.data_dir": options.data_dir, "seed": options.seed}
    if name not in ("clip", "decoder_glide"):
        values["frozen.clip"] = str(options.workdir / "clip")
    if options.smoke:
        return values | training_jobs.smoke(stage)
    if name in BUDGETS:
        like = configs.load(spec(BUDGETS[name]))
        values |= {"total_steps": configs.total_steps(like), "batch_size": like.batch_size}
    return values


def spec(name: str) -> str:
    """Returns a part's config, file:variant."""
    file, variant = PARTS[name]
    return f"{ROOT / 'configs' / file}.py:{variant}"


def settings(options: Options) -> tuple[Setting, ...]:
    """Returns all that is compared."""
    rows = [
        Setting("priors", label, decoder, embedding, scale, **_sampling(embedding))
        for label, decoder, embedding in ROWS
        for scale in options.guidance_scales
    ]
    variances = [
        Setting("variances", label, "decoder", "diffusion", _VARIANCE_SCALE, method, steps, candidates=2)
        for label, method in VARIANCES.items()
        for steps in options.steps
    ]
    return tuple(rows + variances)


def _sampling(embedding: str) -> dict[str, Any]:
    return {"method": _METHOD, "timesteps": _TIMESTEPS} if embedding == "diffusion" else {}


def check(options: Options) -> None:
    """Raises what sampling would, before anything is trained.

    Raises:
      InputError: steps or guidance scales that cannot be.
    """
    for timesteps in options.steps:
        base.create(configs.load(spec("prior_diffusion"), {"sampling.timesteps": timesteps}))
    for scale in options.guidance_scales:
        configs.load(spec("decoder"), {"sampling.guidance_scale": scale})


def statistics_job(options: Options) -> Job:
    """Returns the job that measures what Analytic-DPM needs of the trained diffusion prior."""
    folder = options.workdir / "prior_diffusion"
    command = [sys.executable, "-m", "unclip_jax.statistics", f"--workdir={folder}", "--split=train"]
    command += [f"--examples={_STATISTICS_EXAMPLES}", f"--compile_cache={options.cache}"]
    return Job(
        name="statistics",
        command=command,
        log=options.workdir / "statistics.log",
        finished=lambda: bool(checkpoint.measured(folder)),
        progress=lambda: Progress(0, 1, "measures"),
        needs=("prior_diffusion",),
    )


def cell_jobs(plan: Plan, captions: Sequence[str], *, parts: int, options: Options) -> list[Job]:
    """Returns the jobs that make the cells, a part each."""
    made = []
    for part in range(parts):
        own = plan.part(part, parts)
        paths = [ablation_cells.cell_path(options.workdir, s, seed, captions) for s in own for seed in plan.seeds]
        command = [sys.executable, "-m", "unclip_jax.ablation_cells", f"--workdir={options.workdir}"]
        command += [f"--part={part}", f"--parts={parts}", f"--compile_cache={options.cache}"]
        made.append(
            Job(
                name=f"cells {part + 1}/{parts}",
                command=command,
                log=options.workdir / f"cells-{part}.log",
                finished=functools.partial(_all_there, paths),
                progress=functools.partial(_cell_progress, paths),
            )
        )
    return made


def _all_there(paths: Sequence[pathlib.Path]) -> bool:
    return all(path.exists() for path in paths)


def _cell_progress(paths: Sequence[pathlib.Path]) -> Progress:
    return Progress(sum(path.exists() for path in paths), len(paths), "settings and seeds")


def run(options: Options) -> int:
    """Runs what is not done yet, then writes the tables; returns an exit code."""
    check(options)
    workdir, began = options.workdir, time.monotonic()
    with jobs.claim(workdir) as lock:
        times = jobs.Times(workdir)
        groups = training_jobs.core_groups(options.schedule, most=len(PARTS) - 1)
        _LOG.info("%d at a time, on cores %s", len(groups), [list(group) if group else "all" for group in groups])
        runner = jobs.Runner(groups=groups, times=times, lock=lock, stop=Stopping())
        try:
            code, figures = _work(options, runner, parts=len(groups))
        finally:
            if runner.started:
                times.add("all", time.monotonic() - began)
        if code != programs.DONE:
            return code
        figures |= {"smoke": options.smoke, "seconds": times.seconds}
        (workdir / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
        text = markdown(figures)
        (workdir / "results.md").write_text(text)
    print(text)
    print(f"These tables are {workdir / 'results.md'}, all numbers {workdir / 'results.json'}")
    return programs.DONE


def _work(options: Options, runner: jobs.Runner, *, parts: int) -> tuple[int, dict[str, Any]]:
    """Renders, trains, draws and scores; returns an exit code and the figures."""
    workdir = options.workdir
    values = {name: overrides(name, options) for name in PARTS}
    data = configs.load(spec("clip"), values["clip"]).data
    rendering = training_jobs.rendering(data, workdir=workdir)
    code = runner.run([rendering])
    if code != programs.DONE:
        return code, {}
    plan = Plan(
        directory=datasets.prepare(data.dataset, data_dir=options.data_dir, variant=data.variant),
        captions=options.captions,
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        batch_size=4 if options.smoke else 50,
        settings=settings(options),
    )
    items = ablation_cells.pictures(plan)  # before training, for there may not be so many
    plan.write(workdir)
    training = [
        training_jobs.training(name, spec(name), values[name], workdir=workdir, cache=options.cache) for name in PARTS
    ]
    code = runner.run([rendering, *training, statistics_job(options)])
    if code == programs.DONE:
        captions = [item.caption for item in items]
        code = runner.run(cell_jobs(plan, captions, parts=parts, options=options))
    return code, figures_of(plan, items, options) if code == programs.DONE else {}


def figures_of(plan: Plan, items: Sequence[results.Render], options: Options) -> dict[str, Any]:
    """Reads the cells and returns all numbers."""
    captions = [item.caption for item in items]
    cells = {
        setting: [
            json.loads(ablation_cells.cell_path(options.workdir, setting, seed, captions).read_text())
            for seed in plan.seeds
        ]
        for setting in plan.settings
    }
    tables: dict[str, list[dict[str, Any]]] = {"priors": [], "variances": []}
    for setting, own in cells.items():
        row = {"label": setting.row, **dataclasses.asdict(setting), **ablation_tables.combine(own)}
        if setting.table == "priors" and setting.row != REFERENCE:
            others = next(key for key in cells if key.row == REFERENCE and key.guidance_scale == setting.guidance_scale)
            row["difference"] = ablation_tables.difference(own, cells[others])
        tables[setting.table].append(row)
    trained = {name: configs.load(spec(name), overrides(name, options)) for name in PARTS}
    side = trained["decoder"].model.unet.image_size
    render = oracle.score(results.pixels_of(items, side=side), captions)
    return {
        **tables,
        "captions": len(captions),
        "seeds": list(plan.seeds),
        "side": side,
        "oracle": render["single"],
        "chance": render["shuffled"]["single"],
        "parts": {name: _budget(config) for name, config in trained.items()},
        "machine": results.machine(),
        "versions": results.versions(),
    }


def _budget(config: ConfigDict) -> dict[str, Any]:
    weights = jax.eval_shape(base.create(config).init, jax.random.key(0))
    return {
        "steps": configs.total_steps(config),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "drop": config.drop.to_dict() if "drop" in config else {},
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """Returns the tables with what one must know to read them."""
    budgets = "; ".join(
        f"{name} {part['steps']} x {part['batch_size']} ({part['parameters'] / 1e3:.0f}k parameters)"
        for name, part in figures["parts"].items()
    )
    found = ", ".join(f"{label} {100 * both:.1f}" for label, both in ablation_tables.order(figures["priors"]))
    chance = ", ".join(f"{name} {100 * figures['chance'][name]:.1f}" for name in ablation_tables.VERDICTS)
    lines = [
        f"{figures['captions']} validation captions of one object, {len(figures['seeds'])} seeds of sampling, images "
        f"of {figures['side']} pixels. ± is half of a 95% interval over captions. Each part was trained once, so it "
        "says nothing of how another training might have come out.",
        f"Steps x batch: {budgets}.",
        f"The oracle is right about {100 * figures['oracle']['both']:.1f}% of the real pictures; by chance, of other "
        f"captions' pictures: {chance}.",
        "",
        "## What the decoder reads (section 5.1)",
        "",
        *ablation_tables.priors_table(figures["priors"], reference=REFERENCE),
        "",
        f"Best of each, colour and shape both right: {found}.",
        "",
        f"## Variance of the diffusion prior's steps (first of two draws, decoder guidance {_VARIANCE_SCALE:g})",
        "",
        "Cosine to the true z_i; before they are normalised, the draws' length and variance over captions, as parts of "
        "those of true z_i, and spread: the squared distance of two draws over that of a draw and the truth. All three "
        "are 1 where draws have the distribution of the truth.",
        "",
        *ablation_tables.variances_table(figures["variances"]),
        "",
    ]
    return "\n".join(lines)


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("workdir", "runs/ablations", "Folder of the trained parts and the results.")
    flags.DEFINE_string("data_dir", "~/unclip_data", "Root of prepared data sets.")
    flags.DEFINE_bool("smoke", False, "A few steps of everything, to see that it works.")
    flags.DEFINE_integer("seed", 0, "Seed of training, and the first of sampling.", 0, 2**31 - 1000)
    flags.DEFINE_integer("captions", 300, "Captions to draw from.", lower_bound=2)
    flags.DEFINE_integer("seeds", 2, "Images of each caption in each setting.", 1, 1000)
    flags.DEFINE_list("guidance_scales", ["1", "1.5", "3"], "Of the decoders.")
    flags.DEFINE_list("steps", ["8", "16", "64"], "Of the diffusion prior, where variances are compared.")
    flags.DEFINE_enum("schedule", "auto", ["auto", "cores", "sequential"], "Jobs side by side, or one after another.")
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"--guidance_scales has {text!r}, which is no number") from error


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    programs.start_logging()
    chosen = Options(
        workdir=pathlib.Path(options.workdir).expanduser().absolute(),
        data_dir=str(pathlib.Path(options.data_dir).expanduser().absolute()),
        smoke=options.smoke,
        seed=options.seed,
        captions=min(options.captions, 4) if options.smoke else options.captions,
        seeds=options.seeds,
        guidance_scales=tuple(_number(scale) for scale in options.guidance_scales),
        steps=tuple(options.steps),
        cache=options.compile_cache and str(pathlib.Path(options.compile_cache).expanduser().absolute()),
        schedule=options.schedule,
    )
    return run(chosen)


if __name__ == "__main__":
    define_flags()
    programs.run(main)
