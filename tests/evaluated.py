"""Evaluators of hand-made models and data: predict functions that hand back what the batch holds."""

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax.evaluation import evaluators

SIZE, WIDTH = 4, 3


def _field(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct((SIZE, *shape), dtype)


SPECS = {
    "loss": {"value": _field()},
    "z_i": {"picture": _field(WIDTH)},
    "z_t": {"caption": _field(WIDTH)},
    "sample_z_i": {"caption": _field(WIDTH)},
    "reconstruct": {"image": _field(2, 2, 3, dtype=np.uint8)},
}
PREDICT = {
    "z_i": lambda params, frozen, batch, rng: batch["picture"],
    "z_t": lambda params, frozen, batch, rng: batch["caption"],
}


class Examples:
    """Evaluation data that hands out rows of given arrays, zeros after the last.

    Fields are by name for the evaluation split; a dict under the name of another source holds that one's. `masked`
    are rows of any source that are bad records.
    """

    def __init__(self, *, names=(), masked=(), **fields):
        self.sources = {"labelled": fields, "labelled_training": fields}
        self.sources |= {name: fields.pop(name) for name in ("labelled", "labelled_training") if name in fields}
        self.sources["evaluation"] = fields
        self.names, self.masked = tuple(names), list(masked)

    def count(self, source):
        return min(len(value) for value in self.sources[source].values())

    def class_names(self):
        return self.names

    def batches(self, spec, *, source, limit, batch_size):
        assert batch_size == SIZE
        fields = self.sources[source]
        count = min(limit, self.count(source))
        for start in range(0, count, batch_size):
            index = np.arange(start, start + batch_size)
            mask = (index < count) & ~np.isin(index, self.masked)
            batch = {name: np.where(_wide(mask, fields[name]), fields[name].take(index, 0, mode="clip"), 0)
                     for name in spec}  # fmt: skip
            yield {**batch, "mask": mask}


def _wide(mask, field):
    return mask.reshape(-1, *[1] * (field.ndim - 1))


def create(name, data, *, predict=PREDICT, specs=SPECS, tokenize=None, **config):
    config = ConfigDict({"examples": 11, "batch_size": SIZE, **config})
    return evaluators.create(
        name, predict=predict, specs=specs, data=data, put=dict, config=config, tokenize=tokenize
    )


def run(name, data, **options):
    """Returns what an evaluator says, {name: value}."""
    return dict(create(name, data, **options).run("params", "frozen"))


def unit(rng, count, width=WIDTH):
    """Random embeddings, float32, of length 1."""
    z = rng.normal(size=(count, width)).astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)
