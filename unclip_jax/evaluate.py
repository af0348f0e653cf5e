"""Scores trained models by named protocols: FID and its relatives, with error bars, resumable, on any number of hosts.

    python -m unclip_jax.evaluate --config=configs/eval_coco.py --checkpoint=runs/mine --workdir=evaluations/mine \\
        --config.coco_files.annotations=captions_val2014.json --config.coco_files.images=val2014 --config.inception=FILE
    python -m unclip_jax.evaluate --config=configs/eval_captioned_shapes.py:sweep --checkpoint=runs/quickstart \\
        --workdir=evaluations/quickstart

With --follow=decoder every checkpoint that this part's training run saves is scored as it appears, each in a folder
of its own, until the run has ended. The work is cut into units, each a file. Killed at any moment, the same command
goes on with what is missing. Processes that JAX joins share the units; others can be told by --process_index and
--process_count which share is theirs; results depend on none of this.

    python -m unclip_jax.evaluate near_duplicates --config=configs/eval_coco.py:filtered --clip=runs/mine/clip \\
        --training=data/laion/embeddings/0123456789abcdef/train --threshold=0.95 --out=removed.json

names the reference images that are nearly among the model's training images; `export --workdir=… --out=FOLDER` writes
a job's images and references as others' programs read them (--form=npz as ADM's, or png); and `score --samples=FILE
--reference=FILE --inception=FILE` measures anyone's. Exit codes: 0 done, 42 stopped by SIGTERM
or Ctrl-C (run it again), 1 error.
"""

import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from unclip_jax import (
    checkpoint,
    evaluation_exchange,
    evaluation_job,
    evaluation_pages,
    hosts,
    parts,
    programs,
    reference_filter,
    unclip,
)
from unclip_jax import config as configs
from unclip_jax.data import sealed
from unclip_jax.errors import InputError, nearest
from unclip_jax.evaluated_models import EvaluatedModels, read_clip
from unclip_jax.evaluation import protocols
from unclip_jax.evaluation_job import EvaluationJob
from unclip_jax.image_units import Share
from unclip_jax.stopping import Stopping

_LOG = logging.getLogger(__name__)
# Command -> the flags that it needs; without a command, an evaluation.
COMMANDS = {
    "near_duplicates": ("config", "clip", "training", "out"),
    "export": ("workdir", "out"),
    "score": ("samples", "reference", "inception"),
}
_NEEDED = ("config", "checkpoint", "workdir")
_FOLLOW_SECONDS = 5.0


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "Config of the evaluation, configs/eval_*.py.", lock_config=True)
    flags.DEFINE_string("checkpoint", "", "Folder with the workdirs of the trained parts, such as runs/quickstart.")
    flags.DEFINE_string("workdir", "", "Folder of the evaluation.")
    flags.DEFINE_string("follow", "", "Part whose training run is followed, checkpoint by checkpoint.")
    flags.DEFINE_integer("process_index", None, "Which share is this process's, from 0.", lower_bound=0)
    flags.DEFINE_integer("process_count", None, "How many processes share the work.", lower_bound=1)
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")
    flags.DEFINE_string("clip", "", "near_duplicates: workdir of the CLIP that compares.")
    flags.DEFINE_list("training", [], "near_duplicates: folders of the training set's embeddings, by unclip_jax.embed.")
    flags.DEFINE_float("threshold", 0.95, "near_duplicates: smallest cosine that counts as the same.", -1.0, 1.0)
    flags.DEFINE_string("out", "", "near_duplicates, score: file of the result; export: its folder.")
    flags.DEFINE_enum("form", "npz", ["npz", "png"], "export: one npz as ADM's, or a folder of PNG files.")
    flags.DEFINE_string("samples", "", "score: npz with arr_0, or a folder of pictures.")
    flags.DEFINE_string("reference", "", "score: the same of real images, or an npz with mu and sigma.")
    flags.DEFINE_string("inception", "", "score: file of Inception's weights, or 'redrawn'.")
    flags.DEFINE_string("protocol", "coco30k-openai", "score: by whose cropping and resizing.")
    flags.DEFINE_integer("batch_size", 64, "score: images of a call.", lower_bound=1)


def share_of(options: Any) -> Share:
    """Returns which units are this process's."""
    given = (options.process_index, options.process_count)
    if given == (None, None):
        return Share(hosts.index(), hosts.count(), joined=hosts.count() > 1)
    if None in given or not given[0] < given[1]:
        raise InputError(
            f"--process_index={given[0]} --process_count={given[1]}: give both, the index from 0 and below the count"
        )
    if hosts.count() > 1:
        raise InputError("these processes know each other through JAX; leave out --process_index and --process_count")
    return Share(*given)


def read_models(config: ConfigDict, models: str, *, steps: Mapping[str, int] | None = None) -> EvaluatedModels:
    """Reads what a config evaluates."""
    protocol = protocols.together(config.protocols)[0]
    if config.weights not in ("ema", "params"):
        raise InputError(f"config.weights={config.weights!r}; {nearest(config.weights, ('ema', 'params'))}")
    return EvaluatedModels.read(
        models,
        prior=config.prior,
        size=protocol.size,
        sampling=sampling_of(config),
        weights=config.weights,
        microbatch=config.microbatch,
        steps=steps,
    )


def sampling_of(config: ConfigDict) -> dict[str, dict[str, str]]:
    """Returns part -> {key: text} of the options that a config sets."""
    found: dict[str, dict[str, str]] = {}
    for section, options in config.sampled.items():
        name = unclip.PRIORS.get(config.prior) if section == "prior" else section
        given = {key: value for key, value in options.items() if value}
        if given and name is None:
            raise InputError(f"config.sampled.prior is set, but the prior {config.prior!r} draws nothing")
        if given:
            found[str(name)] = given
    return found


def evaluate(
    config: ConfigDict,
    models: EvaluatedModels,
    workdir: pathlib.Path,
    *,
    share: Share,
    stop: Callable[[], None],
    reference: pathlib.Path | None = None,
) -> str | None:
    """Evaluates once; returns a sentence, or None where units are left to other processes."""
    clip = None
    if config.clip_workdir:
        clip = read_clip(config.clip_workdir, microbatch=config.microbatch)
    shared = pathlib.Path(config.reference).expanduser() if config.reference else reference
    job = EvaluationJob(config, models, workdir, networks_clip=clip, reference=shared)
    results = job.run(share, stop=stop)
    if results is not None:
        write_results(job, results)
    elif share.joined:
        _wait_for(workdir / evaluation_job.RESULTS, job.id, stop)
        results = json.loads((workdir / evaluation_job.RESULTS).read_text())
    return None if results is None else evaluation_pages.sentence(results, workdir)


def write_results(job: EvaluationJob, results: Mapping[str, Any]) -> None:
    """Writes a sweep's plots, results.html, results.md, results.json; after a kill the same command does so again."""
    for name, content in evaluation_pages.plots(results).items():
        with sealed.Replacing(job.workdir / name) as file:
            file.write(content)
    with sealed.Replacing(job.workdir / "results.html") as file:
        file.write(evaluation_pages.page(results, job.shown(evaluation_pages.SHOWN)).encode())
    with sealed.Replacing(job.workdir / "results.md") as file:
        file.write(evaluation_pages.markdown(results).encode())
    with sealed.Replacing(job.workdir / evaluation_job.RESULTS) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())


def _wait_for(path: pathlib.Path, run: str, stop: Callable[[], None]) -> None:
    while not path.exists() or json.loads(path.read_text())["run"] != run:
        stop()
        time.sleep(1.0)


def follow(
    config: ConfigDict, options: Any, *, share: Share, stop: Callable[[], None]
) -> Iterator[str]:
    """Scores each checkpoint of a part's training run as it appears, until the run has ended.

    Raises:
      InputError: there is no such part, or no run of it.
    """
    part, workdir = options.follow, pathlib.Path(options.workdir).expanduser()
    if part not in parts.STAGES:
        raise InputError(f"--follow={part}: there is no such part; {nearest(part, parts.STAGES)}")
    training = checkpoint.absolute(options.checkpoint) / part
    if not (training / "config.json").exists():
        raise InputError(f"--follow={part}: {training} holds no training run")
    done: set[int] = set()
    while True:
        last = configs.total_steps(configs.from_json((training / "config.json").read_text()))
        steps = hosts.from_first("steps", lambda: sorted(checkpoint.steps_of(training / checkpoint.FOLDER)))
        for step in (step for step in steps if step not in done and step > 0):
            done.add(step)
            folder = workdir / f"{part}-{step:08d}"
            try:
                models = read_models(config, options.checkpoint, steps={part: step})
            except InputError as error:
                if step in checkpoint.steps_of(training / checkpoint.FOLDER):
                    raise
                _LOG.warning("step %d was deleted by its run before it could be read: %s", step, error)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            said = evaluate(config, models, folder, share=share, stop=stop, reference=workdir / "reference")
            yield said or f"{folder}: this share is done; units are left to others"
        if last in done:
            if hosts.index() == 0:
                yield evaluation_pages.followed(workdir, part)
            return
        stop()
        time.sleep(_FOLLOW_SECONDS)


def main(argv: Sequence[str]) -> int:
    options = flags.FLAGS
    programs.start_logging()
    command = argv[1] if len(argv) > 1 else ""
    for name in COMMANDS.get(command, _NEEDED):
        if not options[name].value:
            raise InputError(f"--{name} is missing; {command or 'an evaluation'} needs {_needed(command)}")
    stopping = Stopping()  # files are written whole, so that no more than a unit is lost wherever it ends
    programs.start_jax(compile_cache=options.compile_cache)
    if command == "score":
        for line in evaluation_exchange.score(options):
            print(line, flush=True)
        return programs.DONE
    if command == "export":
        folders = (pathlib.Path(folder).expanduser() for folder in (options.workdir, options.out))
        for line in evaluation_exchange.export(*folders, form=options.form):
            print(line, flush=True)
        return programs.DONE
    config = configs.check(options.config)
    if command == "near_duplicates":
        print(reference_filter.run(config, options, stopping.now), flush=True)
        return programs.DONE
    return _evaluate(config, options, stopping.now)


def _needed(command: str) -> str:
    return ", ".join(f"--{name}" for name in COMMANDS.get(command, _NEEDED))


def _evaluate(config: ConfigDict, options: Any, stop: Callable[[], None]) -> int:
    share = share_of(options)
    if options.follow:
        for sentence in follow(config, options, share=share, stop=stop):
            print(sentence, flush=True)
        return programs.DONE
    models = read_models(config, options.checkpoint)
    workdir = pathlib.Path(options.workdir).expanduser()
    said = evaluate(config, models, workdir, share=share, stop=stop)
    print(said or f"{workdir}: this share is done; units are left to others", flush=True)
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main, commands=tuple(COMMANDS))
