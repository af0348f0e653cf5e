"""How long a compiled step would take at the rates of its hardware's data sheet: an estimate, and no measurement.

The compiled program is walked in the order in which its instructions run. One instruction takes

    max(products, padded to the matrix unit / peak,  bytes of HBM / HBM's rate)

for within an instruction the compiler overlaps loading with computing, and between two it does not. An exchange between
devices that the program waits for takes, besides,

    max(bytes that a device sends / (ICI's rate x share of the links in use) + bytes between slices / DCN's rate,
        bytes of HBM / HBM's rate)

and one that it starts early and waits for later (…-start, …-done) is hidden by what runs between: the sum of all that
is waited for is `exposed_seconds`. A group of devices that lie along one of three dimensions of a torus uses a third of
the links. Left out: what starting an instruction costs, the vector unit, hot spots. Products of kernels, which the text
does not show, are known from the jaxpr: the difference is added as if it ran alone (`add_hidden_products`).
So the step takes

    sum of max(products, HBM) over instructions  +  exchanges that are waited for  +  products that the text hides.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from unclip_jax import instruction_costs
from unclip_jax.compiled_program import Computation, Instruction, Module, loop_parts
from unclip_jax.instruction_costs import Collective, Cost
from unclip_jax.topologies import Topology


class Place(NamedTuple):
    """Where a device is: its slice and its chip's place in the slice's network."""

    slice: int
    chip: tuple[int, ...]


def places(devices: Sequence) -> list[Place]:
    """Returns the places of the devices of a mesh, in its order, which numbers them in the compiled program."""
    return [Place(getattr(one, "slice_index", None) or 0, tuple(one.coords)) for one in devices]


@dataclasses.dataclass
class Hot:
    """One instruction that takes long: seconds of a step in all its runs, how often it runs, and what bounds it."""

    seconds: float
    times: int
    bound: str
    op_name: str
    name: str


@dataclasses.dataclass
class Roofline:
    """Seconds of one step. Parts overlap, so they do not add up to `step_seconds`; see the module.

    Attributes:
      compute_seconds: products, padded to the matrix unit, at the chip's peak.
      hbm_seconds: bytes of HBM at its rate.
      memory_bound_seconds: what HBM adds where it takes longer than the products of the same instruction; what is
        fetched early, while others compute, is left out.
      ici_seconds, dcn_seconds: exchanges inside of a slice, and between slices.
      exposed_seconds: of these, what the schedule waits for.
      step_seconds: the estimate.
      overlapped_seconds: the same if everything overlapped: the longest of products, HBM, ICI and DCN. No step is
        shorter.
      flops, hbm_bytes: of one device, as the text shows them.
      hot: the instructions that take longest.
    """

    compute_seconds: float = 0.0
    hbm_seconds: float = 0.0
    memory_bound_seconds: float = 0.0
    ici_seconds: float = 0.0
    dcn_seconds: float = 0.0
    exposed_seconds: float = 0.0
    step_seconds: float = 0.0
    overlapped_seconds: float = 0.0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    hot: list[Hot] = dataclasses.field(default_factory=list)

    def add_hidden_products(self, flops: float, seconds: float) -> None:
        """Adds products that the jaxpr has and the compiled text does not show."""
        self.flops += flops
        self.compute_seconds += seconds
        self.step_seconds += seconds
        self._overlap()

    def _overlap(self) -> None:
        self.overlapped_seconds = max(self.compute_seconds, self.hbm_seconds, self.ici_seconds, self.dcn_seconds)


def estimate(module: Module, topology: Topology, where: Sequence[Place], *, hottest: int = 12) -> Roofline:
    """Walks the compiled program of one device of `topology`.

    Args:
      module: the program.
      topology: whose rates are assumed.
      where: the devices' places, in the program's order.
      hottest: how many instructions to name.
    """
    walk = _Walk(module, topology, where)
    walk.total.step_seconds = walk.run(module.computations[module.entry], 1)
    walk.total.hot = sorted(walk.hot.values(), key=lambda one: -one.seconds)[:hottest]
    walk.total._overlap()
    return walk.total


def exchange_seconds(exchange: Collective, topology: Topology, where: Sequence[Place]) -> tuple[float, float]:
    """Returns seconds on ICI and on DCN of one exchange, both for the device that sends most.

    An exchange across slices is taken apart as the compiler does: within slices, then between devices of one place in
    different slices, which hold a part each.
    """
    chip = topology.chip
    members = [where[number] for number in exchange.group if number < len(where)]
    slices = len({one.slice for one in members}) or 1
    inside = [one.chip for one in members if one.slice == members[0].slice]
    spanned = sum(len(set(axis)) > 1 for axis in zip(*inside, strict=True))
    share = max(spanned, 1) / chip.torus if chip.torus else 1.0
    sent = exchange.sent
    dcn = 0.0
    if slices > 1:
        per_slice = max(len(inside), 1)
        sent = exchange.bytes * instruction_costs.rounds(exchange.kind, per_slice)
        dcn = exchange.bytes * instruction_costs.rounds(exchange.kind, slices) / per_slice
    rate = chip.ici_rate / chip.devices * share
    return sent / rate, dcn / (chip.dcn_rate / chip.devices)


class _Walk:
    """The state of a walk: totals so far, and each instruction's cost, which is read once."""

    def __init__(self, module: Module, topology: Topology, where: Sequence[Place]):
        self.module, self.topology, self.where = module, topology, where
        self.total = Roofline()
        self.hot: dict[tuple[str, str], Hot] = {}
        self.costs: dict[tuple[str, str], Cost] = {}

    def run(self, computation: Computation, times: int) -> float:
        """Returns how long a computation takes once; adds to the totals what it costs in `times` runs."""
        clock, link, memory = 0.0, 0.0, 0.0
        finishes: dict[str, float] = {}
        fetched: set[str] = set()  # what comes from this device's own memory, not from others
        for one in computation.instructions.values():
            if one.opcode == "while":
                trips = self.module.trips(computation, one)
                _, body = loop_parts(one)
                trips = 1 if trips is None else trips
                clock += trips * self.run(self.module.computations[body], times * trips) if trips else 0.0
            elif one.opcode in ("call", "conditional"):
                clock += self._longest(self.module.called(one), times)
            else:
                cost, work, exchange = self._times(computation, one, times)
                if cost.waits:
                    late = max(finishes.get(cost.waits, clock) - clock, 0.0)
                    if cost.waits not in fetched:
                        self.total.exposed_seconds += times * late
                    clock += late
                elif cost.starts and not exchange:
                    fetched.add(cost.starts)
                    memory = finishes[cost.starts] = max(clock, memory) + work
                elif cost.starts:
                    link = finishes[cost.starts] = max(clock, link) + exchange
                else:
                    self.total.exposed_seconds += times * exchange
                    clock += work + exchange
        return max(clock, link, memory)

    def _longest(self, branches: list[Computation], times: int) -> float:
        """Runs the longest of several computations: of a conditional, or the only one of a call."""
        if not branches:
            return 0.0
        longest = max(branches, key=lambda branch: self.run(branch, 0)) if len(branches) > 1 else branches[0]
        return self.run(longest, times)

    def _times(self, computation: Computation, one: Instruction, times: int) -> tuple[Cost, float, float]:
        """Returns the cost, seconds of computing and loading, and seconds of exchanging; adds `times` to totals."""
        key = (computation.name, one.name)
        if key not in self.costs:
            self.costs[key] = instruction_costs.cost(self.module, computation, one)
        cost = self.costs[key]
        chip = self.topology.chip
        padded = sum(product.padded_flops(chip.mxu_side) for product in cost.products)
        compute = padded / (chip.bf16_flops / chip.devices)
        hbm = cost.hbm_bytes / (chip.hbm_rate / chip.devices)
        networks = [exchange_seconds(exchange, self.topology, self.where) for exchange in cost.collectives]
        ici, dcn = (sum(times) for times in zip(*networks, strict=True)) if networks else (0.0, 0.0)
        total = self.total
        total.compute_seconds += times * compute
        total.hbm_seconds += times * hbm
        fetched_early = bool(cost.starts) and not networks
        if not networks and not fetched_early:
            total.memory_bound_seconds += times * max(hbm - compute, 0.0)
        total.ici_seconds += times * ici
        total.dcn_seconds += times * dcn
        total.flops += times * sum(product.flops for product in cost.products)
        total.hbm_bytes += times * cost.hbm_bytes
        exchange = ici + dcn
        if exchange:  # what is sent is read while it is sent
            exchange, hbm = max(exchange, hbm), 0.0
        seconds = max(compute, hbm) + exchange
        if seconds and times and not fetched_early:
            bound = max(((compute, "matrix unit"), (hbm, "HBM"), (ici, "ICI"), (dcn, "DCN")))[1]
            seen = self.hot.setdefault(key, Hot(0.0, 0, bound, one.op_name, one.name))
            seen.seconds, seen.times = seen.seconds + times * seconds, seen.times + times
        return cost, max(compute, hbm), exchange


def by_kind(exchanges: Sequence[tuple[Collective, int]]) -> dict[str, dict[str, float]]:
    """Returns kind -> count, bytes of the arrays and bytes that a device sends, in a step.

    Args:
      exchanges: with how often each runs.
    """
    kinds: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0, "sent": 0.0})
    for exchange, times in exchanges:
        entry = kinds[exchange.kind]
        entry["count"] += times
        entry["bytes"] += times * exchange.bytes
        entry["sent"] += times * exchange.sent
    return dict(kinds)
