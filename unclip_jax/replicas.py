"""A batch seen from one replica: what a loss needs whose examples see each other, as CLIP's do.

A loss is written for the rows that one replica holds. `gather` gives it those of all replicas, and `first_row` says
which of them are its own. Where the batch is in one piece both are trivial, and the same function is the plain loss.

    with sharding.on(mesh, rules):              # program.build, while it traces a step
        loss, metrics = replicas.by_rows(fn, z_i, z_t, scale)     # a stage: fn on each device's own rows
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from unclip_jax import sharding
from unclip_jax.sharding import BATCH_AXES

# Names of the mapped axes that the code being traced is inside of, outermost first; none where the batch is whole.
_AXES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


@contextlib.contextmanager
def inside(axes: Sequence[str]) -> Iterator[None]:
    """Says that what is traced inside holds one replica's rows, mapped over these axes; none: that it stands alone."""
    token = _AXES.set(tuple(axes))
    try:
        with sharding.by_hand():
            yield
    finally:
        _AXES.reset(token)


def gather(x: Float[Array, "b ..."]) -> Float[Array, "_ ..."]:
    """Returns the rows of all replicas, in the order of the global batch."""
    for axis in reversed(_AXES.get()):
        x = jax.lax.all_gather(x, axis, tiled=True)
    return x


def first_row(rows: int) -> Int[Array, ""]:
    """Returns the place in the global batch of the first of this replica's rows."""
    place = jnp.zeros((), jnp.int32)
    for axis in _AXES.get():
        place = place * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return place * rows


def by_rows(fn: Callable[..., Any], *batched: Float[Array, "b ..."], whole: Any) -> Any:
    """Returns the mean over replicas of fn(*own rows of the arrays, whole), a tree of scalars.

    Traced `on` a mesh each device computes its own rows; inside `inside(axes)`, or on one device, this is `fn` itself.
    """
    mesh = sharding.mesh()
    if mesh is None:
        return fn(*batched, whole)

    def own(whole, *rows):
        with inside(BATCH_AXES):
            return jax.lax.pmean(fn(*rows, whole), BATCH_AXES)

    everywhere, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
    mapped = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(everywhere, *(split for _ in batched)),
        out_specs=everywhere,
        axis_names=set(BATCH_AXES),
    )
    return mapped(whole, *batched)
