"""Times our networks against diffusers' on the CPU, on the same weights and inputs, in turn.

  python tests/benchmarks/torch_speed.py                       the table
  python tests/benchmarks/torch_speed.py --only=prior --repeats=15 --json=speed.json

Each row is a network doing one thing: a forward pass, a forward and a backward pass, or 10 sampling steps under
guidance. Both sides are first held to each other, then run in turn, A B A B; a ratio is of medians, above 1 where ours
is faster. Both take all the cores that they find, and torch runs as diffusers does, without torch.compile.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.schedulers import scheduling_unclip

# The tests' tables of weights, and the package where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import pairs
from parity import torch_modules, weights

from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.gaussian import GaussianDiffusion
from unclip_jax.diffusion.guidance import classifier_free

STEPS = 10
# Largest difference over the largest number. Both sides are float32 and add millions of products in their own order;
# sampling feeds the outcome back ten times.
TOLERANCE = {"forward": 1e-4, "forward and backward": 1e-3, "sampling": 1e-2}


class Work(NamedTuple):
    """The same on both sides, each of which does it and returns trees that can be compared."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def tensors(arrays: pairs.Arrays) -> list[torch.Tensor]:
    return [torch.tensor(array) for array in arrays]


def works(pair: pairs.Pair, compiled: Callable[..., Any]) -> Iterator[Work]:
    half = len(pair.x)  # conditions are of twice as many: what to go toward, then what to go away from
    toward, away = ([part[rows] for part in pair.conditions] for rows in (slice(half), slice(half, None)))
    arrays = jax.tree.map(jnp.asarray, (pair.x, pair.t, *toward))
    given = tensors([pair.x, pair.t, *toward])

    def forward_theirs() -> np.ndarray:
        with torch.no_grad():
            return pair.predict_theirs(*given).numpy()

    forward = compiled(pair.predict)
    yield Work("forward", lambda: forward(pair.params, *arrays), forward_theirs)

    def loss(params: Any, *arrays: jax.Array) -> jax.Array:
        return jnp.square(pair.predict(params, *arrays)).mean()

    def gradient_theirs() -> Any:
        pair.theirs.zero_grad(set_to_none=True)
        pair.predict_theirs(*given).square().mean().backward()
        return pair.theirs

    gradient = compiled(jax.grad(loss))
    yield Work("forward and backward", lambda: gradient(pair.params, *arrays)["params"], gradient_theirs)

    process = GaussianDiffusion.create(tables="float32", **pair.process)
    keys = jax.random.split(jax.random.key(0), half)

    def sample(params: Any, x: jax.Array, toward: Any, away: Any) -> jax.Array:
        read = [pair.read(params, *condition) for condition in (toward, away)]

        def denoise(x, t, condition):
            return pair.denoise(params, condition, x, t)

        guided = classifier_free(denoise, *read, scale=4.0, guided_channels=pair.channels)
        return samplers.sample(process, guided, x, keys, timesteps=STEPS)

    conditions = jax.tree.map(jnp.asarray, (toward, away))
    noise = [np.asarray(samplers.draw_noise(keys, pair.x.shape[1:], step=step)) for step in range(STEPS)]
    theirs = sample_theirs(pair, tensors(pair.conditions), tensors(noise))
    sampled = compiled(sample)
    yield Work("sampling", lambda: sampled(pair.params, arrays[0], *conditions), theirs)


def sample_theirs(pair: pairs.Pair, conditions: list[torch.Tensor], noise: list[torch.Tensor]) -> Callable[[], Any]:
    """A pipeline's loop, but for the noise, which is drawn before, as ours draws it."""

    def guided(x: torch.Tensor, t: int) -> torch.Tensor:
        toward, away = pair.predict_theirs(torch.cat([x, x]), torch.tensor(t), *conditions).chunk(2)
        channels = pair.channels or toward.shape[-1]
        steered = away[..., :channels] + 4.0 * (toward[..., :channels] - away[..., :channels])
        return torch.cat([steered, toward[..., channels:]], -1)

    def run() -> np.ndarray:
        pair.scheduler.set_timesteps(STEPS)
        timesteps, x, draws = pair.scheduler.timesteps.tolist(), torch.tensor(pair.x), iter(noise)
        # The scheduler looks for channels on axis 1.
        drawn = scheduling_unclip.randn_tensor
        scheduling_unclip.randn_tensor = lambda *_, **__: next(draws).movedim(-1, 1)
        with torch.no_grad():
            for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
                output = guided(x, t).movedim(-1, 1)
                x = pair.scheduler.step(output, t, x.movedim(-1, 1), prev_timestep=previous).prev_sample.movedim(1, -1)
        scheduling_unclip.randn_tensor = drawn
        return x.numpy()

    return run


def difference(pair: pairs.Pair, ours: Any, theirs: Any) -> float:
    """The largest, over the largest number; of gradients, of each of our weights."""
    if isinstance(theirs, torch.nn.Module):
        gradients = torch_modules.gradients(theirs, without=pair.without)
        ours = weights.flatten(ours)
        theirs = weights.flatten(weights.to_ours(pair.table, gradients, without=pair.without))
    return max(
        float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def measure(pair: pairs.Pair, work: Work, repeats: int) -> dict[str, Any]:
    """Checks that both sides agree, then times them in turn; seconds."""
    apart = difference(pair, work.ours(), work.theirs())
    assert apart < TOLERANCE[work.name], f"{pair.name}, {work.name}: the two sides are {apart:.1e} apart"
    seconds: dict[str, list[float]] = {"torch": [], "ours": []}
    for _ in range(repeats):
        for side, run in (("torch", work.theirs), ("ours", work.ours)):
            began = time.perf_counter()
            jax.block_until_ready(run() if side == "ours" else (run(), None)[1])
            seconds[side].append(time.perf_counter() - began)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    best = {side: min(values) for side, values in seconds.items()}
    ratios = {"ratio": medians["torch"] / medians["ours"], "best_ratio": best["torch"] / best["ours"]}
    return {"network": pair.name, "work": work.name, "difference": apart, **ratios, "median": medians, "best": best}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*pairs.PAIRS], help="one of the networks")
    parser.add_argument("--work", choices=[*TOLERANCE], help="one kind of work")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each side")
    parser.add_argument("--json", help="a file for the rows, with medians and best times in seconds")
    parser.add_argument("--xla", action="append", default=[], help="an option of the compiler, name=value; repeatable")
    chosen = parser.parse_args(arguments)
    options = {name: _value(text) for name, text in (option.split("=", 1) for option in chosen.xla)}

    def compiled(function: Callable[..., Any]) -> Any:
        return jax.jit(function, compiler_options=options)

    print("| network | work | torch, s | ours, s | ratio | ratio of the best times |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    for name, make in pairs.PAIRS.items():
        if chosen.only not in (None, name):
            continue
        pair = make()
        for work in works(pair, compiled):
            if chosen.work in (None, work.name):
                row = measure(pair, work, chosen.repeats)
                cells = [f"{row['median'][side]:.3f}" for side in ("torch", "ours")]
                ratios = [f"{row[name]:.2f}" for name in ("ratio", "best_ratio")]
                print(f"| {' | '.join([pair.name, work.name, *cells, *ratios])} |", flush=True)
                rows.append(row)
    if chosen.json:
        pathlib.Path(chosen.json).write_text(json.dumps(rows, indent=1) + "\n")


def _value(text: str) -> Any:
    return {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)


if __name__ == "__main__":
    main(sys.argv[1:])
