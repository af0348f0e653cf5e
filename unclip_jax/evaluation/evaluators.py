"""Evaluators: named measurements of a model, shared by the training loop and the evaluation job.

Each is a class with `run(params, frozen)` that yields (name, value) pairs: a float, or a picture, uint8 [h, w, 3]. It
sees the model only through its `predict` functions. A new one is a class (`base.Evaluator`) and its line in TABLE.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from unclip_jax.errors import InputError, nearest
from unclip_jax.evaluation.base import Batch, Data, Evaluator, Tokenize
from unclip_jax.evaluation.classification import ZeroShot
from unclip_jax.evaluation.probes import LinearProbe
from unclip_jax.evaluation.retrieval import Retrieval

_LOG = logging.getLogger(__name__)


class Loss(Evaluator):
    """The stage's loss and its parts on the evaluation split.

    Only whole batches count: the loss of CLIP depends on how many examples stand in a batch, and of no stage can single
    examples be taken out of it.
    """

    needs = ("loss",)

    def check(self):
        size, examples = self.config.batch_size, min(self.data.count("evaluation"), self.config.examples)
        if left := examples % size:
            what = f"leaves out {left} of" if examples > size else "gives no value for"
            _LOG.warning(
                "the evaluator 'loss' %s %d examples: it counts whole batches, and config.evaluation.batch_size is %d",
                what, examples, size,
            )  # fmt: skip

    def run(self, params, frozen):
        sums: dict[str, np.ndarray] = {}
        for number, (batch, mask) in enumerate(self.batches("loss")):
            if not mask.all():
                continue
            loss, parts = jax.device_get(self.call("loss", params, frozen, batch, key=number))
            for name, value in {"loss": loss, **parts}.items():
                pair = np.asarray(value if isinstance(value, tuple) else (value, 1.0), np.float64)
                sums[name] = sums.get(name, 0) + pair
        for name, (total, count) in sums.items():
            if count:
                yield name, total / count


class Embedding(Evaluator):
    """Priors: the cosine between a sampled z_i and the true one, and the chance level, that of another caption."""

    needs = ("sample_z_i", "z_i")

    def run(self, params, frozen):
        own, other = [], []
        for number, (batch, mask) in enumerate(self.batches("sample_z_i", "z_i")):
            sampled = self.get(self.call("sample_z_i", params, frozen, batch, key=number))[mask]
            true = self.get(self.call("z_i", params, frozen, batch, key=number))[mask]
            sampled, true = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (sampled, true))
            own.append((sampled * true).sum(-1))
            other.append((sampled * np.roll(true, 1, axis=0)).sum(-1))
        yield "cosine", float(np.concatenate(own).mean())
        yield "cosine_of_others", float(np.concatenate(other).mean())


class Pictures(Evaluator):
    """Images made from what the evaluation split gives (z_i and caption, or a low-resolution image), as a grid."""

    needs = ("reconstruct",)

    def run(self, params, frozen):
        batch, mask = next(self.batches("reconstruct"))
        images = self.get(self.call("reconstruct", params, frozen, batch))
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
    "zero_shot": ZeroShot,
    "linear_probe": LinearProbe,
    "embedding": Embedding,
    "pictures": Pictures,
}


def create(
    name: str,
    *,
    predict: Mapping[str, Callable[..., Any]],
    specs: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
    data: Data,
    put: Callable[[Mapping[str, np.ndarray]], Batch],
    config: ConfigDict,
    tokenize: Tokenize | None = None,
    between: Callable[[], None] = lambda: None,
) -> Evaluator:
    """Returns the evaluator of that name, which has looked at its config and its data; arguments as in `Evaluator`.

    Raises:
      InputError: no such evaluator, the stage lacks a function that it needs, or config and data do not do.
    """
    if name not in TABLE:
        raise InputError(f"config.evaluation.evaluators has {name!r}; {nearest(name, TABLE)}")
    missing = [need for need in TABLE[name].needs if need not in predict]
    if missing:
        raise InputError(f"evaluator {name!r} needs {missing[0]!r}, which this stage does not predict; take it out")
    made = TABLE[name](
        predict=predict, specs=specs, data=data, put=put, config=config, tokenize=tokenize, between=between
    )
    made.check()
    return made
