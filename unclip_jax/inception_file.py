"""Weights of the FID Inception network, from the file that a user names.

`pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid publishes, or torch-fidelity's of the same tensors
(`weights-inception-2015-12-05-6726825d.pth`): both carry the beginning of their SHA-256 in their names, and a file of
another is refused. The same tensors as safetensors are read as well, and their features are named after that file.
"""

import hashlib
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.evaluation import inception
from unclip_jax.interop import tensors

SHA256 = "6726825d"
PUBLISHED = f"pt_inception-2015-12-05-{SHA256}.pth"


def read(path: str | os.PathLike, *, sha256: str = SHA256) -> inception.FeatureSet:
    """Reads the published file; nothing of it is run.

    Args:
      path: of the .pth, or of a safetensors file with tensors of the same names.
      sha256: how the .pth's SHA-256 must begin, in hexadecimal.

    Returns:
      weights named `inception.NAME`; those of a safetensors file have the beginning of its own SHA-256 in their name,
      for there is none that it could be held to.

    Raises:
      InputError: there is no such file, its SHA-256 is another, it is damaged, or its tensors are not the network's.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r} with Inception's weights; pytorch-fid publishes {PUBLISHED}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    name = inception.NAME
    if path.suffix == ".safetensors":
        name = f"{name}-safetensors-{found[:8]}"
    elif not found.startswith(sha256):
        raise InputError(
            f"{path} has the SHA-256 {found[:8]}… and not {sha256}…: it is not {PUBLISHED}, or was not received whole"
        )
    arrays = {name: _float32(tensor.read()) for name, tensor in tensors.open_tensors(path).items()}
    return inception.FeatureSet(name, inception.from_tensors(arrays, where=str(path)))


def _float32(array: np.ndarray) -> np.ndarray:
    """Half-precision copies are told by their type; NumPy does not count bfloat16 among floats."""
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
