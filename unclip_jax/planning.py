"""The plan of a run on hardware that nobody has rented yet: memory, operations, exchanges and time of its real step.

    made = planning.plan(config, topologies.find("v5p-512"))      # compiles the train step; minutes for the largest
    made.fits, made.bytes_per_chip, made.step_seconds_estimate, made.as_dict()

A plan is JSON and nothing else, so that a script can keep it. `docs/pods.md` says how to read one.
"""

import concurrent.futures
import dataclasses
import logging
import multiprocessing
import os
import re
import resource
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import (
    compiled_program,
    instruction_costs,
    programs,
    roofline,
    topologies,
    tpu_compiler,
    traced_run,
)
from unclip_jax import config as configs
from unclip_jax.compiled_program import Module
from unclip_jax.errors import InputError
from unclip_jax.instruction_costs import Collective
from unclip_jax.plans import HEADROOM_WANTED, Plan
from unclip_jax.roofline import Roofline
from unclip_jax.topologies import GPUS_PER_HOST, Topology
from unclip_jax.tpu_compiler import Compilation
from unclip_jax.traced_run import Traced

_LOG = logging.getLogger("unclip_jax.planning")


def plan(
    config: ConfigDict,
    topology: Topology,
    *,
    name: str = "train",
    effort: str = "quick",
    batch_per_chip: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plans one program of a config: for a TPU by its compiler, for GPUs by arithmetic alone.

    Args:
      config: a checked config.
      topology: of `topologies.find`.
      name: "train", "sample" or the name of a predict function.
      effort: one of `tpu_compiler.EFFORTS`.
      batch_per_chip: examples on a chip in a step; the config's global batch without it.
      options: compiler options besides.

    Raises:
      InputError: the config, its batch or its mesh do not suit the hardware.
    """
    config = traced_run.prepare(config, topology, batch_per_chip=batch_per_chip)
    traced = traced_run.lay_out(config, topology, traced_run.devices_of(topology), name=name).trace()
    made = _with_compiler(traced, effort, options) if topology.is_tpu else _without_compiler(traced)
    made.host_peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return made


def plan_apart(config: ConfigDict, topology: Topology, *, effort: str = "quick", **options: Any) -> Plan:
    """Plans in a process of its own, so that memory is given back, is measured, and a crash of the compiler is told.

    Args:
      config, topology, effort, options: see `plan`. Where quick effort crashes the compiler, full effort is tried: a
        failed check of libtpu 0.0.42 on very small arrays is not met there.

    Raises:
      InputError: as `plan`, or the compiler crashed.
    """
    fresh = multiprocessing.get_context("spawn")
    for tried in dict.fromkeys((effort, "full")):
        arguments = (configs.to_json(config), topology.name, {**options, "effort": tried})
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh, initializer=_start_apart) as pool:
            try:
                return pool.submit(_plan_of_json, *arguments).result()
            except concurrent.futures.process.BrokenProcessPool:
                # A failed check inside of the compiler ends its process; what it said stands on stderr.
                _LOG.warning("the TPU compiler crashed (see above) at %s effort", tried)
    raise InputError("the TPU compiler crashed (see above), at full effort too; another version of libtpu may do")


def start_jax() -> None:
    """Sets JAX up to plan: shapes need no accelerator, and random numbers are those of a run."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_threefry_partitionable", True)
    programs.start_logging()


def _start_apart() -> None:
    """Sets a process up that plans for another one, and ends it, in the middle of a compilation, if that one ends."""
    start_jax()

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _plan_of_json(config: str, topology: str, options: dict[str, Any]) -> Plan:
    return plan(configs.from_json(config), topologies.find(topology), **options)


def _with_compiler(traced: Traced, effort: str, options: Mapping[str, Any] | None) -> Plan:
    topology = traced.topology
    began = time.perf_counter()
    lowered = traced.lowerable.lower()
    lowering = time.perf_counter() - began
    found = tpu_compiler.compile_lowered(lowered, effort=effort, options=options)
    each = topology.chip.devices
    made = _plan(
        traced,
        effort=effort,
        memory={
            "arguments": found.arguments * each,
            "temporaries": found.temporaries * each,
            "outputs": found.outputs * each,
            "code": found.code * each,
        },
        hbm=found.available * each or topology.chip.hbm_bytes,
        compiled=True,
    )
    made.fits = bool(made.fits) and found.fits
    made.fits_with_headroom = bool(made.fits_with_headroom) and found.fits
    made.compile_seconds = found.seconds
    made.trace_seconds += lowering
    made.largest_buffers = [dataclasses.asdict(one) for one in found.buffers]
    if found.module is not None:
        _add_program(made, traced, found.module)
    made.advice = [] if made.fits_with_headroom else _advice(made, traced, found)
    return made


def _without_compiler(traced: Traced) -> Plan:
    """What can be said of GPUs: bytes of the arguments, and the time of products, weights and gradients."""
    topology, chip, mesh = traced.topology, traced.topology.chip, traced.mesh
    made = _plan(traced, effort="none", memory={"arguments": traced.argument_bytes}, hbm=chip.hbm_bytes, compiled=False)
    if made.fits:  # temporaries come on top
        made.fits = made.fits_with_headroom = None
    compute = traced.padded_flops / (chip.bf16_flops * topology.chips)
    hbm = 2 * traced.argument_bytes / chip.hbm_rate
    numbers = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    shards, replicas = tuple(numbers[0, 0, :, 0].tolist()), tuple(numbers[:, :, 0, 0].reshape(-1).tolist())
    where = [roofline.Place(number // GPUS_PER_HOST, (number % GPUS_PER_HOST,)) for number in range(mesh.size)]
    # Weights are gathered in bfloat16, forward and backward, and gradients are summed in float32.
    size, trains = traced.parameters, traced.name == "train"
    moved = [("all-gather", 2 * size, shards)] * (2 if trains else 1)
    if trains:
        moved += [("reduce-scatter", 4 * size, shards), ("all-reduce", 4 * size // len(shards), replicas)]
    exchanges = [
        Collective(kind, count, count * instruction_costs.rounds(kind, len(group)), group, "", "")
        for kind, count, group in moved
        if len(group) > 1
    ]
    times = [roofline.exchange_seconds(one, topology, where) for one in exchanges]
    ici, dcn = sum(inside for inside, _ in times), sum(between for _, between in times)
    estimate = Roofline(
        compute_seconds=compute,
        hbm_seconds=hbm,
        memory_bound_seconds=max(hbm - compute, 0.0),
        ici_seconds=ici,
        dcn_seconds=dcn,
        exposed_seconds=ici + dcn,
        step_seconds=max(compute, hbm) + ici + dcn,
        overlapped_seconds=max(compute, hbm, ici, dcn),
        flops=traced.executed_flops / topology.chips,
        hbm_bytes=2.0 * traced.argument_bytes,
    )
    made.collectives = roofline.by_kind([(one, 1) for one in exchanges])
    _add_time(made, traced, estimate)
    made.warnings.append(
        "there is no compiler for GPUs here: arguments are exact, temporaries are not known, and the time is that of "
        "products at the peak, of arguments read and written once, and of weights and gradients exchanged, not hidden"
    )
    return made


def _plan(traced: Traced, *, effort: str, memory: dict[str, int], hbm: int, compiled: bool) -> Plan:
    config, topology = traced.config, traced.topology
    needed = sum(memory.values())
    padded = traced.padded_flops
    chip = topology.chip
    return Plan(
        stage=config.stage,
        program=traced.name,
        topology=topology.name,
        chips=topology.chips,
        chip=chip.name,
        mesh=dict(traced.mesh.shape),
        batch_size=config.batch_size,
        batch_per_chip=config.batch_size / topology.chips,
        accumulation=config.optim.accumulation,
        remat=traced_run.remat_policies(config),
        compiled=compiled,
        effort=effort,
        fits=needed <= hbm,
        headroom=1 - needed / hbm,
        fits_with_headroom=needed <= (1 - HEADROOM_WANTED) * hbm,
        bytes_per_chip=needed,
        hbm_per_chip=hbm,
        memory=memory,
        model_flops=traced.model_flops,
        executed_flops=traced.executed_flops,
        mxu_padding=1 - traced.executed_flops / padded if padded else 0.0,
        assumptions=[
            f"{chip.name}: {chip.bf16_flops / 1e12:.4g} TFLOP/s in bfloat16, HBM {chip.hbm_rate / 1e9:.4g} GB/s, "
            f"{chip.ici_rate / 1e9:.4g} GB/s sent to chips of the slice over all links, {chip.dcn_rate / 1e9:.4g} GB/s "
            f"between slices, matrix units of {chip.mxu_side} x {chip.mxu_side} ({chip.source})"
        ],
        trace_seconds=traced.seconds,
    )


def _add_program(made: Plan, traced: Traced, module: Module) -> None:
    """Adds what the compiled text says: exchanges, and time by the roofline."""
    topology = traced.topology
    where = roofline.places(list(traced.mesh.devices.flat))
    estimate = roofline.estimate(module, topology, where)
    made.compiled_flops = estimate.flops * topology.devices
    missing = traced.executed_flops - made.compiled_flops
    if missing > 0:
        ratio = traced.padded_flops / max(traced.executed_flops, 1.0)
        estimate.add_hidden_products(
            missing / topology.devices, missing * ratio / (topology.chip.bf16_flops * topology.chips)
        )
    exchanges = [
        (one, times)
        for computation, instruction, times in compiled_program.visit(module)
        for one in instruction_costs.cost(module, computation, instruction).collectives
    ]
    made.collectives = roofline.by_kind(exchanges)
    made.exchanged = _exchanged(exchanges)
    _add_time(made, traced, estimate)
    made.warnings += _warnings(made, module)


def _exchanged(exchanges: list[tuple[Collective, int]], most: int = 12) -> list[dict[str, Any]]:
    """Returns what is exchanged, by what it serves, the most bytes first."""
    served: dict[tuple[str, str], dict[str, Any]] = {}
    for one, times in exchanges:
        entry = served.setdefault(
            (one.kind, short_path(one.op_name)),
            {"kind": one.kind, "serves": short_path(one.op_name), "count": 0, "bytes": 0, "sent": 0.0, "among": 0},
        )
        entry["count"] += times
        entry["bytes"] += times * one.bytes
        entry["sent"] += times * one.sent
        entry["among"] = max(entry["among"], len(one.group))
    ranked = sorted(served.values(), key=lambda entry: -entry["sent"])
    # All-to-alls are named whatever their size: they say that two shardings do not agree.
    return [entry for i, entry in enumerate(ranked) if i < most or entry["kind"] == "all-to-all"]


# What tracing adds to a path: loops, calls, and which part of a gradient it is.
_ADDED = re.compile(r"while|body|closed_call|checkpoint|rematted_computation|remat\d*|cond|branch_\d+_fun|")


def short_path(op_name: str) -> str:
    """Returns the end of JAX's path of an operation, without what tracing adds, and whether it is of a gradient."""
    plain = re.sub(r"\b(?:transpose|jvp|vmap|jit)\(|\)", "", op_name)
    names = [name for name in plain.split(";")[0].split("/")[1:] if not _ADDED.fullmatch(name)]
    if not names:
        return "(made by the compiler)"
    return "/".join(names[-5:]) + (" (gradient)" if "transpose(" in op_name else "")


def _warnings(made: Plan, module: Module) -> list[str]:
    said = []
    across = made.collectives.get("all-to-all")
    if across:
        paths = [entry["serves"] for entry in made.exchanged if entry["kind"] == "all-to-all"]
        said.append(
            f"{across['count']:.0f} all-to-alls move {across['bytes'] / 1e6:.4g} MB: shardings of neighbours do not "
            f"agree in {', '.join(paths[:4])}"
        )
    if made.compiled_flops and made.compiled_flops > 1.05 * made.executed_flops:
        said.append(
            f"the compiled program has {made.compiled_flops / made.executed_flops:.3g} times the operations of the "
            "traced one: chips repeat each other's work, or the compiler fills channels up"
        )
    loops = [
        one.name
        for computation, one, _ in compiled_program.visit(module)
        if one.opcode == "while" and module.trips(computation, one) is None
    ]
    if loops:
        said.append(f"{len(loops)} loops of unknown length count once: {', '.join(loops[:3])}")
    return said


def _add_time(made: Plan, traced: Traced, estimate: Roofline) -> None:
    seconds = estimate.step_seconds
    made.roofline = dataclasses.asdict(estimate)
    if not seconds:
        return
    made.step_seconds_estimate = seconds
    made.examples_per_second = made.batch_size / seconds
    made.mfu_estimate = traced.model_flops / (seconds * traced.topology.chip.bf16_flops * traced.topology.chips)
    if traced.name == "train":
        made.days = seconds * configs.total_steps(traced.config) / 86400


def _advice(made: Plan, traced: Traced, found: Compilation) -> list[str]:
    """Says what would make a program fit, the cheapest first."""
    mesh, said = made.mesh, []
    memory = made.memory
    others = made.chips * traced.topology.chip.devices // mesh.get("fsdp", 1)
    if memory["arguments"] > 0.3 * made.hbm_per_chip and others > 1:
        said.append(
            f"weights, moving average and optimizer take {memory['arguments'] / 2**30:.3g} GiB a chip at "
            f"config.mesh.fsdp={mesh.get('fsdp', 1)}: a larger fsdp divides them further"
        )
    lenient = [name for name, value in made.remat.items() if value in (False, "none")]
    if traced.name == "train" and lenient:
        keys = ", ".join(f"--config.{name}" for name in lenient)
        said.append(f"activations are kept for the backward pass: have them recomputed, {keys}")
    each = made.batch_per_chip / made.accumulation
    if traced.name == "train" and each > 1:
        said.append(
            f"{each:.4g} examples a chip are in memory at once: --config.optim.accumulation={2 * made.accumulation} "
            "halves them and keeps the batch"
        )
    elif traced.name != "train" and each > 1:
        said.append(f"a smaller batch: --batch_per_chip={max(int(each) // 2, 1)}")
    if found.buffers and each <= 1:
        said.append("an example outgrows the chip: split layers over chips (config.mesh.model), or take a larger chip")
    return said
