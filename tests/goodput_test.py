"""Where the time went: sums by hand over starts that were killed, a clock that misses nothing, real processes."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from training_processes import ROOT, Training, rows

from unclip_jax import goodput, goodput_sums, jsonl


def at(second):
    """12:00:00 UTC and so many seconds, as a row has it."""
    return f"2026-11-21T12:{second // 60:02d}:{second % 60:02d}+00:00"


def row(run, began, seconds, kind, steps=None, **rest):
    return {"run": run, "host": 0, "began": at(began), "seconds": seconds, "kind": kind} | (
        {"steps": list(steps)} if steps else {}
    ) | rest  # fmt: skip


# Start 1 is killed at second 60 with 30 steps done. Start 2 begins 20 s later at step 20, does steps 21 to 25 and is
# killed. Start 3 begins 5 s after that, at step 22, and ends at step 40.
THREE = [
    row(1, 0, 0, "start", total_steps=40, devices=4),
    row(1, 0, 10, "init"),
    row(1, 10, 8, "compile", (0, 0)),
    row(1, 18, 20, "step", (0, 10)),
    row(1, 38, 2, "data", (0, 10)),
    row(1, 40, 4, "save", (10, 20)),
    row(1, 44, 16, "step", (10, 30)),
    row(2, 80, 0, "start"),
    row(2, 80, 5, "init"),
    row(2, 85, 3, "restore"),
    row(2, 88, 2, "compile", (20, 20)),
    row(2, 90, 10, "step", (20, 25)),
    row(3, 105, 4, "init"),
    row(3, 109, 1, "restore"),
    row(3, 110, 36, "step", (22, 40)),
    row(3, 146, 6, "evaluation", (40, 40)),
    row(3, 152, 2, "gardening", (40, 40)),
    row(3, 156, 0, "end", (40, 40), how="done"),
]
# Kept: 1 to 20 in start 1, 21 and 22 in start 2, 23 to 40 in start 3. Start 1: 20 s and half of 16 s; start 2: 2 of 5
# steps in 10 s; start 3: 36 s. Redone: 10 steps of start 1 (8 s) and 3 of start 2 (6 s). Idle: 20 s and 5 s. Other:
# 2 s of gardening and 2 s that no row tells of.
BY_HAND = {
    "step": 20 + 8 + 4 + 36, "redone": 8 + 6, "data": 2, "save": 4, "evaluation": 6, "compile": 10, "init": 19,
    "restore": 4, "idle": 25, "other": 4,
}  # fmt: skip


def test_three_starts_and_two_kills_add_up_as_by_hand():
    sums = goodput_sums.sum_up(THREE)
    assert sums.seconds == pytest.approx(BY_HAND)
    assert sum(BY_HAND.values()) == 156
    assert sums.total == pytest.approx(156) and sums.goodput == pytest.approx(68 / 156)
    assert sums.steps_redone == 13
    assert [(start.number, start.steps, start.how) for start in sums.starts] == [
        (1, (0, 30), None), (2, (20, 25), None), (3, (22, 40), "done")
    ]  # fmt: skip
    assert sums.starts[0].facts["devices"] == 4


def test_the_order_of_rows_and_what_is_no_row_do_not_matter():
    foreign = [{"step": 3, "loss": 1.0}, row(1, 0, float("nan"), "step"), {"run": 1, "began": "yesterday"}, {}]
    assert goodput_sums.sum_up(foreign + THREE[::-1]).seconds == pytest.approx(BY_HAND)
    assert goodput_sums.sum_up(foreign) is None


def test_a_start_that_never_got_to_a_step_takes_nothing_back():
    sums = goodput_sums.sum_up([row(1, 0, 10, "step", (0, 10)), row(2, 10, 5, "init"), row(3, 15, 1, "init", (4, 4))])
    # The third began at step 4, though it was killed before it repeated any: 5 to 10 have to be done again.
    assert sums.seconds["step"] == pytest.approx(4) and sums.seconds["redone"] == pytest.approx(6)
    sums = goodput_sums.sum_up([row(1, 0, 10, "step", (0, 10)), row(2, 10, 5, "init")])
    assert sums.seconds["step"] == pytest.approx(10) and sums.steps_redone == 0


def test_a_step_in_pieces_is_kept_if_it_was_finished():
    pieces = [row(1, 0, 30, "step", (0, 0)), row(1, 30, 30, "step", (0, 0)), row(1, 60, 10, "step", (0, 1))]
    hung = row(1, 70, 30, "step", (1, 1))
    back = row(2, 100, 10, "step", (1, 2))
    assert goodput_sums.sum_up([*pieces, hung]).seconds["step"] == pytest.approx(100)  # it may still be going on
    sums = goodput_sums.sum_up([*pieces, hung, back])
    assert sums.seconds["step"] == pytest.approx(80) and sums.seconds["redone"] == pytest.approx(30)


def test_starts_that_overlap_are_no_more_than_the_whole():
    sums = goodput_sums.sum_up([row(1, 0, 100, "step", (0, 10)), row(2, 50, 100, "step", (10, 20))])
    assert sums.seconds["idle"] == 0 and sums.goodput <= 1 and sums.total == pytest.approx(200)


def test_shares_along_the_clock_keep_every_second():
    sums = goodput_sums.sum_up(THREE)
    shares = goodput_sums.shares(sums, 13)  # 12 s each
    assert shares[0] == pytest.approx({"init": 10, "compile": 2})
    assert shares[1] == pytest.approx({"compile": 6, "step": 6})
    assert sum(sum(share.values()) for share in shares) == pytest.approx(154)  # but for 2 s that no row tells of


def read(workdir):
    return jsonl.read(goodput.path_of(workdir, 0))


def test_every_second_is_of_one_kind_and_nested_spans_take_theirs_out(tmp_path):
    began = time.monotonic()
    recorder = goodput.Recorder()
    time.sleep(0.02)
    recorder.open(tmp_path, total_steps=2, devices=1)
    with recorder:
        with recorder.span(goodput.RESTORE):
            time.sleep(0.05)
        recorder.at(0)
        for step in (1, 2):
            with recorder.span(goodput.STEP):
                time.sleep(0.04)
                with recorder.span(goodput.SAVE):
                    time.sleep(0.06)
            recorder.given(step, jnp.zeros(()))
    wall = time.monotonic() - began
    sums = goodput_sums.read(tmp_path)[0]
    assert wall - 0.5 < sums.total <= wall and sums.seconds["other"] < 1e-3
    assert 0.05 <= sums.seconds["restore"] < 0.08 + wall - 0.27
    assert 0.12 <= sums.seconds["save"] < 0.15 + wall - 0.27
    assert 0.08 <= sums.seconds["step"] < 0.11 + wall - 0.27
    assert sums.starts[0].how == "done" and sums.starts[0].steps == (0, 2)
    ends = [(row["began"], row["seconds"]) for row in read(tmp_path)]
    assert ends == sorted(ends)


def test_waiting_for_data_costs_only_what_the_device_waited(tmp_path):
    class Output:
        """What the device computes, and is done with after 0.3 s."""

        def block_until_ready(self):
            time.sleep(0.3)
            self.done = time.monotonic()

    output, waits = Output(), []
    recorder = goodput.Recorder()
    recorder.open(tmp_path, total_steps=9)
    with recorder:
        recorder.at(0)
        recorder.given(1, output)
        for seconds in (0.1, 0.4, 0.1):  # beside a busy device; until after it is done; beside an idle one
            with recorder.span(goodput.DATA):
                began = time.monotonic()
                time.sleep(seconds)
                waits.append((began, time.monotonic()))
    cost = sum(ended - max(began, output.done) for began, ended in waits if ended > output.done)
    assert 0.2 < cost < waits[-1][1] - waits[0][0] - 0.15
    seconds = goodput_sums.read(tmp_path)[0].seconds
    assert seconds["data"] == pytest.approx(cost, abs=0.1)
    assert seconds["step"] == pytest.approx(waits[-1][1] - waits[0][0] - cost, abs=0.1)


def test_a_heart_beats_where_the_loop_reports_nothing(tmp_path):
    recorder = goodput.Recorder(heartbeat_seconds=0.1)
    recorder.open(tmp_path)
    with recorder:
        began = time.monotonic()
        with recorder.span(goodput.EVALUATION):
            time.sleep(0.6)
            written = goodput_sums.read(tmp_path)[0].seconds["evaluation"]
        assert 0.2 < written < time.monotonic() - began


def test_last_words_number_and_a_row_cut_short(tmp_path):
    with pytest.raises(ValueError), goodput.Recorder() as recorder:
        recorder.open(tmp_path)
        raise ValueError("the\ndevice is <gone>")
    path = goodput.path_of(tmp_path, 0)
    with path.open("a") as file:
        file.write('{"run": 1, "host": 0, "beg')
    with goodput.Recorder() as recorder:
        recorder.open(tmp_path)
    sums = goodput_sums.read(tmp_path)[0]
    assert [(start.number, start.how) for start in sums.starts] == [
        (1, "ValueError: the device is <gone>"), (2, "stopped")
    ]  # fmt: skip


LEAVES = """
import sys, threading, time
from unclip_jax import goodput, hosts

with goodput.Recorder() as recorder:
    recorder.open(sys.argv[1])
    with recorder.span(goodput.COMPILE):
        time.sleep(0.2)
        threading.Thread(target=hosts.leave, args=(int(sys.argv[2]),)).start()
        time.sleep(60)
"""


def test_a_process_that_ends_at_once_has_last_words_too(tmp_path):
    """As SIGTERM ends a compilation: by another thread, which does not wait for this one."""
    for status in (42, 1):
        done = subprocess.run([sys.executable, "-c", LEAVES, tmp_path, str(status)], cwd=ROOT, timeout=120)
        assert done.returncode == status
    sums = goodput_sums.read(tmp_path)[0]
    assert [start.how for start in sums.starts] == ["stopped", "exit code 1"]
    assert 0.4 <= sums.seconds["compile"] < 60


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    recorder = goodput.Recorder()
    recorder.open(tmp_path / "not there")
    with recorder, recorder.span(goodput.SAVE):
        recorder.given(1, jnp.zeros(()))
    assert "cannot be written" in caplog.text


def test_a_real_run_killed_and_resumed_accounts_for_its_wall_clock(tmp_path, data_dir, compile_cache):
    """The clock outside and the rows inside agree; steps done twice are those that metrics.jsonl has twice."""
    steps, workdir = 150, tmp_path / "run"
    options = ("--config.checkpoint.every_steps=20",)
    walls = []
    for kill in (True, False):
        began = time.time()
        training = Training(workdir, steps=steps, data_dir=data_dir, cache=compile_cache, options=options)
        if kill:
            assert training.wait_for_rows(50)
            training.process.kill()
        training.wait()
        walls.append((began, time.time()))
    sums = goodput_sums.read(workdir)[0]
    outside = walls[1][1] - walls[0][0]
    assert 0.85 * outside - 2 < sums.total < outside + 0.1  # Python needs a moment to end
    for start, (began, ended) in zip(sums.starts, walls, strict=True):
        assert began - 0.1 <= start.began < began + 1  # the process's own beginning, not that of its first line
        assert start.ended <= ended + 0.1
    killed, resumed = sums.starts
    assert killed.how is None and resumed.how == "done" and resumed.facts["total_steps"] == steps
    assert walls[0][1] - killed.ended < 5  # what the kill took with it: half a second, on a machine that is free
    assert resumed.steps[1] == steps and resumed.steps[0] % 20 == 0
    written = [step for step, _ in rows(workdir)]
    again = len(written) - len(set(written))
    assert again <= sums.steps_redone + 20 and sums.steps_redone == max(0, killed.steps[1] - resumed.steps[0])
    assert sums.seconds["other"] < 0.02 * sums.total
    for kind in ("init", "compile", "restore", "step", "save", "evaluation"):
        assert sums.seconds[kind] > 0, kind
    per_window = [json.dumps(row) for row in read(workdir) if row["kind"] == "step"]
    assert len(per_window) < len(written)  # no row per step


def test_hosts_write_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with goodput.Recorder() as recorder:
        recorder.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["goodput-3.jsonl"]
    assert list(goodput_sums.read(tmp_path)) == [3]
