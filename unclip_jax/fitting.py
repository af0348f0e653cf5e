"""Sums over the training data, bit for bit the same for any number of hosts: what is measured before the first step.

The examples are cut into parts, whose size follows from their number alone. One process reads a part, computes on it 64
examples at a time, each 64 on one device, and measures it in float64; then all processes add up the parts in the order
of their numbers. So each sum is the same operations in the same order, whoever does them, as long as devices, libraries
and the hosts' processors are of one kind. A process holds the embeddings of one part, at most 16,384 examples, and
the sums of its own parts.
"""

import collections
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from unclip_jax import metrics

CHUNK = 64  # examples of one call, so of one compiled program
_PARTS = 64  # at least, where there are so many chunks: more hosts than parts would have nothing to do
_MOST_CHUNKS = 256  # of a part


@runtime_checkable
class Chunks(Protocol):
    """An iterator over chunks: {field: array [CHUNK, …]}, endless."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


class OverData:
    """The sums over the first `examples` of a stream, see `stages.base.OverData`."""

    def __init__(
        self,
        read: Callable[[int], Chunks],
        frozen: Any,
        *,
        spec: Mapping[str, jax.ShapeDtypeStruct],
        examples: int,
        devices: Sequence[jax.Device],
        stop: Callable[[], None] = lambda: None,
    ):
        """Reads nothing yet.

        Args:
          read: fn(n) -> the stream from its n-th chunk on.
          frozen: what `compute` is given, wherever it lies; every device gets a copy of all of it.
          spec: of a chunk.
          examples: how many there are, rounded up to whole chunks.
          devices: of this process.
          stop: called after each chunk; raises where the program shall end.
        """
        self._read, self._frozen, self._spec, self._devices, self._stop = read, frozen, spec, devices, stop
        self._examples = examples
        self._copies: list[Any] = []
        self._passes = 0
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        compute: Callable[[Any, Any], tuple[jax.Array, ...]],
        measure: Callable[..., Any],
        *,
        limit: int | None = None,
    ) -> Any:
        chunks = -(-min(self._examples, limit or self._examples) // CHUNK)
        size = min(_MOST_CHUNKS, -(-chunks // _PARTS))
        parts = [range(first, min(first + size, chunks)) for first in range(0, chunks, size)]
        hosts, here = jax.process_count(), jax.process_index()
        own = [parts[number] for number in range(len(parts)) if number * hosts // len(parts) == here]
        if not self._copies:  # by all hosts, also those without a part
            everything = whole(self._frozen)
            self._copies = [jax.device_put(everything, device) for device in self._devices]
        self._passes += 1
        measured = self._measured(compute, measure, own)
        shapes = jax.eval_shape(compute, self._frozen, dict(self._spec))
        nothing = measure(*(np.zeros((0, *x.shape[1:]), x.dtype) for x in shapes))
        # With other hosts, first everybody measures: nobody waits for a part while there is work.
        ready: Iterator[Any] = iter(list(measured)) if hosts > 1 else measured
        total = nothing
        for number in range(len(parts)):
            owner = number * hosts // len(parts)
            part = from_host(owner, next(ready) if owner == here else nothing)
            total = jax.tree.map(np.add, total, part)
        measured.close()
        return total

    def _measured(self, compute, measure, parts: Sequence[range]) -> Generator[Any, None, None]:
        """Yields what `measure` returns for each of some consecutive parts."""
        if not parts:
            return
        total = sum(len(part) for part in parts) * CHUNK
        progress = metrics.Progress(f"statistics, pass {self._passes}", start=0, total=total, examples_per_step=1)
        stream = self._read(parts[0].start)
        done, shown = 0, time.monotonic()
        try:
            for part in parts:
                made = list(self._computed(compute, stream, len(part)))
                done += len(part) * CHUNK
                if time.monotonic() - shown > 5 or done == total:
                    progress.report(done, {})
                    shown = time.monotonic()
                yield measure(*(np.concatenate(arrays) for arrays in zip(*made, strict=True)))
        finally:
            progress.close()
            stream.close()

    def _computed(self, compute, stream: Chunks, count: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the arrays of the next chunks in order, computed on the devices in turn."""
        program = self._compiled.setdefault(compute, jax.jit(compute))
        pending: collections.deque[Any] = collections.deque()
        for number in range(count):
            device = number % len(self._devices)
            pending.append(program(self._copies[device], jax.device_put(next(stream), self._devices[device])))
            self._stop()
            if len(pending) > 2 * len(self._devices):  # or inputs would pile up on the devices
                yield jax.device_get(pending.popleft())
        yield from map(jax.device_get, pending)


def from_host(host: int, tree: Any) -> Any:
    """Returns one host's tree of NumPy arrays on all hosts, which call this together with trees of these shapes."""
    if jax.process_count() == 1:
        return tree

    def one(x):
        x = np.asarray(x)
        # As bytes: JAX would make 64-bit numbers 32-bit ones.
        sent = np.frombuffer(x.tobytes(), np.uint8)
        got = multihost_utils.broadcast_one_to_all(sent, is_source=jax.process_index() == host)
        return np.frombuffer(np.asarray(got).tobytes(), x.dtype).reshape(x.shape)

    return jax.tree.map(one, tree)


def whole(tree: Any) -> Any:
    """Returns arrays that may be spread over devices and hosts as NumPy arrays; every host must ask."""
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
