"""Training by several processes, as on several hosts: really started, stopped, killed and held up.

UNCLIP_LONG_TESTS=1 tries more layouts and more kills.
"""

import os
import pathlib
import random
import shutil
import signal
import sys
import time

import pytest
from survival import survive
from training_processes import Processes, Training, newest_step, rows, seen

from unclip_jax import checkpoint, hosts, metrics

LONG = bool(os.environ.get("UNCLIP_LONG_TESTS"))
STEPS = 40
# Processes and devices of each; the global batch is 8 for all.
LAYOUTS = [(1, 4), (1, 1), (4, 1)] if LONG else [(1, 4)]


class Runs:
    """Runs of STEPS steps below one folder."""

    def __init__(self, folder: pathlib.Path, data_dir: str, cache: str):
        self.folder, self.data_dir, self.cache = folder, data_dir, cache

    def start(self, name: str, *, processes: int, devices: int, options: tuple[str, ...] = ()) -> Training:
        return Training(
            self.folder / name,
            steps=STEPS,
            data_dir=self.data_dir,
            cache=self.cache,
            processes=processes,
            devices=devices,
            options=options,
            watched={"WATCH_IDS": str(self.folder / f"ids-{name}")},
        )

    def finish(self, name: str, *, processes: int, devices: int) -> tuple[dict[int, str], dict[int, list[int]]]:
        """Runs to the end; returns step -> loss and step -> ids of the global batch."""
        training = self.start(name, processes=processes, devices=devices)
        codes = training.codes()
        assert codes == [0] * processes, "\n".join(text[-3000:] for text in training.texts())
        return dict(rows(self.folder / name)), seen(self.folder / f"ids-{name}", processes)

    def copy(self, name: str, other: str) -> None:
        shutil.copytree(self.folder / name, self.folder / other)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir, compile_cache):
    return Runs(tmp_path_factory.mktemp("runs"), data_dir, compile_cache)


@pytest.fixture(scope="module")
def straight(runs):
    """Two processes with two devices each, to the end."""
    return runs.finish("straight", processes=2, devices=2)


def agree(losses: dict[int, str], reference: dict[int, str]) -> None:
    assert losses.keys() == reference.keys()
    for step, loss in reference.items():
        assert float.fromhex(losses[step]) == pytest.approx(float.fromhex(loss), rel=1e-6), step


@pytest.mark.parametrize(("processes", "devices"), LAYOUTS)
def test_any_layout_sees_the_same_examples_and_has_the_same_losses(runs, straight, processes, devices):
    losses, ids = straight
    assert sorted(ids) == list(range(1, STEPS + 1)) and all(len(batch) == 8 for batch in ids.values())
    other_losses, other_ids = runs.finish(f"{processes}x{devices}", processes=processes, devices=devices)
    assert other_ids == ids
    agree(other_losses, losses)


def test_told_to_one_process_all_stop_at_one_step_and_any_layout_goes_on_from_it(runs, straight):
    losses, ids = straight
    training = runs.start("stopped", processes=2, devices=2)
    assert training.wait_for_rows(8), training.texts()
    began = time.monotonic()
    training.processes[1].send_signal(signal.SIGTERM)
    assert training.codes() == [42, 42]
    took = time.monotonic() - began
    last = newest_step(runs.folder / "stopped")
    assert 8 <= last < STEPS and took < 10
    assert all(f"stopped at step {last}; run the same command to go on" in text for text in training.texts())
    assert rows(runs.folder / "stopped")[-1][0] == last  # files by process 0 alone: no row twice
    assert [step for step, _ in rows(runs.folder / "stopped")] == list(range(1, last + 1))

    runs.copy("stopped", "alone")
    again, ids_again = runs.finish("stopped", processes=2, devices=2)
    assert again == losses and {step: ids_again[step] for step in ids} == ids  # bit for bit
    whole, unharmed = (metrics.read(runs.folder / name) for name in ("stopped", "straight"))
    for step, row in unharmed.items():
        exact = {name: value for name, value in row.items() if name == "grad_norm" or name.startswith("evaluation/")}
        assert exact and exact.items() <= whole[step].items()

    alone, ids_alone = runs.finish("alone", processes=1, devices=1)
    assert ids_alone == {step: batch for step, batch in ids.items() if step > last}
    agree(alone, losses)


def test_a_stop_in_an_evaluation_keeps_its_step_and_the_evaluation_is_made_up_for(tmp_path, data_dir, compile_cache):
    values = {"evaluation.batch_size": 2, "evaluation.examples": 96, "checkpoint.every_steps": 9}
    options = tuple(f"--config.{key}={value}" for key, value in values.items())

    def start():
        return Training(
            tmp_path / "run", steps=4, data_dir=data_dir, cache=compile_cache, processes=2, options=options
        )

    training = start()
    assert training.wait_for("clip 4/4")
    time.sleep(0.5)
    began = time.monotonic()
    training.processes[0].send_signal(signal.SIGTERM)
    assert training.codes() == [42, 42] and time.monotonic() - began < 10
    assert "evaluation at step" not in training.texts()[0] and newest_step(tmp_path / "run") == 4
    training = start()
    assert training.codes() == [0, 0], training.texts()
    assert "evaluation at step 4" in training.texts()[0] and "first step" not in training.texts()[0]


def test_a_stop_while_the_first_step_compiles_does_not_wait_for_it(tmp_path, data_dir):
    command = ["-m", "unclip_jax.train", "--config=configs/upsampler.py:tiny_1", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.data.data_dir={data_dir}", "--config.data.variant=smoke", "--compile_cache="]
    running = Processes([sys.executable, *command], logs=tmp_path / "run")
    assert running.wait_for("parameters"), running.texts()
    time.sleep(2)
    began = time.monotonic()
    running.processes[0].send_signal(signal.SIGTERM)
    assert running.codes() == [42] and time.monotonic() - began < 10
    assert "first step" not in running.texts()[0]


def test_a_loader_that_hangs_ends_all_processes_with_their_stacks(tmp_path, data_dir, compile_cache):
    training = Training(
        tmp_path / "run",
        steps=STEPS,
        data_dir=data_dir,
        cache=compile_cache,
        processes=2,
        options=("--config.log.watchdog_seconds=5",),
        watched={"WATCH_HANG": "1:6"},
    )
    assert training.wait_for_rows(5) or not training.running(), training.texts()
    began = time.monotonic()
    assert training.codes() == [1, 1] and time.monotonic() - began < 30
    told = [(tmp_path / "run" / hosts.FAILURES / f"{number}.txt").read_text() for number in range(2)]
    assert "watched_training.py" in told[1] and "in __next__" in told[1]  # where it hangs
    assert "in _loop" in told[0] and "in __next__" not in told[0].partition("Thread")[0]
    assert any("watchdog_seconds" in text for text in told)
    assert all("in _loop" in text for text in training.texts())


def test_what_is_left_after_kills_goes_on_as_if_nothing_had_happened(tmp_path, data_dir):
    kills = 10 if LONG else 1
    trial = survive(
        tmp_path,
        kills=kills,
        seed=random.randrange(1 << 30) if LONG else 1,
        steps=40 + 20 * kills,
        data_dir=data_dir,
        processes=2,
        heartbeat=30 if LONG else 8,
    )
    assert trial.kills == kills and not trial.faults
    assert max([*trial.noticed[True], *trial.noticed[False], 0.0]) < 35


def test_all_processes_pass_over_the_same_damage(runs, straight):
    losses, _ = straight
    runs.copy("straight", "damaged")
    folder = runs.folder / "damaged" / checkpoint.FOLDER
    newest = newest_step(runs.folder / "damaged")
    shutil.rmtree(folder / str(newest) / "ema")
    (folder / "999").mkdir()
    again, _ = runs.finish("damaged", processes=2, devices=2)
    assert again == losses and newest_step(runs.folder / "damaged") == STEPS
    assert len([path for path in folder.iterdir() if path.name.startswith("damaged-")]) == 2
    for number in range(2):
        log = (runs.folder / f"damaged-{number}.log").read_text()
        assert "checkpoint 999 of" in log and f"checkpoint {newest} of" in log and "passed over" in log
