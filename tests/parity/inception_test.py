"""The FID Inception network against `inception_oracle`, and its weights through files that torch writes."""

import hashlib

import jax
import numpy as np
import pytest
import torch
from parity.inception_oracle import Oracle
from safetensors.numpy import save_file

from unclip_jax import inception_file
from unclip_jax.errors import InputError
from unclip_jax.evaluation import inception

BAR = 2e-6
SEED = 7


@pytest.fixture(scope="module")
def tensors():
    return inception.redrawn_tensors(SEED)


@pytest.fixture(scope="module")
def params(tensors):
    return inception.from_tensors(tensors)


def test_features_are_the_oracles(tensors, params):
    # One side shrinks, the other grows.
    images = np.random.default_rng(1).integers(0, 256, (1, 400, 131, 3), np.uint8)
    assert inception.distance(inception.features(params, images), Oracle(tensors)(images)) <= BAR


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_the_published_kind_of_file_is_read(tensors, params, tmp_path, zipped):
    path = tmp_path / "weights.pth"
    named = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    named["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(named, path, _use_new_zipfile_serialization=zipped)
    begin = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.raises(InputError, match=f"SHA-256 {begin}… and not 6726825d…: it is not pt_inception-2015-12-05"):
        inception_file.read(path)
    found = inception_file.read(path, sha256=begin)
    assert found.name == "inception-2015-12-05"
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_safetensors_are_named_after_themselves(tensors, params, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    found = inception_file.read(path)
    assert found.name == f"inception-2015-12-05-safetensors-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    with pytest.raises(InputError, match="no file .*nowhere.pth.* pytorch-fid publishes pt_inception-2015-12-05"):
        inception_file.read(tmp_path / "nowhere.pth")
    few = {name: tensor for name, tensor in tensors.items() if not name.startswith("Mixed_7")}
    save_file(few, path)
    with pytest.raises(InputError, match="weights.safetensors are not those .* is missing; .* more"):
        inception_file.read(path)
