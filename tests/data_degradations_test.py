"""Blurring and resizing against closed forms and float64 sums written here."""

import math

import numpy as np
import pytest

from unclip_jax.data import degradations, resize
from unclip_jax.errors import InputError


def oracle_blur(image, kernel_size, sigma):
    """Blurs by the definition: one weighted sum per pixel, mirrored about the outermost pixels."""
    radius = kernel_size // 2
    weight = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-radius, radius + 1)]
    height, width, channels = image.shape

    def mirrored(position, size):
        return -position if position < 0 else 2 * (size - 1) - position if position >= size else position

    blurred = np.zeros(image.shape)
    for y in range(height):
        for x in range(width):
            for i, wy in enumerate(weight):
                for j, wx in enumerate(weight):
                    near = image[mirrored(y + i - radius, height), mirrored(x + j - radius, width)]
                    blurred[y, x] += wy * wx * near / sum(weight) ** 2
    return blurred


@pytest.mark.parametrize(("kernel_size", "sigma"), [(3, 0.6), (5, 1.2), (1, 0.6)])
def test_blur_is_the_sum_that_defines_it(kernel_size, sigma):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    blurred = degradations.gaussian_blur(image, kernel_size=kernel_size, sigma=sigma)
    assert blurred.dtype == np.uint8
    assert np.abs(blurred - oracle_blur(image, kernel_size, sigma)).max() <= 0.51


def test_a_point_spreads_as_the_papers_kernel():
    # exp(-1 / (2 * 0.6^2)) = 0.24935; the centre weight is 1 / (1 + 2 * 0.24935) = 0.66724.
    image = np.zeros((7, 7, 3), np.uint8)
    image[3, 3] = 255
    blurred = degradations.gaussian_blur(image)[..., 0]
    assert blurred[3, 3] == round(255 * 0.66724**2)
    assert blurred[3, 2] == round(255 * 0.66724 * 0.16638)
    assert blurred[2, 2] == round(255 * 0.16638**2)
    assert blurred.sum() == blurred[2:5, 2:5].sum()


def test_flat_images_stay_and_none_does_nothing():
    flat = np.full((5, 6, 3), 201, np.uint8)
    np.testing.assert_array_equal(degradations.gaussian_blur(flat), flat)
    image = np.random.default_rng(1).integers(0, 256, (5, 6, 3), np.uint8)
    kept = degradations.named("none").low_res(image[:, :5], size=5, method="area", rng=np.random.default_rng(0))
    np.testing.assert_array_equal(kept, image[:, :5])


@pytest.mark.parametrize("name", sorted(degradations.DEGRADATIONS))
def test_every_degradation_shrinks_and_keeps_its_input(name):
    image = np.random.default_rng(2).integers(0, 256, (24, 24, 3), np.uint8)
    before = image.copy()
    entry = degradations.named(name)
    for size in (6, 8, 12):
        made = [entry.low_res(image, size=size, method="area", rng=np.random.default_rng(seed)) for seed in (0, 1, 0)]
        assert made[0].shape == (size, size, 3) and made[0].dtype == np.uint8
        np.testing.assert_array_equal(made[0], made[2])
        assert np.array_equal(made[0], made[1]) != entry.draws
    np.testing.assert_array_equal(image, before)


def test_the_first_upsamplers_blur_comes_after_shrinking():
    image = np.random.default_rng(2).integers(0, 256, (24, 24, 3), np.uint8)
    small = degradations.named("gaussian_blur").low_res(image, size=6, method="area", rng=np.random.default_rng(0))
    shrunk = image.reshape(6, 4, 6, 4, 3).mean((1, 3))
    assert np.abs(small - oracle_blur(shrunk, 3, 0.6)).max() <= 1.01


def test_errors_name_what_is_wrong():
    with pytest.raises(InputError, match="odd kernel"):
        degradations.gaussian_blur(np.zeros((5, 5, 3), np.uint8), kernel_size=4)
    with pytest.raises(InputError, match="known are bsr, bsrgan, gaussian_blur, none"):
        degradations.named("xyz")


@pytest.mark.parametrize("shape", [(24, 24, 3), (24, 40, 3), (37, 24, 3)])
def test_area_reduction_is_the_mean_of_the_covered_pixels(shape):
    image = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    top, left = (shape[0] - 24) // 2, (shape[1] - 24) // 2
    means = image[top : top + 24, left : left + 24].astype(np.float64).reshape(8, 3, 8, 3, 3).mean((1, 3))
    assert np.abs(resize.square(image, size=8) - means).max() <= 0.5
    assert abs((resize.square(image, size=8) - means).mean()) < 0.05


@pytest.mark.parametrize(("side", "size"), [(10, 8), (17, 16), (40, 12), (31, 7)])
def test_area_reduction_counts_pixels_at_the_edges_in_part(side, size):
    image = np.random.default_rng(4).integers(0, 256, (side, side, 3), np.uint8)
    # Row i of the matrix: how much of each source pixel lies in [i, i + 1) target pixels.
    edges = np.arange(side + 1)
    begin, end = np.arange(size)[:, None] * side / size, np.arange(1, size + 1)[:, None] * side / size
    covered = np.clip(np.minimum(end, edges[1:]) - np.maximum(begin, edges[:-1]), 0, None) * size / side
    wanted = np.einsum("ij,jkc,lk->ilc", covered, image.astype(np.float64), covered)
    assert np.abs(resize.square(image, size=size) - wanted).max() <= 0.51


@pytest.mark.parametrize("method", sorted(resize.FILTERS))
def test_reduction_does_not_alias(method):
    # Lines one pixel wide are grey from afar; picking pixels would give black or white.
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255
    small = resize.square(lines, size=8, method=method)
    assert np.abs(small[1:-1, 1:-1].astype(float) - 127.5).max() < 8


@pytest.mark.parametrize("method", sorted(resize.FILTERS))
def test_enlarging_is_smooth(method):
    ramp = np.repeat(np.linspace(0, 250, 6).astype(np.uint8)[None, :, None], 6, axis=0).repeat(3, axis=2)
    large = resize.square(ramp, size=24, method=method)
    assert large.shape == (24, 24, 3) and len(np.unique(large)) > 12


@pytest.mark.parametrize("method", sorted(resize.FILTERS))
@pytest.mark.parametrize(("shape", "window"), [((5, 6, 3), 3), ((10, 10, 3), 6), ((15, 17, 3), 9), ((13, 8, 3), 5)])
def test_a_crop_is_a_window_of_the_square_resized_and_any_of_them(method, shape, window):
    image = np.random.default_rng(5).integers(0, 256, shape, np.uint8)
    side = min(shape[:2])
    corner = (shape[0] - side) // 2, (shape[1] - side) // 2
    places = range(side - window + 1)
    windows = {
        resize.square(image[top : top + window, left : left + window], size=3, method=method).tobytes()
        for top in (corner[0] + place for place in places)
        for left in (corner[1] + place for place in places)
    }
    rng = np.random.default_rng(0)
    # 0.6 of the side, to the nearest pixel.
    drawn = [resize.random_crop(image, fraction=0.6, size=3, method=method, rng=rng) for _ in range(600)]
    assert {crop.tobytes() for crop in drawn} == windows and len(windows) == len(places) ** 2
    whole = resize.random_crop(image, fraction=1.0, size=5, method=method, rng=rng)
    np.testing.assert_array_equal(whole, resize.square(image, size=5, method=method))
