"""What a plan states: numbers, names and sentences, which `planning` makes, people read and scripts keep."""

import dataclasses
from typing import Any

# Of a chip's HBM, what a plan should leave: compilers and libraries change, and quick effort is a tenth off.
HEADROOM_WANTED = 0.1


@dataclasses.dataclass
class Plan:
    """One program of one config on one topology. Bytes, seconds and FLOPs are of one step.

    Attributes:
      stage, program, topology: what was planned; `program` is "train" or the name of a predict function.
      chips, chip, mesh: the hardware, and how it is laid out.
      batch_size, batch_per_chip, accumulation, remat: of the run.
      compiled, effort: whether a compiler was asked, and how hard it tried.
      fits: whether the program loads, None where nobody knows.
      headroom: the share of HBM that it leaves, negative where it does not fit.
      fits_with_headroom: whether it leaves HEADROOM_WANTED.
      bytes_per_chip, hbm_per_chip: needed, and what a program may use.
      memory: argument, temporary, output (not in place of arguments) and code bytes of a chip.
      largest_buffers: bytes, shape on one device, JAX's path and kind of the largest.
      model_flops: of the trained network, forward and backward, without what is recomputed or frozen.
      executed_flops: of the step, counted from its jaxpr, with both.
      compiled_flops: of all chips, counted from the compiled text; more than executed where chips repeat each other.
      mxu_padding: the share of a matrix unit's work that padding wastes, counted from the jaxpr.
      collectives: kind -> count, bytes, sent; exchanged: the largest, with what they serve.
      roofline: see `roofline.Roofline`; empty where it is unknown.
      step_seconds_estimate, examples_per_second, mfu_estimate, days: at the assumed rates; None where unknown.
      assumptions: those rates, in words. warnings, advice: sentences.
      compile_seconds, trace_seconds, host_peak_bytes: what the plan took.
    """

    stage: str
    program: str
    topology: str
    chips: int
    chip: str
    mesh: dict[str, int]
    batch_size: int
    batch_per_chip: float
    accumulation: int
    remat: dict[str, Any]
    compiled: bool
    effort: str
    fits: bool | None
    headroom: float
    fits_with_headroom: bool | None
    bytes_per_chip: int
    hbm_per_chip: int
    memory: dict[str, int]
    model_flops: float
    executed_flops: float
    mxu_padding: float
    assumptions: list[str]
    trace_seconds: float
    compile_seconds: float = 0.0
    host_peak_bytes: int = 0
    compiled_flops: float | None = None
    largest_buffers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    exchanged: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    roofline: dict[str, Any] = dataclasses.field(default_factory=dict)
    step_seconds_estimate: float | None = None
    examples_per_second: float | None = None
    mfu_estimate: float | None = None
    days: float | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    advice: list[str] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns numbers, strings, lists and dictionaries alone, for JSON."""
        return dataclasses.asdict(self)
