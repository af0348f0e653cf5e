"""Scores of files: which metrics can be had of which, against formulas applied to the same features elsewhere."""

import json
import pathlib

import numpy as np
import pytest
import scipy.linalg
from parity import inception_folder

from unclip_jax.errors import InputError
from unclip_jax.evaluation import frechet, image_sets, inception, kernel_distances, manifolds, references, scoring

RNG = np.random.default_rng(11)
SAMPLES = RNG.integers(0, 256, (40, 4, 4, 3), np.uint8)
REAL = RNG.integers(0, 200, (50, 4, 4, 3), np.uint8)
SETS = inception.FeatureSet("patches", None)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Features of a few dimensions, or each test would decompose matrices of 2,048."""
    for name, width in {"2048": 6, "spatial": 4, "logits_unbiased": 3}.items():
        monkeypatch.setitem(inception.WIDTHS, name, width)


def _features(params, images):
    flat = np.asarray(images, np.float32).reshape(len(images), -1) / 255
    return {"2048": flat[:, :6], "spatial": flat[:, 6:10], "logits_unbiased": flat[:, 10:13] * 3}


def _direct(images):
    return {name: value.astype(np.float64) for name, value in _features(None, images).items()}


def _write(path, images):
    image_sets.write_npz(path, [images], len(images))
    return path


def _score(samples, reference, **options):
    return scoring.score(samples, reference, SETS, batch_size=16, compute=_features, **options)


def _published_distance(a, b):
    """pytorch-fid's and ADM's formula, with the square root of a product that has full rank."""
    difference = a.mean(0) - b.mean(0)
    sigmas = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(sigmas[0] @ sigmas[1])
    return difference @ difference + np.trace(sigmas[0] + sigmas[1] - 2 * root.real)


@pytest.fixture
def sets(tmp_path):
    image_sets.write_folder(tmp_path / "real", [REAL], range(50))
    return _write(tmp_path / "samples.npz", SAMPLES), tmp_path / "real"


def test_images_against_images_have_every_metric(sets):
    result = _score(*sets)
    own, held = _direct(SAMPLES), _direct(REAL)
    values = {name: entry["value"] for name, entry in result["metrics"].items()}
    assert values["fid"] == pytest.approx(_published_distance(own["2048"], held["2048"]), rel=1e-6)
    assert values["sfid"] == pytest.approx(_published_distance(own["spatial"], held["spatial"]), rel=1e-6)
    assert values["kid"] == pytest.approx(kernel_distances.kid(own["2048"], held["2048"]), rel=1e-5)
    shares = manifolds.measures(held["2048"], own["2048"], k=3)
    assert {name: values[name] for name in shares} == pytest.approx(shares)
    softmax = np.exp(own["logits_unbiased"]) / np.exp(own["logits_unbiased"]).sum(1, keepdims=True)
    divergences = (softmax * (np.log(softmax) - np.log(softmax.mean(0)))).sum(1)
    assert values["inception_score"] == pytest.approx(np.exp(divergences.mean()), rel=1e-5)
    assert set(values) == {"fid", "sfid", "kid", "inception_score", *shares}
    assert result["metrics"]["fid"]["standard_error"] > 0
    assert (result["features"], result["notes"]) == ("patches", [])
    assert (result["samples"]["images"], result["reference"]["images"]) == (40, 50)
    json.dumps(result, allow_nan=False)


def test_moments_give_the_same_distances_as_the_images_they_are_of(sets, tmp_path):
    held = _direct(REAL)
    moments = [frechet.moments(held[name]) for name in ("2048", "spatial")]
    about = {"features": "patches", "protocol": "one"}
    full, bare = tmp_path / "full.npz", tmp_path / "bare.npz"
    references.write(full, moments[0], spatial=moments[1], about=about, images=[REAL[:10]], images_count=10)
    np.savez(bare, mu=moments[0].mu, sigma=moments[0].sigma)

    wanted = {name: entry["value"] for name, entry in _score(*sets)["metrics"].items()}
    found = _score(sets[0], full, expected={"protocol": "one"})
    assert found["metrics"]["fid"]["value"] == pytest.approx(wanted["fid"], rel=1e-9)
    assert found["metrics"]["sfid"]["value"] == pytest.approx(wanted["sfid"], rel=1e-9)
    few = kernel_distances.kid(_direct(SAMPLES)["2048"], held["2048"][:10])
    assert found["metrics"]["kid"]["value"] == pytest.approx(few, rel=1e-5)
    assert found["reference"]["images"] == 50
    assert found["notes"] == ["KID, precision and recall are against the 10 images in the reference file"]

    found = _score(sets[0], bare)
    assert set(found["metrics"]) == {"fid", "inception_score"}
    assert found["metrics"]["fid"]["value"] == pytest.approx(wanted["fid"], rel=1e-9)
    assert found["reference"]["images"] is None
    assert found["notes"] == ["the reference does not say of which features and images it is"]

    with pytest.raises(InputError, match="of another protocol, 'one' and not 'two'"):
        _score(sets[0], full, expected={"protocol": "two"})
    with pytest.raises(InputError, match="of another features, 'patches' and not 'others'"):
        scoring.score(sets[0], full, inception.FeatureSet("others", None), compute=_features)


def test_equal_sets_are_at_no_distance_and_few_images_are_noted(sets, tmp_path):
    few = _write(tmp_path / "few.npz", REAL[:5])
    found = _score(few, few)
    assert found["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-12)
    starts = [note.partition(",")[0] for note in found["notes"]]
    assert starts == [
        f"FID and sFID are mostly bias: there are 5 images in the {whose}" for whose in ("samples", "reference")
    ]


def test_only_the_pictures_of_a_references_folder_are_prepared(sets):
    images: list[np.ndarray] = []

    def compute(params, batch):
        images.append(batch)
        return _features(params, batch)

    scoring.score(*sets, SETS, batch_size=50, prepare=lambda image: 255 - image, compute=compute)
    np.testing.assert_array_equal(images[0], 255 - REAL)
    np.testing.assert_array_equal(images[1][:40], SAMPLES)
    scoring.score(sets[1], sets[0], SETS, batch_size=50, prepare=lambda image: 255 - image, compute=compute)
    np.testing.assert_array_equal(images[2][:40], SAMPLES)
    np.testing.assert_array_equal(images[3], REAL)


def test_batches_have_one_size_and_rows_keep_their_order():
    sizes = []

    def compute(params, images):
        sizes.append(len(images))
        return _features(params, images)

    batches = [SAMPLES[:16], SAMPLES[16:20], SAMPLES[20:36], SAMPLES[36:]]
    found = scoring.extracted(SETS, batches, 40, batch_size=16, compute=compute)
    assert sizes == [16] * 4
    for name, value in _features(None, SAMPLES).items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "count, spoilt, said",
    [(39, None, "more came than the 39"), (41, None, "40 came, and 41"), (40, 21, "of image 21 are")],
)
def test_missing_and_spoilt_rows_are_errors(count, spoilt, said):
    def compute(params, images):
        found = _features(params, images)
        if spoilt is not None and (images[0] == SAMPLES[16]).all():
            found["spatial"][spoilt - 16, 2] = np.nan
        return found

    batches = (SAMPLES[start : start + 16] for start in range(0, 40, 16))
    with pytest.raises(InputError, match=said):
        scoring.extracted(SETS, batches, count, batch_size=16, compute=compute)


def test_pytorch_fid_finds_the_same_distance_in_our_files(tmp_path):
    """What pytorch-fid 0.3.0 made of the same two files stands beside its network's features."""
    with np.load(pathlib.Path(inception_folder.__file__).parent / inception_folder.ANSWERS) as file:
        wanted = float(file["fid"])
    read = [references.read(path).moments for path in inception_folder.write_moments(tmp_path)]
    assert frechet.distance(*read) == pytest.approx(wanted, rel=1e-6, abs=0)
    a, b = (inception_folder.features(number) for number in range(2))
    assert frechet.distance_of_features(a, b) == pytest.approx(wanted, rel=1e-6)
    assert _published_distance(a, b) == pytest.approx(wanted, rel=1e-6)
