"""Evaluators: named measurements of a model, shared by the training loop and the evaluation job.

Each is a class with `run(params, frozen)` that yields (name, value) pairs: a float, or a picture, uint8 [h, w, 3]. It
sees the model only through its `predict` functions. A new one is a class and its line in TABLE.
"""

import abc
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from ml_collections import ConfigDict

from unclip_jax.errors import InputError, nearest

Batch = dict[str, Any]


@runtime_checkable
class Data(Protocol):
    """Yields batches of the evaluation split for a spec, in order, the last one filled up (`mask` False)."""

    def __call__(
        self, spec: Mapping[str, jax.ShapeDtypeStruct], *, limit: int, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]: ...


class Evaluator(abc.ABC):
    """What every evaluator is given.

    Attributes:
      predict: the stage's jitted functions by name.
      specs: what each of them reads.
      data: source of evaluation batches.
      put: places a host batch on the devices.
      config: `config.evaluation`.
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
    ):
        self.predict, self.specs, self.data, self.put, self.config = predict, specs, data, put, config

    def batches(self, *names: str) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (device batch, mask of the global batch) with the fields that the named functions read."""
        spec: dict[str, jax.ShapeDtypeStruct] = {}
        for name in names:
            spec |= self.specs[name]
        for batch in self.data(spec, limit=self.config.examples, batch_size=self.config.batch_size):
            placed = self.put(batch)
            yield placed, self.get(placed.pop("mask"))

    def get(self, x: jax.Array | np.ndarray) -> np.ndarray:
        """Returns all of an array that is spread over devices and hosts; every host must ask."""
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    @abc.abstractmethod
    def run(self, params: Any, frozen: Any) -> Iterator[tuple[str, float | np.ndarray]]:
        """Measures."""


class Loss(Evaluator):
    """The stage's loss and its parts on the evaluation split; only whole batches count."""

    needs = ("loss",)

    def run(self, params, frozen):
        sums: dict[str, np.ndarray] = {}
        for number, (batch, mask) in enumerate(self.batches("loss")):
            if not mask.all():
                continue
            loss, parts = jax.device_get(self.predict["loss"](params, frozen, batch, jax.random.key(number)))
            for name, value in {"loss": loss, **parts}.items():
                pair = np.asarray(value if isinstance(value, tuple) else (value, 1.0), np.float64)
                sums[name] = sums.get(name, 0) + pair
        for name, (total, count) in sums.items():
            if count:
                yield name, total / count


class Retrieval(Evaluator):
    """CLIP: the share of images whose own caption is the nearest of all (R@1) or among five (R@5)."""

    needs = ("z_i", "z_t")

    def run(self, params, frozen):
        z_i, z_t = [], []
        for batch, mask in self.batches("z_i", "z_t"):
            key = jax.random.key(0)
            z_i.append(self.get(self.predict["z_i"](params, frozen, batch, key))[mask])
            z_t.append(self.get(self.predict["z_t"](params, frozen, batch, key))[mask])
        likeness = np.concatenate(z_i) @ np.concatenate(z_t).T
        # Ties go by the order of the captions: a model that says always the same is at chance, not perfect.
        order = np.argsort(-likeness, axis=1, kind="stable")
        better = np.argmax(order == np.arange(len(order))[:, None], 1)
        for k in (1, 5):
            yield f"image_to_text_r{k}", float((better < k).mean())


class Embedding(Evaluator):
    """Priors: the cosine between a sampled z_i and the true one, and the chance level, that of another caption."""

    needs = ("sample_z_i", "z_i")

    def run(self, params, frozen):
        own, other = [], []
        for number, (batch, mask) in enumerate(self.batches("sample_z_i", "z_i")):
            key = jax.random.key(number)
            sampled = self.get(self.predict["sample_z_i"](params, frozen, batch, key))[mask]
            true = self.get(self.predict["z_i"](params, frozen, batch, key))[mask]
            own.append((sampled * true).sum(-1))
            other.append((sampled * np.roll(true, 1, axis=0)).sum(-1))
        yield "cosine", float(np.concatenate(own).mean())
        yield "cosine_of_others", float(np.concatenate(other).mean())


class Pictures(Evaluator):
    """Images made from what the evaluation split gives (z_i and caption, or a low-resolution image), as a grid."""

    needs = ("reconstruct",)

    def run(self, params, frozen):
        batch, mask = next(self.batches("reconstruct"))
        images = self.get(self.predict["reconstruct"](params, frozen, batch, jax.random.key(0)))
        yield "samples", grid(images[mask][:64])


def grid(images: UInt8[np.ndarray, "n h w 3"], *, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lays images out in rows on white, uint8 [H, W, 3]."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


TABLE: dict[str, type[Evaluator]] = {
    "loss": Loss,
    "retrieval": Retrieval,
    "embedding": Embedding,
    "pictures": Pictures,
}


def create(name: str, *, predict, specs, data: Data, put, config: ConfigDict) -> Evaluator:
    """Returns the evaluator of that name.

    Raises:
      InputError: no such evaluator, or the stage lacks a function that it needs.
    """
    if name not in TABLE:
        raise InputError(f"config.evaluation.evaluators has {name!r}; {nearest(name, TABLE)}")
    missing = [need for need in TABLE[name].needs if need not in predict]
    if missing:
        raise InputError(f"evaluator {name!r} needs {missing[0]!r}, which this stage does not predict; take it out")
    return TABLE[name](predict=predict, specs=specs, data=data, put=put, config=config)
