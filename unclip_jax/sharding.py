"""The device mesh, and the one table that maps logical axes of arrays to its axes.

The mesh has the axes `slice` (groups of devices between which the network is slow), `data` (replicas), `fsdp` (replicas
that share their weights in pieces) and `model` (one layer, or one image, split over devices). A batch is split over the
first three; a weight is split by the config's table, for example `(("embed", "fsdp"), ("mlp", "model"), …)`.

Code that is being traced `on` a mesh says with these functions where its arrays lie: `whole` a weight that a layer is
about to use, `laid` an activation, `each_part` a kernel that no compiler can split. Traced elsewhere they do nothing.
"""

import contextlib
import contextvars
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from unclip_jax.errors import InputError

_LOG = logging.getLogger(__name__)
AXES = ("slice", "data", "fsdp", "model")
BATCH_AXES = ("slice", "data", "fsdp")

Rules = Sequence[tuple[str, str | None]]


def make_mesh(sizes: Mapping[str, int] | ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over `devices` (all of them by default), neighbours innermost.

    Args:
      sizes: devices along each of AXES. `slice` -1 is the number of slices that the devices say they are in; one of
        the others may be -1, which takes what is left.
      devices: the devices to use.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or there are other slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    shape[0] = slices if int(sizes.get("slice", -1)) == -1 else shape[0]
    if slices > 1 and shape[0] != slices:
        raise InputError(f"config.mesh.slice={shape[0]}, but the devices are in {slices} slices; give that, or -1")
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1:
        raise InputError(f"config.mesh may leave one size to be inferred (-1), not {shape.count(-1)}")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        shown = [axis for axis in AXES if axis != "slice" or shape[0] > 1]
        wanted = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in shown)
        raise InputError(f"config.mesh asks for {wanted}, which does not divide over the {len(devices)} devices here")
    # A torus of 16 x 16 has no side of 64, but a block of 16 x 4.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inside, between = (1, *shape[1:]), (slices, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def partition_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    rules: Rules,
    mesh: Mesh,
    *,
    where: str = "",
    logged: bool = True,
) -> PartitionSpec:
    """Returns how an array with logical axis `names` is split over the mesh.

    A dimension that the mesh axis does not divide is replicated, which is said in the log unless `logged` is off.

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
            if logged:
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


class _Placement(NamedTuple):
    mesh: Mesh
    rules: Rules


_PLACEMENT: contextvars.ContextVar[_Placement | None] = contextvars.ContextVar("placement", default=None)
_PLATFORM: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def _placed(placement: _Placement | None) -> Iterator[None]:
    token = _PLACEMENT.set(placement)
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


@contextlib.contextmanager
def on(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Says that what is traced inside runs on `mesh`, its arrays split by the table `rules`."""
    token = _PLATFORM.set(mesh.devices.flat[0].platform)
    try:
        with _placed(_Placement(mesh, rules)):
            yield
    finally:
        _PLATFORM.reset(token)


def traced_on(mesh: Mesh, rules: Rules, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn`, to be traced `on` the mesh whoever traces it."""

    @functools.wraps(fn)
    def wrapped(*arguments):
        with on(mesh, rules):
            return fn(*arguments)

    return wrapped


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Says that what is traced inside is split further by the compiler, which can split no kernel."""
    token = _PLATFORM.set("any")
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def by_hand() -> contextlib.AbstractContextManager[None]:
    """Says that what is traced inside is one device's part already, as in a `shard_map`."""
    return _placed(None)


def platform() -> str:
    """Returns what code is being traced for, "cpu", "gpu" or "tpu": where its mesh is, which may not be here.

    It is "any" inside of `without_kernels`.
    """
    return _PLATFORM.get() or jax.default_backend()


def mesh() -> Mesh | None:
    """Returns the mesh that code is being traced on; None where it is on none, or only one device shares its batch."""
    placement = _PLACEMENT.get()
    return None if placement is None or _parts(placement.mesh) == 1 else placement.mesh


def _parts(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def whole(weight: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Returns a weight in full, for a layer to use: gathered over the axes that split the batch.

    Told nothing, the compiler may leave the weight in its pieces and move the activations, which are larger. The
    gradient goes back to the pieces as it is summed, a reduce-scatter. What `model` splits stays split.

    Args:
      weight: as it is stored, in the type that is computed with: it is half the bytes to gather.
      names: its logical axes.
    """
    placement = _PLACEMENT.get()
    if placement is None:
        return weight
    stored = partition_spec(names, weight.shape, placement.rules, placement.mesh, logged=False)
    used = PartitionSpec(*(None if axis in BATCH_AXES else axis for axis in stored))
    if used == stored:
        return weight
    return _gathered(weight, NamedSharding(placement.mesh, used), NamedSharding(placement.mesh, stored))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(weight, used, stored):
    del stored
    return jax.lax.with_sharding_constraint(weight, used)


def _scattered(used, stored, _, gradient):
    # Summed in full, then cut: XLA makes one reduce-scatter of both. Told the pieces at once it would cut the product
    # behind it as well, into a ring of small ones, which takes a TPU's compiler several times longer.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, used), stored),)


_gathered.defvjp(lambda weight, used, stored: (_gathered(weight, used, stored), None), _scattered)


def product(
    fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, weight: jax.Array, names: Sequence[str | None]
) -> jax.Array:
    """Returns fn(x, weight), the weight gathered as by `whole`, its gradient scattered by hand.

    Each device multiplies out its own examples' part of the gradient, and the parts are summed and scattered over
    `fsdp` and then summed over the other axes that split the batch. Left to itself the compiler sums in full over all
    of these, twice the bytes, as soon as there is more than one.

    Args:
      fn: linear in the weight; sums nothing over examples, which are x's first axis.
      x, weight: in the type that is computed with.
      names: the weight's logical axes.
    """
    placement = _PLACEMENT.get()
    if placement is None:
        return fn(x, weight)
    stored = partition_spec(names, weight.shape, placement.rules, placement.mesh, logged=False)
    if "fsdp" not in stored or x.shape[0] % _parts(placement.mesh):
        return fn(x, whole(weight, names))
    return _multiplied(fn, placement.mesh, stored, x, weight)


def _plainly(fn, mesh, stored, x, weight):
    used = PartitionSpec(*(None if axis in BATCH_AXES else axis for axis in stored))
    return fn(x, jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, used)))


_multiplied = jax.custom_vjp(_plainly, nondiff_argnums=(0, 1, 2))


def _multiplied_backward(fn, mesh, stored, kept, dy):
    x, weight = kept
    (dx,) = jax.linear_transpose(lambda x: _plainly(fn, mesh, stored, x, weight), x)(dy)
    axis = list(stored).index("fsdp")
    others = tuple(name for name in BATCH_AXES if name != "fsdp" and mesh.shape[name] > 1)

    def own(x, dy):
        (part,) = jax.linear_transpose(lambda weight: fn(x, weight), weight)(dy)
        part = _summed_piece(part, axis, mesh.shape["fsdp"])
        return jax.lax.psum(part, others) if others else part

    examples = PartitionSpec(BATCH_AXES)
    gradient = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(examples, examples),
        out_specs=PartitionSpec(*("fsdp" if name == "fsdp" else None for name in stored)),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(x, dy)
    return dx, gradient


def _summed_piece(part: jax.Array, axis: int, pieces: int) -> jax.Array:
    """Sums over `fsdp`; returns this device's piece, along an axis, of the sum.

    A piece narrower than the 16 rows of a TPU's tile, as of a convolution's channels, has the compiler sum in full and
    then cut, twice the bytes. Pieces are laid one behind the other for it.
    """
    if part.ndim == 2 and part.shape[axis] // pieces >= 16:
        return jax.lax.psum_scatter(part, "fsdp", scatter_dimension=axis, tiled=True)
    moved = jnp.moveaxis(part, axis, 0)
    rows = moved.reshape(pieces, -1, moved.shape[-1])
    own = jax.lax.psum_scatter(rows, "fsdp", scatter_dimension=0, tiled=True)
    return jnp.moveaxis(own.reshape(-1, *moved.shape[1:]), 0, axis)


_multiplied.defvjp(
    lambda fn, mesh, stored, x, weight: (_multiplied(fn, mesh, stored, x, weight), (x, weight)), _multiplied_backward
)


def split(name: str, size: int) -> int:
    """Returns into how many parts the mesh splits an axis of this name and size, other than by batches' axes."""
    placement = _PLACEMENT.get()
    axis = dict(placement.rules).get(name) if placement else None
    if placement is None or axis is None or axis in BATCH_AXES or size % placement.mesh.shape[axis]:
        return 1
    return placement.mesh.shape[axis]


def laid(x: jax.Array, names: Sequence[str | None] = ("batch",)) -> jax.Array:
    """Returns an activation, split by its axes' names: "batch" over replicas, others by the table or not at all."""
    placement = _PLACEMENT.get()
    if placement is None or placement.mesh.size == 1:
        return x
    names = (*names, *(None,) * (x.ndim - len(names)))
    spec = list(partition_spec([None, *names[1:]], x.shape, placement.rules, placement.mesh, logged=False))
    if names[0] == "batch" and x.shape[0] % _parts(placement.mesh) == 0:
        spec[0] = BATCH_AXES
    return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, PartitionSpec(*spec)))


def each_part(
    fn: Callable[..., jax.Array], *arrays: jax.Array | None, names: Sequence[str | None]
) -> jax.Array:
    """Returns fn(*arrays), each device computing its own part: a kernel is a program of one device.

    Args:
      fn: a function of arrays whose axes `names` are independent of each other; the result has the first's shape.
      arrays: of equal rank; an axis of size 1 where others are larger is whole everywhere; None is handed on.
      names: of the arrays' axes, "batch" first; those the table does not split are whole.
    """
    placement = _PLACEMENT.get()
    if placement is None or placement.mesh.size == 1:
        return fn(*arrays)
    mesh, rules = placement

    def spec(x):
        parts = list(partition_spec([None, *names[1:]], x.shape, rules, mesh, logged=False))
        if x.shape[0] % _parts(mesh) == 0:
            parts[0] = BATCH_AXES
        return PartitionSpec(*parts)

    there = [x for x in arrays if x is not None]

    def own(*parts):
        rest = iter(parts)
        with by_hand():
            return fn(*(None if x is None else next(rest) for x in arrays))

    specs = tuple(spec(x) for x in there)
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*there)
