"""How fast a core makes the training examples of each `:paper` stage, beside what the chips of a host take.

    python tests/benchmarks/input_speed.py
    python tests/benchmarks/input_speed.py --images=24 --rounds=9

Pictures are JPEGs of the size and roughness of photographs, which `unclip_jax.prepare` puts into a data set of its own
beneath a temporary folder; the batches are those of `data.examples`, with what the stage's config says of fields,
crops and degradation, read from that data set (which is in the page cache). Times are CPU seconds of this process,
which other processes do not change much; rates are medians over rounds. Then come the cores that the chips of a host
keep busy where they train at 40% of their peak, and what share that is of the host's.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from degradation_speed import jpeg, photograph

from unclip_jax import config as configs
from unclip_jax import prepare
from unclip_jax.data import datasets, degradations, embedding_units, embeddings, examples, images, resize
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.stages import base

# Examples a second of one chip at 40% of its peak: 0.4 * peak / counted operations of training on one, without those of
# the frozen CLIP. Peaks in TFLOP/s, operations in TFLOP; CLIP's are those of a step with SAM.
PEAKS = {"v5p": 459, "v6e": 918, "H100": 989}
WORK = {
    "clip": 2.291,
    "prior_diffusion": 1.924,
    "prior_ar": 3.805,
    "decoder": 6.660,
    "upsampler_1": 1.594,
    "upsampler_2": 3.721,
    "embed": 0.382,  # CLIP, forward
}


@dataclasses.dataclass(frozen=True)
class Host:
    """What one machine of a pod has: chips and hardware threads (vCPUs)."""

    chips: int
    threads: int


# Cloud TPU's documentation, tables of VM types of v5p and v6e (cloud.google.com/tpu/docs/v5p, …/v6e), and that of the
# machine type with eight H100s (a3-highgpu-8g).
HOSTS = {"v5p": Host(4, 208), "v6e": Host(8, 180), "H100": Host(8, 208)}

CONFIGS = {
    "clip": "clip.py:paper",
    "prior_diffusion": "prior_diffusion.py:paper",
    "prior_ar": "prior_ar.py:paper",
    "decoder": "decoder.py:paper",
    "upsampler_1": "upsampler.py:paper_1",
    "upsampler_2": "upsampler.py:paper_2",
}
# The same with embeddings that were made before.
PRECOMPUTED = ("prior_diffusion", "prior_ar", "decoder")
CAPTION = "an oil painting of a fox in a forest at dawn, with mist between the trees and a small red hut behind them"


class Clock:
    """CPU seconds by operation; what an operation calls is counted there and not twice."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `work`, which counts towards a name."""

        def wrapped(*arguments, **options):
            self._inside.append(0.0)
            began = time.process_time()
            try:
                return work(*arguments, **options)
            finally:
                took = time.process_time() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inside.pop()
                self._inside[-1] += took

        return wrapped

    @contextlib.contextmanager
    def watching(self, preparation: examples.Preparation) -> Iterator[None]:
        """Times the operations of the input path while the block runs."""
        degradation = degradations.DEGRADATIONS[preparation.degradation]
        watched: list[tuple[Any, str, str]] = [
            (images, "decode", "decode"),
            (resize, "square", "resize"),
            (Tokenizer, "encode", "tokens"),
            (examples, "_stack", "stack"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
        for (owner, name, label), (_, _, work) in zip(watched, before, strict=True):
            setattr(owner, name, self.timed(label, work))
        spoilt = dataclasses.replace(degradation, low_res=self.timed("degrade", degradation.low_res))
        degradations.DEGRADATIONS[preparation.degradation] = spoilt
        try:
            yield
        finally:
            for owner, name, work in before:
                setattr(owner, name, work)
            degradations.DEGRADATIONS[preparation.degradation] = degradation


class Reading:
    """Records of a data set, read as training reads them."""

    def __init__(self, directory: str, clock: Clock):
        self._source = datasets.open_source(directory, "train")
        self._read = clock.timed("read", self._source.__getitem__)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._read(index)


def prepared(folder: pathlib.Path, photographs: list[np.ndarray], *, size: int = 0) -> str:
    """Writes a folder of captioned JPEGs and prepares it, as a user does; returns the data set's folder."""
    source, out = folder / "pictures", folder / f"data_{size}"
    source.mkdir(exist_ok=True)
    lines = []
    for number, pixels in enumerate(photographs):
        (source / f"{number}.jpg").write_bytes(jpeg(pixels))
        lines.append(json.dumps({"file_name": f"{number}.jpg", "caption": f"{CAPTION}, number {number}"}))
    (source / "captions.jsonl").write_text("\n".join(lines))
    prepare.prepare(str(source), str(out), prepare.Settings(size=size))
    return str(out)


def stored(folder: pathlib.Path, count: int, width: int) -> embeddings.Stored:
    """Writes embeddings that no CLIP made: random ones take as long to read."""
    job = embeddings.Job(
        data={"examples": count}, clip="", network={}, tokenizer="", width=width, unit=64, storage="float16",
        mirrored=False, backend="cpu",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    embedding_units.begin(str(folder), job)
    for number in range(job.units()):
        shape = (len(job.examples_of(number)), width)
        rows = {name: rng.standard_normal(shape).astype(np.float32) for name in job.names}
        embedding_units.write_unit(str(folder), job, number, rows, {})
    embedding_units.finish(str(folder), job)
    return embeddings.Stored(str(folder))


def input_path(stage: str, directory: str, clock: Clock, rows: embeddings.Stored | None) -> Callable[[], int]:
    """Returns what makes a batch of every picture once, anew at every call, and tells how many examples it was."""
    config = configs.load(f"configs/{CONFIGS[stage]}", {"data.embeddings": "auto" if rows else ""})
    spec = base.create(config).batch_spec(1)
    preparation = examples.Preparation(
        shapes={name: field.shape[1:] for name, field in spec.items()},
        seed=0,
        crop=config.data.crop_fraction,
        flip=0.5 if config.data.flip else 0.0,
        degradation=config.data.degradation,
    )
    made = examples.Examples(
        Reading(directory, clock), preparation=preparation, tokenizer=Tokenizer("tiny"), embeddings=rows
    )
    epochs = iter(range(1 << 30))

    def make() -> int:
        epoch = next(epochs)
        with clock.watching(preparation):
            fields, bad = made.batch([(epoch, index) for index in range(len(made))])
        assert fields is not None and not bad and set(fields) == set(spec)
        return len(made)

    return make


def measured(
    parts: dict[str, tuple[Clock, Callable[[], int]]], *, rounds: int
) -> dict[str, tuple[float, dict[str, float]]]:
    """Times the parts in turn; returns for each the median examples per CPU second and milliseconds by operation."""
    rates: dict[str, list[float]] = {name: [] for name in parts}
    counts = dict.fromkeys(parts, 0)
    totals = dict.fromkeys(parts, 0.0)
    for number in range(rounds + 1):
        for name, (clock, part) in parts.items():
            began = time.process_time()
            count = part()
            took = time.process_time() - began
            if number == 0:  # the first round fills caches
                clock.seconds.clear()
                continue
            rates[name].append(count / took)
            counts[name] += count
            totals[name] += took
    result = {}
    for name, (clock, _) in parts.items():
        steps = {**clock.seconds, "rest": totals[name] - sum(clock.seconds.values())}
        result[name] = statistics.median(rates[name]), {op: 1e3 * x / counts[name] for op, x in steps.items()}
    return result


def decoders(photographs: list[np.ndarray], *, side: int, rounds: int) -> None:
    """Prints what other ways to decode take, and how their pictures, shrunk to a side, differ from ours."""

    def draft(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.draft("RGB", (side, side))  # the smallest of 1, 1/2, 1/4 and 1/8 that holds the target
        return np.asarray(image)

    def opencv(data: bytes) -> Any:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    files = [jpeg(pixels) for pixels in photographs]
    ways = {"data.images.decode": images.decode, f"Pillow's draft for {side} pixels": draft, "OpenCV": opencv}
    ours = [resize.square(images.decode(data), size=side).astype(np.int16) for data in files]
    for name, decode in ways.items():
        took = []
        for _ in range(rounds):
            began = time.process_time()
            made = [decode(data) for data in files]
            took.append((time.process_time() - began) / len(files))
        apart = np.abs([resize.square(pixels, size=side) - our for pixels, our in zip(made, ours, strict=True)])
        milliseconds = 1e3 * statistics.median(took)
        print(f"{name:32}{milliseconds:6.2f} ms, mean difference {apart.mean():.2f}, most {apart.max()}")


OPERATIONS = ("read", "decode", "resize", "degrade", "tokens", "stack", "rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--decoders", action="store_true", help="compare ways to decode, and nothing else")
    options = parser.parse_args()
    if options.decoders:
        pictures = [photograph(1024, 1280, seed=seed) for seed in range(options.images)]
        for side in (64, 256):
            decoders(pictures, side=side, rounds=options.rounds)
        return
    sets: dict[str, list[np.ndarray]] = {
        "512 x 512": [photograph(512, 512, seed=seed) for seed in range(options.images)],
        "1280 x 1024": [photograph(1024, 1280, seed=seed) for seed in range(options.images)],
    }
    parts: dict[str, tuple[Clock, Callable[[], int]]] = {}
    with tempfile.TemporaryDirectory() as root:
        for size, photographs in sets.items():
            folder = pathlib.Path(root) / size.partition(" ")[0]
            folder.mkdir()
            directory = prepared(folder, photographs)
            bytes_each = statistics.mean(path.stat().st_size for path in folder.glob("pictures/*.jpg"))
            print(f"{options.images} JPEGs of {size} pixels, {bytes_each / 1e3:.0f} kB on average")
            rows = stored(folder / "embeddings", options.images, 1024)
            for stage in CONFIGS:
                clock = Clock()
                parts[f"{stage}, {size}"] = clock, input_path(stage, directory, clock, None)
                if stage in PRECOMPUTED:
                    clock = Clock()
                    parts[f"{stage}, {size}, embeddings"] = clock, input_path(stage, directory, clock, rows)
        smaller = prepared(folder, photographs, size=256)
        for stage in ("clip", "upsampler_1"):
            clock = Clock()
            parts[f"{stage}, prepared at 256"] = clock, input_path(stage, smaller, clock, None)
        found = measured(parts, rounds=options.rounds)
    _print(found)


def _print(found: dict[str, tuple[float, dict[str, float]]]) -> None:
    print(f"\nms of a core for an example\n{'':42}{'per s':>8}" + "".join(f"{name:>9}" for name in OPERATIONS))
    for name, (rate, steps) in found.items():
        print(f"{name:42}{rate:8.0f}" + "".join(f"{steps.get(op, 0.0):9.2f}" for op in OPERATIONS))
    hosts = [f"{chip} x{host.chips}" for chip, host in HOSTS.items()]
    print(f"\ncores a host needs, and the share of its vCPUs\n{'':42}" + "".join(f"{name:>16}" for name in hosts))
    for name, (rate, _) in found.items():
        print(f"{name:42}" + _cores(name.partition(",")[0], rate))
    for size in ("512 x 512", "1280 x 1024", "prepared at 256"):  # what CLIP trains on is what it embeds
        print(f"{'embed, ' + size:42}" + _cores("embed", found[f"clip, {size}"][0]))


def _cores(stage: str, rate: float) -> str:
    needed = {chip: 0.4 * PEAKS[chip] / WORK[stage] * host.chips / rate for chip, host in HOSTS.items()}
    return "".join(f"{needed[chip]:9.1f} {needed[chip] / host.threads:5.0%} " for chip, host in HOSTS.items())


if __name__ == "__main__":
    main()
