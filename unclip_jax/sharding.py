"""The device mesh, and the one table that maps logical axes of arrays to its axes.

The mesh has the axes `data` (replicas), `fsdp` (replicas that share their weights in pieces) and `model` (one layer
split over devices). A batch is split over `data` and `fsdp`; a weight is split by the config's table, for example
`(("embed", "fsdp"), ("mlp", "model"), …)`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from unclip_jax.errors import InputError

_LOG = logging.getLogger(__name__)
AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

Rules = Sequence[tuple[str, str | None]]


def make_mesh(sizes: Mapping[str, int] | ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over `devices` (all of them by default), neighbours innermost.

    Args:
      sizes: devices along each of AXES; one may be -1, which takes what the others leave.
      devices: the devices to use.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1:
        raise InputError(f"config.mesh may leave one size to be inferred (-1), not {shape.count(-1)}")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
        raise InputError(f"config.mesh asks for {wanted}, which does not divide over the {len(devices)} devices here")
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: Mesh, *, where: str = ""
) -> PartitionSpec:
    """Returns how an array with logical axis `names` is split over the mesh.

    A dimension that the mesh axis does not divide is replicated, and that is logged once per array.

    Raises:
      InputError: two dimensions of the array map to one mesh axis, or a rule names an axis the mesh lacks.
    """
    table = dict(rules)
    spec: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = table.get(name) if name else None
        if axis is not None and axis not in mesh.shape:
            raise InputError(f"config.sharding maps {name!r} to mesh axis {axis!r}; the mesh has {tuple(mesh.shape)}")
        if axis is not None and axis in spec:
            raise InputError(
                f"config.sharding maps two dimensions of {where or tuple(names)} to mesh axis {axis!r}; "
                "map one elsewhere"
            )
        if axis is not None and size % mesh.shape[axis]:
            _LOG.info("%s: dimension %s of %d does not divide over %s; replicated", where, name, size, axis)
            axis = None
        spec.append(axis)
    return PartitionSpec(*spec)


def shardings(abstract: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns a tree of NamedSharding for a tree whose leaves may be boxed with logical axis names.

    Args:
      abstract: a tree of arrays or ShapeDtypeStructs; leaves without names are replicated.
      rules: pairs (logical axis, mesh axis).
      mesh: the mesh.
    """

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * len(leaf.shape)
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        return NamedSharding(mesh, partition_spec(names, shape, rules, mesh, where=jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over all replicas."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size: int, mesh: Mesh, *, accumulation: int = 1) -> None:
    """Raises InputError if a global batch does not divide over the replicas and accumulation steps."""
    replicas = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (replicas * accumulation):
        below = batch_size // (replicas * accumulation) * replicas * accumulation
        raise InputError(
            f"config.batch_size={batch_size} does not divide over {replicas} replicas x {accumulation} accumulation "
            f"steps; the nearest that does is {below or replicas * accumulation}"
        )


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Makes global arrays from this process's part of a batch."""
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
