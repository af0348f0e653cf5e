"""What torch writes, in both of its formats and as TorchScript, read without it."""

import numpy as np
import pytest
import torch

from unclip_jax.interop import tensors


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
        self.scale = torch.nn.Parameter(torch.randn(()))

    def forward(self, x):
        return self.layers(self.norm(x)) * self.scale


def equal(found, state):
    wanted = {name: value.float().numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape
        np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted[name])


def state():
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    floats = (torch.float64, torch.float16, torch.bfloat16)
    kinds = (*floats, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool)
    return {
        **Tower().state_dict(),
        **{str(kind): (10 * torch.randn(3, 2)).to(kind) for kind in kinds},
        "view": whole[1:5:2, 1:].t(),
        "same storage": whole[3],
        "parameter": torch.nn.Parameter(whole),
        "ids": torch.arange(77).expand((1, -1)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts(tmp_path, zipped):
    path = tmp_path / "model.bin"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    equal(tensors.open_tensors(path), {name: value.detach() for name, value in state().items()})


def test_a_training_checkpoint(tmp_path):
    tower = Tower()
    optimizer = torch.optim.AdamW(tower.parameters())
    torch.save({"epoch": 1, "state_dict": tower.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    equal(tensors.open_tensors(tmp_path / "x.pt"), tower.state_dict())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript(tmp_path):
    tower = Tower().half().eval()
    traced = torch.jit.trace(tower, torch.zeros(1, 3, dtype=torch.float16))
    traced.save(str(tmp_path / "x.pt"))
    equal(tensors.open_tensors(tmp_path / "x.pt"), tower.state_dict())
