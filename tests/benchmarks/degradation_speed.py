"""How fast a core makes the upsamplers' training examples, beside what an accelerator takes.

    python tests/benchmarks/degradation_speed.py
    python tests/benchmarks/degradation_speed.py --rounds=9 --images=16

Pictures are JPEGs of the size and roughness of photographs, in memory, so that reading them costs nothing. Each line is
one part of the input path, from decoding to the stacked batch or BSR alone, timed in turn with the others (A B C A B C)
in CPU seconds of this process, which other processes do not change much; rates are medians. Then come the cores that
one accelerator keeps busy, where it trains at 40% of its peak.
"""

import argparse
import functools
import io
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from unclip_jax.data import bsr, resize
from unclip_jax.data.examples import Examples, Preparation

# Examples a second of one chip at 40% of its peak, out of the stages' counted operations: 3.721 TFLOP for a crop of
# 256 -> 1024 and 1.594 for one of 64 -> 256, over 459, 918 and 989 TFLOP/s.
NEEDED = {"256->1024": {"v5p": 49, "v6e": 99, "H100": 106}, "64->256": {"v5p": 115, "v6e": 230, "H100": 248}}
PREPARATIONS = {
    "256->1024": {"image": (256, 256, 3), "low_res": (64, 64, 3)},
    "64->256": {"image": (64, 64, 3), "low_res": (16, 16, 3)},
}


def photograph(height: int, width: int, *, seed: int) -> np.ndarray:
    """A picture with the spectrum of photographs, amplitude f^-1.2, and a few sharp edges."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** -1.2
    shared, *own = (_filtered(rng.standard_normal((height, width)), falloff) for _ in range(4))
    pixels = np.stack([shared + 0.3 * channel for channel in own], -1)
    pixels = 127 + 50 * pixels / pixels.std()
    y, x = np.mgrid[:height, :width]
    for _ in range(12):
        inside = np.hypot(y - rng.integers(height), x - rng.integers(width)) < rng.integers(20, 200)
        pixels[inside] += rng.uniform(-60, 60, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _filtered(noise: np.ndarray, falloff: np.ndarray) -> np.ndarray:
    return np.fft.irfft2(np.fft.rfft2(noise) * falloff, s=noise.shape)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def records(photographs: list[np.ndarray], *, side: int | None) -> list[dict]:
    """As downloaded, or as `prepare --size=side` leaves them."""
    if side is not None:
        photographs = [resize.square(photo, size=side, method="bicubic") for photo in photographs]
    return [{"image": jpeg(photo), "caption": b"", "id": number} for number, photo in enumerate(photographs)]


def input_path(stage: str, source: list[dict], *, degradation: str) -> Callable[[], int]:
    """Makes a batch of every picture once, anew at every call; returns how many examples it was."""
    preparation = Preparation(shapes=PREPARATIONS[stage], seed=0, crop=0.25, degradation=degradation)
    examples = Examples(source, preparation=preparation, tokenizer=None)
    epochs = iter(range(1 << 30))

    def make() -> int:
        epoch = next(epochs)
        fields, bad = examples.batch([(epoch, index) for index in range(len(source))])
        assert fields is not None and not bad
        return len(source)

    return make


def bsr_alone(process: bsr.Process, photographs: list[np.ndarray], rng: np.random.Generator) -> int:
    for photo in photographs:
        bsr.degrade(photo[100:356, 100:356], factor=4, process=process, rng=rng)
    return len(photographs)


def rates(parts: dict[str, Callable[[], int]], *, rounds: int) -> dict[str, float]:
    """Median examples per CPU second of each part."""
    seen: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, part in parts.items():
            began = time.process_time()
            count = part()
            if number:  # the first round fills caches
                seen[name].append(count / (time.process_time() - began))
    return {name: statistics.median(values) for name, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=12)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    sizes = rng.integers(1024, 1281, (options.images, 2)).tolist()
    photographs = [photograph(*size, seed=seed) for seed, size in enumerate(sizes)]
    as_found = records(photographs, side=None)
    parts: dict[str, Callable[[], int]] = {
        "256->1024, photographs of 1024 to 1280 px": input_path("256->1024", as_found, degradation="bsr"),
        "256->1024, prepared at 1024 px": input_path("256->1024", records(photographs, side=1024), degradation="bsr"),
        "256->1024, the same with the original BSRGAN": input_path("256->1024", as_found, degradation="bsrgan"),
        "64->256, photographs of 1024 to 1280 px": input_path("64->256", as_found, degradation="gaussian_blur"),
        "64->256, prepared at 256 px": input_path(
            "64->256", records(photographs, side=256), degradation="gaussian_blur"
        ),
        "BSR alone, 256 px to 64": functools.partial(bsr_alone, bsr.LIGHT, photographs, rng),
        "original BSRGAN alone, 256 px to 64": functools.partial(bsr_alone, bsr.BSRGAN, photographs, rng),
    }
    size = statistics.mean(len(record["image"]) for record in as_found)
    print(f"{options.images} JPEGs of {size / 1e3:.0f} kB on average\n")
    print(f"{'':46}{'crops/s per core':>18}   cores per chip: {'v5p':>6}{'v6e':>7}{'H100':>7}")
    for name, rate in rates(parts, rounds=options.rounds).items():
        needed = NEEDED.get(name.partition(",")[0], {})
        cores = "".join(f"{need / rate:7.2f}" for need in needed.values())
        print(f"{name:46}{rate:18.1f}                   {cores}")


if __name__ == "__main__":
    main()
