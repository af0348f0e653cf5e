"""Floating-point operations of a function, counted from its jaxpr without running, compiling or allocating anything.

Matrix products and convolutions count, two operations for each multiplication with addition; the rest is a few percent
of a network and none of an accelerator's matrix units. What a mask hides is counted: it is computed.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# Where a count belongs: the names of the modules around the operation, outermost first.
Scope = tuple[str, ...]


def count(fn: Callable[..., Any], *arguments: Any) -> Counter[Scope]:
    """Returns the operations of fn(*arguments), by the Flax modules they are in.

    Args:
      fn: any function that JAX can trace.
      arguments: arrays, or ShapeDtypeStructs in their place.

    Returns:
      Scope -> operations; () for those outside of any module. A `scan` counts its body as often as it runs, a `cond`
      its most expensive branch, and a `while`, whose length nobody knows beforehand, its body once.
    """
    counts: Counter[Scope] = Counter()
    _add(jax.make_jaxpr(fn)(*arguments).jaxpr, (), 1, counts)
    return counts


def _add(jaxpr: core.Jaxpr, scope: Scope, times: int, counts: Counter[Scope]) -> None:
    for equation in jaxpr.eqns:
        # Names are joined by slashes; those of a nested jaxpr are relative to where it stands.
        names = str(equation.source_info.name_stack).split("/")
        here = scope + tuple(name for name in names if name)
        operations = _OPERATIONS.get(equation.primitive.name)
        if operations:
            counts[here] += times * operations(equation)
            continue
        bodies = list(_bodies(equation))
        if equation.primitive.name == "cond":
            branches = [Counter[Scope]() for _ in bodies]
            for body, branch in zip(bodies, branches, strict=True):
                _add(body, here, times, branch)
            counts.update(max(branches, key=lambda branch: sum(branch.values())))
            continue
        for body in bodies:
            _add(body, here, times * _repetitions(equation), counts)


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
    return 1


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dot_general(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    kernel, result = _shape(equation.invars[1]), _shape(equation.outvars[0])
    outputs, *_ = equation.params["dimension_numbers"].rhs_spec
    return 2 * math.prod(result) * (math.prod(kernel) // kernel[outputs])


_OPERATIONS: dict[str, Callable[[core.JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
