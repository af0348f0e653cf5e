"""What one instruction of a compiled program costs a device: matrix products, bytes of HBM, bytes over the network.

Counted from the shapes in XLA's text, so all of it is arithmetic and none of it was measured. Sizes of values in memory
are those of their layouts, whose tiles are padded; sizes of what collectives move are those of the arrays.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from unclip_jax.compiled_program import Array, Computation, Instruction, Module
from unclip_jax.flops import Product

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
# What runs as one with all that it calls; a plain `call` is one only inside of these.
_WHOLE = ("fusion", "async-start", "call-start", "call")
# Values that nothing computes: names for parts of others.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "copy-done", "slice-done", "async-done", "async-update", "iota", "domain",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of KINDS.
      bytes: of the whole array (all-gather: the result; else the operand), on one device.
      sent: bytes that a device sends in a ring, or directly where nothing is combined.
      group: devices that take part, as numbers in the program's order.
      op_name: JAX's path of the operation that it serves.
      name: of the instruction.
    """

    kind: str
    bytes: int
    sent: float
    group: tuple[int, ...]
    op_name: str
    name: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an instruction costs one device when it runs once.

    Attributes:
      products, hbm_bytes, collectives: see the module.
      starts, waits: a name of what it starts and does not wait for, and of what it waits for; "" for neither.
    """

    products: tuple[Product, ...] = ()
    hbm_bytes: int = 0
    collectives: tuple[Collective, ...] = ()
    starts: str = ""
    waits: str = ""


def cost(module: Module, computation: Computation, instruction: Instruction) -> Cost:
    """Returns the cost of an instruction with all that it calls; loops, calls and conditionals cost nothing."""
    if instruction.opcode.endswith("-done"):
        return Cost(waits=instruction.operands[0])
    if instruction.opcode in _FREE or instruction.opcode in ("while", "conditional", "call"):
        return Cost()
    part, chain = _chained(module, instruction)
    if part == "done":
        return Cost(waits=chain)
    starts = instruction.name if instruction.opcode.endswith("-start") else chain if part == "start" else ""
    return Cost(
        products=tuple(_products(module, computation, instruction)),
        hbm_bytes=_hbm_bytes(module, computation, instruction),
        collectives=tuple(_collectives(module, computation, instruction, scattered=False)),
        starts=starts,
    )


def _chained(module: Module, instruction: Instruction) -> tuple[str, str]:
    """Returns which part a fusion has in an exchange that goes on while others compute, and a name of that exchange.

    A TPU's compiler writes it as a chain of fusions: "start", then any number of "middle", which compute something else
    and hold the exchange again, and "done".
    """
    for called in module.called(instruction) if instruction.opcode == "fusion" else ():
        for one in called.instructions.values():
            chain = re.search(r'chain_id="(\d+)"', one.attributes) if one.opcode in KINDS else None
            if chain:
                ends = " ".join(inner.attributes[:200] for inner in called.instructions.values() if _ends_chain(inner))
                parts = {"start": "AsyncCollectiveStart", "done": "AsyncCollectiveDone", "middle": ""}
                return next(part for part, end in parts.items() if end in ends), f"chain {chain[1]}"
    return "", ""


def _ends_chain(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and '"AsyncCollective' in instruction.attributes[:200]


def _operands(computation: Computation, instruction: Instruction) -> list[Instruction]:
    return [computation.instructions[name] for name in instruction.operands if name in computation.instructions]


# Matrix products.


def _products(module: Module, computation: Computation, instruction: Instruction) -> Iterator[Product]:
    if instruction.opcode == "convolution":
        yield _convolution(computation, instruction)
    elif instruction.opcode == "dot":
        yield _dot(computation, instruction)
    elif instruction.opcode in _WHOLE:
        for called in module.called(instruction):
            for inner in called.instructions.values():
                yield from _products(module, called, inner)


def _dot(computation: Computation, instruction: Instruction) -> Product:
    left, right = (one.outputs[0].dims for one in _operands(computation, instruction)[:2])

    def sizes(name: str, dims: tuple[int, ...]) -> int:
        match = re.search(name + r"=\{([\d,]*)\}", instruction.attributes)
        return math.prod(dims[int(axis)] for axis in match[1].split(",") if axis) if match else 1

    batch, contracted = sizes("lhs_batch_dims", left), sizes("lhs_contracting_dims", left)
    return Product(
        rows=math.prod(left) // (batch * contracted),
        contracted=contracted,
        columns=math.prod(right) // (batch * contracted),
        times=batch,
    )


def _convolution(computation: Computation, instruction: Instruction) -> Product:
    """A convolution as matrix products, one for each position of the kernel that meets data.

    XLA writes products with batch dimensions as convolutions too, over a window that meets each number once; so only
    positions that hold data count, as in XLA's own analysis. Zeros at an image's border do not.
    """
    left, right = (one.outputs[0].dims for one in _operands(computation, instruction)[:2])
    result = instruction.outputs[0].dims
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert match, instruction.name
    lhs, rhs, out = match[1], match[2], match[3]
    groups = _integer(instruction, "feature_group_count")
    batch_groups = _integer(instruction, "batch_group_count")
    window = _window(instruction.attributes)
    positions, taps, met = 1, 1, 1
    for axis in (label for label in lhs if label.isdigit()):
        size, kernel = left[lhs.index(axis)], right[rhs.index(axis)]
        outputs = result[out.index(axis)]
        positions, taps = positions * outputs, taps * kernel
        met *= meetings(size, kernel, outputs, **window.get(int(axis), {}))
    batch, inputs = left[lhs.index("b")] // batch_groups, left[lhs.index("f")] // groups
    columns = result[out.index("f")] // (groups * batch_groups)
    if taps > positions:  # a weight's gradient: the sum runs over the image, which stands where a kernel does
        return Product(batch, inputs * met // positions, columns, positions * groups * batch_groups)
    whole = Product(batch * positions, inputs, columns, groups * batch_groups)
    return dataclasses.replace(whole, times=whole.times * met / positions)


def _integer(instruction: Instruction, name: str) -> int:
    match = re.search(name + r"=(\d+)", instruction.attributes)
    return int(match[1]) if match else 1


def _window(attributes: str) -> dict[int, dict[str, int]]:
    """Returns spatial axis -> stride, padding below and dilations, where they are not the default."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=", 1) for part in match[1].split()) if match else {}
    axes: dict[int, dict[str, int]] = {}
    for field, name in (("stride", "stride"), ("lhs_dilate", "spread"), ("rhs_dilate", "gap"), ("pad", "below")):
        for axis, value in enumerate(fields[field].split("x") if field in fields else ()):
            axes.setdefault(axis, {})[name] = int(value.split("_")[0])
    return axes


@functools.lru_cache(maxsize=10_000)
def meetings(
    size: int, kernel: int, outputs: int, *, stride: int = 1, below: int = 0, spread: int = 1, gap: int = 1
) -> int:
    """Along one axis: pairs of an output and a place in the kernel that fall on a number of the input.

    Output o and place t meet at o * stride + t * gap - below, where a number lies at each multiple of `spread`. The
    axis may be a batch of millions, so the outputs that a place meets are counted and not listed.
    """
    start = np.arange(kernel, dtype=np.int64) * gap - below
    first = np.maximum(-(start // stride), 0)
    last = np.minimum(((size - 1) * spread - start) // stride, outputs - 1)
    common = math.gcd(stride, spread)
    period = spread // common
    met = (-start // common) * pow(stride // common, -1, period) % period  # outputs are this, modulo the period
    count = (last - met) // period - (first - 1 - met) // period
    return int(np.where((start % common == 0) & (last >= first), count, 0).sum())


# Bytes of HBM.


def _hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Operands read and results written, where they lie in HBM; of what is sliced or updated, only that part."""
    if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0
    operands = _operands(computation, instruction)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return sum(_in_hbm(one) for one in instruction.outputs) + _least(instruction, operands[0])
    if instruction.opcode == "dynamic-update-slice":
        return _written(operands[0].outputs[0], operands[1].outputs[0]) + _size(operands[1])
    if fetches(module, instruction):  # the values are (result, operand, …), (operand, result, …)
        moved = instruction.outputs[0 if instruction.opcode == "copy-start" else 1]
        return _in_hbm(moved) + (moved.bytes if operands[0].outputs[0].in_hbm else 0)
    if instruction.opcode == "fusion":
        called = module.called(instruction)[0]
        read = sum(_read(module, called, number, one) for number, one in enumerate(operands))
        return read + _result_bytes(called)
    if instruction.opcode.endswith("-start"):
        return 2 * sum(_size(one) for one in operands)
    # An array that stands in several places, as columns of one do that a kernel reads apart, is read once.
    distinct = {one.name: one for one in operands}
    return sum(map(_size, distinct.values())) + sum(map(_in_hbm, instruction.outputs))


def fetches(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction starts to copy an array, or a part of one, while others compute."""
    if instruction.opcode != "async-start":
        return instruction.opcode in ("copy-start", "slice-start")
    return all(
        inner.opcode in ("parameter", "slice", "dynamic-slice", "copy", "bitcast")
        for called in module.called(instruction)
        for inner in called.instructions.values()
    )


def _in_hbm(array: Array) -> int:
    return array.bytes if array.in_hbm else 0


def _size(instruction: Instruction) -> int:
    return sum(map(_in_hbm, instruction.outputs))


def _least(instruction: Instruction, operand: Instruction) -> int:
    """Bytes read of an operand of which a part is taken."""
    taken = sum(array.bytes for array in instruction.outputs)
    return min(taken, _size(operand))


def _written(target: Array, update: Array) -> int:
    return update.bytes if target.in_hbm else 0


def _read(module: Module, computation: Computation, number: int, operand: Instruction) -> int:
    """Bytes that a fusion reads of its operand: of one that is only sliced, or updated in place, that part."""
    whole = _size(operand)
    if not whole:
        return 0
    total = 0
    for name, user in _uses(module, computation, computation.parameter(number).name):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += sum(array.bytes for array in user.outputs)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            pass  # written in place
        elif user.opcode == "tuple" or "chain_id=" in user.attributes or _ends_chain(user):
            pass  # handed through, or moved by an exchange that has been counted where it starts
        elif user.opcode == "fusion":  # what a product reads may be a fusion of its own
            inner = module.called(user)[0]
            total += sum(_read(module, inner, place, operand) for place, one in enumerate(user.operands) if one == name)
        else:
            return whole
    return min(total, whole)


def _uses(module: Module, computation: Computation, name: str) -> Iterator[tuple[str, Instruction]]:
    """Yields what reads a value, and under which name; through bitcasts, which only rename it."""
    for user in computation.users[name]:
        if user.opcode == "bitcast":
            yield from _uses(module, computation, user.name)
        else:
            yield name, user


def _result_bytes(computation: Computation) -> int:
    root = computation.instructions[computation.root]
    results = _operands(computation, root) if root.opcode == "tuple" else [root]
    return sum(_root_bytes(computation, one) for one in results)


def _root_bytes(computation: Computation, result: Instruction) -> int:
    while result.opcode == "bitcast" and result.operands:
        result = computation.instructions[result.operands[0]]
    if result.opcode == "parameter" or (result.opcode in KINDS and "chain_id=" in result.attributes):
        return 0  # handed through
    if result.opcode == "dynamic-update-slice":
        target, update = _operands(computation, result)[:2]
        return _written(result.outputs[0], update.outputs[0])
    return _size(result)


# Bytes over the network.


def _collectives(
    module: Module, computation: Computation, instruction: Instruction, *, scattered: bool
) -> Iterator[Collective]:
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
        yield _collective(computation, instruction, kind, module.devices)
    elif instruction.opcode in _WHOLE and _chained(module, instruction)[0] in ("", "start"):
        for called in module.called(instruction):
            # An all-reduce of which each device keeps its own slice is written as one fusion, and runs as one exchange.
            slices = any(inner.opcode == "partition-id" for inner in called.instructions.values())
            for inner in called.instructions.values():
                for found in _collectives(module, called, inner, scattered=slices):
                    yield found if found.op_name else dataclasses.replace(found, op_name=instruction.op_name)


def _collective(computation: Computation, instruction: Instruction, kind: str, devices: int) -> Collective:
    members = group(instruction.attributes) or tuple(range(devices))
    size = len(members)
    own = sum(array.logical_bytes for one in _operands(computation, instruction) for array in one.outputs)
    total = own * size if kind == "all-gather" else own
    return Collective(kind, total, total * rounds(kind, size), members, instruction.op_name, instruction.name)


def rounds(kind: str, size: int) -> float:
    """Returns how often the whole array leaves a device, in an exchange among `size` devices by rings."""
    whole = {"all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0, "collective-broadcast": 1.0}
    return whole.get(kind, (size - 1) / size)


def group(attributes: str) -> tuple[int, ...]:
    """Returns the first group of devices that take part, in any of the ways that XLA writes it; () where all do."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:
        first = re.match(r"\{(\d+),(\d+)\}", pairs[1])
        return (int(first[1]), int(first[2])) if first else ()
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(number) for number in listed[1].split(",") if number)
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        numbers = np.arange(math.prod(_sizes(tiled[3]))).reshape(_sizes(tiled[3]))
        numbers = numbers.transpose(_sizes(tiled[4])) if tiled[4] else numbers
        return tuple(int(number) for number in numbers.reshape(int(tiled[1]), int(tiled[2]))[0])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes)
    return _mesh_group(*meshed.groups()) if meshed else ()


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _mesh_group(mesh: str, order: str, axes: str) -> tuple[int, ...]:
    """Reads mesh["a"=4,"b"=8], device_ids=([8,4]T(1,0)) {"a","b":(2)4}: what differs along (parts of) axes alone."""
    shape = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
    numbers = np.arange(math.prod(shape.values()))
    turned = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if turned:
        numbers = numbers.reshape(_sizes(turned[1]))
        numbers = numbers.transpose(_sizes(turned[2])) if turned[2] else numbers
    numbers = numbers.reshape(tuple(shape.values()))
    varied = {name: (before, size) for name, before, size in re.findall(r"'([\w.\-]+)'(?::\((\d+)\)(\d+))?", axes)}
    index: list[np.ndarray] = []
    for name, size in shape.items():
        if name not in varied:
            index.append(np.zeros(1, int))
            continue
        before, part = (int(number) if number else 0 for number in varied[name])
        step = size // (before * part) if part else 1
        index.append(np.arange(part or size) * step)
    return tuple(int(number) for number in numbers[np.ix_(*index)].reshape(-1))
