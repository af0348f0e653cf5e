"""Which share of a killed run's time makes progress, and what a kill costs.

    python tests/benchmarks/goodput_of_kills.py --kills=10 --workdir=/tmp/goodput

A small CLIP's training process is started again and again and killed (SIGKILL) at random moments; in the end it may
finish. Printed are the sums over all starts, as `python -m unclip_jax.report --workdir=…/run` has them too, and the
seconds that a kill costs: until the next start is where the killed one was. They carry over to runs whose steps
take longer, the share does not: this run's steps take milliseconds.
"""

import argparse
import pathlib
import random
import sys
import time

# The tests' processes, and the package where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from training_processes import Training

from unclip_jax import goodput, goodput_sums
from unclip_jax.data import datasets

OPTIONS = ("--config.checkpoint.every_steps=50", "--config.log.every_steps=10")
ROWS_A_START = 20  # 200 steps, on average half of that before a kill
COST = (goodput.INIT, goodput.COMPILE, goodput.RESTORE, goodput_sums.REDONE, goodput_sums.IDLE)


def main() -> int:
    """Parses the command line, kills, and prints where the time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="empty, or not there yet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.workdir
    data_dir = str(folder / "data")
    datasets.prepare("captioned_shapes", data_dir=data_dir, variant="smoke")
    rng, kills, began = random.Random(options.seed), 0, time.monotonic()
    while True:
        training = Training(
            folder / "run", steps=200 + 150 * options.kills, data_dir=data_dir, cache=str(folder / "cache"),
            options=OPTIONS,
        )  # fmt: skip
        if kills < options.kills and training.wait_for_rows(rng.randint(1, ROWS_A_START)):
            training.process.kill()
            kills += 1
        if (code := training.wait()) >= 0:  # it ended by itself
            break
    outside = time.monotonic() - began
    sums = goodput_sums.read(folder / "run")[0]
    print(f"{kills} kills, exit code {code}; {outside:.1f} s by the clock outside, {sums.total:.1f} s in the rows")
    for bucket, seconds in sums.seconds.items():
        print(f"{bucket:12} {seconds:8.1f} s {100 * seconds / sums.total:6.1f}%")
    print(f"goodput {100 * sums.goodput:.1f}%; {sums.steps_redone} steps done again")
    cost = sum(sums.seconds[bucket] for bucket in COST) - _first_start(sums)
    print(f"a kill cost {cost / max(kills, 1):.1f} s")
    return code


def _first_start(sums: goodput_sums.Sums) -> float:
    """Seconds that the first start took to its first step, which no kill is to blame for."""
    ended = sums.starts[0].ended
    return sum(piece.seconds for piece in sums.pieces if piece.began < ended and piece.bucket in COST[:3])


if __name__ == "__main__":
    sys.exit(main())
