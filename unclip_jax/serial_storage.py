"""Checkpoints of NumPy arrays, written and read one array after the other: what waits in memory is small.

Orbax begins with all arrays at once. What is compressed sooner than it is written, or read sooner than it is unpacked,
then waits in memory, as much as the arrays themselves; and it copies arrays before it writes them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

# Bytes of an array that are compressed and written as one, and of a file of a checkpoint.
_PIECE = 4 << 20


class _InTurn(ocp.type_handlers.NumpyHandler):
    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        for number, (value, info) in enumerate(zip(values, infos, strict=True)):
            for written in await super().serialize([value], [info], args[number : number + 1] if args else None):
                written.result()
        return []

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[np.ndarray]:
        found: list[np.ndarray] = []
        for number, info in enumerate(infos):
            found += await super().deserialize([info], args[number : number + 1] if args else None)
        return found


def handler() -> ocp.PyTreeCheckpointHandler:
    """Returns Orbax's handler of trees of NumPy arrays, which must not change while they are written."""
    handlers = ((np.ndarray, _InTurn(deepcopy_host_arrays=False)), (jax.Array, ocp.type_handlers.ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=ocp.type_handlers.create_type_handler_registry(*handlers))


def saving(tree: Any) -> ocp.args.PyTreeSave:
    """Returns what `handler` is to write."""
    return ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=_PIECE)


def restore(folder: epath.Path, like: Any) -> Any:
    """Returns a tree that anybody's checkpoint of an item holds, as NumPy arrays of the shapes and types of `like`."""
    reader = handler()
    kinds = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), like)
    try:
        return reader.restore(folder, args=ocp.args.PyTreeRestore(like, restore_args=kinds))
    finally:
        reader.close()
