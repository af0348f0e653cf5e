"""What an evaluator is, and what it is given."""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int32
from ml_collections import ConfigDict

Batch = dict[str, Any]
# (captions, context length) -> token ids, int32 [b, context length]
Tokenize = Callable[[Sequence[str], int], Int32[np.ndarray, "b n"]]


@runtime_checkable
class Data(Protocol):
    """The examples that evaluators may read, by source.

    "evaluation" is the evaluation split; "labelled" and "labelled_training" are examples with class labels, those to
    be measured on and those to be trained on.
    """

    def batches(
        self, spec: Mapping[str, jax.ShapeDtypeStruct], *, source: str, limit: int, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's part of batches for a spec, the last one filled up (`mask` False).

        The first `limit` examples of the source in its order, or of "labelled_training" as many drawn at random, the
        same each time. Labelled sources have the field `label`, -1 where an example has none.
        """

    def count(self, source: str) -> int:
        """Examples in a source; raises InputError where it cannot be read."""

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label; raises InputError where the data has no such labels."""


class Evaluator(abc.ABC):
    """A named measurement of a model, which it sees through the stage's `predict` functions only.

    Attributes:
      needs: names of the functions that it calls.
      predict: the stage's jitted functions by name.
      specs: what each of them reads.
      data: source of examples.
      put: places a host batch on the devices.
      config: `config.evaluation`.
      tokenize: captions to token ids as the model reads them; None where it reads none.
      between: called before each batch, equally often on all hosts; raises where the evaluation shall end.
    """

    needs: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        predict: Mapping[str, Callable[..., Any]],
        specs: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
        data: Data,
        put: Callable[[Mapping[str, np.ndarray]], Batch],
        config: ConfigDict,
        tokenize: Tokenize | None = None,
        between: Callable[[], None] = lambda: None,
    ):
        self.predict, self.specs, self.data, self.put, self.config = predict, specs, data, put, config
        self.tokenize, self.between = tokenize, between

    def check(self) -> None:
        """Looks at config and data before a run writes anything; raises InputError where they do not do."""
        self.data.count("evaluation")

    @abc.abstractmethod
    def run(self, params: Any, frozen: Any) -> Iterator[tuple[str, float | np.ndarray]]:
        """Measures; yields (name, value) pairs, a value being a number or a picture, uint8 [h, w, 3]."""

    def host_batches(self, *names: str, source: str = "evaluation", limit: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's part of batches with the fields that the named functions read, and `mask`."""
        size = self.config.batch_size
        spec = {field: value for name in names for field, value in self.specs[name].items()}
        if source != "evaluation":
            spec["label"] = jax.ShapeDtypeStruct((size,), np.int32)
        for batch in self.data.batches(spec, source=source, limit=limit or self.config.examples, batch_size=size):
            self.between()
            yield batch

    def batches(self, *names: str) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (device batch, mask of the global batch) of the evaluation split."""
        for batch in self.host_batches(*names):
            placed = self.put(batch)
            yield placed, self.get(placed.pop("mask"))

    def call(self, name: str, params: Any, frozen: Any, batch: Batch, *, key: int = 0) -> Any:
        """Calls a predict function with the fields that it reads, so that it is compiled once for all evaluators."""
        fields = {field: batch[field] for field in self.specs[name]}
        return self.predict[name](params, frozen, fields, jax.random.key(key))

    def get(self, x: jax.Array | np.ndarray) -> np.ndarray:
        """Returns all of an array that is spread over devices and hosts; every host must ask."""
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
