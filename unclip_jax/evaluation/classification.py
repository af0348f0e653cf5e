"""Zero-shot classification: an image is what the caption nearest to it names (Radford et al., 2021, section 3.1)."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from unclip_jax.errors import InputError
from unclip_jax.evaluation.base import Evaluator
from unclip_jax.evaluation.retrieval import ranks

_LOG = logging.getLogger(__name__)
PLACE = "{}"  # where a template takes the name of a class
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of one {}.", "an image of a {}.")


def mean_per_class(right: Bool[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> float:
    """Returns the mean, over the classes that occur, of the share of their examples that are right."""
    counts = np.bincount(labels)
    shares = np.bincount(labels, weights=right)[counts > 0] / counts[counts > 0]
    return float(shares.mean())


def texts(entries: Sequence[Any], *, key: str) -> tuple[str, ...]:
    """Returns texts that a config gives: an entry `@path` stands for the lines of that file, empty ones left out.

    Raises:
      InputError: an entry is no text, or its file cannot be read.
    """
    found: list[str] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise InputError(f"config.evaluation.{key} has {entry!r}; it takes texts, or '@path' for a file of them")
        if not entry.startswith("@"):
            found.append(entry)
            continue
        try:
            lines = epath.Path(entry[1:]).expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"config.evaluation.{key}: the file {entry[1:]!r} cannot be read: {error}") from error
        found += [line.strip() for line in lines if line.strip()]
    return tuple(found)


class Labelled(Evaluator):
    """What evaluators of labelled images share: the names of the classes, and embeddings with their labels."""

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called: `config.evaluation.classes`, or as the data has it, "_" as a blank.

        An InputError where the data has no such labels, fewer than two, or not as many as there are names.
        """
        there = self.data.class_names()
        names = texts(self.config.get("classes", ()), key="classes")
        if names and len(names) != len(there):
            raise InputError(
                f"config.evaluation.classes has {len(names)} names, but config.evaluation.label="
                f"{self.config.get('label', '')!r} has {len(there)} classes: give one for each"
            )
        if len(there) < 2:
            raise InputError(f"config.evaluation.label={self.config.get('label', '')!r} has one class: nothing to tell")
        return names or tuple(name.replace("_", " ") for name in there)

    def check(self):
        _ = self.class_names
        self.data.count("labelled")

    def labelled(
        self, name: str, params: Any, frozen: Any, *, source: str, limit: int
    ) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, "n"]]:
        """Returns what a predict function makes of the labelled examples of a source, and their labels."""
        values, labels = [], []
        for batch in self.host_batches(name, source=source, limit=limit):
            placed = self.put(batch)
            label = self.get(placed["label"])
            kept = self.get(placed["mask"]) & (label >= 0)
            values.append(self.get(self.call(name, params, frozen, placed))[kept])
            labels.append(label[kept])
        return np.concatenate(values), np.concatenate(labels)


class ZeroShot(Labelled):
    """CLIP: how often the class nearest to an image is its own; top-5 where there are more classes than that.

    A class's embedding is the mean, normalised, of those of its name in all templates (Radford et al., 3.1.4).
    Examples without a label do not count.
    """

    needs = ("z_i", "z_t")

    @functools.cached_property
    def templates(self) -> tuple[str, ...]:
        """`config.evaluation.templates`, or ours; an InputError where one has no place for the name."""
        templates = texts(self.config.get("templates", ()), key="templates") or TEMPLATES
        for template in templates:
            if PLACE not in template:
                raise InputError(
                    f"config.evaluation.templates has {template!r}, which has no {PLACE} for the name of a class; one "
                    f"is like {TEMPLATES[0]!r}"
                )
        return templates

    def check(self):
        super().check()
        _ = self.templates
        if self.tokenize is None:
            raise InputError("evaluator 'zero_shot' needs a stage that reads captions; take it out")

    def class_embeddings(self, params: Any, frozen: Any) -> Float[np.ndarray, "k d"]:
        """Embeds the classes: float32, of length 1."""
        assert self.tokenize is not None  # as `check` has seen
        names, templates = self.class_names, self.templates
        prompts = [template.replace(PLACE, name) for name in names for template in templates]
        ((field, spec),) = self.specs["z_t"].items()
        size, length = spec.shape
        sums: Any = 0.0
        for start in range(0, len(prompts), size):
            self.between()
            tokens = np.zeros((size, length), spec.dtype)
            rows = np.arange(start, start + size, dtype=np.int32)
            part = prompts[start : start + size]
            tokens[: len(part)] = self.tokenize(part, length)
            # Every host has all prompts and places its share. Row numbers travel along, for which share is whose, and
            # so the order in which they come back, is the mesh's business.
            own = np.array_split(np.arange(size), jax.process_count())[jax.process_index()]
            placed = self.put({field: tokens[own], "row": rows[own]})
            row = self.get(placed["row"])
            z_t = self.get(self.call("z_t", params, frozen, placed))[row < len(prompts)].astype(np.float64)
            classes = row[row < len(prompts)] // len(templates)
            sums = sums + np.eye(len(names))[classes].T @ z_t
        return (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype(np.float32)

    def run(self, params, frozen):
        classes = self.class_embeddings(params, frozen)
        z_i, labels = self.labelled("z_i", params, frozen, source="labelled", limit=self.config.examples)
        if not len(labels):
            _LOG.warning("zero-shot: none of the first %d examples has a label", self.config.examples)
            return
        before = ranks(z_i, classes, np.stack([np.arange(len(labels)), labels], 1))
        yield "zero_shot_top1", float((before < 1).mean())
        if len(classes) > 5:
            yield "zero_shot_top5", float((before < 5).mean())
        yield "zero_shot_mean_per_class", mean_per_class(before < 1, labels)
