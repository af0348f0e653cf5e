"""A compiled program, read back from XLA's text: computations, instructions in the order they run, loops and sizes.

The text is that of one device's part of the program, after all optimisation. Only what is needed to count is read:
the shape of every value with its layout and memory, operands, called computations and the name that JAX gave.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Loops longer than this are taken for endless: their length is not known.
_MOST_TRIPS = 1_000_000
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0,
    "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_TILE = re.compile(r"T\(([\d,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a value: dimensions, bytes as laid out (tiles padded) and of its numbers, memory (0 is HBM)."""

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    logical_bytes: int
    space: int = 0

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory, not on the chip itself or in the host."""
        return self.space == 0


@functools.lru_cache(maxsize=200_000)
def arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a shape as XLA writes it: one, or those of a tuple."""
    return tuple(_array(*match.groups()) for match in _ARRAY.finditer(text))


def _array(dtype: str, sizes: str, order: str | None, layout: str | None) -> Array:
    dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    bits = _BITS.get(dtype, 8 if dtype.startswith("f8") else 32)
    physical = [dims[int(axis)] for axis in reversed(order.split(","))] if order else list(dims)
    tile = _TILE.search(layout or "")
    if tile and physical:
        sides = [1 if side == "*" else int(side) for side in tile[1].split(",")]
        for place, side in enumerate(reversed(sides), 1):
            if place <= len(physical):
                physical[-place] = -(-physical[-place] // side) * side
    space = _SPACE.search(layout or "")
    sizes_in_bytes = (math.prod(physical) * bits // 8, math.prod(dims) * bits // 8)
    return Array(dtype, dims, *sizes_in_bytes, int(space[1]) if space else 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name, opcode: as XLA writes them.
      shape: text of its value's shape; `arrays` reads it.
      operands: names of the instructions it reads, of the same computation.
      called: names of computations that it calls.
      op_name: the path that JAX gave to the operation, "" where XLA made it.
      attributes: the rest of its line.
      inner: what stands between its parentheses.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    op_name: str
    attributes: str
    inner: str

    @property
    def outputs(self) -> tuple[Array, ...]:
        """The arrays of its value."""
        return arrays(self.shape)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order they run; the last of `root` is its value."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def parameter(self, number: int) -> Instruction:
        """Returns the instruction that stands for an argument."""
        return self._parameters[number]

    @functools.cached_property
    def _parameters(self) -> dict[int, Instruction]:
        return {int(one.inner): one for one in self.instructions.values() if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that read it."""
        readers: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in one.operands:
                if operand in readers:
                    readers[operand].append(one)
        return readers


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, the one that runs, and on how many devices it does."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def called(self, instruction: Instruction) -> list[Computation]:
        """Returns the computations that an instruction calls."""
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often a `while` of the computation runs its body; None where that depends on data."""
        known = _KNOWN_TRIPS.search(loop.attributes)
        return int(known[1]) if known else _count_trips(self, computation, loop)


def parse(text: str) -> Module:
    """Reads the text of a compiled program (`compiled.as_text()`).

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    inside: dict[str, Instruction] = {}
    last = text_of_last = ""
    for line in text.splitlines():
        if not name:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                name, inside, root = header[2], {}, ""
                entry = name if header[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            computations[name] = Computation(name, inside, root)
            name = ""
        else:
            match = _NAME.match(line)
            if match:
                last, text_of_last = match[2], line[match.end() :]
                root = last if match[1] else root
            else:  # what a kernel's call says of itself may take several lines
                text_of_last += " " + line
            inside[last] = _instruction(last, text_of_last)
    if not entry:
        raise ValueError("the text of the compiled program has no entry computation")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.index("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inner, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    opcode = rest[:opening]
    operands = () if opcode in ("parameter", "constant") else tuple(_OPERAND.findall(inner))
    called = [part.strip("% ") for match in _CALLED.findall(attributes) for part in match.strip("{}").split(",")]
    op_name = _OP_NAME.search(attributes)
    return Instruction(
        name, opcode, shape, operands, tuple(called), op_name[1] if op_name else "", attributes, inner
    )


def _closing(text: str, opening: int) -> int:
    """Returns the place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {text[:200]}")


def visit(module: Module) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields every instruction that runs by itself, with its computation and how often it runs.

    What a fusion, a reduction or a `-start` calls is part of it and not visited. A loop whose length is not known
    counts once, and all branches of a conditional count.
    """

    def inside(name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                _, body = loop_parts(instruction)
                yield from inside(body, times * (module.trips(computation, instruction) or 1))
            elif instruction.opcode in ("call", "conditional"):
                for called in module.called(instruction):
                    yield from inside(called.name, times)

    yield from inside(module.entry, 1)


def loop_parts(loop: Instruction) -> tuple[str, str]:
    """Returns the names of a loop's condition and body."""
    condition, body = (re.search(rf"{part}=%?([\w.\-]+)", loop.attributes) for part in ("condition", "body"))
    assert condition and body
    return condition[1], body[1]


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: int(not a),
    "select": lambda p, a, b: a if p else b,
}
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip
_SAME = ("copy", "bitcast", "reshape", "convert", "opt-barrier", "copy-done", "copy-start", "broadcast")


class _Unknown(Exception):
    """A number that depends on data."""


# The value of an instruction: a whole number, or for a tuple what gives its elements by place.
_Value = int | Callable[[int], Any]


def _count_trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Runs the whole numbers that a loop's condition looks at, and nothing else of the loop.

    Returns:
      How often the body runs; None where that depends on data.
    """
    condition, body = (module.computations[name] for name in loop_parts(loop))

    def following(state: Callable[[int], Any]) -> Callable[[int], Any]:
        @functools.cache
        def element(place: int) -> Any:
            return _element(_value(module, body, body.root, [functools.partial(_same, state)]), place)

        return element

    try:
        state: Any = _value(module, computation, loop.operands[0], [])
        count = 0
        while _value(module, condition, condition.root, [functools.partial(_same, state)]):
            state = following(state)
            count += 1
            if count > _MOST_TRIPS:
                return None
    except _Unknown:
        return None
    return count


def _same(state: Any) -> Any:
    return state


def _element(value: _Value, place: int) -> Any:
    if isinstance(value, int):
        raise _Unknown
    return value(place)


def _value(module: Module, computation: Computation, name: str, arguments: Sequence[Callable[[], Any]]) -> Any:
    one = computation.instructions[name]

    def operand(place: int) -> Any:
        return _value(module, computation, one.operands[place], arguments)

    if one.opcode == "parameter":
        if int(one.inner) >= len(arguments):
            raise _Unknown
        return arguments[int(one.inner)]()
    if one.opcode == "constant":
        if not re.fullmatch(r"-?\d+|true|false", one.inner):
            raise _Unknown
        return {"true": 1, "false": 0}[one.inner] if one.inner.isalpha() else int(one.inner)
    if one.opcode == "tuple":
        return operand
    if one.opcode == "get-tuple-element":
        match = re.search(r"index=(\d+)", one.attributes)
        return _element(operand(0), int(match[1]) if match else 0)
    if one.opcode in ("fusion", "call"):
        called = module.called(one)[0]
        return _value(module, called, called.root, [functools.partial(operand, i) for i in range(len(one.operands))])
    if one.opcode in _SAME:
        return operand(0)
    numbers = _ARITHMETIC.get(one.opcode)
    if one.opcode == "compare":
        direction = re.search(r"direction=(\w+)", one.attributes)
        numbers = _COMPARED[direction[1]] if direction else None
    if numbers is None:
        raise _Unknown
    return int(numbers(*(operand(place) for place in range(len(one.operands)))))
