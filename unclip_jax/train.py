"""Trains any stage: `python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder`.

The same command resumes: every later loss is bit-identical to that of a run never stopped. Exit codes: 0 done, 42
stopped by SIGTERM or SIGINT after saving (run it again), 1 error.
"""

import collections
import dataclasses
import functools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, config_flags

from unclip_jax import checkpoint, metrics, optim, programs, sharding
from unclip_jax import config as configs
from unclip_jax.data import datasets, pipeline
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.evaluation import evaluators
from unclip_jax.stages import base
from unclip_jax.state import TrainState

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything compiled of a run, made without allocating anything.

    Attributes:
      config, mesh, stage: what it was built from.
      total_steps: length of the run.
      learning_rate: schedule by step.
      state, frozen: abstract trees (ShapeDtypeStruct with shardings).
      batch_sharding: of every field of a batch.
      init: fn(rng) -> state.
      train_step: fn(state, frozen, batch) -> (state, metrics); the state is donated.
      predict: name -> jitted fn(params, frozen, batch, rng).
    """

    config: ConfigDict
    mesh: Mesh
    stage: base.Stage
    total_steps: int
    learning_rate: optax.Schedule
    state: Any
    frozen: Any
    batch_sharding: NamedSharding
    init: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    predict: Mapping[str, jax.stages.Wrapped]

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Abstract global batch, with shardings, to lower the step with."""
        spec = self.stage.batch_spec(self.config.batch_size)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.batch_sharding) for name, x in spec.items()
        }


def build(config: ConfigDict, mesh: Mesh) -> Program:
    """Returns shapes, shardings and jitted functions of a run; allocates nothing.

    Raises:
      InputError: the config does not make a network, or its batch does not divide over the mesh.
    """
    stage = base.create(config)
    accumulation = config.optim.accumulation
    sharding.check_batch(config.batch_size, mesh, accumulation=accumulation)
    if accumulation > 1 and not stage.splits_batch:
        raise InputError(f"config.optim.accumulation={accumulation}: the loss of {config.stage!r} needs whole batches")
    total_steps = configs.total_steps(config)
    warmup = configs.duration(config.optim, "warmup", batch_size=config.batch_size, total_steps=total_steps)
    learning_rate = optim.learning_rate(config.optim, total_steps=total_steps, warmup_steps=warmup)
    optimizer = optim.create(config.optim, learning_rate)

    def init_boxed(rng):
        params = stage.init(rng)
        statistics = stage.init_frozen(rng).get("statistics", {})
        return TrainState.create(params, optimizer.init(params), statistics)

    rules = config.sharding
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed_state = jax.eval_shape(init_boxed, key)
    boxed_frozen = jax.eval_shape(stage.init_frozen, key)
    boxed_frozen = {name: tree for name, tree in boxed_frozen.items() if name != "statistics"}
    state = _abstract(boxed_state, sharding.shardings(boxed_state, rules, mesh))
    frozen = _abstract(boxed_frozen, sharding.shardings(boxed_frozen, rules, mesh))
    state_sharding = jax.tree.map(lambda x: x.sharding, state)
    batch_sharding = sharding.batch_sharding(mesh)
    step = functools.partial(_train_step, config, stage, optimizer, learning_rate)
    return Program(
        config=config,
        mesh=mesh,
        stage=stage,
        total_steps=total_steps,
        learning_rate=learning_rate,
        state=state,
        frozen=frozen,
        batch_sharding=batch_sharding,
        init=jax.jit(
            lambda rng: nn.meta.unbox(init_boxed(rng)), out_shardings=state_sharding, compiler_options=_once(mesh)
        ),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, sharding.replicated(mesh))),
        predict={name: jax.jit(fn) for name, fn in stage.predict_fns().items()},
    )


def _once(mesh: Mesh) -> dict[str, Any] | None:
    """Compiler options of what runs once: on CPU, optimising it takes several times longer than it saves."""
    return {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None


def _abstract(boxed: Any, shardings: Any) -> Any:
    def one(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    return jax.tree.map(one, nn.meta.unbox(boxed), shardings)


def _train_step(config, stage, optimizer, learning_rate, state: TrainState, frozen, batch):
    """One step of any stage. A loss or gradient that is not finite changes nothing but the counters."""
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    frozen = {**frozen, "statistics": state.statistics}
    loss, parts, grads = _gradient(config, stage, state.params, frozen, batch, rng)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def apply(_):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = optim.ema_decay(config.optim, state.step)
        return params, optim.ema_update(state.ema, params, decay), opt_state

    def keep(_):
        return state.params, state.ema, state.opt_state

    params, ema, opt_state = jax.lax.cond(finite, apply, keep, None)
    bad = (~finite).astype(jnp.int32)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        skipped=state.skipped + bad,
        streak=(state.streak + bad) * bad,
    )
    report = {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
        "learning_rate": learning_rate(state.step),
        "skipped_steps": new.skipped,
        "streak": new.streak,
    }
    return new, {**report, **parts}


def _gradient(config, stage, params, frozen, batch, rng):
    """Returns loss, metrics and gradient of a batch, in one piece or as the mean over equal parts of it."""
    value_and_grad = jax.value_and_grad(functools.partial(stage.loss, train=True), has_aux=True)
    parts = config.optim.accumulation
    if parts == 1:
        (loss, aux), grads = value_and_grad(params, frozen, batch, rng)
        return loss, aux, grads

    def split(x):  # part i takes every parts-th example, so that each device keeps its own examples
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def add(total, item):
        number, part = item
        (loss, aux), grads = value_and_grad(params, frozen, part, jax.random.fold_in(rng, number))
        return jax.tree.map(jnp.add, total, (loss, aux, grads)), None

    first = jax.eval_shape(value_and_grad, params, frozen, jax.tree.map(lambda x: split(x)[0], batch), rng)
    (loss, aux), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    (loss, aux, grads), _ = jax.lax.scan(add, (loss, aux, grads), (jnp.arange(parts), jax.tree.map(split, batch)))
    # Pairs (sum, count) add up; means are averaged.
    aux = {name: value if isinstance(value, tuple) else value / parts for name, value in aux.items()}
    return loss / parts, aux, jax.tree.map(lambda g: g / parts, grads)


class Stopping:
    """Whether to stop: SIGTERM or SIGINT here, or a preemption that all hosts agreed on."""

    def __init__(self, saver: checkpoint.Checkpointer | None = None):
        self._saver = saver
        self._asked = threading.Event()
        self._distributed = jax.process_count() > 1
        # With several hosts SIGTERM belongs to JAX's preemption service, which makes all stop at one step.
        for number in (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if self._asked.is_set():  # a second Ctrl-C does not wait
            sys.exit(programs.REQUEUE)
        self._asked.set()

    def at(self, step: int) -> bool:
        """Must be called at every step by every host."""
        if self._distributed and self._saver and self._saver.preempted(step):
            return True
        return self._asked.is_set()


class Input:
    """The data of a run: batches by step, evaluation batches, and the fingerprint that a resume must match."""

    def __init__(self, program: Program):
        self._program, self._config = program, program.config
        data = self._config.data
        builtin = data.dataset in datasets.DATASETS
        data_dir = str(epath.Path(data.data_dir).expanduser())
        self.directory = (
            datasets.prepare(data.dataset, data_dir=data_dir, variant=data.variant)
            if builtin
            else str(epath.Path(data.dataset).expanduser())
        )
        fields = program.stage.batch_spec(1)
        reads_text = any(name.endswith("tokens") for name in fields)
        self.tokenizer = Tokenizer(data.vocabulary) if reads_text else None
        if self.tokenizer and self.tokenizer.vocab_size != program.stage.vocab_size:
            raise InputError(
                f"the vocabulary {data.vocabulary!r} has {self.tokenizer.vocab_size} entries, the model's vocab_size "
                f"is {program.stage.vocab_size}; set one to the other"
            )
        self.fingerprint = {
            **datasets.fingerprint(self.directory, data.split),
            "tokenizer": self.tokenizer.digest if self.tokenizer else "",
        }

    def _batches(self, *, seed: int, start_step: int):
        data, config = self._config.data, self._config
        return pipeline.training_batches(
            datasets.open_source(self.directory, data.split),
            spec=self._program.stage.batch_spec(config.batch_size),
            tokenizer=self.tokenizer,
            seed=seed,
            batch_size=config.batch_size,
            start_step=start_step,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            workers=data.workers,
            cache="memory" if data.cache else "none",
            crop=data.crop_fraction,
            flip=0.5 if data.flip else 0.0,
            degradation=data.degradation,
            max_bad_fraction=data.max_bad_percent / 100,
        )

    def training(self, start_step: int):
        """Returns this host's batches from `start_step` on, as an endless iterator."""
        return self._batches(seed=self._config.seed, start_step=start_step)

    def fitting(self, examples: int) -> Iterator[dict[str, jax.Array]]:
        """Yields global batches of the training data, about `examples` examples, in an order of their own."""
        batches = self._batches(seed=self._config.seed + 1, start_step=0)
        for _ in range(-(-examples // self._config.batch_size)):
            yield sharding.put_batch(next(batches), self._program.batch_sharding)
        batches.close()

    def evaluation(
        self, spec: Mapping[str, jax.ShapeDtypeStruct], *, limit: int, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's part of the first `limit` examples of the evaluation split, in order."""
        data = self._config.data
        batches = pipeline.evaluation_batches(
            datasets.open_source(self.directory, data.eval_split),
            spec=spec,
            tokenizer=self.tokenizer,
            batch_size=batch_size,
            limit=limit,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            crop=data.crop_fraction,
            degradation=data.degradation,
            max_bad_fraction=data.max_bad_percent / 100,
        )
        yield from batches
        batches.close()


def load_frozen(program: Program) -> dict[str, Any]:
    """Reads the frozen networks that `config.frozen` names from the workdirs of their own runs (their EMA).

    Raises:
      InputError: a workdir is not given, holds no run, or holds another network than `config.<name>` describes.
    """
    frozen = {}
    for name, tree in program.frozen.items():
        workdir = program.config.frozen[name]
        if not workdir:
            raise InputError(
                f"config.frozen.{name} is not set; name the workdir of a trained {name}: "
                f"--config.frozen.{name}=runs/{name}"
            )

        def abstract(config, tree=tree, name=name, workdir=workdir):
            here = program.config[name].to_dict()
            there = {key: value for key, value in config.model.to_dict().items() if key in here}
            keys = [key for key in here if there.get(key) != here[key]]
            differing = [f"{key}={there.get(key)!r} there, {here[key]!r} here" for key in keys]
            if differing:
                raise InputError(f"the network in {workdir} is not config.{name}: {'; '.join(differing)}")
            return tree, {}

        params, _, _, step = checkpoint.load(workdir, abstract)
        _LOG.info("frozen %s: step %d of %s", name, step, workdir)
        frozen[name] = params
    return frozen


class Run:
    """One training run: restores or begins, then steps to the end or until it is told to stop."""

    def __init__(self, config: ConfigDict, workdir: str, *, accept_changes: bool = False):
        self.config, self.workdir = config, epath.Path(workdir).expanduser()
        self.program = build(config, sharding.make_mesh(config.mesh))
        # Everything that can be wrong with the input is found before anything is written.
        self.frozen = load_frozen(self.program)
        self.input = Input(self.program)
        changed = configs.claim_workdir(self.workdir, config, accept_changes=accept_changes)
        for key, (old, new) in changed.items():
            _LOG.warning("resuming with config.%s=%r, which was %r", key, new, old)
        total = self.program.total_steps
        self.every = {
            section: configs.duration(config[section], "every", batch_size=config.batch_size, total_steps=total)
            for section in ("checkpoint", "log", "evaluation")
        }
        self.every["log"] = max(self.every["log"], 1)  # 2% of a short run is less than a step
        self.saver = checkpoint.Checkpointer(
            self.workdir, every_steps=self.every["checkpoint"], keep=config.checkpoint.keep
        )
        self.writer = metrics.Writer(self.workdir, tensorboard=config.log.tensorboard)
        self.stopping = Stopping(self.saver)
        self.accept_changes = accept_changes

    def begin(self) -> TrainState:
        """Returns the newest whole checkpoint's state, or a new one at step 0."""
        restored = self.saver.restore(self.program.state)
        if restored is None:
            state = self.program.init(jax.random.key(self.config.seed))
            fitting = _Again(lambda: self.input.fitting(self.config.get("fit_examples", 0)))
            frozen = {**self.frozen, "statistics": state.statistics}
            fitted = self.program.stage.fit_statistics(frozen, fitting)
            if fitted:
                fitted = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), fitted, self.program.state.statistics)
                state = state.replace(statistics=fitted)
            _overview(state.params)
            return state
        state, meta = restored
        differing = {
            key: (meta.get("data", {}).get(key), value)
            for key, value in self.input.fingerprint.items()
            if meta.get("data", {}).get(key) != value
        }
        if differing and not self.accept_changes:
            named = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in differing.items())
            raise InputError(f"{self.workdir} was trained on other data ({named}); restore it, or --accept_changes")
        _LOG.info("resuming %s at step %d", self.workdir, int(state.step))
        return state

    def run(self) -> int:
        """Trains to the end; returns an exit code."""
        state = self.begin()
        step = int(state.step)
        try:
            if step < self.program.total_steps:
                state, step = self._loop(state, step)
        finally:
            self.writer.close()
            self.saver.close()
        return programs.DONE if step >= self.program.total_steps else programs.REQUEUE

    def _loop(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        program, config = self.program, self.config
        batches = self.input.training(step)
        progress = metrics.Progress(
            config.stage, start=step, total=program.total_steps, examples_per_step=config.batch_size
        )
        guard = _Guard(config.max_nonfinite_steps)
        window: list[dict[str, Any]] = []
        began = time.monotonic()
        first = step
        while step < program.total_steps:
            _profile(config.log, self.workdir, step)
            local = next(batches)
            state, report = program.train_step(state, self.frozen, sharding.put_batch(local, program.batch_sharding))
            step += 1
            guard.watch(step, report, local.get("id"))
            window.append(report)
            if step == first + 1:
                jax.block_until_ready(report)
                _LOG.info("first step, compiled, after %.1f s", time.monotonic() - began)
                progress.restart_clock()
            if step % self.every["log"] == 0 or step == program.total_steps:
                self._log(step, window, progress)
                window = []
            stop = self.stopping.at(step)
            if stop or self.saver.due(step) or step == program.total_steps:
                guard.drain()
                if guard.last_step_good:
                    self.saver.save(state, config=config, extra={"data": self.input.fingerprint})
            if stop:
                _LOG.info("stopped at step %d; run the same command to go on", step)
                break
            if self.every["evaluation"] and (step % self.every["evaluation"] == 0 or step == program.total_steps):
                self._evaluate(state, step)
                progress.restart_clock()
        progress.close()
        batches.close()
        return state, step

    def _log(self, step: int, window: list[dict[str, Any]], progress: metrics.Progress) -> None:
        window = jax.device_get(window)
        last = {name: float(value) for name, value in window[-1].items() if np.ndim(value) == 0}
        means = metrics.average(window)
        rates = progress.report(step, {"loss": means["loss"], "grad_norm": means["grad_norm"]})
        self.writer.scalars(step, {**last, **{f"mean/{name}": value for name, value in means.items()}, **rates})

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Runs the evaluators that the config names, on the moving average."""
        frozen = {**self.frozen, "statistics": state.statistics}
        scalars = {}
        for name in self.config.evaluation.evaluators:
            evaluator = evaluators.create(
                name,
                predict=self.program.predict,
                specs=self.program.stage.predict_specs(self.config.evaluation.batch_size),
                data=self.input.evaluation,
                put=functools.partial(sharding.put_batch, sharding=self.program.batch_sharding),
                config=self.config.evaluation,
            )
            for key, value in evaluator.run(state.ema, frozen):
                if np.ndim(value):
                    self.writer.picture(step, key, np.asarray(value))
                else:
                    scalars[f"evaluation/{key}"] = float(value)
        self.writer.scalars(step, scalars)
        shown = "  ".join(f"{name.removeprefix('evaluation/')} {value:.4g}" for name, value in scalars.items())
        _LOG.info("evaluation at step %d: %s", step, shown)


class _Again:
    """An iterable that begins anew each time; what `fit_statistics` may read more than once."""

    def __init__(self, make: Callable[[], Iterator[Any]]):
        self._make = make

    def __iter__(self):
        return self._make()


class _Guard:
    """Watches, one step behind so that the device never waits, for losses and gradients that are not finite."""

    def __init__(self, limit: int):
        self._limit = limit
        self._pending: collections.deque[tuple[int, Mapping[str, Any], Any]] = collections.deque()
        self._bad: list[tuple[int, list[int]]] = []
        self.last_step_good = True

    def watch(self, step: int, report: Mapping[str, Any], ids: np.ndarray | None) -> None:
        self._pending.append((step, report, ids))
        if len(self._pending) > 1:
            self._check(*self._pending.popleft())

    def drain(self) -> None:
        while self._pending:
            self._check(*self._pending.popleft())

    def _check(self, step: int, report: Mapping[str, Any], ids: np.ndarray | None) -> None:
        streak = int(report["streak"])
        self.last_step_good = streak == 0
        if not streak:
            self._bad.clear()
            return
        names = [] if ids is None else [int(i) for i in ids]
        self._bad.append((step, names))
        _LOG.warning(
            "step %d skipped: loss %g, gradient norm %g", step, float(report["loss"]), float(report["grad_norm"])
        )
        if streak >= self._limit:
            first, examples = self._bad[0]
            raise InputError(
                f"{streak} steps in a row had a loss or gradient that is not finite, from step {first} (examples "
                f"{examples[:16]}{' …' if len(examples) > 16 else ''}); the last checkpoint is from before them"
            )


def _profile(config: ConfigDict, workdir: epath.Path, step: int) -> None:
    """Starts and stops the profiler's window, config.log.profile_start and profile_steps."""
    if config.profile_steps and step == config.profile_start:
        jax.profiler.start_trace(str(workdir / "profile"))
    if config.profile_steps and step == config.profile_start + config.profile_steps:
        jax.profiler.stop_trace()


def _overview(params: Any) -> None:
    if jax.process_index() == 0:
        from clu import parameter_overview

        _LOG.info("parameters\n%s", parameter_overview.get_parameter_overview(params, include_stats=False))


_CONFIG = config_flags.DEFINE_config_file("config", None, "Which config, file:variant.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, pictures.")
_ACCEPT = flags.DEFINE_bool("accept_changes", False, "Resume although the config or the data differ; they are logged.")
_CACHE = flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def main(argv) -> int:
    del argv
    if not _CONFIG.value or not _WORKDIR.value:
        raise InputError("give --config=configs/STAGE.py:VARIANT and --workdir=FOLDER")
    programs.start_logging()
    programs.start_jax(compile_cache=_CACHE.value)
    config = configs.check(_CONFIG.value)
    return Run(config, _WORKDIR.value, accept_changes=_ACCEPT.value).run()


if __name__ == "__main__":
    programs.run(main)
