"""Real training processes, to be stopped and killed: how to start one, and what it has left behind."""

import json
import pathlib
import subprocess
import sys
import time

from unclip_jax import checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Longer than any of these runs takes on a slow, shared core.
PATIENCE = 300.0


class Training:
    """One process of `python -m unclip_jax.train`, whose log goes to a file beside the workdir."""

    def __init__(self, workdir: pathlib.Path, *, steps: int, data_dir: str, cache: str, options: tuple[str, ...] = ()):
        self.workdir = workdir
        self.log = workdir.with_suffix(".log")
        self.command = [sys.executable, "-m", "unclip_jax.train", f"--config=tests/small_clip.py:{steps}"]
        self.command += [f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", f"--compile_cache={cache}"]
        self.command += options
        self._log = self.log.open("w")
        self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT)

    def wait(self) -> int:
        """Returns the exit code; the log can be read by then."""
        try:
            code = self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            self._log.close()
        return code

    def wait_for_rows(self, count: int) -> bool:
        """Waits until the workdir has `count` more rows of metrics than now; False if the process ended before."""
        wanted = len(rows(self.workdir)) + count
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
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


def newest_step(workdir: pathlib.Path) -> int:
    """Returns the newest step that Orbax has committed, 0 if there is none."""
    return max(checkpoint.steps_of(workdir / checkpoint.FOLDER), default=0)
