"""What the processes of a run tell each other, how they stop and how they end. Each case is real processes."""

import os
import signal
import sys
import time

import pytest
from training_processes import Processes, free_port

from unclip_jax import clock, hosts
from unclip_jax.errors import InputError

PROGRAM = """
import hashlib, json, os, signal, sys, time
from absl import flags
from unclip_jax import hosts, programs, stopping
from unclip_jax.errors import InputError

def busy(seconds):
    # Like a compilation: for Python one long call, which no signal cuts short and other threads run beside.
    end = time.monotonic() + seconds
    rounds = 100_000
    began = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    rounds = int(rounds * seconds / max(time.monotonic() - began, 1e-6))
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)

def say(*words):
    print(*words, flush=True)

def main(argv):
    programs.start_logging()
    told = stopping.Stopping()
    programs.start_jax()
    say("ready")
    {body}

programs.run(main)
"""


def start(tmp_path, body: str, *, processes: int = 1, **environment: str) -> Processes:
    indented = body.strip().replace("\n", "\n    ")
    command = [sys.executable, "-c", PROGRAM.format(body=indented)]
    return Processes(command, logs=tmp_path / "run", processes=processes, environment=environment)


def send(running: Processes, number: int, *, process: int = 0) -> float:
    """Sends a signal once all are ready; returns when."""
    for other in range(len(running.processes)):
        assert running.wait_for("ready", process=other), running.texts()
    time.sleep(0.5)
    running.processes[process].send_signal(number)
    return time.monotonic()


POLLS = """
for step in range(3000):
    time.sleep({seconds})
    if told.poll():
        say("stopped at", step)
        return programs.REQUEUE
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_that_polls_stops(tmp_path, number):
    running = start(tmp_path, POLLS.format(seconds=0.02))
    began = send(running, number)
    assert running.codes() == [42] and time.monotonic() - began < 10
    assert "stopped at" in running.texts()[0]


def test_a_call_that_takes_long_is_ended_where_nothing_is_lost(tmp_path):
    running = start(tmp_path, "busy(120)")
    began = send(running, signal.SIGTERM)
    assert running.codes() == [42] and 3 < time.monotonic() - began < 10
    assert "stopped while there was nothing to save" in running.texts()[0]


def test_and_waited_for_where_something_is(tmp_path):
    body = """
told.disposable = lambda: False
busy(7)
say("computed")
assert told.poll()
time.sleep(1)
say("saved")
return programs.REQUEUE
"""
    running = start(tmp_path, body)
    send(running, signal.SIGTERM)
    running.processes[0].send_signal(signal.SIGTERM)  # once more changes nothing
    assert running.codes() == [42]
    assert running.texts()[0].splitlines()[-2:] == ["computed", "saved"]


def test_a_second_interrupt_does_not_wait(tmp_path):
    running = start(tmp_path, "told.disposable = lambda: False\nbusy(120)")
    send(running, signal.SIGINT)
    assert running.wait_for("stopping: SIGINT")
    began = time.monotonic()
    running.processes[0].send_signal(signal.SIGINT)
    assert running.codes() == [42] and time.monotonic() - began < 5


def test_several_hosts_stop_at_one_poll_though_one_of_them_is_slow(tmp_path):
    running = start(tmp_path, POLLS.format(seconds="0.01 + 0.3 * hosts.index()"), processes=2)
    began = send(running, signal.SIGTERM, process=1)
    assert running.codes() == [42, 42] and time.monotonic() - began < 30  # the slow one has to catch up
    first, second = ([line for line in text.splitlines() if "stopped at" in line] for text in running.texts())
    assert first == second and len(first) == 1
    assert "[1] " in running.texts()[1] and "process 1 was sent SIGTERM" in running.texts()[0]


@pytest.mark.parametrize("one_has_work", [False, True])
def test_several_hosts_leave_at_once_only_if_none_has_something_to_save(tmp_path, one_has_work):
    body = f"""
told.disposable = lambda: not (hosts.index() == 0 and {one_has_work})
busy(8)
assert told.poll()
say("saved")
return programs.REQUEUE
"""
    running = start(tmp_path, body, processes=2)
    began = send(running, signal.SIGTERM)
    assert running.codes() == [42, 42]
    assert one_has_work or time.monotonic() - began < 10
    assert ["saved" in text.splitlines() for text in running.texts()] == [one_has_work, one_has_work]


def test_hosts_agree_and_the_first_goes_first(tmp_path):
    body = """
say(hosts.gather("names", [hosts.index(), "x"]), hosts.from_first("step", lambda: 7 + hosts.index()))
def write():
    there = os.path.exists(os.environ["THERE"])
    time.sleep(0.5)
    open(os.environ["THERE"], "w").close()
    return there
say("there before:", hosts.one_first("write", write))
def broken():
    if hosts.index():
        raise OSError("disk is gone")
    return "fine"
try:
    hosts.together("read", broken)
except (OSError, RuntimeError) as error:
    say(type(error).__name__, error)
hosts.check_same("config", {"seed": 1})
hosts.check_same("config", {"seed": 1, "lr": 1 + hosts.index()})
"""
    running = start(tmp_path, body, processes=2, THERE=str(tmp_path / "there"))
    assert running.codes() == [0, 1] or running.codes() == [1, 1]
    first, second = running.texts()
    assert all("[[0, 'x'], [1, 'x']] 7" in text for text in (first, second))
    assert "there before: False" in first and "there before: True" in second
    assert "RuntimeError process 1: OSError: disk is gone" in first and "OSError disk is gone" in second
    assert "process 1 has another config than process 0 (lr is 1 there and 2 here); start all alike" in second


def test_what_one_host_fails_of_ends_all_and_is_written_down(tmp_path):
    body = """
hosts.failures_belong_to(os.environ["FOLDER"])
if hosts.index() == 1:
    raise KeyError("no such record")
busy(120)
"""
    running = start(tmp_path, body, processes=2, FOLDER=str(tmp_path))
    assert running.codes() == [1, 1]
    told = [(tmp_path / hosts.FAILURES / f"{number}.txt").read_text() for number in range(2)]
    assert 'raise KeyError("no such record")' not in told[0]  # a program given by -c has no lines to show
    assert "KeyError: 'no such record'" in told[1] and "Traceback" in told[1]
    assert "process 1: KeyError: 'no such record'" in told[0] and "in busy" in told[0]
    assert "KeyError" in running.texts()[1]


@pytest.mark.parametrize(("number", "says"), [
    (1, "process 1 could not reach process 0 at localhost:"), (0, "not all of 2 processes came together at localhost:")
])
def test_processes_that_do_not_come_are_told_of_in_a_sentence(tmp_path, number, says):
    running = start(
        tmp_path,
        "",
        JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(number),
        UNCLIP_JOIN_SECONDS="3",
    )
    assert running.codes() == [1]
    (line,) = [line for line in running.texts()[0].splitlines() if line.startswith("error: ")]
    assert says in line and "within 3 s" in line


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, False),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
])
def test_signs_of_other_hosts(monkeypatch, environment, expected):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_PROCID", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._is_one_of_several() == expected


def test_one_host_is_silent_and_a_wrong_environment_is_not(monkeypatch):
    hosts.join()
    assert (hosts.count(), hosts.index()) == (1, 0)
    assert hosts.gather("x", (1, 2)) == [[1, 2]] and hosts.from_first("x", lambda: "y") == "y"
    hosts.check_same("x", {"a": 1})
    monkeypatch.setenv("UNCLIP_HOSTS", "on")
    with pytest.raises(InputError, match="UNCLIP_HOSTS='on' is unknown; did you mean 'one'"):
        hosts.join()
    monkeypatch.setenv("UNCLIP_HOSTS", "auto")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES='two' is no number"):
        hosts.join()
    assert os.environ["UNCLIP_HOSTS"] == "auto"


def test_a_clock_rings_once_in_each_period_and_is_looked_at_now_and_then(monkeypatch):
    now, looks = [100.0], []
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    ask = hosts.from_first
    monkeypatch.setattr(clock.hosts, "from_first", lambda name, make: looks.append(now[0]) or ask(name, make))
    ringing, rang = clock.Clock(60.0), []
    for step in range(1, 2001):
        now[0] += 0.1
        if ringing.rings(step):
            rang.append(now[0] - 100)
    assert len(rang) == 3 and all(abs(time - 60 * number) < 4 * number for number, time in enumerate(rang, 1))
    assert len(looks) < 100
    assert not clock.Clock(0.0).rings(10**6)
