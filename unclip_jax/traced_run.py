"""A run's programs, traced for hardware that is not there: what they compute, and what their arguments take.

Nothing is compiled or allocated. A traced program knows its matrix products and the bytes of its arguments on one chip,
which is enough to rule a layout out, and it can be lowered for the compiler.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import description, flops, sharding, topologies
from unclip_jax import program as runs
from unclip_jax.errors import InputError, nearest
from unclip_jax.topologies import Topology


def prepare(config: ConfigDict, topology: Topology, *, batch_per_chip: int | None = None) -> ConfigDict:
    """Returns the config as it would run on the hardware: "auto" resolved, the batch as asked for.

    Args:
      config: a checked config.
      topology: the hardware.
      batch_per_chip: examples on a chip in one step; the config's own global batch without it.
    """
    config = ConfigDict(config.to_dict())
    if config.dtype == "auto":  # here a CPU is the backend, which would make it float32
        config.dtype = "bfloat16"
    if batch_per_chip is not None:
        if batch_per_chip < 1:
            raise InputError(f"--batch_per_chip={batch_per_chip} leaves nothing to do; give 1 or more")
        config.batch_size = batch_per_chip * topology.chips
    return config.lock()


def make_mesh(config: ConfigDict, devices: Sequence[Any]) -> Mesh:
    """Returns the config's mesh over devices; a shape that the network cannot take is an InputError."""
    try:
        return sharding.make_mesh(config.mesh, devices)
    except NotImplementedError as error:
        reason = str(error).split(". ")[0]
        raise InputError(f"config.mesh={config.mesh.to_dict()} does not lie on this network: {reason}") from error


def function_name(stage: Any, wanted: str) -> str:
    """Returns "train", or the predict function that is meant: "sample" is the stage's sampler.

    Raises:
      InputError: the stage has no such function.
    """
    names = list(stage.predict_fns())
    if wanted in ("train", *names):
        return wanted
    if wanted == "sample" and any(name.startswith("sample") for name in names):
        return next(name for name in names if name.startswith("sample"))
    raise InputError(f"--program={wanted!r} is none of this stage's programs; {nearest(wanted, ['train', *names])}")


def arguments(program: runs.Program, name: str) -> tuple[Any, tuple[Any, ...]]:
    """Returns a jitted function of a run, the train step or a predict function, and what it is called with."""
    if name == "train":
        return program.train_step, (program.state, program.frozen, program.batch())
    batch_size = program.config.batch_size
    batch = {
        field: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=program.batch_sharding)
        for field, x in program.stage.predict_specs(batch_size)[name].items()
    }
    frozen = {**program.frozen, "statistics": program.state.statistics}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(program.mesh))
    return program.predict[name], (program.state.params, frozen, batch, key)


def remat_policies(config: ConfigDict) -> dict[str, Any]:
    """Returns what the config says of every part's rematerialisation: name of the key -> its value."""
    return {name: value for name, value in configs.leaves(config) if name.rpartition(".")[2] == "remat"}


def devices_of(topology: Topology) -> list[Any]:
    """Returns devices to lay a mesh on: the TPU compiler's, or for GPUs as many CPU devices, which stand for them.

    Raises:
      InputError: the compiler is missing.
    """
    if topology.is_tpu:
        return topologies.compile_only_devices(topology)
    try:
        jax.config.update("jax_num_cpu_devices", topology.devices)
    except RuntimeError:
        pass  # JAX has been started already
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise InputError(
            f"--topology={topology.name!r}: {topology.devices} CPU devices are to stand for GPUs, and JAX was started "
            f"with {len(devices)}"
        )
    return devices[: topology.devices]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of a run, traced: what it computes, before any compiler has seen it.

    Attributes:
      name: "train", or of the predict function.
      config, topology, mesh: what it was traced for.
      argument_bytes: of its arguments on one device.
      parameters: numbers that the network learns.
      model_flops: of the trained network in a step, forward and backward, nothing recomputed; else as executed.
      lowerable: what JAX lowers.
      products: its matrix products, those of all devices.
      seconds: that tracing took.
    """

    name: str
    config: ConfigDict
    topology: Topology
    mesh: Mesh
    argument_bytes: int
    parameters: int
    model_flops: float
    lowerable: Any
    products: list[flops.Product]
    seconds: float

    @property
    def executed_flops(self) -> float:
        """Of one step, on all chips."""
        return sum(product.flops for product in self.products)

    @property
    def padded_flops(self) -> float:
        """The same, padded to the chip's matrix unit."""
        return sum(product.padded_flops(self.topology.chip.mxu_side) for product in self.products)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A function of a run on a mesh: its arguments are known, and nothing is traced yet."""

    name: str
    topology: Topology
    program: runs.Program
    function: Any
    values: tuple[Any, ...]

    @property
    def argument_bytes(self) -> int:
        """Bytes of one device's part of the arguments."""
        plain = [x for x in jax.tree.leaves(self.values) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
        return sum(np.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in plain)

    def trace(self) -> Traced:
        """Traces the function; compiles nothing."""
        began = time.perf_counter()
        config = self.program.config
        traced = self.function.trace(*self.values)
        found = [product for _, product in flops.products(traced.jaxpr.jaxpr)]
        model_flops = sum(product.flops for product in found)
        if self.name == "train":
            model_flops = float(description.describe(config).train_flops_per_example * config.batch_size)
        return Traced(
            name=self.name,
            config=config,
            topology=self.topology,
            mesh=self.program.mesh,
            argument_bytes=self.argument_bytes,
            parameters=sum(x.size for x in jax.tree.leaves(self.program.state.params)),
            model_flops=model_flops,
            lowerable=traced,
            products=found,
            seconds=time.perf_counter() - began,
        )


def lay_out(config: ConfigDict, topology: Topology, devices: Sequence[Any], *, name: str = "train") -> Layout:
    """Returns a function of a config's run on a topology.

    Args:
      config: of `prepare`.
      topology, devices: the hardware; devices are only looked at, so any of the right number do.
      name: "train", "sample" or the name of a predict function.

    Raises:
      InputError: the config, its batch or its mesh do not suit the hardware, or the stage has no such function.
    """
    program = runs.build(config, make_mesh(config, devices))
    name = function_name(program.stage, name)
    return Layout(name, topology, program, *arguments(program, name))
