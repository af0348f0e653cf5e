"""Real training processes, to be stopped and killed: how to start them, and what they have left behind."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

from unclip_jax import checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Longer than any of these runs takes on a slow, shared core.
PATIENCE = 300.0


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


class Processes:
    """Processes that run one command together, as one on each host; the log of each goes to a file."""

    def __init__(
        self,
        command: list[str],
        *,
        logs: pathlib.Path,
        processes: int = 1,
        devices: int = 1,
        environment: Mapping[str, str] | None = None,
    ):
        """Starts them.

        Args:
          command: of each; what tells them apart is in their environment.
          logs: `<logs>.log`, of several processes `<logs>-<number>.log`.
          processes: how many.
          devices: of each.
          environment: more variables.
        """
        names = [logs.with_suffix(".log")] if processes == 1 else []
        self.logs = names or [logs.with_name(f"{logs.name}-{number}.log") for number in range(processes)]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        shared = {**os.environ, "XLA_FLAGS": flags, **(environment or {})}
        if processes > 1:
            shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
        self.processes = []
        for number, log in enumerate(self.logs):
            with log.open("w") as file:
                own = shared | ({"JAX_PROCESS_ID": str(number)} if processes > 1 else {})
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=own)
            self.processes.append(process)

    def codes(self, seconds: float = PATIENCE) -> list[int]:
        """Returns the exit codes; the logs can be read by then. What still runs after so many seconds is killed."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends what is left of them."""
        for process in self.processes:
            process.kill()
            process.wait()

    def running(self) -> bool:
        """Whether none has ended."""
        return all(process.poll() is None for process in self.processes)

    def texts(self) -> list[str]:
        """Returns what they have logged so far."""
        return [log.read_text(errors="replace") for log in self.logs]

    def wait_for(self, words: str, *, process: int = 0) -> bool:
        """Waits until a process has logged these words; False if one ended before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if words in self.texts()[process]:
                return True
            if not self.running():
                return False
            time.sleep(0.02)
        return False


class Training(Processes):
    """`python -m unclip_jax.train` of tests/small_clip.py, whose logs lie beside the workdir."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        steps: int,
        data_dir: str,
        cache: str,
        options: tuple[str, ...] = (),
        processes: int = 1,
        devices: int = 1,
        watched: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        """Starts it; `watched` are variables for tests/watched_training.py, which then runs in its place."""
        self.workdir = workdir
        program = ["-m", "unclip_jax.train"] if watched is None else [str(ROOT / "tests" / "watched_training.py")]
        self.command = [sys.executable, *program, f"--config=tests/small_clip.py:{steps}"]
        self.command += [f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", f"--compile_cache={cache}"]
        self.command += options
        environment = {**(environment or {}), **(watched or {})}
        super().__init__(
            self.command, logs=workdir, processes=processes, devices=devices, environment=environment
        )
        self.log, self.process = self.logs[0], self.processes[0]

    def wait(self) -> int:
        """Returns the exit code of process 0, once all have ended."""
        return self.codes()[0]

    def wait_for_rows(self, count: int) -> bool:
        """Waits until the workdir has `count` more rows of metrics than now; False if a process ended before."""
        wanted = len(rows(self.workdir)) + count
        deadline = time.monotonic() + PATIENCE
        while self.running() and time.monotonic() < deadline:
            if len(rows(self.workdir)) >= wanted:
                return True
            time.sleep(0.005)
        return False


def rows(workdir: pathlib.Path) -> list[tuple[int, str]]:
    """Returns (step, exact loss) of every whole row that was ever written, repeated steps included."""
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        if "loss" in row:
            found.append((row["step"], float(row["loss"]).hex()))
    return found


def seen(prefix: pathlib.Path, processes: int) -> dict[int, list[int]]:
    """Returns step -> ids of the global batch, of all processes in their order, as tests/watched_training.py saw it."""
    batches: dict[int, list[int]] = {}
    for number in range(processes):
        path = prefix.with_name(f"{prefix.name}-{number}.jsonl")
        latest = dict(json.loads(line) for line in path.read_text().splitlines())
        for step, ids in latest.items():
            batches.setdefault(step, []).extend(ids)
    return batches


def newest_step(workdir: pathlib.Path) -> int:
    """Returns the newest step that Orbax has committed, 0 if there is none."""
    return max(checkpoint.steps_of(workdir / checkpoint.FOLDER), default=0)
