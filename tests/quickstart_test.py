"""The quickstart: all of it as a real process with a few steps, and how its jobs are run, stopped and reported."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from unclip_jax import jobs, programs, quickstart
from unclip_jax import quickstart_results as results
from unclip_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 600.0


def _job(folder, name, code, *, needs=()):
    """A job that runs Python code, and then leaves a file."""
    there = folder / f"{name}.done"
    return jobs.Job(
        name=name,
        command=[sys.executable, "-c", f"{code}\nopen({str(there)!r}, 'w').close()"],
        log=folder / f"{name}.log",
        finished=there.exists,
        progress=lambda: jobs.Progress(0, 1),
        needs=needs,
    )


class _Asked:
    """A stop that no signal sets."""

    asked = False

    def poll(self):
        return self.asked


@pytest.fixture
def runner(tmp_path):
    with jobs.claim(tmp_path) as lock:
        yield jobs.Runner(groups=[None, None], times=jobs.Times(tmp_path), lock=lock, stop=_Asked())


def test_a_job_begins_when_those_it_needs_are_done(tmp_path, runner):
    first = _job(tmp_path, "first", "import time; time.sleep(0.5)")
    second = _job(tmp_path, "second", f"import os; assert os.path.exists({str(tmp_path / 'first.done')!r})",
                  needs=("first",))  # fmt: skip
    beside = _job(tmp_path, "beside", f"import os; assert not os.path.exists({str(tmp_path / 'first.done')!r})")
    assert runner.run([second, first, beside]) == programs.DONE
    assert runner.started == 3
    # Finished jobs are not begun again.
    assert runner.run([second, first, beside]) == programs.DONE
    assert runner.started == 3
    assert set(jobs.Times(tmp_path).seconds) == {"first", "second", "beside"}
    assert jobs.Times(tmp_path).seconds["first"] >= 0.5


def test_a_failing_job_stops_the_others_and_is_shown(tmp_path, runner):
    saves = (
        "import signal, sys, time\n"
        f"def stop(*_): open({str(tmp_path / 'saved')!r}, 'w').close(); sys.exit(42)\n"
        f"signal.signal(signal.SIGTERM, stop); open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(60)"
    )
    wrong = (
        f"import os, sys, time\nwhile not os.path.exists({str(tmp_path / 'ready')!r}): time.sleep(0.01)\n"
        "print('error: no such colour', file=sys.stderr); sys.exit(1)"
    )
    began = time.monotonic()
    with pytest.raises(InputError, match="wrong failed with exit code 1: no such colour\n.*wrong.log"):
        runner.run([_job(tmp_path, "long", saves), _job(tmp_path, "wrong", wrong)])
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - began < 30


def test_a_job_that_saved_and_stopped_stops_the_run(tmp_path, runner):
    assert runner.run([_job(tmp_path, "stopped", "raise SystemExit(42)")]) == programs.REQUEUE


def test_a_workdir_belongs_to_one_run(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); time.sleep(60)", str(tmp_path / ".lock")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is at work"), jobs.claim(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with jobs.claim(tmp_path):
        pass


def test_children_hold_the_workdir_after_their_parent(tmp_path):
    with jobs.claim(tmp_path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    try:
        with pytest.raises(InputError, match="or a process that it started"), jobs.claim(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with open(tmp_path / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("cores, most, groups", [
    ([0, 1], 5, [(0,), (1,)]), ([3], 5, [(3,)]), (range(7), 3, [(0, 1), (2, 3), (4, 5)]),
])  # fmt: skip
def test_cores_are_dealt_out_evenly_and_once(cores, most, groups):
    assert jobs.core_groups(list(cores), most=most) == groups


def test_a_job_runs_on_its_cores_alone(tmp_path):
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    code = f"import os; assert os.sched_getaffinity(0) == {{{core}}}; assert 'eigen=false' in os.environ['XLA_FLAGS']"
    with jobs.claim(tmp_path) as lock:
        runner = jobs.Runner(groups=[(core,)], times=jobs.Times(tmp_path), lock=lock, stop=_Asked())
        assert runner.run([_job(tmp_path, "bound", code)]) == programs.DONE
    assert os.sched_getaffinity(0) == before


def test_curves_are_smoothed_without_a_bias_at_the_start():
    assert results.smoothed([4.0, 4.0, 4.0, 4.0, 4.0, 4.0]) == [4.0] * 6
    assert results.smoothed([2.0, 4.0]) == [2.0, 3.0]


def test_the_whole_of_it_runs_is_stopped_and_goes_on(tmp_path, data_dir):
    """Six stages trained, images drawn by every prior and scored, and a report; SIGTERM on the way loses nothing."""
    command = [sys.executable, "-m", "unclip_jax.quickstart", "--smoke", f"--workdir={tmp_path / 'run'}"]
    command += [f"--data_dir={data_dir}", f"--compile_cache={tmp_path / 'cache'}"]
    log = tmp_path / "log"

    def start():
        with log.open("a") as file:
            return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    process = start()
    deadline = time.monotonic() + PATIENCE
    while not quickstart.checkpoint.steps_of(tmp_path / "run" / "clip" / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == programs.REQUEUE, log.read_text()
    assert not (tmp_path / "run" / "report.json").exists()

    assert start().wait(PATIENCE) == programs.DONE, log.read_text()
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {name: stage["steps"] for name, stage in figures["stages"].items()} == dict.fromkeys(quickstart.STAGES, 4)
    assert set(figures["accuracy"]) == {"validation", "unseen"}
    # The oracle reads real renders rightly: the untrained images' score is theirs, not the oracle's.
    assert figures["oracle"]["single"]["both"] >= 0.98
    assert set(figures["accuracy"]["validation"]) == {"diffusion", "ar", "none", "render"}
    assert figures["side"] == 64
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
    _evaluated(tmp_path)


def _evaluated(folder):
    """Scores the models that were trained; images a call are as many as before, so that programs are found compiled."""
    command = [sys.executable, "-m", "unclip_jax.evaluate", "--config=configs/eval_captioned_shapes.py:smoke"]
    command += [f"--checkpoint={folder / 'run'}", f"--workdir={folder / 'evaluation'}", "--config.microbatch=4"]
    command += [f"--compile_cache={folder / 'cache'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == programs.DONE, done.stderr[-3000:]
    assert done.stdout.startswith("captioned_shapes-smoke: Fréchet distance (CLIP ")
    found = json.loads((folder / "evaluation" / "results.json").read_text())
    assert found["manifest"]["rows"]["count"] == 96 and not found["points"][0]["bad"]["count"]
    assert {name: one["step"] for name, one in found["manifest"]["models"].items()} == {
        name: 4 for name in quickstart.STAGES if name != "prior_ar"
    }
    assert (folder / "evaluation" / "results.html").stat().st_size > 100_000
