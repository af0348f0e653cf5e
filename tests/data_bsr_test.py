"""BSR: each operation against SciPy, Pillow or a closed form, and what is drawn against the published tables."""

import collections
import functools
import io

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, JpegImagePlugin

from unclip_jax.data import bsr

PROCESSES = {"light": bsr.LIGHT, "bsrgan": bsr.BSRGAN}
DRAWS = 2000


def smooth(height, width, *, seed=0):
    """A picture of slow changes between mild colours, uint8."""
    coarse = np.random.default_rng(seed).integers(60, 200, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def random_pixels(height, width, *, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)


def applied(operation, pixels, *, seed=0):
    before = pixels.copy()
    result = operation(pixels, np.random.default_rng(seed))
    np.testing.assert_array_equal(pixels, before)
    assert result.dtype == np.float32 and -1e-4 < result.min() and result.max() < 255.0001
    return result


@functools.cache
def plans(name, factor, height=1000, width=600):
    rng = np.random.default_rng(0)
    return [bsr.plan(height, width, factor=factor, process=PROCESSES[name], rng=rng) for _ in range(DRAWS)]


REDUCTIONS = (bsr.Resize, bsr.Decimate, bsr.HalveSmoothly)


def of(kind, plan):
    return [operation for operation in plan if isinstance(operation, kind)]


# Blurs.


@pytest.mark.parametrize("variances", [(1.9, 0.4), (6.0, 2.5), (3.0, 3.0), (0.01, 0.5)])
@pytest.mark.parametrize("angle", [0.0, 0.7, 2.2])
def test_a_kernel_is_the_normal_density_at_whole_pixels(variances, angle):
    axis, normal = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    covariance = variances[0] * np.outer(axis, axis) + variances[1] * np.outer(normal, normal)
    for size in (5, 8, 25):
        kernel = bsr.Blur(size, variances, angle).kernel()
        places = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1) - size // 2  # (x, y)
        density = scipy.stats.multivariate_normal(cov=covariance).pdf(places)
        np.testing.assert_allclose(kernel, density / density.sum(), atol=1e-6)
    if min(variances) > 0.3:
        # The widest kernel holds nearly all of the density, so its moments are those of the density.
        moments = np.einsum("yx,yxi,yxj->ij", kernel, places, places)
        np.testing.assert_allclose(moments, covariance, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "blur", [bsr.Blur(7, (2.0, 0.3), 0.5), bsr.Blur(9, (1.5, 1.5), 0.0), bsr.Blur(25, (8.0, 5.0), 2.0)]
)
def test_blurring_is_scipys_convolution_with_mirrored_edges(blur):
    pixels = random_pixels(19, 31)
    kernel = blur.kernel()[..., None].astype(np.float64)
    wanted = scipy.ndimage.convolve(pixels.astype(np.float64), kernel, mode="mirror")
    np.testing.assert_allclose(applied(blur, pixels), wanted, atol=2e-3)


@pytest.mark.parametrize("size", [5, 6, 7, 10, 14])
@pytest.mark.parametrize("variances", [(1.2, 0.5), (0.8, 0.8)])
def test_a_blur_leaves_a_point_where_it_is(size, variances):
    pixels = np.zeros((41, 41, 3), np.float32)
    pixels[20, 17] = 255
    spread = applied(bsr.Blur(size, variances, 0.4), pixels)[..., 1]
    assert spread.sum() == pytest.approx(255, rel=1e-4)
    rows, columns = np.indices(spread.shape)
    # An even kernel set on a pixel's corner would be off by 0.5; cut off on one side only, it is by a little.
    assert np.sum(spread * rows) / 255 == pytest.approx(20, abs=0.05)
    assert np.sum(spread * columns) / 255 == pytest.approx(17, abs=0.05)


def test_a_blur_of_no_width_does_nothing():
    pixels = random_pixels(9, 9)
    for variances in ((0.0, 0.0), (0.0, 1e-12)):
        np.testing.assert_allclose(applied(bsr.Blur(6, variances, 1.0), pixels), pixels, atol=1e-3)


# Changes of size.


def test_smooth_halving_is_pillows_bicubic_reduction():
    pixels = random_pixels(24, 36)
    # Pillow ends its kernel at the border, MATLAB reflects the image there, edge pixels twice.
    mirrored = np.pad(pixels, ((8, 8), (8, 8), (0, 0)), mode="symmetric")
    for channel in range(3):
        plane = Image.fromarray(mirrored[..., channel])
        wanted = np.asarray(plane.resize((26, 20), Image.Resampling.BICUBIC))[4:-4, 4:-4]
        got = applied(bsr.HalveSmoothly(), pixels)[..., channel]
        np.testing.assert_allclose(got, np.clip(wanted, 0, 255), atol=2e-3)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("sigma", [0.1, 0.9, 2.3])
def test_decimation_is_a_shifted_gaussian_at_every_nth_pixel(factor, sigma):
    pixels = random_pixels(48, 36)
    point = np.zeros((25, 25))
    point[12, 12] = 1
    kernel = np.exp(-0.5 * (np.arange(25) - 12.0) ** 2 / sigma**2)
    kernel = np.outer(kernel, kernel)
    # SciPy's convolution turns the kernel round: moved up and left, it takes its pixels from further down and right.
    kernel = scipy.ndimage.shift(kernel, -(factor - 1) / 2, order=1, mode="nearest")
    wanted = scipy.ndimage.convolve(pixels.astype(np.float64), (kernel / kernel.sum())[..., None], mode="mirror")
    got = applied(bsr.Decimate(factor, sigma), pixels)
    np.testing.assert_allclose(got, wanted[::factor, ::factor], atol=2e-3)


@pytest.mark.parametrize(
    ("operation", "factor"),
    [
        (bsr.HalveSmoothly(), 2),
        (bsr.Decimate(2, 0.8), 2),
        (bsr.Decimate(3, 1.2), 3),
        (bsr.Decimate(4, 2.0), 4),
        *[(bsr.Resize(32, 24, kind), 4) for kind in bsr.INTERPOLATIONS],
        *[(bsr.Resize(64, 48, kind), 2) for kind in bsr.INTERPOLATIONS],
    ],
)
def test_a_small_pixel_stands_in_the_middle_of_the_block_that_it_replaces(operation, factor):
    rows, columns = np.indices((128, 96), dtype=np.float32)
    ramp = np.stack([rows, columns, rows + columns], -1)
    small = applied(operation, ramp)
    middle = (factor - 1) / 2
    rows, columns = np.indices(small.shape[:2]) * factor + middle
    inside = (slice(8, -8), slice(8, -8))
    wanted = np.stack([rows, columns, rows + columns], -1)
    np.testing.assert_allclose(small[inside], wanted[inside], atol=0.01)


@pytest.mark.parametrize("kind", list(bsr.INTERPOLATIONS))
def test_resizing_gives_the_size_that_was_asked_for(kind):
    assert applied(bsr.Resize(13, 41, kind), random_pixels(30, 20)).shape == (13, 41, 3)


# Noise.


def noise_of(noise, *, side=200):
    pixels = np.full((side, side, 3), 127, np.float32)
    return (applied(noise, pixels, seed=3) - 127).reshape(-1, 3).astype(np.float64)


@pytest.mark.parametrize("level", [1, 2, 25])
def test_colour_noise_is_independent_and_grey_noise_the_same_in_all_channels(level):
    colour = noise_of(bsr.Noise("colour", level))
    np.testing.assert_allclose(np.cov(colour.T), level**2 * np.eye(3), atol=0.03 * level**2)
    grey = noise_of(bsr.Noise("grey", level))
    np.testing.assert_allclose(np.cov(grey.T), np.full((3, 3), level**2), rtol=0.03)
    assert abs(colour.mean()) < 0.01 * level and abs(grey.mean()) < 0.02 * level
    assert abs(scipy.stats.kurtosis(colour[:, 0])) < 0.15


def test_correlated_noise_has_the_covariance_that_was_drawn():
    drawn = [noise for plan in plans("bsrgan", 2)[:40] for noise in of(bsr.Noise, plan) if noise.kind == "correlated"]
    assert len(drawn) > 3
    for noise in drawn:
        covariance = np.array(noise.covariance)
        np.testing.assert_allclose(covariance, covariance.T, atol=1e-9)
        np.testing.assert_allclose(np.cov(noise_of(noise).T), covariance, atol=0.03 * covariance.max())


# JPEG.


@pytest.mark.parametrize("quality", [30, 80, 95])
def test_jpeg_has_the_quality_and_halves_the_colours(monkeypatch, quality):
    files = []
    encode = cv2.imencode

    def spy(*arguments):
        result = encode(*arguments)
        files.append(result[1].tobytes())
        return result

    monkeypatch.setattr(bsr.cv2, "imencode", spy)
    pixels = smooth(40, 24).astype(np.float32)
    result = applied(bsr.Jpeg(quality), pixels)
    written = Image.open(io.BytesIO(files[0]))
    same = io.BytesIO()
    Image.fromarray(smooth(40, 24)).save(same, "JPEG", quality=quality)
    assert written.quantization == Image.open(same).quantization
    assert JpegImagePlugin.get_sampling(written) == JpegImagePlugin.get_sampling(Image.open(same)) == 2
    # In the order red, green, blue, as another decoder sees it.
    np.testing.assert_allclose(result, np.asarray(written), atol=2)
    assert np.abs(result - pixels).mean() < 6 < np.abs(result[..., ::-1] - pixels).mean()


# What is drawn.


def share(flags):
    return np.mean(list(flags))


def near(probability):
    """Five standard deviations of a share of DRAWS."""
    return pytest.approx(probability, abs=5 * np.sqrt(probability * (1 - probability) / DRAWS) + 1e-9)


def assert_uniform(values, low, high):
    """Kolmogorov and Smirnov's test against the uniform distribution, at a level of one in a million."""
    assert scipy.stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-6


def is_isotropic(blur):
    return blur.variances[0] == blur.variances[1]


@pytest.mark.parametrize("name", PROCESSES)
def test_a_reduction_by_four_begins_with_a_halving_in_one_of_four(name):
    begins = collections.Counter()
    for plan in plans(name, 4):
        reductions = of(REDUCTIONS, plan)
        if len(reductions) == 3:
            first = plan[0]
            assert first is reductions[0]
            assert isinstance(first, bsr.HalveSmoothly) or (first.height, first.width) == (500, 300)
            begins[getattr(first, "interpolation", "smooth")] += 1
    assert sum(begins.values()) / DRAWS == near(0.25)
    assert begins["smooth"] / DRAWS == near(0.125)
    for interpolation in bsr.INTERPOLATIONS:
        assert begins[interpolation] / DRAWS == near(0.125 / 3)
    assert all(len(of(REDUCTIONS, plan)) == 2 for plan in plans(name, 2))
    assert not any(of(bsr.HalveSmoothly, plan) for plan in plans(name, 2))


@pytest.mark.parametrize(("name", "resized"), [("light", 0.8), ("bsrgan", 0.75)])
def test_the_reduction_goes_by_a_random_factor_and_then_to_the_target(name, resized):
    pairs = [of(REDUCTIONS, plan) for plan in plans(name, 2)]
    assert share(isinstance(first, bsr.Resize) for first, _ in pairs) == near(resized)
    assert all((last.height, last.width) == (500, 300) for _, last in pairs)
    factors = [1000 / (first.height + 0.5) for first, _ in pairs if isinstance(first, bsr.Resize)]
    assert_uniform(factors, 1, 4)
    for first, _ in pairs:
        if isinstance(first, bsr.Resize):
            assert abs(first.width - 0.6 * first.height) < 1.6
    assert_uniform([first.sigma for first, _ in pairs if isinstance(first, bsr.Decimate)], 0.1, 1.2)
    for interpolation in bsr.INTERPOLATIONS:
        assert share(last.interpolation == interpolation for _, last in pairs) == near(1 / 3)


@pytest.mark.parametrize(
    ("name", "count", "anisotropic", "isotropic", "scale"),
    [("light", 1, range(5, 15), range(5, 8), 1 / 4), ("bsrgan", 2, range(7, 26, 2), range(7, 26, 2), 1)],
)
def test_blurs_are_those_of_the_table(name, count, anisotropic, isotropic, scale):
    made = plans(name, 2)  # no halving, which would change the factor
    assert all(len(of(bsr.Blur, plan)) == count for plan in made)
    blurs = [blur for plan in made for blur in of(bsr.Blur, plan)]
    assert share(map(is_isotropic, blurs)) == near(0.5)
    for kinds, sizes in ((True, isotropic), (False, anisotropic)):
        seen = collections.Counter(blur.size for blur in blurs if is_isotropic(blur) == kinds)
        assert set(seen) == set(sizes)
        assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-6
    assert_uniform([b.variances[0] ** 0.5 for b in blurs if is_isotropic(b)], 0, 2.4 * scale)
    for axis in (0, 1):
        assert_uniform([b.variances[axis] for b in blurs if not is_isotropic(b)], 0, 6 * scale)
    assert_uniform([b.angle for b in blurs if not is_isotropic(b)], 0, np.pi)
    # At factor 4 blurs are wider, unless the image was halved before.
    widest = collections.defaultdict(float)
    for plan in plans(name, 4):
        variances = [max(blur.variances) for blur in of(bsr.Blur, plan) if not is_isotropic(blur)]
        count = len(of(REDUCTIONS, plan))
        widest[count] = max(widest[count], *variances, 0)
    assert 7.8 * scale < widest[2] < 8 * scale and 5.5 * scale < widest[3] < 6 * scale


@pytest.mark.parametrize(("name", "levels", "qualities"), [("light", (1, 2), (80, 95)), ("bsrgan", (2, 25), (30, 95))])
def test_noise_and_jpeg_are_those_of_the_table(name, levels, qualities):
    made = plans(name, 4)
    noises = [noise for plan in made for noise in of(bsr.Noise, plan)]
    assert len(noises) == DRAWS
    for kind, probability in (("colour", 0.4), ("grey", 0.4), ("correlated", 0.2)):
        assert share(noise.kind == kind for noise in noises) == near(probability)
    seen = collections.Counter(noise.level for noise in noises)
    assert set(seen) == set(range(levels[0], levels[1] + 1))
    assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-6
    traces = [np.trace(noise.covariance) for noise in noises if noise.kind == "correlated"]
    # A rotation keeps the trace: three numbers, uniform up to the square of the largest level.
    assert np.mean(traces) == pytest.approx(1.5 * levels[1] ** 2, rel=0.06) and max(traces) < 3 * levels[1] ** 2

    assert all(isinstance(plan[-1], bsr.Jpeg) for plan in made)
    assert share(len(of(bsr.Jpeg, plan)) == 2 for plan in made) == near(0.9)
    assert all(1 <= len(of(bsr.Jpeg, plan)) <= 2 for plan in made)
    for place in (0, -1):
        seen = collections.Counter(of(bsr.Jpeg, plan)[place].quality for plan in made)
        assert set(seen) == set(range(qualities[0], qualities[1] + 1))
        assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-6


@pytest.mark.parametrize("name", PROCESSES)
def test_the_order_is_random_but_for_the_reductions_among_themselves(name):
    blurs = PROCESSES[name].blurs
    # Without the last JPEG, and where neither halving nor an omitted JPEG changes the count: 4 + blurs operations.
    whole = [plan[:-1] for plan in plans(name, 2) if len(plan) == blurs + 5]
    expected = {"Blur": blurs, "Noise": 1, "Jpeg": 1, "reduction": 2}
    for place in range(blurs + 4):
        names = [type(plan[place]).__name__ for plan in whole]
        seen = collections.Counter("reduction" if kind in ("Resize", "Decimate") else kind for kind in names)
        for kind, count in expected.items():
            assert seen[kind] / len(whole) == near(count / (blurs + 4))


# The whole of it.


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    ("height", "width", "factor"), [(64, 64, 4), (67, 101, 4), (101, 66, 4), (33, 50, 2), (40, 31, 3), (8, 9, 4)]
)
def test_any_size_is_reduced_and_the_input_kept(name, height, width, factor):
    image = smooth(height, width)
    before = image.copy()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        small = bsr.degrade(image, factor=factor, process=PROCESSES[name], rng=rng)
        assert small.shape == (height // factor, width // factor, 3) and small.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_generator_alone_decides(name):
    image = smooth(64, 48)
    degrade = functools.partial(bsr.degrade, image, factor=4, process=PROCESSES[name])
    made = [degrade(rng=np.random.default_rng((7, 0, index))) for index in range(20)]
    for index, small in enumerate(made):
        np.testing.assert_array_equal(small, degrade(rng=np.random.default_rng((7, 0, index))))
    assert len({small.tobytes() for small in made}) == 20


def shift(small, image, factor):
    """How far `small`, made of a horizontal ramp, lies to the left of where it belongs, in its own pixels."""
    blocks = image.astype(np.float64).reshape(image.shape[0] // factor, factor, -1, factor, 3).mean((1, 3))
    slope = (blocks[:, -5] - blocks[:, 4]).mean() / (blocks.shape[1] - 9)
    return (small[:, 4:-4].astype(np.float64) - blocks[:, 4:-4]).mean() / slope


@pytest.mark.parametrize("name", PROCESSES)
def test_the_small_image_lies_on_the_large_one(name):
    ramp = np.broadcast_to(np.linspace(10, 245, 160)[None, :, None], (96, 160, 3)).astype(np.uint8)
    rngs = [np.random.default_rng(seed) for seed in range(40)]
    shifts = [shift(bsr.degrade(ramp, factor=4, process=PROCESSES[name], rng=rng), ramp, 4) for rng in rngs]
    assert abs(np.mean(shifts)) < 0.06
    # In sizes that are no multiple, what lies beyond is cut off at the right; with the axes swapped it would be much.
    wide = np.zeros((64, 131, 3), np.uint8)
    wide[:, 64:] = 200
    for seed in range(20):
        small = bsr.degrade(wide, factor=4, process=PROCESSES[name], rng=np.random.default_rng(seed))
        assert small.shape == (16, 32, 3)
        assert small[:, :12].mean() < 40 and small[:, 20:].mean() > 160


@pytest.mark.parametrize(("name", "tolerance"), [("light", 1.0), ("bsrgan", 3.0)])
def test_a_flat_image_keeps_its_colour(name, tolerance):
    flat = np.full((64, 64, 3), (60, 128, 190), np.uint8)
    rngs = [np.random.default_rng(seed) for seed in range(40)]
    means = [bsr.degrade(flat, factor=4, process=PROCESSES[name], rng=rng).mean((0, 1)) for rng in rngs]
    np.testing.assert_allclose(np.mean(means, 0), (60, 128, 190), atol=tolerance)


def test_the_light_process_spoils_less():
    image = smooth(128, 128, seed=4)
    blocks = image.reshape(32, 4, 32, 4, 3).mean((1, 3))
    errors = {
        name: np.mean(
            [
                np.abs(bsr.degrade(image, factor=4, process=process, rng=np.random.default_rng(seed)) - blocks).mean()
                for seed in range(30)
            ]
        )
        for name, process in PROCESSES.items()
    }
    assert 0.3 < errors["light"] < 4 < errors["bsrgan"]


def test_opencv_starts_no_threads():
    assert cv2.getNumThreads() == 1
