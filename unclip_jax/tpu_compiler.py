"""Compiles programs for a TPU that is not there, and reads what the compiler says of their memory.

A program that is too large for the chip is an answer here, not an error: XLA assigns its buffers before it gives up,
and its dump of them is read either way.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from unclip_jax.compiled_program import Module, arrays, parse
from unclip_jax.errors import InputError

EFFORTS: dict[str, dict[str, Any]] = {
    # The least that the compiler can be asked for: large U-Nets compile several times faster so.
    "quick": {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
    "full": {},
}
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = re.compile(
    r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)i?B?\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT]?)"
)
_ALLOCATION = re.compile(r"allocation (\d+): size (\d+)(?:, color (\d+))?(.*)")
_BUFFER = re.compile(r" value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One place in HBM, by the largest value that it ever holds.

    Attributes:
      bytes: as laid out on the device.
      shape: of that value on one device, as XLA writes it.
      op_name: JAX's path of the operation that makes it, or of the argument that it is.
      kind: "argument", "output" or "temporary".
    """

    bytes: int
    shape: str
    op_name: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What the compiler made of a program for one device.

    Attributes:
      fits: whether it compiled.
      arguments, temporaries, outputs, code: bytes of HBM; outputs only where they do not take the place of arguments.
        0 bytes of code where it did not fit, for none was made.
      available: bytes that the compiler let it use, where it said so because they did not suffice; else 0.
      buffers: the largest first.
      module: the optimised program; None where the compiler gave up before there was one.
      seconds: that it took.
    """

    fits: bool
    arguments: int
    temporaries: int
    outputs: int
    code: int
    available: int
    buffers: list[Buffer]
    module: Module | None
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes of HBM in all."""
        return self.arguments + self.temporaries + self.outputs + self.code


def compile_lowered(
    lowered: Any, *, effort: str = "quick", options: Mapping[str, Any] | None = None, largest: int = 8
) -> Compilation:
    """Compiles a lowered program and reads its memory; one that does not fit is returned as well.

    Args:
      lowered: of `jax.jit(fn).lower(…)`, for devices of one TPU topology.
      effort: one of EFFORTS.
      options: compiler options besides.
      largest: how many buffers of each kind to name.

    Raises:
      InputError: there is no such option.
    """
    import jax

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="unclip_plan_") as folder:
        wanted = {**EFFORTS[effort], "xla_dump_to": folder, **(options or {})}
        compiled, failure = None, ""
        try:
            compiled = lowered.compile(compiler_options=wanted)
        except jax.errors.JaxRuntimeError as error:
            failure = str(error)
            if "No such compile option" in failure:
                raise InputError(f"--compiler_options: {failure.partition(': ')[2]}") from error
            if "RESOURCE_EXHAUSTED" not in failure:
                raise
        seconds = time.perf_counter() - began
        # Not compiled.as_text(), which fails to read large programs back.
        text = _dumped(folder, "after_optimizations.txt")
        module = parse(text) if text else None
        assigned = _dumped(folder, "after_optimizations-buffer-assignment.txt")
    sizes, buffers = read_buffers(assigned, module)
    code = 0
    if compiled:
        memory = compiled.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        sizes = {
            "argument": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "output": max(outputs, 0),
        }
        code = memory.generated_code_size_in_bytes
    used, available = too_large(failure)
    if not compiled and not any(sizes.values()):
        sizes = {"argument": 0, "temporary": used, "output": 0}
    return Compilation(
        fits=compiled is not None,
        arguments=sizes["argument"],
        temporaries=sizes["temporary"],
        outputs=sizes["output"],
        code=code,
        available=available,
        buffers=_largest(buffers, largest),
        module=module,
        seconds=seconds,
    )


def _largest(buffers: list[Buffer], each: int) -> list[Buffer]:
    kinds = ("temporary", "argument", "output")
    kept = [one for kind in kinds for one in [one for one in buffers if one.kind == kind][:each]]
    return sorted(kept, key=lambda one: -one.bytes)


def too_large(message: str) -> tuple[int, int]:
    """Returns bytes wanted and bytes available, from the compiler's error; zeros where it names none."""
    match = _TOO_LARGE.search(message)
    if not match:
        return 0, 0
    return int(float(match[1]) * _UNITS[match[2]]), int(float(match[3]) * _UNITS[match[4]])


def _dumped(folder: str, ending: str) -> str:
    """Returns the dumped file of this name; of several modules, the last and largest."""
    found = sorted(pathlib.Path(folder).glob(f"*.{ending}"), key=lambda path: path.stat().st_size)
    return found[-1].read_text() if found else ""


def read_buffers(assigned: str, module: Module | None) -> tuple[dict[str, int], list[Buffer]]:
    """Reads XLA's dump of its buffers.

    Args:
      assigned: the dump.
      module: the program that it belongs to, which says what JAX calls an instruction.

    Returns:
      Bytes of HBM for arguments, outputs and temporaries; and places in HBM, the largest first.
    """
    names = {
        one.name: one.op_name.replace("\\'", "'")
        for computation in (module.computations.values() if module else ())
        for one in computation.instructions.values()
        if one.op_name
    }
    sizes = {"argument": 0, "output": 0, "temporary": 0}
    slots: dict[tuple[str, str], Buffer] = {}
    allocation, kind, argument = "", "", ""
    for line in assigned.splitlines():
        start = _ALLOCATION.match(line)
        if start:
            allocation, kind = start[1], _kind(start[4])
            number = re.search(r"parameter (\d+)", start[4])
            argument = _argument(module, int(number[1])) if number else ""
            if int(start[3] or 0):
                kind = ""  # in memory of another kind
            if kind:
                sizes[kind] += int(start[2])
            continue
        value = _BUFFER.match(line) if kind else None
        if value:
            name, _, size, offset, shape = value.groups()
            slot = (allocation, offset)
            # The table of a tuple's addresses is no buffer that anybody could do without.
            if not shape.startswith("(") and (slot not in slots or int(size) > slots[slot].bytes):
                slots[slot] = Buffer(int(size), _plain(shape), argument or names.get(name, name), kind)
    return sizes, sorted(slots.values(), key=lambda one: -one.bytes)


def _argument(module: Module | None, number: int) -> str:
    if module is None:
        return f"argument {number}"
    return module.computations[module.entry].parameter(number).op_name.replace("\\'", "'") or f"argument {number}"


def _kind(attributes: str) -> str:
    if "parameter " in attributes:
        return "argument"
    return "output" if "maybe-live-out" in attributes else "temporary" if "temp" in attributes else ""


def _plain(shape: str) -> str:
    """A shape without its layout: bf16[64,1024]."""
    one = arrays(shape)[0]
    return f"{one.dtype}[{','.join(map(str, one.dims))}]"
