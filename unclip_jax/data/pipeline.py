"""Batches in an order that is a function of (seed, step, host): the whole state of the input is one integer, the step.

The endless stream of examples is one shuffle of the data set after another, each a function of seed and epoch.
Global batch `step` is positions [step * G, (step + 1) * G) of that stream, and host h of P reads the h-th of P equal
runs of it; so the hosts' batches laid end to end are the same global batch for every P, and neither the number of
workers nor where a run was stopped can change it.
"""

import json
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from absl import flags

from unclip_jax.data import order, sources
from unclip_jax.data.embeddings import Embeddings
from unclip_jax.data.examples import Bad, CachedExamples, Examples, Fields, Preparation
from unclip_jax.data.sources import Source
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError, nearest

_LOG = logging.getLogger(__name__)
CACHES = ("none", "memory")
Spec = Mapping[str, jax.ShapeDtypeStruct]

# Batches that are made ahead, by each reader.
_AHEAD = 4
# Grain wants a range of steps to end.
_NO_LAST_STEP = 1 << 40


class Batches(Iterator[Fields]):
    """Iterator over a host's batches, `{field: array [local batch, ...]}`.

    Attributes:
      bad: example index -> `Bad`, for every example found unusable so far, on this host.
    """

    def __init__(self, batches: grain.IterDataset, *, examples: int, max_bad_fraction: float):
        self.bad: dict[int, Bad] = {}
        self._allowed = int(max_bad_fraction * examples)
        # Held so that it can be let go while Python is still whole: Grain's iterators fail, loudly, in their `__del__`
        # when they are collected after Python has begun to take itself apart. A finalizer runs before that.
        self._iterators = [iter(batches)]
        self._end = weakref.finalize(self, _end, self._iterators)

    @property
    def bad_count(self) -> int:
        """Number of different examples that were skipped so far."""
        return len(self.bad)

    def __next__(self) -> Fields:
        if not self._iterators:
            raise StopIteration
        fields, found = next(self._iterators[0])
        self._note([Bad(*one) for one in json.loads(found)])
        if not fields:
            raise InputError(f"no usable example was found in place of a bad one; bad are {self._names()}")
        return fields

    def close(self) -> None:
        """Ends the threads or processes that read ahead; no batch comes after it."""
        self._end()

    def _note(self, found: Sequence[Bad]) -> None:
        for one in found:
            if one.index not in self.bad:
                self.bad[one.index] = one
                _LOG.warning("example %d (%s) is skipped: %s", one.index, one.name, one.reason)
        if len(self.bad) > self._allowed:
            raise InputError(
                f"{len(self.bad)} examples cannot be used, more than the {self._allowed} that max_bad_fraction allows: "
                f"{self._names()}"
            )

    def _names(self) -> str:
        shown = [f"{one.index} ({one.name}): {one.reason}" for one in list(self.bad.values())[:5]]
        return "; ".join(shown) + ("; ..." if len(self.bad) > 5 else "")


def _end(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def training_batches(
    source: Source,
    *,
    spec: Spec,
    tokenizer: Tokenizer | None,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    cache: str = "none",
    resize: str = "area",
    crop: float = 1.0,
    flip: float = 0.0,
    degradation: str = "none",
    embeddings: Embeddings | None = None,
    max_bad_fraction: float = 0.01,
) -> Batches:
    """Returns an endless iterator over this host's batches, beginning with that of step `start_step`.

    Args:
      source: random access to records with `image`, `caption` and `id`; a `sources.Mixture` for several data sets.
      spec: field -> shape and dtype with the GLOBAL batch dimension first; `examples.FIELDS` are known.
      tokenizer: for `tokens` and `clip_tokens`; None where the spec has neither.
      seed: of the order and of all that is drawn, in [0, 2**32).
      batch_size: examples in a global batch, as in `spec`.
      start_step: number of batches that were already used.
      host_index: this process, in [0, host_count).
      host_count: processes that share each global batch; divides `batch_size`.
      workers: processes that decode; 0 for threads of this process.
      threads: threads that decode, in this process or in each worker.
      cache: "memory" decodes every example once, before the first batch, and needs `workers=0`; "none" does not.
      resize: filter for shrinking, "area" or "bicubic".
      crop: side of the random window that `image` is, as a fraction of the whole image's.
      flip: probability of mirroring left and right.
      degradation: what `low_res` suffers, a key of `degradations.DEGRADATIONS`.
      embeddings: of the source's examples, for `z_i` and `z_t`; None where the spec has neither.
      max_bad_fraction: fraction of the data set's examples that may be unusable. A bad example is named in the log and
        replaced by another one, which is a function of its index.

    Raises:
      InputError: bad arguments; later, while iterating, too many bad examples.
    """
    local = _local_size(spec, batch_size=batch_size, host_index=host_index, host_count=host_count)
    if not 0 <= seed < 2**32:
        raise InputError(f"the data seed is {seed}; it must be from 0 to {2**32 - 1}")
    if start_step < 0:
        raise InputError(f"start_step is {start_step}; it counts batches already used, from 0")
    if cache not in CACHES:
        raise InputError(f"no cache {cache!r}; {nearest(cache, CACHES)}")
    if cache == "memory" and workers:
        raise InputError(f"cache='memory' leaves nothing for {workers} workers to do: set workers to 0")
    preparation = Preparation(
        shapes=_shapes(spec), seed=seed, resize=resize, crop=crop, flip=flip, degradation=degradation
    )
    make = CachedExamples if cache == "memory" else Examples
    examples = make(source, preparation=preparation, tokenizer=tokenizer, embeddings=embeddings)
    make_batch = _TrainingBatch(
        examples, seed=seed, size=local, first=host_index * local, stride=batch_size
    )
    batches = grain.MapDataset.range(start_step, _NO_LAST_STEP).map(make_batch)
    reading = _read_ahead(batches, workers=workers, threads=threads)
    return Batches(reading, examples=len(examples), max_bad_fraction=max_bad_fraction)


def evaluation_batches(
    source: Source,
    *,
    spec: Spec,
    tokenizer: Tokenizer | None,
    batch_size: int,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    resize: str = "area",
    crop: float = 1.0,
    degradation: str = "none",
    label: str = "",
    max_bad_fraction: float = 0.01,
) -> Batches:
    """Returns an iterator over this host's part of each example once, in the order of the source or a random one.

    Every batch has a further field `mask`, bool [b]: False where the last batch is filled up and where an example
    cannot be used; all other fields are 0 there. Hosts' batches laid end to end are the global batch, and every host
    gets the same number of batches. What is drawn depends on the example's index alone.

    Args:
      limit: number of examples from the beginning; None for all.
      shuffle_seed: examples come in the order of training's first epoch under this seed, so that `limit` takes a random
        part; None for the order of the source.
      label: feature of the records that the field `label` is read from (`examples.only_class`), -1 for no label.
      Others as in `training_batches`.

    Raises:
      InputError: as `training_batches`.
    """
    local = _local_size(spec, batch_size=batch_size, host_index=host_index, host_count=host_count)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be 1 or more")
    preparation = Preparation(
        shapes=_shapes(spec), seed=0, resize=resize, crop=crop, degradation=degradation, label=label
    )
    examples = Examples(source, preparation=preparation, tokenizer=tokenizer)
    count = min(len(examples), limit or len(examples))
    starts = grain.MapDataset.range(host_index * local, -(-count // batch_size) * batch_size, batch_size)
    batches = starts.map(_EvaluationBatch(examples, count=count, size=local, shuffle_seed=shuffle_seed))
    reading = _read_ahead(batches, workers=workers, threads=threads)
    return Batches(reading, examples=count, max_bad_fraction=max_bad_fraction)


def chunks(
    source: Source,
    *,
    spec: Spec,
    tokenizer: Tokenizer | None,
    starts: Sequence[int],
    size: int,
    workers: int = 0,
    threads: int = 2,
) -> Batches:
    """Returns an iterator over examples [start, start + size) for each start, in the order of the source, unchanged.

    Beyond the last example, and where one cannot be used, fields are 0 and `mask` False, as in `evaluation_batches`.
    """
    _local_size(spec, batch_size=size, host_index=0, host_count=1)
    examples = Examples(source, preparation=Preparation(shapes=_shapes(spec), seed=0), tokenizer=tokenizer)
    make = _EvaluationBatch(examples, count=len(examples), size=size, shuffle_seed=None)
    reading = _read_ahead(grain.MapDataset.source(list(starts)).map(make), workers=workers, threads=threads)
    return Batches(reading, examples=len(examples), max_bad_fraction=1.0)


# Classes, not closures: they travel to worker processes.
class _TrainingBatch:
    """Maps a step to this host's batch of it."""

    def __init__(self, examples: Examples, *, seed: int, size: int, first: int, stride: int):
        self.examples = examples
        self.seed = seed
        self.size = size
        self.first = first
        self.stride = stride

    def __call__(self, step: int) -> tuple[Fields, str]:
        begin = step * self.stride + self.first
        positions = np.arange(begin, begin + self.size, dtype=np.int64)
        epochs, indices = sources.shuffled(self.examples.source, positions, seed=self.seed)
        fields, bad = self.examples.batch(list(zip(epochs.tolist(), indices.tolist(), strict=True)))
        return fields or {}, _as_json(bad)


class _EvaluationBatch:
    def __init__(self, examples: Examples, *, count: int, size: int, shuffle_seed: int | None):
        self.examples = examples
        self.count = count
        self.size = size
        self.shuffle_seed = shuffle_seed

    def __call__(self, start: int) -> tuple[Fields, str]:
        there = list(range(start, min(start + self.size, self.count)))
        if self.shuffle_seed is not None:
            _, shuffled = order.shuffled(np.array(there, np.int64), count=len(self.examples), seed=self.shuffle_seed)
            there = shuffled.tolist()
        made, bad = self.examples.batch_as_is(there)
        missing = self.size - len(there)
        fields = {name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) for name, values in made.items()}
        return fields, _as_json(bad)


def _as_json(bad: Sequence[Bad]) -> str:
    return json.dumps([[one.index, one.name, one.reason] for one in bad])


def _local_size(spec: Spec, *, batch_size: int, host_index: int, host_count: int) -> int:
    """Checks the sizes against each other and returns the number of examples in a host's batch."""
    for name, field in spec.items():
        if field.shape[0] != batch_size:
            raise InputError(f"field {name!r} has {field.shape[0]} examples, but the batch size is {batch_size}")
    if not 0 <= host_index < host_count:
        raise InputError(f"host {host_index} of {host_count} does not exist")
    if batch_size < 1 or batch_size % host_count:
        raise InputError(f"a batch of {batch_size} examples does not divide over {host_count} hosts")
    return batch_size // host_count


# Of the others: uint8.
_DTYPES = {
    **{"id": "uint32", "label": "int32", "tokens": "int32", "clip_tokens": "int32"},
    **{"z_i": "float32", "z_t": "float32"},
}


def _shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Checks the dtypes and returns field -> shape of one example."""
    for name, field in spec.items():
        needed = np.dtype(_DTYPES.get(name, "uint8"))
        if field.dtype != needed:
            raise InputError(f"field {name!r} is {field.dtype} in the spec, but the data is {needed}")
    return {name: tuple(field.shape[1:]) for name, field in spec.items()}


def _read_ahead(batches: grain.MapDataset, *, workers: int, threads: int) -> grain.IterDataset:
    if workers < 0 or threads < 1:
        raise InputError(f"{workers} workers with {threads} threads: workers must be 0 or more, threads 1 or more")
    reading = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD))
    if workers == 0:
        return reading
    # Grain reads its own absl flags when it starts processes, and a program without absl.app never parses them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return reading.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
