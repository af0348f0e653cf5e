"""Floating-point operations of a function, counted from its jaxpr without running, compiling or allocating anything.

Matrix products and convolutions count, two operations for each multiplication with addition; the rest is a few percent
of a network and none of an accelerator's matrix units. What a mask hides is counted: it is computed.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# Where a count belongs: the names of the modules around the operation, outermost first.
Scope = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix products [rows, contracted] x [contracted, columns], `times` of them."""

    rows: int
    contracted: int
    columns: int
    times: float = 1

    @property
    def flops(self) -> float:
        """Two operations for each multiplication with addition."""
        return 2 * self.rows * self.contracted * self.columns * self.times

    def padded_flops(self, side: int) -> float:
        """Operations of a matrix unit of side x side for it, which are wasted in part.

        The unit holds a piece of one factor, padded in both dimensions. Rows of the other stream through it, any number
        of them; but while it loads the next piece, `side` could, so fewer take as long. The compiler chooses which
        factor is held: the better one, it is assumed. What it may do besides, such as laying taps of a convolution side
        by side, is left out.
        """

        def filled(size: int) -> int:
            return math.ceil(size / side) * side

        held = (max(self.rows, side) * filled(self.columns), filled(self.rows) * max(self.columns, side))
        return 2 * self.times * filled(self.contracted) * min(held)


def count(fn: Callable[..., Any], *arguments: Any) -> Counter[Scope]:
    """Returns the operations of fn(*arguments), by the Flax modules they are in.

    Args:
      fn: any function that JAX can trace.
      arguments: arrays, or ShapeDtypeStructs in their place.

    Returns:
      Scope -> operations; () for those outside of any module. A `scan` counts its body as often as it runs, and a
      `while`, whose length nobody knows beforehand, its body once. A `cond` counts its most expensive branch. A kernel
      counts what it computes of each block, which may be more than what is used.
    """
    counts: Counter[Scope] = Counter()
    for scope, product in products(jax.make_jaxpr(fn)(*arguments).jaxpr):
        counts[scope] += round(product.flops)
    return counts


def products(jaxpr: core.Jaxpr) -> list[tuple[Scope, Product]]:
    """Returns the matrix products and convolutions of a jaxpr with all that it calls, counted as in `count`."""
    return list(_products(jaxpr, (), 1))


def _products(jaxpr: core.Jaxpr, scope: Scope, times: int) -> Iterator[tuple[Scope, Product]]:
    for equation in jaxpr.eqns:
        # Names are joined by slashes; those of a nested jaxpr are relative to where it stands.
        names = str(equation.source_info.name_stack).split("/")
        here = scope + tuple(name for name in names if name)
        operation = _OPERATIONS.get(equation.primitive.name)
        if operation:
            product = operation(equation)
            yield here, dataclasses.replace(product, times=times * product.times)
            continue
        bodies = list(_bodies(equation))
        if equation.primitive.name == "cond":
            branches = [list(_products(body, here, times)) for body in bodies]
            yield from max(branches, key=lambda branch: sum(product.flops for _, product in branch))
            continue
        for body in bodies:
            yield from _products(body, here, times * _repetitions(equation))


def _bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _repetitions(equation: core.JaxprEqn) -> int:
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":  # the body is one device's part
        mesh, manual = equation.params["mesh"], equation.params["newly_manual_axes"]
        return math.prod(mesh.shape[axis] for axis in manual)
    if equation.primitive.name == "pallas_call":  # the body is one block's part
        return math.prod(size for size in equation.params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dot_general(equation: core.JaxprEqn) -> Product:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = _shape(equation.invars[0]), _shape(equation.invars[1])
    times = math.prod(left[axis] for axis in batch)
    size = math.prod(left[axis] for axis in contracted)
    # Of an empty array no dimension may be divided by.
    rows, columns = (math.prod(shape) // max(times * size, 1) for shape in (left, right))
    return Product(rows, size, columns, times)


def _convolution(equation: core.JaxprEqn) -> Product:
    """Every tap of the kernel at every output, those on the zeros of a border included and those between inputs not.

    Of a weight's gradient the sum runs over the image, which stands where a kernel does: it is what is contracted.
    """
    left, kernel, result = (_shape(one) for one in (*equation.invars[:2], equation.outvars[0]))
    numbers = equation.params["dimension_numbers"]
    spread = math.prod(equation.params["lhs_dilation"])
    groups = equation.params["feature_group_count"] * equation.params["batch_group_count"]
    outputs, inputs, *space = numbers.rhs_spec
    taps = math.prod(kernel[axis] for axis in space)
    positions = math.prod(result[axis] for axis in numbers.out_spec[2:])
    batch = left[numbers.lhs_spec[0]] // equation.params["batch_group_count"]
    columns = kernel[outputs] // groups
    if taps > positions:
        return Product(batch, kernel[inputs] * taps, columns, positions * groups / spread)
    return Product(batch * positions, kernel[inputs], columns, taps * groups / spread)


_OPERATIONS: dict[str, Callable[[core.JaxprEqn], Product]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
