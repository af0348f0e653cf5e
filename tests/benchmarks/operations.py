"""Says where the time of `torch_speed.py` goes: each convolution and matrix product of a forward pass by itself.

  python tests/benchmarks/operations.py --only=unet --repeats=5

Collects them from our network's jaxpr, runs each shape alone, in XLA and in torch in turn, and adds up the medians,
each as often as the network has it. Torch's convolutions are of channels-first images, as diffusers has them. The last
row is the whole pass: what it takes beyond its products are norms, activations, softmax and copies.
"""

import argparse
import collections
import pathlib
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from jax.extend import core

# The tests' tables of weights, and the package where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import pairs

KINDS = {"conv_general_dilated": "convolutions", "dot_general": "matrix products"}


def products(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Every product in a jaxpr and how often it runs; of a branch for each kind of device, the CPU's."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in KINDS:
            yield equation, times
        elif name == "cond":  # lax.platform_dependent: the CPU's way is the first
            yield from products(equation.params["branches"][0].jaxpr, times)
        else:
            for value in equation.params.values():
                if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
                    inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
                    yield from products(inner, times * (equation.params["length"] if name == "scan" else 1))


def shape_of(equation: core.JaxprEqn) -> tuple[Any, ...]:
    avals: list[Any] = [variable.aval for variable in equation.invars]
    shapes = tuple(aval.shape for aval in avals)
    return equation.primitive.name, shapes, str(sorted(equation.params.items(), key=lambda item: item[0]))


def theirs(equation: core.JaxprEqn, a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
    """The same product in torch, its arguments laid out as torch likes them."""
    if equation.primitive.name == "conv_general_dilated":
        strides, padding = equation.params["window_strides"], equation.params["padding"]
        x = torch.tensor(a).permute(0, 3, 1, 2).contiguous()
        kernel = torch.tensor(b).permute(3, 2, 0, 1).contiguous()
        assert all(low == high for low, high in padding), "torch pads both sides alike"
        return lambda: torch.nn.functional.conv2d(x, kernel, stride=strides, padding=[low for low, _ in padding])
    (left, right), (batch_left, batch_right) = equation.params["dimension_numbers"]
    letters = iter(string.ascii_lowercase)
    names_a = [next(letters) for _ in a.shape]
    names_b = [next(letters) for _ in b.shape]
    for i, j in [*zip(left, right, strict=True), *zip(batch_left, batch_right, strict=True)]:
        names_b[j] = names_a[i]
    batch = [names_a[i] for i in batch_left]
    free_a = [n for i, n in enumerate(names_a) if i not in (*left, *batch_left)]
    free_b = [n for j, n in enumerate(names_b) if j not in (*right, *batch_right)]
    formula = f"{''.join(names_a)},{''.join(names_b)}->{''.join(batch + free_a + free_b)}"
    x, y = torch.tensor(a), torch.tensor(b)
    return lambda: torch.einsum(formula, x, y)


def ours(equation: core.JaxprEqn, a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
    run = jax.jit(lambda a, b: equation.primitive.bind(a, b, **equation.params))
    x, y = jax.device_put((a, b))
    return lambda: jax.block_until_ready(run(x, y))


def in_turn(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, after a first run."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(repeats + 1):
        for side, run in sides.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[side].append(time.perf_counter() - began)
    return {side: statistics.median(values) for side, values in seconds.items()}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*pairs.PAIRS], help="one of the networks")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    chosen = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    print("| network | in its forward pass | torch, s | ours, s | ratio |\n|---|---|---|---|---|", flush=True)
    for name, make in pairs.PAIRS.items():
        if chosen.only not in (None, name):
            continue
        pair = make()
        given = (pair.params, pair.x, pair.t, *(part[: len(pair.x)] for part in pair.conditions))
        found: dict[Any, list[Any]] = collections.defaultdict(list)
        for equation, times in products(jax.make_jaxpr(pair.predict)(*given).jaxpr):
            found[shape_of(equation)] += [equation] * times
        totals: dict[str, dict[str, float]] = {kind: {} for kind in KINDS.values()}
        for equations in found.values():
            first = equations[0]
            a, b = (rng.standard_normal(variable.aval.shape).astype(np.float32) for variable in first.invars)
            medians = in_turn({"torch": theirs(first, a, b), "ours": ours(first, a, b)}, chosen.repeats)
            for side, seconds in medians.items():
                sums = totals[KINDS[first.primitive.name]]
                sums[side] = sums.get(side, 0.0) + seconds * len(equations)
        for kind, sums in totals.items():
            if sums:
                cells = [f"{sums['torch']:.3f}", f"{sums['ours']:.3f}", f"{sums['torch'] / sums['ours']:.2f}"]
                print(f"| {pair.name} | {kind} | {' | '.join(cells)} |", flush=True)
        whole = of_all(pair, given, chosen.repeats)
        cells = [f"{whole['torch']:.3f}", f"{whole['ours']:.3f}", f"{whole['torch'] / whole['ours']:.2f}"]
        print(f"| {pair.name} | all of it | {' | '.join(cells)} |", flush=True)


def of_all(pair: pairs.Pair, given: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each side's whole forward pass."""
    forward = jax.jit(pair.predict)
    arrays = [torch.tensor(x) for x in given[1:]]

    def run_theirs() -> None:
        with torch.no_grad():
            pair.predict_theirs(*arrays)

    return in_turn({"torch": run_theirs, "ours": lambda: jax.block_until_ready(forward(*given))}, repeats)


if __name__ == "__main__":
    main(sys.argv[1:])
