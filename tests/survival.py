"""Kills training processes at random moments, and holds what they make to a run that nobody killed.

    python tests/survival.py --kills=20 --workdir=/tmp/survival --seed=0
    python tests/survival.py --kills=100 --processes=2 --workdir=/tmp/survival

Every start is the same command. It is killed (SIGKILL) at a random moment: while it starts, between steps, and, for it
saves every third step and keeps two, above all during saves and deletions. Of several processes, one drawn at random is
killed, process 0 as well as another, and the others have to end by themselves. In the end the run may finish. Checked:
each start resumes from the newest step that was committed before it, none finds a damaged one, and every loss that any
of them ever wrote is, bit for bit, that of the run that was never killed. Exit code 0 if all of that held, else 1.
"""

import argparse
import pathlib
import random
import re
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training_processes import Training, newest_step, rows

from unclip_jax.data import datasets

# After the death of one process: the heartbeat, and what it takes to end.
NOTICED_SECONDS = 30.0


class Survival:
    """The tally of one trial."""

    def __init__(
        self, workdir: pathlib.Path, *, steps: int, data_dir: str, processes: int = 1, devices: int = 1, heartbeat: int
    ):
        self.killed = workdir / "killed"
        self.unharmed = workdir / "unharmed"
        self.steps, self.data_dir, self.cache = steps, data_dir, str(workdir / "cache")
        self.processes, self.devices, self.heartbeat = processes, devices, heartbeat
        self.kills = self.kills_in_saves = self.kills_in_starts = self.redone = 0
        self.noticed: dict[bool, list[float]] = {True: [], False: []}  # whether process 0 was killed -> seconds
        self.faults: list[str] = []

    def start(self, workdir: pathlib.Path) -> Training:
        """Starts the processes; always the same command."""
        return Training(
            workdir,
            steps=self.steps,
            data_dir=self.data_dir,
            cache=self.cache,
            processes=self.processes,
            devices=self.devices,
            environment={"UNCLIP_HEARTBEAT_SECONDS": str(self.heartbeat), "UNCLIP_JOIN_SECONDS": "45"},
        )

    def reference(self) -> dict[int, str]:
        """Returns step -> loss of a run that nobody disturbs."""
        if any(codes := self.start(self.unharmed).codes(self.patience())):
            raise RuntimeError(f"the undisturbed run ended with {codes}: {self.unharmed}.log")
        return dict(rows(self.unharmed))

    def patience(self) -> float:
        """Seconds that a whole run may take."""
        return 300.0 + self.steps

    def attempt(self, rng: random.Random, *, start_seconds: float) -> None:
        """Starts the processes and kills one at a random moment."""
        before, had = newest_step(self.killed), len(rows(self.killed))
        training = self.start(self.killed)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, start_seconds))
        elif training.wait_for_rows(rng.randint(1, 20)):  # by rows, or a fast machine would be done before a slow kill
            time.sleep(rng.uniform(0, 0.03))
        victim = rng.randrange(self.processes)
        training.processes[victim].kill()
        if training.processes[victim].wait() == 0:
            raise RuntimeError(f"the run of {self.steps} steps ended before it could be killed: give it more --steps")
        self.kills += 1
        folder = self.killed / "checkpoints"
        self.kills_in_saves += any("tmp" in path.name for path in folder.iterdir()) if folder.exists() else 0
        self.kills_in_starts += len(rows(self.killed)) == had
        self.watch_the_others(training, victim)
        self.check_start(training.log.read_text(), before)

    def watch_the_others(self, training: Training, victim: int) -> None:
        """Notes how long the others go on without the one that was killed."""
        began = time.monotonic()
        joined = all("parameters" in text or "resuming" in text for text in training.texts()[:1])
        try:
            codes = training.codes(NOTICED_SECONDS + 30)
        except subprocess.TimeoutExpired:
            if joined:  # before that they may wait for UNCLIP_JOIN_SECONDS, for one that never came
                self.faults.append(f"kill {self.kills}: without process {victim} the others went on for a minute")
            return
        if self.processes == 1:
            return
        if joined:
            self.noticed[victim == 0].append(time.monotonic() - began)
        if any(code == 0 for number, code in enumerate(codes) if number != victim):
            self.faults.append(f"kill {self.kills}: others said that they were done, {codes}")

    def check_start(self, log: str, before: int) -> None:
        """Notes a start that found damage, failed by itself, or resumed from an older step than it might have."""
        signs = ("damaged", "Traceback", "error:") if self.processes == 1 else ("damaged",)  # peers end by errors
        for sign in signs:
            if sign in log:
                self.faults.append(f"kill {self.kills}: {sign!r} in the log: {log[log.index(sign) :][:500]}")
        resumed = re.search(r"resuming \S+ at step (\d+)", log)
        if resumed and int(resumed[1]) != before:
            self.faults.append(f"kill {self.kills}: resumed from step {resumed[1]}, though {before} was committed")
        if not resumed and before and "first step" in log:
            self.faults.append(f"kill {self.kills}: began anew, though {before} was committed")

    def finish(self, reference: dict[int, str]) -> None:
        """Lets the run end and compares every row."""
        before = newest_step(self.killed)
        training = self.start(self.killed)
        if any(codes := training.codes(self.patience())):
            self.faults.append(f"the last run ended with {codes}")
        self.check_start(training.log.read_text(), before)
        written = rows(self.killed)
        self.redone = len(written) - len(set(step for step, _ in written))
        self.faults += [f"step {step}: another loss" for step, loss in written if reference.get(step) != loss]
        if missing := set(reference) - {step for step, _ in written}:
            self.faults.append(f"steps without a row: {sorted(missing)}")

    def tally(self) -> str:
        """Says in a line what happened."""
        told = (
            f"{self.kills} kills, {self.kills_in_saves} of them during a save and {self.kills_in_starts} before a step "
            f"was logged; {self.steps} steps, {self.redone} of them done again; {len(self.faults)} faults"
        )
        for zero, seconds in self.noticed.items():
            if seconds:
                whom = "process 0" if zero else "another process"
                told += f"; {len(seconds)} times {whom} died, noticed after {max(seconds):.1f} s at most"
        return told


def survive(
    workdir: pathlib.Path,
    *,
    kills: int,
    seed: int,
    steps: int,
    data_dir: str,
    processes: int = 1,
    devices: int = 1,
    heartbeat: int = 30,
) -> Survival:
    """Runs the whole trial below `workdir`, which should be empty."""
    workdir.mkdir(parents=True, exist_ok=True)
    trial = Survival(
        workdir, steps=steps, data_dir=data_dir, processes=processes, devices=devices, heartbeat=heartbeat
    )
    began = time.monotonic()
    reference = trial.reference()
    start_seconds = min(time.monotonic() - began, 6.0)
    rng = random.Random(seed)
    while trial.kills < kills:
        trial.attempt(rng, start_seconds=start_seconds)
    trial.finish(reference)
    return trial


def main() -> int:
    """Parses the command line, prepares the data, and prints the tally."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="of the run; by default what that many kills need")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--heartbeat", type=int, default=30, help="UNCLIP_HEARTBEAT_SECONDS of the processes")
    options = parser.parse_args()
    data_dir = str(options.workdir / "data")
    datasets.prepare("captioned_shapes", data_dir=data_dir, variant="smoke")
    began = time.monotonic()
    trial = survive(
        options.workdir,
        kills=options.kills,
        seed=options.seed,
        steps=options.steps or 60 + 20 * options.kills,
        data_dir=data_dir,
        processes=options.processes,
        devices=options.devices,
        heartbeat=options.heartbeat,
    )
    for fault in trial.faults[:20]:
        print(fault)
    print(f"{trial.tally()}; {time.monotonic() - began:.0f} s in all")
    return 1 if trial.faults else 0


if __name__ == "__main__":
    sys.exit(main())
