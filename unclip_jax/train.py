"""Trains any stage: `python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder`.

The same command resumes: every later loss is bit-identical to that of a run never stopped. Exit codes: 0 done, 42
stopped by SIGTERM or SIGINT after saving (run it again), 1 error.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from unclip_jax import beginnings, checkpoint, digests, fitting, goodput, hosts, metrics, programs, sharding
from unclip_jax import config as configs
from unclip_jax.clock import Clock
from unclip_jax.errors import InputError
from unclip_jax.evaluation import evaluators
from unclip_jax.guard import Guard
from unclip_jax.inputs import Input, load_frozen
from unclip_jax.program import build
from unclip_jax.state import TrainState
from unclip_jax.stopping import Stopped, Stopping
from unclip_jax.watchdog import Watchdog

_LOG = logging.getLogger("unclip_jax.train")  # not __main__, which nobody listens to
# How many times config.log.watchdog_seconds a save, or an evaluation between two batches, may take: it compiles, too.
_PATIENCE = 4.0


class Run:
    """One training run: restores or begins, then steps to the end or until it is told to stop."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        *,
        accept_changes: bool = False,
        recorder: goodput.Recorder | None = None,
        stopping: Stopping | None = None,
    ):
        self.goodput = recorder or goodput.Recorder()
        self.config, self.workdir = config, checkpoint.absolute(workdir)
        self.stopping = stopping or Stopping()  # until the first step is done, a run can be ended at any moment
        hosts.failures_belong_to(self.workdir)
        hosts.check_same("config", dict(configs.leaves(config)))
        self.program = build(config, sharding.make_mesh(config.mesh))
        total = self.program.total_steps
        self.every = {
            section: configs.duration(config[section], "every", batch_size=config.batch_size, total_steps=total)
            for section in ("checkpoint", "log", "evaluation")
        }
        self.every["log"] = max(self.every["log"], 1)  # 2% of a short run is less than a step
        # Everything that can be wrong with the input is found before anything is written.
        self.frozen = load_frozen(self.program)
        # What the losses depend on beside the config and the data.
        networks = {name: digests.fingerprint(tree) for name, tree in self.frozen.items()}
        self.input = Input(self.program, networks)
        self.fingerprint = {**self.input.fingerprint, **{f"frozen.{name}": x for name, x in networks.items()}}
        hosts.check_same("input", self.fingerprint)
        self.evaluators = self._evaluators()
        begun = bool(checkpoint.steps_of(self.workdir / checkpoint.FOLDER))
        self.beginning = None if begun else beginnings.read(self.program, networks)
        changed = configs.claim_workdir(self.workdir, config, accept_changes=accept_changes)
        for key, (old, new) in changed.items():
            _LOG.warning("resuming with config.%s=%r, which was %r", key, new, old)
        self.goodput.open(self.workdir, **self._facts(changed))
        self.saver = checkpoint.Checkpointer(
            self.workdir, every_steps=self.every["checkpoint"], keep=config.checkpoint.keep
        )
        self.clock = Clock(60 * config.checkpoint.get("every_minutes", 0.0))
        self.watchdog = Watchdog(config.log.get("watchdog_seconds", 0.0))
        self.accept_changes = accept_changes

    def _facts(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the report tells of this start."""
        return {
            "total_steps": self.program.total_steps,
            "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(self.program.state.params)),
            "devices": jax.device_count(),
            "device": jax.devices()[0].device_kind,
            "hosts": jax.process_count(),
            "changed": {key: [repr(old), repr(new)] for key, (old, new) in changed.items()},
        }

    def _evaluators(self) -> list[evaluators.Evaluator]:
        """Returns the evaluators that the config names; none where it never evaluates."""
        config = self.config.evaluation
        if not self.every["evaluation"]:
            return []
        data, tokenizer = self.input.evaluation(), self.input.tokenizer
        if self.config.get("sampling", {}).get("method") == "analytic":
            _LOG.info("evaluations sample with the small fixed variance, for these weights' own is measured afterwards")
        return [
            evaluators.create(
                name,
                predict=self.program.predict,
                specs=self.program.stage.predict_specs(config.batch_size),
                data=data,
                put=functools.partial(sharding.put_batch, sharding=self.program.batch_sharding),
                config=config,
                tokenize=tokenizer.encode if tokenizer else None,
                between=self._between_batches,
            )
            for name in config.evaluators
        ]

    def begin(self) -> TrainState:
        """Returns the newest whole checkpoint's state, or a new one at step 0."""
        with self.goodput.span(goodput.RESTORE):
            restored = self.saver.restore(self.program.state)
        if restored is None:
            # While there is no state yet: it takes memory, too.
            measured = self.beginning.statistics if self.beginning else self._measured()
            state = self.program.init(jax.random.key(self.config.seed))
            if self.beginning:
                params = self.beginning.put(state.params)
                state = dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))
                self.beginning = None
            if measured:
                state = dataclasses.replace(state, statistics={**state.statistics, **measured})
                self._save(state)
            _overview(state.params)
            return state
        state, meta = restored
        before = {"loader": self.fingerprint["loader"], **meta.get("data", {})}  # which older checkpoints do not tell
        differing = [key for key, value in self.fingerprint.items() if before.get(key) != value]
        named = "; ".join(f"{key} was {before.get(key)!r}, is {self.fingerprint[key]!r}" for key in differing)
        if differing and not self.accept_changes:
            raise InputError(f"{self.workdir} was trained on other input ({named}); restore it, or --accept_changes")
        if differing:
            _LOG.warning("resuming on other input: %s", named)
        _LOG.info("resuming %s at step %d", self.workdir, int(state.step))
        return state

    def _measured(self) -> dict[str, jax.Array]:
        """Returns what the stage measures of the data before its first step, placed as in the state."""
        over_data = fitting.OverData(
            functools.partial(self.input.fitting, batch_size=fitting.CHUNK),
            self.frozen,
            spec=self.program.stage.batch_spec(fitting.CHUNK),
            examples=self.config.get("fit_examples", 0),
            devices=[device for device in self.program.mesh.devices.flat if device in jax.local_devices()],
            stop=self.stopping.now,
        )
        fitted, told = self.program.stage.fit_statistics(over_data)
        if fitted:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in told.items())
            _LOG.info("measured of %d examples: %s", self.config.fit_examples, shown)
        # Hosts' own linear algebra may round otherwise.
        fitted = fitting.from_host(0, jax.tree.map(np.asarray, fitted))
        return {name: jax.device_put(x, self.program.state.statistics[name].sharding) for name, x in fitted.items()}

    def run(self) -> int:
        """Trains to the end; returns an exit code."""
        with self.goodput:
            return self._run()

    def _run(self) -> int:
        state = self.begin()
        step = int(state.step)
        self.goodput.at(step)
        self.writer = metrics.Writer(self.workdir, tensorboard=self.config.log.tensorboard)
        try:
            if self._evaluates(step) and not hosts.from_first("evaluated", lambda: self._is_evaluated(step)):
                self._evaluate(state, step)  # it ended between the save and this
            stopped = step < self.program.total_steps and self._loop(state, step)
        except Stopped:  # in an evaluation, before which its step is saved
            stopped = True
        except Exception:
            if hosts.count() == 1:  # several would wait for the one that failed before it could tell them
                self._close()
            raise
        self._close()
        return programs.REQUEUE if stopped else programs.DONE

    def _close(self) -> None:
        self.writer.close()
        self.watchdog.feed("the last save", times=_PATIENCE)
        with self.goodput.span(goodput.SAVE):
            self.saver.close()
        self.watchdog.rest()

    def _evaluates(self, step: int) -> bool:
        if not self.evaluators:  # as where the interval is 0
            return False
        return step == self.program.total_steps or (step > 0 and step % self.every["evaluation"] == 0)

    def _is_evaluated(self, step: int) -> bool:
        return any(name.startswith("evaluation/") for name in metrics.read(self.workdir).get(step, {}))

    def _save(self, state: TrainState, *, temporary: bool = False) -> None:
        self.clock.restart()
        with self.goodput.span(goodput.SAVE):
            self.saver.save(state, config=self.config, extra={"data": self.fingerprint}, temporary=temporary)

    def _loop(self, state: TrainState, step: int) -> bool:
        """Steps to the end, or until it is told to stop; returns whether it was."""
        program, config = self.program, self.config
        batches = self.input.training(step)
        progress = metrics.Progress(
            config.stage, start=step, total=program.total_steps, examples_per_step=config.batch_size
        )
        guard = Guard(config.max_nonfinite_steps)
        window: list[dict[str, Any]] = []
        began = time.monotonic()
        first = step
        self.watchdog.rest()  # a compilation takes as long as it takes
        while step < program.total_steps:
            _profile(config.log, self.workdir, step)
            with self.goodput.span(goodput.DATA):
                local = next(batches)
            batch = sharding.put_batch(local, program.batch_sharding)
            with self.goodput.span(goodput.COMPILE if step == first else goodput.STEP):
                state, report = program.train_step(state, self.frozen, batch)
            step += 1
            self.goodput.given(step, report["loss"])
            guard.watch(step, report, local.get("id"))
            window.append(report)
            if step == first + 1:
                jax.block_until_ready(report)
                _LOG.info("first step, compiled, after %.1f s", time.monotonic() - began)
                progress.restart_clock()
            self.stopping.disposable = lambda: False
            self.watchdog.feed(f"what follows step {step}")
            if step % self.every["log"] == 0 or step == program.total_steps:
                self._log(step, window, progress)
                window = []
            stop = self.stopping.poll()
            regular = stop or self.saver.due(step) or step == program.total_steps
            if self.clock.rings(step) or regular or self._evaluates(step):
                self.watchdog.feed(f"the save of step {step}", times=_PATIENCE)
                guard.drain()
                # A bad step is never saved. Where no later one can be, what came before it is, to be gone on from.
                if guard.last_step_good or stop or step == program.total_steps:
                    self._save(state.last_good(), temporary=not regular)
            if stop:
                _LOG.info("stopped at step %d; run the same command to go on", step)
                break
            if self._evaluates(step):
                self._evaluate(state, step)
                progress.restart_clock()
        progress.close()
        batches.close()
        return stop and (step < program.total_steps or self._evaluates(step))

    def _log(self, step: int, window: list[dict[str, Any]], progress: metrics.Progress) -> None:
        window = jax.device_get(window)
        last = {name: float(value) for name, value in window[-1].items() if np.ndim(value) == 0}
        means = metrics.average(window)
        rates = progress.report(step, {"loss": means["loss"], "grad_norm": means["grad_norm"]})
        self.writer.scalars(step, {**last, **{f"mean/{name}": value for name, value in means.items()}, **rates})
        self.goodput.report()

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Runs the evaluators that the config names, on the moving average.

        Raises:
          Stopped: the run is to stop; nothing is written of this evaluation, which the same command makes up for.
        """
        self.watchdog.feed(f"the evaluation of step {step}", times=_PATIENCE)
        self.stopping.disposable = functools.partial(self.saver.committed, step)
        frozen = {**self.frozen, "statistics": state.statistics}
        scalars = {}
        with self.goodput.span(goodput.EVALUATION):
            for evaluator in self.evaluators:
                for key, value in evaluator.run(state.ema, frozen):
                    if np.ndim(value):
                        self.writer.picture(step, key, np.asarray(value))
                    else:
                        scalars[f"evaluation/{key}"] = float(value)
        self.writer.scalars(step, scalars)
        shown = "  ".join(f"{name.removeprefix('evaluation/')} {value:.4g}" for name, value in scalars.items())
        _LOG.info("evaluation at step %d: %s", step, shown)

    def _between_batches(self) -> None:
        self.watchdog.feed("a batch of the evaluation", times=_PATIENCE)
        self.stopping.check()


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
    stopping = Stopping()
    programs.start_jax(compile_cache=_CACHE.value)
    config = configs.check(_CONFIG.value)
    recorder = goodput.Recorder(since=goodput.process_began())
    run = Run(config, _WORKDIR.value, accept_changes=_ACCEPT.value, recorder=recorder, stopping=stopping)
    return run.run()


if __name__ == "__main__":
    programs.run(main)
