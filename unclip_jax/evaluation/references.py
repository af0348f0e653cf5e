"""Moments of a reference set in files that others write and read.

Two formats, both npz: pytorch-fid's with `mu` and `sigma` of the 2,048 features; and ADM's reference batches, which add
`mu_s` and `sigma_s` of the 2,023 spatial ones for sFID and some of the images, `arr_0`, for precision and recall. In
what is written here `about` stands beside them, a JSON text that says what they are moments of; other programs do not
look at it.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.evaluation import image_sets
from unclip_jax.evaluation.frechet import Moments

_ABOUT = "about"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A file of moments.

    Attributes:
      moments: of the features that FID is of.
      spatial: of those that sFID is of; None where the file has none.
      about: what the file says of itself; None where it says nothing, as others' do not.
      images: how many images it holds as `arr_0`, which `image_sets.read` reads; 0 where it holds none.
    """

    moments: Moments
    spatial: Moments | None
    about: Mapping[str, Any] | None
    images: int


def is_reference(path: str | os.PathLike) -> bool:
    """Whether a file is an npz with moments, and not one with images alone."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def read(path: str | os.PathLike, *, expected: Mapping[str, Any] | None = None) -> Reference:
    """Reads a file of moments.

    Args:
      path: of the npz.
      expected: what must stand in its `about`, such as a protocol's digest and the features' name. A file without
        `about` has nothing to compare, which is the caller's to say in a result.

    Raises:
      InputError: there is no such file, it is damaged, its arrays are no moments, or its `about` says otherwise.
    """
    path = pathlib.Path(path).expanduser()
    arrays = _arrays(path)
    missing = {"mu", "sigma"} - arrays.keys()
    if missing:
        raise InputError(f"{path} has no {' and no '.join(sorted(missing))}: a reference has mu and sigma")
    about = _about(path, arrays.pop(_ABOUT, None))
    for key, value in (expected or {}).items():
        if about is not None and about.get(key) != value:
            raise InputError(f"{path} is of another {key}, {about.get(key)!r} and not {value!r}; make it anew")
    count = int((about or {}).get("count", 0))
    spatial = _moments(path, arrays, "mu_s", "sigma_s", count) if "mu_s" in arrays else None
    held = image_sets.count(path) if f"{image_sets.ARRAY}.npy" in _names(path) else 0
    return Reference(_moments(path, arrays, "mu", "sigma", count), spatial, about, held)


def _names(path):
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _arrays(path):
    """All arrays but the images, which may be larger than memory."""
    wanted = ("mu", "sigma", "mu_s", "sigma_s", _ABOUT)
    try:
        with path.open("rb") as stored, np.load(stored) as file:
            return {name: file[name] for name in wanted if name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no npz with mu and sigma: {error}") from error


def _about(path, text):
    if text is None:
        return None
    try:
        about = json.loads(str(text))
        int(about.get("count", 0))
        return about
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: its `about` is no JSON object: {error}") from error


def _moments(path, arrays, mu_name, sigma_name, count):
    mu, sigma = np.asarray(arrays[mu_name]), np.asarray(arrays.get(sigma_name))
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise InputError(
            f"{path}: {mu_name} is {mu.dtype}{list(mu.shape)} and {sigma_name} {sigma.dtype}{list(sigma.shape)}; they "
            "must be a mean and a covariance, floats [d] and [d, d]"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise InputError(f"{path}: {mu_name} or {sigma_name} is not finite")
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * max(1.0, float(np.abs(sigma).max()))):
        raise InputError(f"{path}: {sigma_name} is not symmetric, so it is no covariance")
    return Moments(count, mu, (sigma + sigma.T) / 2)


def write(
    path: str | os.PathLike,
    moments: Moments,
    *,
    spatial: Moments | None = None,
    about: Mapping[str, Any] | None = None,
    images: Iterable[image_sets.Batch] | None = None,
    images_count: int = 0,
) -> None:
    """Writes a file that pytorch-fid reads, and ADM's evaluation too where it has `spatial` and `images`.

    The file appears whole or not at all, and images are never all in memory.

    Args:
      path: of the npz.
      moments: of the features that FID is of.
      spatial: of those that sFID is of.
      about: what the moments are of; their count is added.
      images: some of the images, ADM's evaluation computes precision and recall of: batches of uint8 [b, h, w, 3].
      images_count: how many these are.

    Raises:
      InputError: there are more images or fewer, or they are of different sizes.
    """
    arrays = {"mu": moments.mu, "sigma": moments.sigma}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma}
    arrays[_ABOUT] = np.array(json.dumps({**(about or {}), "count": moments.count}, sort_keys=True))
    with sealed.Replacing(pathlib.Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
        if images is not None:
            image_sets.write_member(archive, images, images_count, where=str(path))
