"""Files that others' programs read in `inception_answers`, and tests that compare with their results write again."""

import pathlib

import numpy as np

from unclip_jax.evaluation import frechet, image_sets, inception, references

ANSWERS = "inception_folder.npz"
NAMES = ("9", "10", "image-2")


def write(folder: pathlib.Path) -> None:
    """Three pictures of 64 x 64 in a folder."""
    images = np.concatenate([inception.known_images(64)[:, ::-1], inception.known_images(64)[:1, :, ::-1]])
    image_sets.write_folder(folder, [images], NAMES)


def features(number: int) -> np.ndarray:
    """Features with correlations, float64 [90, 24]; sets 0 and 1 have other means and covariances."""
    rng = np.random.RandomState(number)
    mixing = rng.standard_normal((24, 24)) * np.linspace(0.2, 2, 24)
    return rng.standard_normal((90, 24)) @ mixing + 0.3 * rng.standard_normal(24)


def write_moments(folder: pathlib.Path) -> list[pathlib.Path]:
    """Two files of moments."""
    paths = [folder / f"{number}.npz" for number in range(2)]
    for number, path in enumerate(paths):
        references.write(path, frechet.moments(features(number)), about={"features": "drawn"})
    return paths
