"""Which of somebody's tensors is which of our weights, and how the one is laid out as the other: in both directions.

A table is a list of pieces. A piece says that one of their tensors, or one of equal parts of it, is one of our arrays,
or one index of it: our blocks are stacked on the first axis and our q, k and v are one array, where theirs are many.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from unclip_jax.errors import InputError
from unclip_jax.interop.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array is laid out as another: only views, so that it costs nothing and can be asked for shapes alone.

    Attributes:
      ours: from their tensor to our array.
      theirs: from our array to their tensor.
    """

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]

    def then(self, other: "Layout") -> "Layout":
        """This one first, seen from theirs, and `other` after it."""
        return Layout(lambda x: other.ours(self.ours(x)), lambda x: self.theirs(other.theirs(x)))


SAME = Layout(lambda x: x, lambda x: x)
# A linear layer's [out, in] is our [in, out]; a bias stays as it is.
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
# [out, in, height, width] is our [height, width, in, out].
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# A convolution over one axis with a kernel of one place, [out, in, 1], is a linear layer [out, in].
POINTWISE = Layout(lambda x: x[..., 0], lambda x: x[..., None])


def leading_ones(axes: int) -> Layout:
    """Theirs has so many axes of length one in front."""
    return Layout(lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape))


def to_heads(heads: int) -> Layout:
    """A projection to heads: [heads · k, in] is our [in, heads, k]; a bias [heads · k] is [heads, k]."""
    return Layout(
        lambda x: x.T.reshape(*x.T.shape[:-1], heads, -1), lambda x: x.reshape(*x.shape[:-2], math.prod(x.shape[-2:])).T
    )


def from_heads(heads: int) -> Layout:
    """The projection back: [out, heads · k] is our [heads, k, out]."""
    return Layout(lambda x: x.T.reshape(heads, -1, len(x)), lambda x: x.reshape(math.prod(x.shape[:2]), x.shape[-1]).T)


def fused(count: int, heads: int) -> Layout:
    """Projections one after the other, q, then k, then v: [count · heads · k, in] is our [in, count, heads, k]."""
    return Layout(
        lambda x: x.T.reshape(*x.T.shape[:-1], count, heads, -1),
        lambda x: x.reshape(*x.shape[:-3], math.prod(x.shape[-3:])).T,
    )


def interleaved(count: int, heads: int) -> Layout:
    """Projections head by head, q, k and v of each (GLIDE): [heads · count · k, in] is our [in, count, heads, k]."""
    return Layout(
        lambda x: x.T.reshape(*x.T.shape[:-1], heads, count, -1).swapaxes(-2, -3),
        lambda x: x.swapaxes(-2, -3).reshape(*x.shape[:-3], math.prod(x.shape[-3:])).T,
    )


def token_major(tokens: int) -> Layout:
    """A projection to tokens: output i of theirs belongs to token i % tokens, of ours to token i // width."""
    return Layout(
        lambda x: x.T.reshape(*x.T.shape[:-1], -1, tokens).swapaxes(-1, -2).reshape(x.T.shape),
        lambda x: x.reshape(*x.shape[:-1], tokens, -1).swapaxes(-1, -2).reshape(x.shape).T,
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of theirs, or a part of it, and where it lies in ours.

    Attributes:
      name: of their tensor.
      path: of our array, its keys joined by "/".
      layout: between the two.
      index: which part of our array it is; () for all.
      part: (k, n) for the k-th of n equal parts of their tensor along its first axis.
    """

    name: str
    path: str
    layout: Layout = SAME
    index: tuple[Any, ...] = ()
    part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Table:
    """Pieces, and what of theirs is no weight.

    Attributes:
      pieces: all there are.
      ignored: patterns (regular expressions, of whole names) of tensors that are known and not wanted.
    """

    pieces: tuple[Piece, ...]
    ignored: tuple[str, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(self.pieces + other.pieces, self.ignored + other.ignored)

    def under(self, *, ours: str = "", theirs: str = "") -> "Table":
        """The table of a network that is a part of another: put in front of our paths and of their names, as it is."""
        pieces = (dataclasses.replace(piece, path=ours + piece.path, name=theirs + piece.name) for piece in self.pieces)
        return Table(tuple(pieces), tuple(re.escape(theirs) + pattern for pattern in self.ignored))


def table(*tables: Table) -> Table:
    """All pieces of several tables."""
    return sum(tables, Table(()))


def stacked(tables: Sequence[Table]) -> Table:
    """Tables of equal blocks with the same paths, whose weights we stack on the first axis."""
    return Table(
        tuple(
            dataclasses.replace(piece, index=(number, *piece.index))
            for number, one in enumerate(tables)
            for piece in one.pieces
        )
    )


# Tables of layers, named by our path and by theirs.


def array(ours: str, theirs: str, layout: Layout = SAME) -> Table:
    """One array by its whole name."""
    return Table((Piece(theirs, ours, layout),))


def linear(ours: str, theirs: str, layout: Layout = LINEAR, *, bias: bool = True) -> Table:
    """A linear layer; `layout` is of kernel and bias alike."""
    both = (Piece(f"{theirs}.weight", f"{ours}/kernel", layout), Piece(f"{theirs}.bias", f"{ours}/bias", layout))
    return Table(both if bias else both[:1])


def joined(ours: str, theirs: str, heads: int, *, bias: bool = True, layout: Layout = SAME) -> Table:
    """The projection of heads back to one width; `layout` comes before it, for the kernel alone."""
    kernel = Piece(f"{theirs}.weight", f"{ours}/kernel", layout.then(from_heads(heads)))
    return Table((kernel, Piece(f"{theirs}.bias", f"{ours}/bias"))[: 1 + bias])


def separate(ours: str, theirs: Sequence[str], heads: int) -> Table:
    """Our one projection to q, k and v (or k and v) that are several linear layers of theirs, with biases."""
    return Table(
        tuple(
            Piece(f"{name}.{kind}", f"{ours}/{our}", to_heads(heads), (..., number, slice(None), slice(None)))
            for number, name in enumerate(theirs)
            for kind, our in (("weight", "kernel"), ("bias", "bias"))
        )
    )


def conv(ours: str, theirs: str, *, bias: bool = True) -> Table:
    """A 2-D convolution."""
    both = (Piece(f"{theirs}.weight", f"{ours}/kernel", CONV), Piece(f"{theirs}.bias", f"{ours}/bias"))
    return Table(both if bias else both[:1])


def norm(ours: str, theirs: str) -> Table:
    """A layer norm or group norm."""
    return Table((Piece(f"{theirs}.weight", f"{ours}/scale"), Piece(f"{theirs}.bias", f"{ours}/bias")))


# Reading and writing by a table.


def imported(table: Table, tensors: Mapping[str, Tensor], into: Any, *, where: str = "the file") -> dict[str, Any]:
    """Returns our tree of their tensors, each read once and let go before the next.

    Args:
      table: for each array of `into`, the tensors that it is made of.
      tensors: theirs; each of the table must be there, in the shape that ours asks for, and no others but ignored.
      into: our tree, as arrays or shapes (boxed or not); the result has its shapes and types.
      where: what messages call theirs.

    Raises:
      InputError: tensors are missing, left over, of other shapes or of whole numbers (one error names all of them), or
        hold numbers that are not finite.
    """
    shapes = flattened(into)
    by_name = _by_name(table)
    _check_covered(table, shapes)
    _check_tensors(table, by_name, tensors, shapes, where)
    arrays = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    for name, pieces in by_name.items():
        theirs = tensors[name].read()
        if not _finite(theirs):
            raise InputError(f"{where}: {name} holds numbers that are not finite; such weights compute nothing")
        for piece in pieces:
            arrays[piece.path][piece.index] = piece.layout.ours(_part(theirs, piece.part))
        del theirs
    return traverse_util.unflatten_dict(arrays, sep="/")


def exported(table: Table, params: Any) -> dict[str, Tensor]:
    """Returns their tensors by name, in the table's order, each made of our arrays when it is read.

    Args:
      table: as in `imported`.
      params: our tree, of arrays or, for shapes alone, of shapes.
    """
    ours = flattened(params)
    _check_covered(table, ours)
    found = {}
    for name, pieces in _by_name(table).items():
        shape = _their_shape(pieces[0], ours)

        def read(pieces=pieces):
            parts = [
                piece.layout.theirs(np.asarray(ours[piece.path])[piece.index])
                for piece in sorted(pieces, key=lambda piece: piece.part)
            ]
            # A copy: views of ours are not contiguous, as files want them.
            return np.array(parts[0], order="C") if len(parts) == 1 else np.concatenate(parts)

        found[name] = Tensor(shape, np.dtype(ours[pieces[0].path].dtype), read)
    return found


def flattened(tree: Any) -> dict[str, Any]:
    """Returns path -> leaf of a tree of dictionaries, boxes of logical axes taken off."""
    unboxed = jax.tree.map(lambda x: getattr(x, "value", x), tree, is_leaf=lambda x: hasattr(x, "unbox"))
    return traverse_util.flatten_dict(unboxed, sep="/")


def _by_name(table: Table) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in table.pieces:
        found.setdefault(piece.name, []).append(piece)
    for name, pieces in found.items():
        parts = sorted(piece.part for piece in pieces)
        if parts != [(k, len(parts)) for k in range(len(parts))]:
            raise ValueError(f"the table has parts {parts} of {name}")
    return found


def _part(theirs: np.ndarray, part: tuple[int, int]) -> np.ndarray:
    number, of = part
    if of == 1:
        return theirs
    length = len(theirs) // of
    return theirs[number * length : (number + 1) * length]


def _dummy(leaf: Any) -> np.ndarray:
    """An array of a leaf's shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.bool_), leaf.shape)


def _their_shape(piece: Piece, ours: Mapping[str, Any]) -> tuple[int, ...]:
    shape = piece.layout.theirs(_dummy(ours[piece.path])[piece.index]).shape
    return (shape[0] * piece.part[1], *shape[1:]) if piece.part[1] > 1 else shape


def _check_covered(table: Table, ours: Mapping[str, Any]) -> None:
    """A table that leaves out some of our numbers is an error of its author's."""
    covered = dict.fromkeys(ours, 0)
    for piece in table.pieces:
        if piece.path not in ours:
            raise ValueError(f"the table maps {piece.name} to {piece.path}, which is not among our weights")
        covered[piece.path] += _dummy(ours[piece.path])[piece.index].size
    odd = [path for path, leaf in ours.items() if covered[path] != math.prod(leaf.shape)]
    if odd:
        raise ValueError(f"the table does not cover {len(odd)} of our weights once: {', '.join(odd)}")


def _check_tensors(
    table: Table,
    by_name: Mapping[str, Sequence[Piece]],
    tensors: Mapping[str, Tensor],
    ours: Mapping[str, Any],
    where: str,
) -> None:
    ignored = [re.compile(pattern) for pattern in table.ignored]
    missing = [name for name in by_name if name not in tensors]
    over = [name for name in tensors if name not in by_name and not any(one.fullmatch(name) for one in ignored)]
    wrong = list(_misshapen(by_name, tensors, ours))
    faults = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("left over", over), ("of another shape", wrong))
        if names
    ]
    if faults:
        raise InputError(f"{where} is not this network: " + "; ".join(faults))


def _misshapen(
    by_name: Mapping[str, Iterable[Piece]], tensors: Mapping[str, Tensor], ours: Mapping[str, Any]
) -> Iterator[str]:
    for name, pieces in by_name.items():
        if name not in tensors:
            continue
        there = tensors[name]
        wanted = {_their_shape(piece, ours) for piece in pieces}
        if wanted != {tuple(there.shape)}:
            yield f"{name} {list(there.shape)} where {' or '.join(str(list(shape)) for shape in wanted)} should be"
        elif there.dtype.kind in "iub":
            yield f"{name} of {there.dtype} where numbers with a point should be"


def _finite(numbers: np.ndarray) -> bool:
    # Minimum and maximum, for a mask of a large tensor would take as much memory again as a quarter of it.
    if not numbers.size:
        return True
    flat = numbers.reshape(-1)
    step = 1 << 20
    return all(bool(np.isfinite(flat[at : at + step]).all()) for at in range(0, flat.size, step))
