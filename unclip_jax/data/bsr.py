"""BSR: the random degradation that the 256->1024 upsampler is trained against (DALL-E 2, appendix C).

BSRGAN (Zhang et al., 2103.14006) makes a low-resolution image from a large one by blurs, resizes, noise and JPEG
compression in random order. Latent diffusion (Rombach et al., 2112.10752, appendix D.6.1) found its parameters too
strong and adapted them; DALL-E 2 takes BSR "from Rombach et al.", so `LIGHT`, theirs, is the reading here, and `BSRGAN`
the alternative. Numbers are those of the code that both published. What is drawn (`plan`) is apart from what is done
with it (the operations), so that either can be looked at alone.

Two things differ from that code, which are faults there: it swaps height and width where it crops to a multiple of the
factor; and its kernels of even width lie half a pixel off, which moves the image away from the large one that it must
fit, and makes it black where hardly any blur was drawn. BSRGAN's camera noise needs a network and is in neither.

Pixels are float32 in [0, 255] between operations, so that noise of a grey level or two is not rounded away.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

# Grain runs one image in each of its threads and processes; OpenCV's own threads would only get into their way.
cv2.setNumThreads(0)

Pixels = Float32[np.ndarray, "_ _ 3"]  # height, width, RGB
# One step of the process, with all that was drawn for it but the noise itself.
Operation = Callable[[Pixels, np.random.Generator], Pixels]

INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}
NOISES = ("colour", "grey", "correlated")
_NOISE_PROBABILITIES = (0.4, 0.4, 0.2)
_HALVE_PROBABILITY = 0.25
_JPEG_PROBABILITY = 0.9
_ANISOTROPIC_PROBABILITY = 0.5
_DECIMATION_TAPS = 25
# A Gaussian narrower than this is a single pixel.
_SMALLEST_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """What the two published versions of the process differ in.

    Attributes:
      blurs: how many of them.
      anisotropic_sizes, isotropic_sizes: widths of blurring kernels in pixels, equally likely.
      blur_scale: factor of the largest variance and of the largest standard deviation of a blur.
      resize_probability: of a resize by a random factor, where otherwise pixels are picked after a Gaussian.
      noise_levels: smallest and largest standard deviation of noise, whole grey levels of 255.
      jpeg_qualities: smallest and largest quality.
    """

    blurs: int
    anisotropic_sizes: Sequence[int]
    isotropic_sizes: Sequence[int]
    blur_scale: float
    resize_probability: float
    noise_levels: tuple[int, int]
    jpeg_qualities: tuple[int, int]


BSRGAN = Process(
    blurs=2,
    anisotropic_sizes=range(7, 26, 2),
    isotropic_sizes=range(7, 26, 2),
    blur_scale=1.0,
    resize_probability=0.75,
    noise_levels=(2, 25),
    jpeg_qualities=(30, 95),
)
LIGHT = Process(
    blurs=1,
    anisotropic_sizes=range(5, 15),
    isotropic_sizes=range(5, 8),
    blur_scale=0.25,
    resize_probability=0.8,
    noise_levels=(1, 2),
    jpeg_qualities=(80, 95),
)


@dataclasses.dataclass(frozen=True)
class Blur:
    """Convolves with a Gaussian; edges are mirrored about the outermost pixel.

    Attributes:
      size: width of the kernel in pixels; an even one reaches one pixel further to the left and to the top.
      variances: along the two axes, in pixels^2.
      angle: of the first axis, from x (to the right) towards y (down), in radians.
    """

    size: int
    variances: tuple[float, float]
    angle: float

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        if self.variances[0] == self.variances[1]:
            taps = self.taps()
            return cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101)
        return cv2.filter2D(image, -1, self.kernel(), borderType=cv2.BORDER_REFLECT_101)

    def kernel(self) -> Float32[np.ndarray, "n n"]:
        """The weights of a pixel's neighbours, rows by y; their sum is 1."""
        y, x = np.meshgrid(self._offsets(), self._offsets(), indexing="ij")
        first, second = (max(variance, _SMALLEST_VARIANCE) for variance in self.variances)
        along = x * math.cos(self.angle) + y * math.sin(self.angle)
        across = y * math.cos(self.angle) - x * math.sin(self.angle)
        return _normalised(np.exp(-0.5 * (along**2 / first + across**2 / second)))

    def taps(self) -> Float32[np.ndarray, " n"]:
        """The weights along one axis of a kernel with equal variances, which is the product of these."""
        return _normalised(np.exp(-0.5 * self._offsets() ** 2 / max(self.variances[0], _SMALLEST_VARIANCE)))

    def _offsets(self) -> np.ndarray:
        return np.arange(self.size) - self.size // 2


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes to (height, width) without any filter of OpenCV's own: "linear" and "cubic" skip pixels, as published."""

    height: int
    width: int
    interpolation: str

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        resized = cv2.resize(image, (self.width, self.height), interpolation=INTERPOLATIONS[self.interpolation])
        return np.clip(resized, 0, 255)


@dataclasses.dataclass(frozen=True)
class HalveSmoothly:
    """Halves height and width by antialiased bicubic interpolation, as MATLAB's imresize does."""

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        # Pixel i lies at 2i + 0.5 of the source: three taps before 2i and four after it.
        taps = _halving_taps()
        filtered = cv2.sepFilter2D(image, -1, taps, taps, anchor=(3, 3), borderType=cv2.BORDER_REFLECT)
        return np.clip(filtered[::2, ::2], 0, 255)


@dataclasses.dataclass(frozen=True)
class Decimate:
    """Takes every `factor`-th pixel of a Gaussian blur about the middle of the block of pixels that it stands for."""

    factor: int
    sigma: float

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        taps = _decimation_taps(self.factor, self.sigma)[:, None]
        # Down first, and only then, on the rows that are left, across.
        rows = cv2.filter2D(image, -1, taps, borderType=cv2.BORDER_REFLECT_101)[:: self.factor]
        both = cv2.filter2D(np.ascontiguousarray(rows), -1, taps.T, borderType=cv2.BORDER_REFLECT_101)
        return np.clip(both[:, :: self.factor], 0, 255)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Adds Gaussian noise.

    Attributes:
      kind: "colour" is independent in every channel, "grey" the same in all three, "correlated" has `covariance`.
      level: standard deviation of the first two, in grey levels.
      covariance: of the channels of the third, in grey levels^2.
    """

    kind: str
    level: float
    covariance: tuple[tuple[float, float, float], ...] = ()

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        height, width, _ = image.shape
        channels = 1 if self.kind == "grey" else 3
        noise = rng.standard_normal((height, width, channels), dtype=np.float32)
        if self.kind == "correlated":
            # The covariance can be singular, so its root is taken by eigenvalues.
            values, vectors = np.linalg.eigh(np.array(self.covariance))
            root = vectors * np.sqrt(np.maximum(values, 0))
            noise = noise @ root.T.astype(np.float32)
        else:
            noise *= np.float32(self.level)
        noise = noise + image
        return np.clip(noise, 0, 255, out=noise)


@dataclasses.dataclass(frozen=True)
class Jpeg:
    """Compresses with colour at half the resolution (4:2:0) and decompresses."""

    quality: int

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        settings = [cv2.IMWRITE_JPEG_QUALITY, self.quality]
        settings += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
        _, encoded = cv2.imencode(".jpg", cv2.cvtColor(to_uint8(image), cv2.COLOR_RGB2BGR), settings)
        decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
        assert decoded is not None
        return decoded.astype(np.float32)


def degrade(
    image: UInt8[np.ndarray, "h w 3"], *, factor: int, process: Process, rng: np.random.Generator
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns a degraded image of 1/factor of the size; the same generator gives the same image.

    Args:
      image: uint8 [h, w, 3], RGB. Rows and columns beyond a multiple of `factor` are cut off, at the bottom and right.
      factor: 2 or more.
      process: `LIGHT` or `BSRGAN`.
      rng: the example's own generator.

    Returns:
      uint8 [h // factor, w // factor, 3], RGB.
    """
    height, width = (side - side % factor for side in image.shape[:2])
    pixels = image[:height, :width].astype(np.float32)
    for operation in plan(height, width, factor=factor, process=process, rng=rng):
        pixels = operation(pixels, rng)
    return to_uint8(pixels)


def plan(height: int, width: int, *, factor: int, process: Process, rng: np.random.Generator) -> list[Operation]:
    """Draws the operations for an image of this size, whose sides are multiples of `factor`.

    Blurs, noise, JPEG (in nine of ten) and the two steps of the reduction come in random order. A reduction by 4
    begins, in one of four, with a plain halving. JPEG ends it all.
    """
    target = (height // factor, width // factor)
    operations: list[Operation] = []
    if factor == 4 and rng.random() < _HALVE_PROBABILITY:
        height, width, factor = height // 2, width // 2, 2
        operations.append(_draw_halving(height, width, rng))
    reductions = _draw_reductions(height, width, target, factor, process, rng)
    names = [*["blur"] * process.blurs, "reduction", "reduction", "noise", "jpeg"]
    for place in rng.permutation(len(names)):
        name = names[place]
        if name == "blur":
            operations.append(_draw_blur(factor, process, rng))
        elif name == "reduction":
            operations.append(next(reductions))
        elif name == "noise":
            operations.append(_draw_noise(process, rng))
        elif rng.random() < _JPEG_PROBABILITY:
            operations.append(_draw_jpeg(process, rng))
    return [*operations, _draw_jpeg(process, rng)]


def _draw_halving(height: int, width: int, rng: np.random.Generator) -> Operation:
    return Resize(height, width, _draw_interpolation(rng)) if rng.random() < 0.5 else HalveSmoothly()


def _draw_reductions(
    height: int, width: int, target: tuple[int, int], factor: int, process: Process, rng: np.random.Generator
) -> Iterator[Operation]:
    """The first goes anywhere from the full size to half of the target's, the second to the target."""
    if rng.random() < process.resize_probability:
        by = rng.uniform(1, 2 * factor)
        yield Resize(max(1, int(height / by)), max(1, int(width / by)), _draw_interpolation(rng))
    else:
        yield Decimate(factor, rng.uniform(0.1, 0.6 * factor))
    yield Resize(*target, _draw_interpolation(rng))


def _draw_interpolation(rng: np.random.Generator) -> str:
    return tuple(INTERPOLATIONS)[rng.integers(len(INTERPOLATIONS))]


def _draw_blur(factor: int, process: Process, rng: np.random.Generator) -> Blur:
    if rng.random() < _ANISOTROPIC_PROBABILITY:
        size = _draw_one(process.anisotropic_sizes, rng)
        first, second = process.blur_scale * (4 + factor) * rng.random(2)
        return Blur(size, (float(first), float(second)), rng.uniform(0, math.pi))
    size = _draw_one(process.isotropic_sizes, rng)
    variance = (process.blur_scale * (2 + 0.2 * factor) * rng.random()) ** 2
    return Blur(size, (variance, variance), 0.0)


def _draw_noise(process: Process, rng: np.random.Generator) -> Noise:
    low, high = process.noise_levels
    level = int(rng.integers(low, high, endpoint=True))
    kind = str(rng.choice(NOISES, p=_NOISE_PROBABILITIES))
    if kind != "correlated":
        return Noise(kind, level)
    # As published: the largest level whatever was drawn, random axes, and no negative covariance.
    axes = np.linalg.svd(rng.random((3, 3)))[0]
    covariance = np.abs(high**2 * axes.T @ np.diag(rng.random(3)) @ axes)
    return Noise(kind, level, tuple(map(tuple, covariance.tolist())))


def _draw_one(sizes: Sequence[int], rng: np.random.Generator) -> int:
    return sizes[int(rng.integers(len(sizes)))]


def _draw_jpeg(process: Process, rng: np.random.Generator) -> Jpeg:
    return Jpeg(int(rng.integers(*process.jpeg_qualities, endpoint=True)))


@functools.cache
def _halving_taps() -> Float32[np.ndarray, " n"]:
    """Weights of the cubic kernel (Keys, a = -0.5), stretched to twice its width, at the eight nearest pixels."""
    distance = np.abs(np.arange(8) - 3.5) / 2
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, far)
    return _normalised(weights)


def _decimation_taps(factor: int, sigma: float) -> Float32[np.ndarray, " n"]:
    """A sampled Gaussian, moved by linear interpolation from its middle tap to the middle of a block of pixels."""
    places = np.arange(_DECIMATION_TAPS)
    weights = np.exp(-0.5 * ((places - _DECIMATION_TAPS // 2) / sigma) ** 2)
    # The taps are applied without being turned round, so they move towards later pixels.
    return _normalised(np.interp(places - (factor - 1) / 2, places, weights))


def _normalised(weights: np.ndarray) -> np.ndarray:
    return (weights / weights.sum()).astype(np.float32)


def to_uint8(image: Pixels) -> UInt8[np.ndarray, "h w 3"]:
    """Rounds to the nearest grey level."""
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)
