"""Hardware that a run is planned for: slices of TPU by their friendly names, GPUs by count, and what a chip can do.

    topology = topologies.find("v5p-512")      # 256 chips, 4 x 8 x 8: the number counts TensorCores
    devices = topologies.compile_only_devices(topology)       # for a mesh; none of them is there

In v4-N, v5p-N and tpu7x-N the number counts TensorCores, two a chip; in v5e-N (also v5litepod-N) and v6e-N, chips.
`2xv5e-256` is two slices, joined by the data-centre network. `v5p:4x4x12` gives a shape that has no entry here.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from unclip_jax.errors import InputError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do. Rates are per second and in decimal units, as their makers print them.

    Attributes:
      name: as in the names of slices, or "h100".
      bf16_flops: peak of its matrix units, dense.
      hbm_bytes: what a program may use, which is less than what is printed: for TPUs the limit that libtpu 0.0.52
        names where a program is too large.
      hbm_rate: bytes read or written per second.
      ici_rate: bytes sent per second to the other chips of a slice, over all links: half of the "bidirectional" figure.
      dcn_rate: bytes sent per second to other slices, a chip's share of its host's network card.
      mxu_side: what channels are padded to: rows and columns of a matrix unit.
      torus: dimensions of the network inside of a slice; 0 where a switch joins all.
      cores: TensorCores a chip; `per_core` says whether names of slices count them.
      devices: JAX devices a chip: two cores of v4 and v5p work as one (megacore), those of tpu7x do not.
      source: of the figures.
    """

    name: str
    bf16_flops: float
    hbm_bytes: int
    hbm_rate: float
    ici_rate: float
    dcn_rate: float
    mxu_side: int
    torus: int
    cores: int = 1
    per_core: bool = False
    devices: int = 1
    source: str = ""


_DOCS = "cloud.google.com/tpu/docs/"
# DCN: v5p's page gives 50 Gbit/s a chip; v5e's and v6e's a pod's, 6.4 and 25.6 Tbit/s over 256 chips; tpu7x's 100
# Gbit/s a chip. v4's page gives neither DCN nor ICI: 25 Gbit/s are assumed, and six links of 50 GB/s each way.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, int(30.75 * GIB), 1200e9, 300e9, 3.125e9, 128, 3, 2, True, 1, _DOCS + "v4"),
        Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9, 128, 2, source=_DOCS + "v5e"),
        Chip("v5p", 459e12, int(95.73 * GIB), 2765e9, 600e9, 6.25e9, 128, 3, 2, True, 1, _DOCS + "v5p"),
        Chip("v6e", 918e12, int(31.24 * GIB), 1638e9, 400e9, 12.5e9, 256, 2, source=_DOCS + "v6e"),
        Chip("tpu7x", 2307e12, int(2 * 94.74 * GIB), 7380e9, 600e9, 12.5e9, 256, 3, 2, True, 2, _DOCS + "tpu7x"),
        # Of GPUs, a slice is the eight of a host that NVLink joins. Between hosts, 400 Gbit/s a GPU are assumed.
        Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9, 25e9, 16, 0, source="NVIDIA A100 80GB datasheet"),
        Chip("h100", 989.4e12, 80 * 10**9, 3350e9, 450e9, 50e9, 16, 0, source="NVIDIA H100 SXM datasheet"),
        Chip("h200", 989.4e12, 141 * 10**9, 4800e9, 450e9, 50e9, 16, 0, source="NVIDIA H200 SXM datasheet"),
        Chip("b200", 2250e12, 180 * 10**9, 7700e9, 900e9, 50e9, 16, 0, source="NVIDIA DGX B200 datasheet"),
    )
}
GPUS_PER_HOST = 8
_ALSO = {"v5litepod": "v5e", "v6lite": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}

# Chips -> shape, as Google's pages list them. A 2D slice is a part of one pod of 16 x 16.
_FLAT: dict[int, tuple[int, ...]] = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
}  # fmt: skip
_CUBES: dict[int, tuple[int, ...]] = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 192: (4, 4, 12),
    256: (4, 8, 8), 384: (4, 8, 12), 512: (8, 8, 8), 768: (8, 8, 12), 1024: (8, 8, 16), 1536: (8, 12, 16),
    2048: (8, 16, 16), 3072: (12, 16, 16), 4096: (16, 16, 16), 6144: (16, 16, 24),
}  # fmt: skip
_MOST = {"v4": 4096, "v5p": 6144, "tpu7x": 4096}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind, in one or more slices.

    Attributes:
      name: as it was asked for.
      chip: which chip.
      shape: chips along each dimension of one slice; (8,) for the GPUs of a host.
      slices: how many of them.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices in all slices."""
        return self.chips * self.chip.devices

    @property
    def is_tpu(self) -> bool:
        """Whether the compiler for it can be had on any machine."""
        return self.chip.torus > 0


def names() -> list[str]:
    """Returns the names of all TPU slices that are listed."""
    known = []
    for chip in CHIPS.values():
        for chips in _shapes(chip):
            known.append(f"{chip.name}-{chips * (chip.cores if chip.per_core else 1)}")
    return known


def _shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
    if not chip.torus:
        return {}
    if chip.torus == 2:
        return _FLAT
    shapes = {chips: shape for chips, shape in _CUBES.items() if chips <= _MOST[chip.name]}
    return {1: (1, 1, 1), **shapes} if chip.name == "tpu7x" else shapes


def find(name: str) -> Topology:
    """Returns the hardware of a name: v5p-512, 2xv5e-256, v5litepod-16, v5p:4x4x12, h100-256.

    Raises:
      InputError: there is no such slice.
    """
    word = name.strip().lower()
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", word)
    kind = _ALSO.get(match[2], match[2]) if match else ""
    if match is None or kind not in CHIPS:
        raise InputError(f"--topology={name!r} is not a slice that is known; {nearest(word, [*names(), 'h100-256'])}")
    chip, slices = CHIPS[kind], int(match[1] or 1)
    if slices < 1:
        raise InputError(f"--topology={name!r} has no slice; write 2x{kind}-{match[3] or '…'} for two of them")
    if not chip.torus:
        return _gpus(name, chip, int(match[3] or 0), slices)
    if match[4]:
        shape = tuple(int(side) for side in match[4].split("x"))
        if len(shape) != chip.torus or not all(shape):
            raise InputError(f"--topology={name!r}: a slice of {kind} has {chip.torus} sides, none of them 0")
        return Topology(name, chip, shape, slices)
    chips = int(match[3]) / (chip.cores if chip.per_core else 1)
    if chips not in _shapes(chip):
        counted = "TensorCores, two a chip" if chip.per_core else "chips"
        sizes = [int(known.rpartition("-")[2]) for known in names() if known.startswith(f"{kind}-")]
        near = min(sizes, key=lambda size: abs(math.log(size / max(int(match[3]), 1))))
        raise InputError(
            f"--topology={name!r} is not a slice that is known (the number counts {counted}); did you mean "
            f"'{kind}-{near}'?"
        )
    return Topology(name, chip, _shapes(chip)[int(chips)], slices)


def _gpus(name: str, chip: Chip, count: int, hosts: int) -> Topology:
    count *= hosts
    if count < 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise InputError(
            f"--topology={name!r}: GPUs come in hosts of {GPUS_PER_HOST}; write {chip.name}-8, {chip.name}-256, …"
        )
    host = min(count, GPUS_PER_HOST)
    return Topology(name, chip, (host,), count // host)


def require_compiler() -> None:
    """Raises InputError, with what to install, where the package libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "the TPU compiler, package libtpu, is missing (no TPU is needed): pip install 'unclip_jax[plan]', or in a "
            "clone pip install -e '.[plan]'"
        )


def compile_only_devices(topology: Topology) -> list[Any]:
    """Returns the JAX devices of a TPU topology, which programs can be compiled for and not run on.

    Raises:
      InputError: the compiler is not installed, or knows no slice of this shape.
    """
    require_compiler()
    # Several processes may compile side by side, and there is no cloud whose metadata could be asked for a TPU's type.
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(variable, "1")  # read when libtpu is loaded
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    import jax
    from jax.experimental import topologies as jax_topologies

    shape = "x".join(map(str, topology.shape))
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # as on a real v4: one device a chip
    if math.prod(topology.shape) < 4:
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]  # a part of a host
    try:
        described = jax_topologies.get_topology_desc(f"{topology.chip.name}:{shape}", platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--topology={topology.name!r}: the TPU compiler refuses {shape}: {reason}") from error
    devices = list(described.devices)
    if len(devices) != topology.devices:
        raise InputError(
            f"--topology={topology.name!r}: {topology.devices} devices were expected and the TPU compiler has "
            f"{len(devices)}; another version of libtpu may be needed"
        )
    return devices
