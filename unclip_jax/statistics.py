"""Measures what a stage keeps in its checkpoint besides weights.

Of a trained diffusion prior, the variance that sampling with the method "analytic" needs (Analytic-DPM, Bao et al.
2022; the paper's choice, table 3):

    python -m unclip_jax.statistics --workdir=runs/prior_diffusion --examples=1024
    python -m unclip_jax.generate --models=runs --out=images --prior_method=analytic --prompt='…'

For each of the timesteps it is the mean square of x_start less its prediction, per dimension, by the moving average of
the weights, given the caption. It is stored in the step that was measured, which stays whole wherever this is killed.

Of the training data, what a stage measures before its first step (the AR prior's principal components and buckets, the
diffusion prior's whitening):

    python -m unclip_jax.statistics --config=configs/prior_ar.py:tiny --workdir=runs/prior_ar \\
        --config.frozen.clip=runs/clip

That writes the checkpoint of step 0. `unclip_jax.train` with the same options goes on from it; without it, it measures
the same by itself.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from unclip_jax import checkpoint, digests, fitting, metrics, programs, sharding, train
from unclip_jax import config as configs
from unclip_jax.errors import InputError
from unclip_jax.inputs import Input, load_frozen
from unclip_jax.program import Program, build
from unclip_jax.stages import base
from unclip_jax.state import of_data
from unclip_jax.stopping import Stopping

_LOG = logging.getLogger("unclip_jax.statistics")  # not __main__, which nobody listens to

# The mean square error [T, b] of a batch's predictions, that of x_start itself [b], and which examples count. Batches
# may differ in size.
Measured = tuple[Float[np.ndarray, "T _"], Float[np.ndarray, "_"], Bool[np.ndarray, "_"]]


def x_start_variance(batches: Iterable[Measured]) -> tuple[Float[np.ndarray, "T"], int]:
    """Averages errors over examples: E |x_start - prediction|^2 per dimension at each timestep, and their number.

    Summed in float64. No estimate exceeds E |x_start|^2, what predicting zeros would leave: 0.289 for unit vectors of
    1,024 numbers times 17.2.

    Raises:
      InputError: there is no example, or an error is not finite.
    """
    total: Any = 0.0
    square, count = 0.0, 0
    for errors, squares, counts in batches:
        total = total + errors.astype(np.float64)[:, counts].sum(1)
        square += float(squares.astype(np.float64)[counts].sum())
        count += int(counts.sum())
    if not count:
        raise InputError("there is no example to measure the variance on; give another --split")
    if not np.isfinite(total).all():
        raise InputError("predictions are not finite, so they have no variance; measure another --step")
    return np.clip(total / count, 0.0, square / count), count


def measure(
    workdir: str,
    *,
    examples: int,
    split: str = "",
    step: int | None = None,
    batch_size: int = 64,
    overrides: dict[str, str] | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "T"]:
    """Measures x_start_variance on a saved step and stores it there.

    Args:
      workdir: of a training run whose stage is a `base.MeasuresVariance`.
      examples: how many, the first of the split; fewer if it has fewer.
      split: of the run's data set; "" is its evaluation split.
      step: which; the newest whole one by default.
      batch_size: examples at once, made to divide over the devices.
      overrides: keys of the run's config whose values are others here, such as where the data lies.

    Returns:
      The variance at each original timestep, float64.

    Raises:
      InputError: no such step or data, or another kind of stage.
    """
    mesh = sharding.make_mesh({"data": -1})
    changes = {**({"data.eval_split": split} if split else {}), **(overrides or {})}
    built: list[Program] = []

    def abstract(config: ConfigDict) -> tuple[Any, Any]:
        config = _changed(config, changes, replicas=mesh.size)
        program = build(config, mesh)
        if not isinstance(program.stage, base.MeasuresVariance):
            raise InputError(
                f"{workdir} holds a {config.stage}, of which there is nothing to measure; give a prior_diffusion's"
            )
        built[:] = [program]
        return program.state.ema, program.state.statistics

    params, statistics, _, step = checkpoint.load(workdir, abstract, step=step)
    (program,) = built
    frozen = {**load_frozen(program), "statistics": statistics}
    _check_frozen(workdir, step, frozen)
    batches = _measured(program, params, frozen, examples=examples, batch_size=batch_size, stop=stop)
    variance, count = x_start_variance(batches)
    placed = {
        **statistics,
        "x_start_variance": jax.device_put(variance.astype(np.float32), statistics["x_start_variance"].sharding),
    }
    how = {"examples": count, "split": program.config.data.eval_split}
    checkpoint.replace_statistics(workdir, step, placed, extra={"x_start_variance": how})
    return variance


def _changed(config: ConfigDict, overrides: dict[str, str], *, replicas: int) -> ConfigDict:
    """The config with a batch size that this machine takes, and with the caller's values."""
    plain = ConfigDict(config.to_dict())
    plain.optim.accumulation = 1
    plain.batch_size = replicas
    for key, value in overrides.items():
        plain.update_from_flattened_dict({key: value})
    return configs.check(plain.lock())


def _check_frozen(workdir: str, step: int, frozen: Any) -> None:
    """The networks here must be those that the step was trained on."""
    known = checkpoint.trained_on(workdir, step)
    for name in frozen:
        there = known.get(f"frozen.{name}")
        if there not in (None, digests.fingerprint(frozen[name])):
            raise InputError(f"{workdir} was trained on another {name}; give the workdir of that one as --{name}")


def _measured(
    program: Program, params: Any, frozen: Any, *, examples: int, batch_size: int, stop: Callable[[], None]
) -> Iterable[Measured]:
    stage: Any = program.stage
    batch_size = -(-batch_size // program.mesh.size) * program.mesh.size
    data = Input(program).evaluation().batches(
        stage.predict_specs(batch_size)["loss"], source="evaluation", limit=examples, batch_size=batch_size
    )
    compiled = jax.jit(stage.x_start_errors)
    progress = metrics.Progress("variance", start=0, total=examples, examples_per_step=1)
    done, rng = 0, jax.random.key(program.config.seed)
    try:
        for batch in data:
            placed = sharding.put_batch(batch, program.batch_sharding)
            counts = fitting.whole(placed.pop("mask"))
            errors, squares = fitting.whole(compiled(params, frozen, placed, rng))
            yield errors, squares, counts
            stop()
            done += int(counts.sum())
            progress.report(done, {"mean_square_error": float(errors[:, counts].mean())})
    finally:
        progress.close()


def fit(
    config: ConfigDict, workdir: str, *, accept_changes: bool = False, stopping: Stopping | None = None
) -> None:
    """Measures of the training data what the stage needs before its first step, and saves step 0.

    Raises:
      InputError: the stage needs nothing, or whatever keeps the run from beginning.
    """
    stage = base.create(config)
    abstract = jax.eval_shape(stage.init_frozen, jax.eval_shape(functools.partial(jax.random.key, 0)))
    if not of_data(abstract.get("statistics", {})):
        raise InputError(
            f"a {config.stage} with this config measures nothing before its first step; without --config, this "
            "measures the variance of a trained prior_diffusion"
        )
    run = train.Run(config, workdir, accept_changes=accept_changes, stopping=stopping)
    try:
        run.begin()
    finally:
        run.saver.close()


def define_flags() -> None:
    """Defines the program's flags besides those of `unclip_jax.train`, which it shares."""
    flags.DEFINE_integer("examples", 1024, "Examples that the variance is measured on.", lower_bound=1)
    flags.DEFINE_string("split", "", "Split that they are the first of; the run's evaluation split by default.")
    flags.DEFINE_integer("step", None, "Saved step to measure; the newest by default.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 64, "Examples at once.", lower_bound=1)
    flags.DEFINE_string("data_dir", None, "Root of prepared data sets, if not where the run found it.")
    flags.DEFINE_string("clip", None, "Workdir of the CLIP, if not where the run found it.")


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    if not options.workdir:
        raise InputError("--workdir is missing; give that of a trained diffusion prior, or a new one and --config")
    programs.start_logging()
    stopping = Stopping()  # nothing is lost before the end, when a rename puts all of it in place
    programs.start_jax(compile_cache=options.compile_cache)
    if options.config:
        config = configs.check(options.config)
        fit(config, options.workdir, accept_changes=options.accept_changes, stopping=stopping)
        print(f"{epath.Path(options.workdir)} is ready for training: its data is measured")
        return programs.DONE
    moved = {"data.data_dir": options.data_dir, "frozen.clip": options.clip}
    variance = measure(
        options.workdir,
        examples=options.examples,
        split=options.split,
        step=options.step,
        batch_size=options.batch_size,
        overrides={key: value for key, value in moved.items() if value is not None},
        stop=stopping.now,
    )
    quarters = "  ".join(f"{part.mean():.4g}" for part in np.array_split(variance, 4))
    print(f"{options.workdir}: the variance of x_start is measured, by quarters of the process: {quarters}")
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main)
