"""Calls parts' predict functions on any number of examples: in batches of one size, compiled once, and timed."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from unclip_jax import sharding
from unclip_jax.errors import InputError
from unclip_jax.parts import STAGES, Part, frozen_of

# Called after each batch with (part, examples done, examples in all).
Progress = Callable[[str, int, int], None]
# Part -> the noise [n, ...] that its sampling starts from, and that [n, steps, ...] of its steps (`stages.base.noise`),
# None where that is drawn.
Noise = Mapping[str, tuple[np.ndarray, np.ndarray | None]]
# Part -> optional fields [n, ...] of its functions, such as a known part of the images (`stages.inpainting.given`).
Extra = Mapping[str, Mapping[str, np.ndarray]]


class Drawing(TypedDict, total=False):
    """How n things are drawn; may all be left out.

    Attributes:
      seed: any integer from 0 to 2^32 - 1; 0 by default.
      ids: n integers, uint32, which with the seed name the noise; 0 … n - 1 by default.
      noise: by part, what is given in its place.
      extra: by part, fields that it reads besides.
      progress: called with (part, things done, n) after each batch.
    """

    seed: int
    ids: Sequence[int] | None
    noise: Noise | None
    extra: Extra | None
    progress: Progress | None


@dataclasses.dataclass
class Timing:
    """What one part has taken so far: compilation apart, then seconds of work for that many images."""

    compile_seconds: float = 0.0
    seconds: float = 0.0
    images: int = 0


class Predictor:
    """The predict functions of some parts, on all devices of this host."""

    def __init__(self, parts: Mapping[str, Part], *, microbatch: int, mesh: jax.sharding.Mesh):
        """Takes parts by name, the examples per call, rounded up so that devices have equal shares, and the devices."""
        self._parts = parts
        self.timings = {name: Timing() for name in parts}
        self._mesh = mesh
        replicas = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        self.microbatch = math.ceil(microbatch / replicas) * replicas
        self._programs: dict[tuple[str, str, Any], Any] = {}

    def share(self, other: "Predictor") -> None:
        """Takes over what another one, for batches as large, has compiled of parts that are the same ones here."""
        if (other._mesh, other.microbatch) == (self._mesh, self.microbatch):
            same = {name for name, part in self._parts.items() if other._parts.get(name) is part}
            self._programs |= {key: program for key, program in other._programs.items() if key[0] in same}

    def run(
        self,
        name: str,
        function: str,
        fields: Mapping[str, np.ndarray],
        **drawing: Unpack[Drawing],
    ) -> np.ndarray:
        """Runs one predict function over n examples in microbatches, the last one filled up."""
        ids, noise, progress = drawing.get("ids"), drawing.get("noise"), drawing.get("progress")
        part, timing = self._parts[name], self.timings[name]
        count = len(next(iter(fields.values()))) if fields else len(ids or ())
        numbers = np.asarray(range(count) if ids is None else ids, np.uint32)
        if len(numbers) != count:
            raise InputError(f"{len(numbers)} ids were given for {count} examples; give one for each")
        if not count:
            raise InputError("there is nothing to make: give at least one caption, embedding or image")
        numbered = "id" in part.stage.predict_specs(self.microbatch)[function]
        whole = {**fields, **(drawing.get("extra") or {}).get(name, {}), **({"id": numbers} if numbered else {})}
        if noise and name in noise:
            given = zip(("x_T", "noise"), noise[name], strict=True)
            whole |= {field: np.asarray(x, np.float32) for field, x in given if x is not None}
        rng = jax.random.fold_in(jax.random.key(drawing.get("seed", 0)), list(STAGES).index(name))
        made = []
        for start in range(0, count, self.microbatch):
            rows = np.minimum(np.arange(start, start + self.microbatch), count - 1)
            batch = {field: np.ascontiguousarray(values[rows]) for field, values in whole.items()}
            program = self._program(part, function, batch, rng)
            began = time.monotonic()
            result = np.asarray(program(batch, rng))
            done = min(self.microbatch, count - start)
            made.append(result[:done])
            timing.seconds += time.monotonic() - began
            timing.images += done
            if progress:
                progress(name, start + done, count)
        return np.concatenate(made)

    def _program(
        self, part: Part, function: str, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> Callable[[Mapping[str, np.ndarray], jax.Array], jax.Array]:
        """Returns the compiled predict function as fn(batch, rng); compiled once for each shape of batch."""
        placed = sharding.batch_sharding(self._mesh)
        same = sharding.replicated(self._mesh)
        frozen = {known: self._parts[name].params for known, name in frozen_of(part, self._parts).items()}
        frozen["statistics"] = part.statistics
        key = (part.name, function, tuple((field, x.shape) for field, x in batch.items()))
        if key not in self._programs:
            began = time.monotonic()
            fn = jax.jit(sharding.traced_on(self._mesh, part.config.sharding, part.stage.predict_fns()[function]))
            abstract = {f: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for f, x in batch.items()}
            rng_like = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=same)
            self._programs[key] = fn.lower(part.params, frozen, abstract, rng_like).compile()
            self.timings[part.name].compile_seconds += time.monotonic() - began
        program = self._programs[key]
        return lambda batch, rng: program(
            part.params, frozen, sharding.put_batch(batch, placed), jax.device_put(rng, same)
        )
