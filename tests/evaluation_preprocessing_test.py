"""Each protocol's way from a photograph to Inception, against independent code and what can be said in closed form."""

import io

import numpy as np
import pytest
from PIL import Image

from unclip_jax.evaluation import preprocessing

RNG = np.random.default_rng(3)


def _noise(height, width):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def _ramp(height, width):
    """Pixels whose channels are their row and column, which no averaging of neighbours bends."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 77)], -1).astype(np.uint8)


def _keys(x):
    """Keys' cubic, a = -1/2 (1981, equation 15)."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x):
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _matrix(length, size, kernel, support):
    """Weights of an antialiased filter: the kernel widened by the scale where it shrinks, normalised at borders."""
    scale = length / size
    wide = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    places = np.arange(length) + 0.5
    distances = (places - centres[:, None]) / wide
    weights = np.where(np.abs(distances) < support, kernel(distances), 0.0)
    return weights / weights.sum(1, keepdims=True)


def _filtered(image, height, width, kernel, support, *, rounded=True):
    """Columns, then rows, in float64; Pillow keeps bytes of bytes between the two passes, and clips them."""
    for axis, size in ((1, width), (0, height)):
        matrix = _matrix(image.shape[axis], size, kernel, support)
        image = np.moveaxis(np.tensordot(matrix, image.astype(np.float64), (1, axis)), 0, axis)
        image = np.floor(image + 0.5).clip(0, 255) if rounded else image
    return image


def _halved(image):
    """Means of pairs, columns first, rounded as above."""
    columns = np.floor(image.reshape(len(image), -1, 2, 3).mean(2) + 0.5)
    return np.floor(columns.reshape(-1, 2, *columns.shape[1:]).mean(1) + 0.5)


def _near(found, wanted, *, most=1.0):
    """Equal but for weights in fixed point, which may round to the next grey level."""
    change = np.abs(found.astype(np.float64) - wanted)
    assert change.max() <= most and change.mean() < 0.02


@pytest.mark.parametrize("height, width", [(31, 47), (47, 31), (33, 33), (20, 27), (15, 20)])
def test_adms_crop_is_bicubic_of_the_short_side_and_the_middle(height, width):
    image, size = _noise(height, width), 20
    scale = size / min(height, width)
    tall, wide = round(height * scale), round(width * scale)
    top, left = (tall - size) // 2, (wide - size) // 2
    wanted = _filtered(image, tall, wide, _keys, 2)[top : top + size, left : left + size]
    _near(preprocessing.center_crop_arr(image, size), wanted)


def test_adms_crop_halves_by_averages_first():
    image = _noise(64, 96)
    _near(preprocessing.center_crop_arr(image, 16), _halved(_halved(image))[:, 4:20])
    _near(preprocessing.center_crop_arr(image, 20), _filtered(_halved(image), 20, 30, _keys, 2)[:, 5:25])
    # Bicubic at once, without halving, is something else.
    assert np.abs(preprocessing.center_crop_arr(image, 16) - _filtered(image, 16, 24, _keys, 2)[:, 4:20]).max() > 10


def test_adms_crop_takes_the_upper_left_of_two_middles():
    image = _ramp(20, 27)
    np.testing.assert_array_equal(preprocessing.center_crop_arr(image, 20), image[:, 3:23])
    image = _ramp(27, 20)
    np.testing.assert_array_equal(preprocessing.center_crop_arr(image, 20), image[3:23])


@pytest.mark.parametrize("difference, begin", [(1, 0), (3, 2), (5, 2), (4, 2)])
def test_gigagans_crop_begins_at_the_even_one_of_two_middles(difference, begin):
    image = _ramp(20, 20 + difference)
    np.testing.assert_array_equal(preprocessing.lanczos_crop(image, 20), image[:, begin : begin + 20])
    image = _ramp(20 + difference, 20)
    np.testing.assert_array_equal(preprocessing.lanczos_crop(image, 20), image[begin : begin + 20])


@pytest.mark.parametrize("side, size", [(41, 16), (16, 24)])
def test_gigagans_resizing_is_lanczos(side, size):
    image = _noise(side, side + 2)
    _near(preprocessing.lanczos_crop(image, size), _filtered(image[:, 1:-1], size, size, _lanczos, 3))


def test_mlperfs_squeeze_bends_the_shape():
    image = _noise(30, 50)
    _near(preprocessing.squeeze(image, 20), _filtered(image, 20, 20, _keys, 2))


def test_jpeg_is_pillows_default():
    image = preprocessing.squeeze(_noise(9, 9), 32)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    np.testing.assert_array_equal(preprocessing.through_jpeg(image), Image.open(io.BytesIO(buffer.getvalue())))
    assert np.abs(preprocessing.through_jpeg(image).astype(int) - image).max() > 2


@pytest.mark.parametrize("height, width", [(64, 64), (400, 310)])
def test_clean_fids_resizing_is_bicubic_and_not_rounded(height, width):
    image = _noise(height, width)
    found = preprocessing.clean_fid_input(image)
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
    wanted = _filtered(image, 299, 299, _keys, 2, rounded=False).clip(0, 255)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert np.abs(found - found.round()).mean() > 0.2


@pytest.mark.parametrize("height, width", [(64, 70), (310, 512)])
def test_pytorch_fids_resizing_is_torchs_and_its_scale(height, width):
    torch = pytest.importorskip("torch")
    image = _noise(height, width)
    unit = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    resized = torch.nn.functional.interpolate(unit, size=(299, 299), mode="bilinear", align_corners=False)
    wanted = (2 * resized - 1)[0].permute(1, 2, 0).numpy()
    found = preprocessing.pytorch_fid_input(image)
    assert found.dtype == np.float32
    np.testing.assert_allclose((found - 128) / 128, wanted, atol=2e-6)
