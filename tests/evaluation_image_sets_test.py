"""Sets of images and files of moments: cross-read with NumPy and by the readers that others have, as they document."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from unclip_jax.errors import InputError
from unclip_jax.evaluation import image_sets, references
from unclip_jax.evaluation.frechet import Moments

RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (7, 6, 4, 3), np.uint8)


def _batches(images=IMAGES, size=3):
    return (images[start : start + size] for start in range(0, len(images), size))


def _all(path, **options):
    batches = list(image_sets.read(path, **options))
    return np.concatenate(batches)


def test_npz_is_numpys_in_both_directions(tmp_path):
    image_sets.write_npz(tmp_path / "ours.npz", _batches(), 7)
    with np.load(tmp_path / "ours.npz") as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "theirs.npz", IMAGES, np.arange(7))  # ADM's own samples have labels as arr_1
        assert image_sets.count(tmp_path / "theirs.npz") == 7
        assert [len(batch) for batch in image_sets.read(tmp_path / "theirs.npz", batch_size=3)] == [3, 3, 1]
        np.testing.assert_array_equal(_all(tmp_path / "theirs.npz", batch_size=3), IMAGES)
    turned = _all(tmp_path / "ours.npz", prepare=lambda image: image[::-1].copy())
    np.testing.assert_array_equal(turned, IMAGES[:, ::-1])


def test_npz_has_what_a_streaming_reader_needs(tmp_path):
    """ADM's evaluation opens the member, takes a header of version 1 or 2 in C order and then rows of bytes."""
    path = tmp_path / "images.npz"
    image_sets.write_npz(path, _batches(size=2), 7)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        assert archive.testzip() is None
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran, dtype) == ((7, 6, 4, 3), False, np.uint8)
        rows = np.frombuffer(member.read(7 * 72), np.uint8).reshape(shape)
        np.testing.assert_array_equal(rows, IMAGES)
        assert not member.read(1)
    again = tmp_path / "again.npz"
    image_sets.write_npz(again, _batches(size=7), 7)
    assert again.read_bytes() == path.read_bytes()


def test_npz_is_never_in_memory_whole(tmp_path):
    path, batch = tmp_path / "large.npz", np.full((8, 128, 128, 3), 9, np.uint8)
    tracemalloc.start()
    try:
        image_sets.write_npz(path, (batch for _ in range(32)), 256)
        total = sum(int(images.sum(dtype=np.int64)) for images in image_sets.read(path, batch_size=8))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 9 * 256 * 128 * 128 * 3
    assert path.stat().st_size > 12e6 > 4 * most


@pytest.mark.parametrize(
    "count, batches, said",
    [
        (8, [IMAGES], "8 images were announced and 7 came"),
        (6, [IMAGES], "6 images were announced and more came"),
        (9, [IMAGES, IMAGES[:2, :5]], "cannot stand in one array"),
        (0, [], "0 images were announced and 0 came"),
    ],
)
def test_npz_of_another_number_or_size_is_not_written(tmp_path, count, batches, said):
    with pytest.raises(InputError, match=said):
        image_sets.write_npz(tmp_path / "x.npz", iter(batches), count)
    assert not list(tmp_path.iterdir())


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    for array, said in (
        (IMAGES.astype(np.float32), r"float32\[7, 6, 4, 3\]; images are uint8"),
        (IMAGES[0], r"uint8\[6, 4, 3\]"),
        (IMAGES[..., :1], r"\[7, 6, 4, 1\]"),
        (np.asfortranarray(IMAGES), "Fortran order"),
    ):
        with pytest.raises(InputError, match=said):
            image_sets.count(_npz(path, arr_0=array))
    with pytest.raises(InputError, match="no array 'arr_0' with images; it holds mu"):
        list(image_sets.read(_npz(path, mu=np.zeros(2))))
    path.write_bytes(b"\x89PNG")
    for wrong in (path, tmp_path / "nowhere.npz"):
        with pytest.raises(InputError, match="neither a folder of pictures nor an npz"):
            list(image_sets.read(wrong))


def test_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    image_sets.write_npz(path, _batches(), 7)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        data = archive.read("arr_0.npy")
    flipped = bytearray(whole)
    flipped[whole.index(IMAGES.tobytes()) + 40] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="Bad CRC-32"):
        list(image_sets.read(path))
    for content, said in ((data[:-80], "ends within image 5 of the 7"), (data + b"x", "longer than the 7 images")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
        with pytest.raises(InputError, match=said):
            list(image_sets.read(path, batch_size=2))
    path.write_bytes(whole[:300])
    with pytest.raises(InputError, match="neither a folder"):
        list(image_sets.read(path))


def test_folder_is_read_in_natural_order(tmp_path):
    names = ["b10", "b9", "a2", "b1", "10", "9", "b010"]
    image_sets.write_folder(tmp_path / "set", _batches(), names)
    for name, image in zip(names, IMAGES, strict=True):
        np.testing.assert_array_equal(Image.open(tmp_path / "set" / f"{name}.png"), image)
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    order = [names.index(name) for name in ("9", "10", "a2", "b1", "b9", "b010", "b10")]
    assert image_sets.count(tmp_path / "set") == 7
    np.testing.assert_array_equal(_all(tmp_path / "set", batch_size=2), IMAGES[order])


def test_folder_with_a_wrong_picture_is_refused_by_its_name(tmp_path):
    image_sets.write_folder(tmp_path, _batches(), range(7))
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"3\.png cannot be read: .*truncated"):
        _all(tmp_path)
    Image.fromarray(IMAGES[0].repeat(2, 0)).save(tmp_path / "3.png")
    with pytest.raises(InputError, match=r"3\.png has 4x12 pixels and 0\.png 4x6"):
        _all(tmp_path)
    assert _all(tmp_path, prepare=lambda image: image[:6].copy()).shape == (7, 6, 4, 3)


def test_folder_is_not_written_over_another(tmp_path):
    with pytest.raises(InputError, match="own name"):
        image_sets.write_folder(tmp_path / "set", _batches(), [1, 2, 3, 4, 5, 6, "1"])
    with pytest.raises(InputError, match="7 images came for 8 names"):
        image_sets.write_folder(tmp_path / "few", _batches(), range(8))
    with pytest.raises(InputError, match="more images came than the 2"):
        image_sets.write_folder(tmp_path / "many", _batches(), range(2))
    with pytest.raises(InputError, match="not empty"):
        image_sets.write_folder(tmp_path / "few", _batches(), range(7))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        image_sets.count(tmp_path / "none")


def _moments(d, count=9):
    x = RNG.standard_normal((count, d))
    return Moments(count, x.mean(0), np.cov(x, rowvar=False))


def test_references_are_read_as_pytorch_fid_and_adm_do(tmp_path):
    pool, spatial = _moments(5), _moments(3)
    about = {"features": "some", "protocol": "digest"}
    path = tmp_path / "reference.npz"
    references.write(path, pool, spatial=spatial, about=about, images=_batches(), images_count=7)
    with np.load(path) as file:
        np.testing.assert_array_equal(file["mu"][:], pool.mu)
        np.testing.assert_array_equal(file["sigma"][:], pool.sigma)
        np.testing.assert_array_equal(file["mu_s"], spatial.mu)
        np.testing.assert_array_equal(file["sigma_s"], spatial.sigma)
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        assert json.loads(str(file["about"])) == about | {"count": 9}
    found = references.read(path, expected=about)
    np.testing.assert_array_equal(found.moments.sigma, pool.sigma)
    np.testing.assert_array_equal(found.spatial.mu, spatial.mu)
    assert (found.moments.count, found.images, found.about) == (9, 7, about | {"count": 9})
    np.testing.assert_array_equal(_all(path, batch_size=4), IMAGES)
    assert references.is_reference(path)

    np.savez_compressed(tmp_path / "theirs.npz", mu=pool.mu.astype(np.float32), sigma=pool.sigma.astype(np.float32))
    found = references.read(tmp_path / "theirs.npz", expected=about)
    assert (found.moments.count, found.spatial, found.images, found.about) == (0, None, 0, None)
    np.testing.assert_array_equal(found.moments.mu, pool.mu.astype(np.float32))
    assert found.moments.sigma.dtype == np.float64
    image_sets.write_npz(tmp_path / "images.npz", _batches(), 7)
    assert not references.is_reference(tmp_path / "images.npz") and not references.is_reference(tmp_path)


def test_references_of_something_else_are_refused(tmp_path):
    pool, path = _moments(4), tmp_path / "x.npz"
    references.write(path, pool, about={"protocol": "one"})
    with pytest.raises(InputError, match="of another protocol, 'one' and not 'two'; make it anew"):
        references.read(path, expected={"protocol": "two"})
    lopsided, infinite = pool.sigma.copy(), pool.sigma.copy()
    lopsided[0, 1] += 1
    infinite[0, 0] = np.nan
    for arrays, said in (
        ({"mu": pool.mu}, "has no sigma: a reference has mu and sigma"),
        ({"mu": pool.mu, "sigma": pool.sigma[:3]}, r"sigma float64\[3, 4\]"),
        ({"mu": pool.mu.astype(int), "sigma": pool.sigma}, r"mu is int64\[4\]"),
        ({"mu": pool.mu, "sigma": lopsided}, "not symmetric"),
        ({"mu": pool.mu, "sigma": infinite}, "not finite"),
        ({"mu": pool.mu, "sigma": pool.sigma, "mu_s": pool.mu}, "sigma_s"),
        ({"mu": pool.mu, "sigma": pool.sigma, "about": np.array("[1]")}, "no JSON object"),
        ({"mu": np.array([{}]), "sigma": pool.sigma}, "no npz with mu and sigma"),
    ):
        with pytest.raises(InputError, match=said):
            references.read(_npz(path, **arrays))
    path.write_bytes(path.read_bytes()[:200])
    for wrong in (path, tmp_path / "nowhere.npz"):
        with pytest.raises(InputError, match="no npz with mu and sigma"):
            references.read(wrong)


def test_a_reference_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="8 images were announced and 7 came"):
        references.write(tmp_path / "x.npz", _moments(2), images=_batches(), images_count=8)
    assert not list(tmp_path.iterdir())


def test_archives_over_four_gigabytes_can_be_described():
    """The fields of a zip archive that such a file needs are there from its beginning."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        image_sets.write_member(archive, _batches(), 7, where="x")
    local = buffer.getvalue()[:200]
    assert local[18:26] == b"\xff" * 8, "sizes stand in the extra field of 64 bits"
