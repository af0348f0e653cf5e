"""Slices are as Google's pages say, and the compiler has as many devices for them."""

import pytest

from unclip_jax import topologies
from unclip_jax.errors import InputError

# Name -> chips and shape, from the pages of cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x.
DOCUMENTED = {
    "v4-8": (4, (2, 2, 1)),
    "v4-512": (256, (4, 8, 8)),
    "v4-4096": (2048, (8, 16, 16)),
    "v5e-1": (1, (1, 1)),
    "v5e-8": (8, (2, 4)),
    "v5litepod-16": (16, (4, 4)),
    "v5e-256": (256, (16, 16)),
    "v5p-8": (4, (2, 2, 1)),
    "v5p-128": (64, (4, 4, 4)),
    "v5p-512": (256, (4, 8, 8)),
    "v5p-12288": (6144, (16, 16, 24)),
    "v6e-4": (4, (2, 2)),
    "v6e-256": (256, (16, 16)),
    "tpu7x-8": (4, (2, 2, 1)),
    "tpu7x-128": (64, (4, 4, 4)),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_slice_has_the_chips_that_its_page_says(name):
    topology = topologies.find(name)
    assert (topology.chips, topology.shape) == DOCUMENTED[name]


def test_chips_are_those_of_their_pages():
    published = {"v4": (275, 32, 1200), "v5e": (197, 16, 819), "v5p": (459, 96, 2765), "v6e": (918, 32, 1638)}
    for name, (teraflops, gibibytes, rate) in published.items():
        chip = topologies.CHIPS[name]
        assert (chip.bf16_flops, chip.hbm_rate) == (teraflops * 1e12, rate * 1e9)
        assert 0.95 * gibibytes < chip.hbm_bytes / 2**30 <= gibibytes  # a program may not use all of it


@pytest.mark.parametrize(
    ("name", "devices", "slices"),
    # v4 and v5p show two cores as one device, tpu7x shows both.
    [("v4-8", 4, 1), ("v5p-512", 256, 1), ("tpu7x-8", 8, 1), ("v5e-1", 1, 1), ("2xv5e-256", 512, 2), ("v6e-8", 8, 1)],
)
def test_the_compiler_has_these_devices(name, devices, slices):
    found = topologies.compile_only_devices(topologies.find(name))
    assert len(found) == devices
    assert len({getattr(one, "slice_index", None) for one in found}) == slices
    assert {one.platform for one in found} == {"tpu"}


def test_gpus_come_in_hosts_of_eight():
    assert (topologies.find("h100-256").chips, topologies.find("h100-256").slices) == (256, 32)
    assert topologies.find("2xh100-8").chips == 16
    assert not topologies.find("h100-1").is_tpu


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-500", "did you mean 'v5p-512'"),
        ("v5p-256x", "did you mean 'v5p-256'"),
        ("v5p512", "did you mean 'v5p-512'"),
        ("v7e-4", "did you mean 'v6e-4'"),
        ("v5e-12", "counts chips"),
        ("v4-4", "counts TensorCores"),
        ("v5p:4x4", "3 sides"),
        ("0xv5e-4", "no slice"),
        ("h100-12", "hosts of 8"),
        ("h100", "did you mean 'h100-256'"),
        ("v5p", "did you mean 'v5p-"),
        ("", "known"),
    ],
)
def test_an_unknown_slice_is_refused_with_what_would_be_right(name, said):
    with pytest.raises(InputError, match=said):
        topologies.find(name)


def test_without_the_compiler_its_package_is_named(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'unclip_jax\[plan\]'"):
        topologies.compile_only_devices(topologies.find("v5e-4"))
