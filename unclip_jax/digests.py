"""Digests of arrays, which no single changed element leaves as they were and no sharding changes."""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Arrays of up to this many elements are digested on the host: a U-Net has hundreds, and to compile a reduction for
# each takes longer than a laptop's whole run spends on saving.
_HOST_ELEMENTS = 1 << 20


def named(tree: Any) -> list[tuple[str, Any]]:
    """Returns (name, leaf) of every leaf of a tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def described(tree: Any) -> dict[str, list[Any]]:
    """Returns name -> [dtype, shape, digest] of every array."""
    leaves = named(tree)
    digests = jax.tree.leaves(digest([leaf for _, leaf in leaves]))
    return {
        name: [str(leaf.dtype), list(leaf.shape), int(value)]
        for (name, leaf), value in zip(leaves, digests, strict=True)
    }


def digest(tree: Any) -> Any:
    """Returns a uint32 per array that any one changed element changes, whatever the sharding.

    The sum modulo 2^32 of each element's bits times an odd number that depends on its index: a change of one
    element changes the sum, because odd numbers have inverses modulo 2^32. Large arrays are summed where they are.
    """
    return jax.tree.map(lambda x: _host_digest(x) if _is_small(x) else _device_digest(x), tree)


def fingerprint(tree: Any) -> str:
    """Returns 16 hexadecimal digits that stand for the names, shapes, dtypes and bits of a tree of arrays."""
    return fingerprint_of(described(tree))


def fingerprint_of(arrays: dict[str, list[Any]]) -> str:
    """Returns the fingerprint of a tree that `described` has described before."""
    return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()[:16]


def _is_small(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return True  # to move it to a device would take its size again
    return (x.is_fully_addressable or x.is_fully_replicated) and math.prod(x.shape) <= _HOST_ELEMENTS


def _host_digest(x: Any) -> np.uint32:
    array = np.ascontiguousarray(x).reshape(-1)
    total = np.zeros(1, np.uint32)  # an array: of scalars that wrap NumPy warns
    for begin in range(0, array.size, _HOST_ELEMENTS):
        part = array[begin : begin + _HOST_ELEMENTS]
        bits = part.view(f"u{array.dtype.itemsize}").astype(np.uint32, copy=False)
        odd = 2 * np.arange(begin, begin + len(part), dtype=np.uint32) + 1
        total += np.dot(bits, odd)
    return total[0]


@jax.jit
def _device_digest(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[np.dtype(x.dtype).itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
