"""How long it takes to reduce the features of an evaluation to its metrics, and how much memory.

    python tests/benchmarks/feature_reduction.py
    python tests/benchmarks/feature_reduction.py --metrics=fid,kid --rows=5000 --reference=5000
    taskset -c 0,1 python tests/benchmarks/feature_reduction.py          # on two cores of a larger machine

Features are drawn, float32 with a spectrum that falls off as Inception's does, and written to a temporary file, which
is read as an evaluation reads its own. The reference's moments are made before the clock starts, for a protocol has
them in a file. Each metric is timed in a process of its own: wall clock, CPU seconds of all threads (which other
processes on the machine change less), and the largest resident set, in which the libraries themselves have 0.2 GB.
"""

import argparse
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from unclip_jax.evaluation import frechet, kernel_distances, manifolds

MANIFOLD_ROWS = 10_000  # ADM's reference for precision and recall


def write(path: pathlib.Path, rows: int, width: int, *, seed: int, shift: float) -> None:
    """Writes drawn features, float32 [rows, width], a block at a time."""
    rng = np.random.default_rng(seed)
    scales = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    for start in range(0, rows, 4096):
        block = rng.standard_normal((min(4096, rows - start), width), np.float32)
        block[:, 1:] += 0.5 * block[:, :-1]  # dimensions that know of each other
        out[start : start + len(block)] = np.maximum(block * scales + shift, 0)
    out.flush()


def fid(folder: pathlib.Path) -> float:
    x = np.load(folder / "samples.npy")
    reference = frechet.Moments(0, np.load(folder / "mu.npy"), np.load(folder / "sigma.npy"))
    return frechet.distance(frechet.moments(x), reference)


def fid_with_error_bar(folder: pathlib.Path) -> float:
    x = np.load(folder / "samples.npy")
    reference = frechet.Moments(0, np.load(folder / "mu.npy"), np.load(folder / "sigma.npy"))
    return frechet.measured(x, reference).standard_error


def fid_at_infinity(folder: pathlib.Path) -> float:
    x = np.load(folder / "samples.npy")
    reference = frechet.Moments(0, np.load(folder / "mu.npy"), np.load(folder / "sigma.npy"))
    return frechet.at_infinity(x, reference, 0).value


def kid(folder: pathlib.Path) -> float:
    return kernel_distances.kid(np.load(folder / "samples.npy"), np.load(folder / "reference.npy"))


def kid_of_subsets(folder: pathlib.Path) -> float:
    x, y = np.load(folder / "samples.npy"), np.load(folder / "reference.npy")
    return kernel_distances.kid_of_subsets(x, y, size=min(1000, len(x), len(y)))[0]


def precision(folder: pathlib.Path) -> float:
    reference = np.load(folder / "reference.npy")[:MANIFOLD_ROWS]
    return manifolds.measures(reference, np.load(folder / "samples.npy"))["precision"]


METRICS: dict[str, Callable[[pathlib.Path], float]] = {
    "fid": fid,
    "fid_with_error_bar": fid_with_error_bar,
    "fid_at_infinity": fid_at_infinity,
    "kid": kid,
    "kid_of_subsets": kid_of_subsets,
    "precision": precision,
}


def timed(name: str, folder: pathlib.Path, results: multiprocessing.SimpleQueue) -> None:
    """Computes one metric and puts (value, wall seconds, CPU seconds, peak bytes) into a queue."""
    wall, cpu = time.monotonic(), time.process_time()
    value = METRICS[name](folder)
    took = time.monotonic() - wall, time.process_time() - cpu
    results.put((value, *took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--reference", type=int, default=40_504)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--metrics", default="fid,fid_with_error_bar")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        write(folder / "samples.npy", options.rows, options.width, seed=0, shift=0.02)
        write(folder / "reference.npy", options.reference, options.width, seed=1, shift=0.0)
        reference = frechet.moments(np.load(folder / "reference.npy", mmap_mode="r"))
        np.save(folder / "mu.npy", reference.mu)
        np.save(folder / "sigma.npy", reference.sigma)
        print(f"{options.rows} x {options.width}\n{'':20}{'value':>12}{'s':>9}{'CPU s':>9}{'GB':>7}")
        context = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory
        for name in options.metrics.split(","):
            results = context.SimpleQueue()
            process = context.Process(target=timed, args=(name, folder, results))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{name} ended with {process.exitcode}")
            value, wall, cpu, memory = results.get()
            print(f"{name:20}{value:12.6f}{wall:9.1f}{cpu:9.1f}{memory / 1e9:7.2f}", flush=True)


if __name__ == "__main__":
    main()
