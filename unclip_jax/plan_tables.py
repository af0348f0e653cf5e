"""Descriptions and plans as tables for people: what `python -m unclip_jax.plan` prints without `--json`."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from unclip_jax.description import Description
from unclip_jax.planning import short_path
from unclip_jax.plans import HEADROOM_WANTED, Plan

_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def amount(value: float, unit: str = "") -> str:
    """Returns a number with four digits and a decimal prefix: 3.565 G."""
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def gib(value: float) -> str:
    """Returns bytes as people count memory: 1.25 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size / 4:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"


def duration(seconds: float) -> str:
    """Returns seconds in a unit that suits them: 12.5 ms."""
    for size, unit in _TIMES:
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.3g} s"


def show_description(description: Description, console: Console) -> None:
    """Prints a config in numbers."""
    console.print(_modules(description), _totals(description))


def _modules(description: Description) -> Table:
    table = Table("module", title=f"{description.stage}: the trained network")
    table.add_column("parameters", justify="right")
    table.add_column("forward, an example", justify="right")
    for name, module in description.modules.items():
        table.add_row(name, amount(module.parameters), amount(module.forward_flops_per_example, "FLOP"))
    table.add_section()
    table.add_row("all", amount(description.parameters), amount(description.forward_flops_per_example, "FLOP"))
    return table


def _totals(description: Description) -> Table:
    table = Table("per example", show_header=False, title="the run")
    table.add_column("", justify="right")
    table.add_row("training, an example", amount(description.train_flops_per_example, "FLOP"))
    table.add_row("its frozen networks: parameters", amount(description.frozen_parameters))
    table.add_row("their forward pass, an example", amount(description.frozen_flops_per_example, "FLOP"))
    for name, count in description.sampling_flops_per_example.items():
        table.add_row(f"{name}, an example", amount(count, "FLOP"))
    table.add_row("batch x steps", f"{description.batch_size:,} x {description.steps:,}")
    table.add_row("training, the whole run", amount(description.train_flops, "FLOP"))
    return table


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    console.print(_run(plan))
    console.print(_memory(plan))
    if plan.largest_buffers:
        console.print(_buffers(plan.largest_buffers))
    if plan.roofline:
        console.print(_time(plan))
    if plan.collectives:
        console.print(_collectives(plan))
    if plan.roofline.get("hot"):
        console.print(_hot(plan))
    told = {"warning": plan.warnings, "to make it fit": plan.advice, "assumed": plan.assumptions}
    for title, sentences in told.items():
        for sentence in sentences:
            console.print(f"{title}: {sentence}", markup=False, highlight=False)


def _pairs(title: str, rows: Iterator[tuple[str, str]]) -> Table:
    table = Table("", show_header=False, title=title)
    table.add_column("", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _run(plan: Plan) -> Table:
    def rows() -> Iterator[tuple[str, str]]:
        yield "chips", f"{plan.chips} x {plan.chip}"
        yield "mesh", " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
        yield "batch", f"{plan.batch_size:,} ({plan.batch_per_chip:.4g} a chip, in {plan.accumulation} parts)"
        for name, value in plan.remat.items():
            yield f"config.{name}", str(value)
        yield "executed, a step", amount(plan.executed_flops, "FLOP")
        yield "of the model, a step", amount(plan.model_flops, "FLOP")
        yield "of the compiled program", amount(plan.compiled_flops, "FLOP") if plan.compiled_flops else "not compiled"
        yield "lost to padding, of the matrix units", f"{plan.mxu_padding:.1%}"
        yield "the plan took", f"{duration(plan.trace_seconds)} to trace, {duration(plan.compile_seconds)} to compile"
        yield "with", f"{gib(plan.host_peak_bytes)} of this machine's memory"

    effort = f"{plan.effort} effort" if plan.compiled else "not compiled"
    return _pairs(f"{plan.stage}, {plan.program}, on {plan.topology} ({effort})", rows())


def _memory(plan: Plan) -> Table:
    def rows() -> Iterator[tuple[str, str]]:
        for name, size in plan.memory.items():
            yield name, gib(size)
        if not plan.compiled:
            yield "temporaries", "not known"
        yield "in all", gib(plan.bytes_per_chip)
        yield "a program may use", gib(plan.hbm_per_chip)
        wanted = "" if plan.fits_with_headroom else f" ({HEADROOM_WANTED:.0%} is wanted)"
        yield "left", f"{plan.headroom:.1%}{wanted}"
        yield "fits", "not known" if plan.fits is None else "yes" if plan.fits else "NO"

    return _pairs("bytes of a chip", rows())


def _buffers(buffers: Sequence[Mapping[str, object]]) -> Table:
    table = Table("kind", title="largest buffers (not all at one time)")
    table.add_column("shape, on one device", overflow="fold")
    table.add_column("made by", overflow="fold")
    table.add_column("bytes", justify="right")
    for one in buffers:
        path = str(one["op_name"])
        made = path if one["kind"] == "argument" or "/" not in path else short_path(path)
        table.add_row(str(one["kind"]), str(one["shape"]), made, gib(float(str(one["bytes"]))))
    return table


def _time(plan: Plan) -> Table:
    line = plan.roofline

    def rows() -> Iterator[tuple[str, str]]:
        yield "products, padded, at the peak", duration(line["compute_seconds"])
        yield "HBM, " + amount(line["hbm_bytes"], "B"), duration(line["hbm_seconds"])
        yield "of it beyond the products it feeds", duration(line["memory_bound_seconds"])
        yield "network of the slice", duration(line["ici_seconds"])
        yield "network between slices", duration(line["dcn_seconds"])
        yield "of both, waited for", duration(line["exposed_seconds"])
        yield "a step, if everything overlapped", duration(line["overlapped_seconds"])
        if plan.step_seconds_estimate:
            yield "a step, estimated", duration(plan.step_seconds_estimate)
        if plan.examples_per_second:
            yield "examples per second", f"{plan.examples_per_second:,.4g}"
        if plan.mfu_estimate is not None:
            yield "model FLOPs, of the peak (MFU)", f"{plan.mfu_estimate:.1%}"
        if plan.days is not None:
            yield "days for the config's steps", f"{plan.days:.3g}"

    return _pairs("time of a step, by arithmetic", rows())


def _collectives(plan: Plan) -> Table:
    table = Table("collective", title="exchanges of a step, of each device")
    table.add_column("serves", overflow="fold")
    for column in ("among", "times", "bytes", "sent"):
        table.add_column(column, justify="right")
    for kind, entry in sorted(plan.collectives.items(), key=lambda item: -item[1]["sent"]):
        table.add_row(kind, "", "", f"{entry['count']:.0f}", gib(entry["bytes"]), gib(entry["sent"]))
    table.add_section()
    for one in plan.exchanged:
        sizes = (str(one["among"]), str(one["count"]), gib(one["bytes"]), gib(one["sent"]))
        table.add_row(one["kind"], one["serves"], *sizes)
    return table


def _hot(plan: Plan) -> Table:
    table = Table(title="where the time goes")
    table.add_column("instruction", overflow="fold")
    table.add_column("of", overflow="fold")
    table.add_column("bound by")
    table.add_column("runs", justify="right")
    table.add_column("in a step", justify="right")
    for one in plan.roofline["hot"]:
        row = (one["name"], short_path(one["op_name"]), one["bound"], str(one["times"]), duration(one["seconds"]))
        table.add_row(*row)
    return table


def ranking(found: Sequence[tuple[str, Plan | None, str]]) -> Table:
    """Returns the table of a search.

    Args:
      found: settings as options of the command line, their plan, and a word on those that were not compiled.
    """
    table = Table(title="the fastest first, of those that fit")
    table.add_column("options", overflow="fold")
    for column in ("a chip", "left", "step", "MFU", "all-to-alls"):
        table.add_column(column, justify="right")
    for settings, plan, word in found:
        if plan is None:
            table.add_row(settings, word, "", "", "", "")
            continue
        step = duration(plan.step_seconds_estimate) if plan.step_seconds_estimate else ""
        mfu = f"{plan.mfu_estimate:.1%}" if plan.mfu_estimate is not None else ""
        across = f"{plan.collectives.get('all-to-all', {}).get('count', 0):.0f}"
        left = f"{plan.headroom:.1%}" if plan.fits else "does not fit"
        table.add_row(settings, gib(plan.bytes_per_chip), left, step, mfu, across)
    return table
