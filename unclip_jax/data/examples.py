"""From records to the fields of a batch: decode, crop, resize, degrade, tokenize, label.

What an example looks like is a function of (seed, epoch, example index) only, so it does not matter which process,
thread or host makes it, nor what was made before. `Examples` decodes at every use; `CachedExamples` decodes once and
keeps pixels and tokens in memory, with the same result.
"""

import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.data import degradations, embeddings, images, resize, sources
from unclip_jax.data.embeddings import Embeddings
from unclip_jax.data.sources import Source
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError, nearest

_LOG = logging.getLogger(__name__)
IMAGE_FIELDS = ("image", "clip_image", "low_res")
TOKEN_FIELDS = ("tokens", "clip_tokens")
VECTOR_FIELDS = embeddings.FIELDS
FIELDS = (*IMAGE_FIELDS, *TOKEN_FIELDS, *VECTOR_FIELDS, "id", "label")

# A bad example is replaced by another; if that many in a row are bad, the data set is.
_REPLACEMENTS = 64
_MAX_CACHE_BYTES = 4 << 30

Fields = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to each example.

    Attributes:
      shapes: field -> shape of one example, without the batch dimension.
      seed: seed of crops, flips and degradations.
      resize: filter for shrinking ("area" or "bicubic").
      crop: `image` is a random window of this fraction of the side of the centred square, resized; 1 is the whole. The
        paper's upsamplers train at 0.25 (Table 3).
      flip: probability of mirroring left and right, for data without "left of" in its captions.
      degradation: how `low_res` is made of `image`, a key of `degradations.DEGRADATIONS`.
      label: feature of the records that `label` is read from, a class or several; "" where the batch has no labels.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    resize: str = "area"
    crop: float = 1.0
    flip: float = 0.0
    degradation: str = "none"
    label: str = ""

    def __post_init__(self):
        for field, shape in self.shapes.items():
            if field not in FIELDS:
                raise InputError(f"the batch has a field {field!r} that no data set fills; {nearest(field, FIELDS)}")
            if field in IMAGE_FIELDS and not (len(shape) == 3 and shape[0] == shape[1] and shape[2] == 3):
                raise InputError(f"field {field!r} has shape {shape} an example, but must be square RGB, (s, s, 3)")
        resize.check_filter(self.resize)
        degradation = degradations.named(self.degradation)
        if not 0.0 < self.crop <= 1.0:
            raise InputError(f"crop is {self.crop}; it is a fraction of the image's side, above 0 and up to 1")
        if not 0.0 <= self.flip <= 1.0:
            raise InputError(f"flip is {self.flip}; it is a probability, from 0 to 1")
        if "low_res" in self.shapes:
            large, small = self.size("image"), self.size("low_res")
            if large < small:
                raise InputError(f"low_res ({small}) needs an image of its size or larger")
            if degradation.whole_factor and (large % small or large < 2 * small):
                raise InputError(
                    f"degradation {self.degradation!r} shrinks by 2, 3, 4 or another whole factor, not from {large} to "
                    f"{small} pixels"
                )
        if "label" in self.shapes and not self.label:
            raise InputError("the batch has labels, but no feature of the records was named to read them from")

    def size(self, field: str) -> int:
        """Pixels a side of an image field; 0 if the batch lacks it."""
        return self.shapes[field][0] if field in self.shapes else 0

    @property
    def draws(self) -> bool:
        """Whether an example's pixels differ from epoch to epoch; `clip_image` is mirrored, but never cropped."""
        noisy = "low_res" in self.shapes and degradations.named(self.degradation).draws
        return self.crop < 1.0 or self.flip > 0.0 or noisy


@dataclasses.dataclass(frozen=True)
class Bad:
    """An example that cannot be used: its index, its own id, and why."""

    index: int
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """An example of a batch: its index, its images as they go into the batch, and whether they are mirrored, its
    caption and label."""

    index: int
    images: Fields
    mirrored: bool
    caption: str
    label: int


class Examples:
    """Makes the fields of examples out of records."""

    def __init__(
        self,
        source: Source,
        *,
        preparation: Preparation,
        tokenizer: Tokenizer | None,
        embeddings: Embeddings | None = None,
    ):
        if len(source) == 0:
            raise InputError("the data set is empty: there is no example to read")
        if tokenizer is None and any(field in preparation.shapes for field in TOKEN_FIELDS):
            raise InputError("the batch has tokens but no tokenizer was given")
        if embeddings is None and any(field in preparation.shapes for field in VECTOR_FIELDS):
            raise InputError("the batch has embeddings but none were given")
        if embeddings is not None and len(embeddings) != len(source):
            raise InputError(f"there are {len(embeddings)} embeddings of {len(source)} examples")
        self.embeddings = embeddings
        self.source = source
        self.preparation = preparation
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, positions: Sequence[tuple[int, int]]) -> tuple[Fields | None, list[Bad]]:
        """Makes a batch of (epoch, example index) pairs, replacing bad examples.

        Returns:
          (fields, bad examples met); fields is None if no replacement was found either.
        """
        bad: list[Bad] = []
        chosen = []
        for epoch, index in positions:
            good = self._first_good(index, bad)
            if good is None:
                return None, bad
            chosen.append(self._drawn(epoch, *good))
        return self._collate(chosen), bad

    def batch_as_is(self, indices: Sequence[int]) -> tuple[Fields, list[Bad]]:
        """Makes a batch of example indices with a bool field `mask`, False (and zeros) where an example is bad."""
        bad: list[Bad] = []
        good = [self._drawn(0, index, base) for index in indices if (base := self._load(index, bad)) is not None]
        kept = {one.index for one in good}
        mask = np.array([index in kept for index in indices], bool)
        made = self._collate(good)
        fields = {name: np.zeros((len(indices), *values.shape[1:]), values.dtype) for name, values in made.items()}
        for name, values in made.items():
            fields[name][mask] = values
        return {**fields, "mask": mask}, bad

    def _first_good(self, index: int, bad: list[Bad]) -> tuple[int, dict[str, Any]] | None:
        # A function of the index alone, so that a resumed run replaces by the same example.
        for candidate in _with_replacements(index, sources.peers(self.source, index)):
            base = self._load(candidate, bad)
            if base is not None:
                return candidate, base
        return None

    def _load(self, index: int, bad: list[Bad]) -> dict[str, Any] | None:
        """Returns what does not change from epoch to epoch, or notes why there is nothing."""
        record = self.source[index]
        try:
            if self.embeddings is not None and (problem := self.embeddings.problem(index)):
                raise InputError(problem)
            label = {"label": only_class(record[self.preparation.label])} if "label" in self.preparation.shapes else {}
            return {**self._still_images(record), "caption": _text(record.get("caption", "")), **label}
        except InputError as error:
            bad.append(Bad(index, _text(record.get("id", index)), str(error)))
            return None

    def _still_images(self, record: Mapping[str, Any]) -> Fields:
        todo = self.preparation
        if not any(field in todo.shapes for field in IMAGE_FIELDS):
            return {}
        decoded = images.decode(record["image"])
        made = {}
        if "image" in todo.shapes:
            # Of what is cropped only the window will be resized.
            whole = todo.crop == 1.0
            made["image"] = resize.square(decoded, size=todo.size("image"), method=todo.resize) if whole else decoded
        if "clip_image" in todo.shapes:
            made["clip_image"] = resize.square(decoded, size=todo.size("clip_image"), method=todo.resize)
        if "low_res" in todo.shapes and not todo.draws:
            made["low_res"] = self._low_res(made["image"], np.random.default_rng(0))
        return made

    def _low_res(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        todo = self.preparation
        make = degradations.named(todo.degradation).low_res
        return make(image, size=todo.size("low_res"), method=todo.resize, rng=rng)

    def _drawn(self, epoch: int, index: int, base: dict[str, Any]) -> _Chosen:
        """Applies what is drawn anew for each epoch: window, mirroring and noise."""
        todo = self.preparation
        made = {name: base[name] for name in IMAGE_FIELDS if name in base}
        mirrored = False
        if todo.draws:
            rng = np.random.default_rng((todo.seed, epoch, index))
            if todo.crop < 1.0 and "image" in made:
                made["image"] = resize.random_crop(
                    made["image"], fraction=todo.crop, size=todo.size("image"), method=todo.resize, rng=rng
                )
            mirrored = todo.flip > 0.0 and rng.random() < todo.flip
            if mirrored:
                made = {name: pixels[:, ::-1] for name, pixels in made.items()}
            if "low_res" in todo.shapes:
                made["low_res"] = self._low_res(np.ascontiguousarray(made["image"]), rng)
        return _Chosen(index, made, mirrored, base.get("caption", ""), base.get("label", -1))

    def _vectors(self, name: str, chosen: Sequence[_Chosen]) -> np.ndarray:
        assert self.embeddings is not None
        indices = np.array([one.index for one in chosen], np.int64)
        return self.embeddings.rows(name, indices, np.array([one.mirrored for one in chosen], bool))

    def _collate(self, chosen: Sequence[_Chosen]) -> Fields:
        """Stacks examples into the fields of the batch, in the order of the spec."""
        captions = [one.caption for one in chosen]
        fields: Fields = {}
        for name, shape in self.preparation.shapes.items():
            if name == "id":
                fields[name] = np.array([one.index for one in chosen], np.uint32)
            elif name == "label":
                fields[name] = np.array([one.label for one in chosen], np.int32)
            elif name in TOKEN_FIELDS:
                assert self.tokenizer is not None
                fields[name] = self.tokenizer.encode(captions, shape[0])
            elif name in VECTOR_FIELDS:
                fields[name] = self._vectors(name, chosen)
            else:
                fields[name] = _stack([one.images[name] for one in chosen], shape)
        return fields


class CachedExamples(Examples):
    """Examples kept in memory as pixels and tokens: for data sets of a few thousand small images."""

    def __init__(
        self,
        source: Source,
        *,
        preparation: Preparation,
        tokenizer: Tokenizer | None,
        embeddings: Embeddings | None = None,
    ):
        super().__init__(source, preparation=preparation, tokenizer=tokenizer, embeddings=embeddings)
        self._bad: dict[int, Bad] = {}
        self._kept = self._allocate()
        captions = [""] * len(source)
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for index, (base, bad) in enumerate(pool.map(self._load_one, range(len(source)))):
                self._bad.update({one.index: one for one in bad})
                if base is not None:
                    captions[index] = base.pop("caption")
                    for name, pixels in base.items():
                        self._kept[name][index] = np.ascontiguousarray(resize.centre(pixels))
        for name in TOKEN_FIELDS:
            if name in preparation.shapes and tokenizer is not None:
                self._kept[name] = tokenizer.encode(captions, preparation.shapes[name][0])

    def _allocate(self) -> Fields:
        todo, count = self.preparation, len(self.source)
        sizes = {name: todo.size(name) for name in ("image", "clip_image") if name in todo.shapes}
        if "low_res" in todo.shapes and not todo.draws:
            sizes["low_res"] = todo.size("low_res")
        # What is cropped is kept as it was decoded, in arrays of its own.
        ragged = todo.crop < 1.0 and sizes.pop("image", 0) > 0
        needed = count * sum(3 * side * side for side in sizes.values())
        needed += sum(map(self._decoded_bytes, range(count))) if ragged else 0
        if needed > _MAX_CACHE_BYTES:
            raise InputError(
                f"to keep {count} examples in memory takes {needed / 2**30:.1f} GiB of at most "
                f"{_MAX_CACHE_BYTES >> 30}: use cache='none' with workers"
            )
        _LOG.info("%d examples are kept in memory: %.1f MB", count, needed / 1e6)
        kept = {name: np.zeros((count, side, side, 3), np.uint8) for name, side in sizes.items()}
        return {**kept, "image": np.empty(count, object)} if ragged else kept

    def _decoded_bytes(self, index: int) -> int:
        """Size of an image's centred square, as its header says; 0 where there is none to be read."""
        try:
            return 3 * min(images.read_header(self.source[index]["image"])[1:]) ** 2
        except InputError:
            return 0

    def _load_one(self, index: int) -> tuple[dict[str, Any] | None, list[Bad]]:
        bad: list[Bad] = []
        return super()._load(index, bad), bad

    def _load(self, index: int, bad: list[Bad]) -> dict[str, Any] | None:
        if index in self._bad:
            bad.append(self._bad[index])
            return None
        if not self.preparation.draws:
            return {}  # all rows of a batch are taken in one go
        return {name: kept[index] for name, kept in self._kept.items() if name in IMAGE_FIELDS}

    def _collate(self, chosen: Sequence[_Chosen]) -> Fields:
        rows = np.array([one.index for one in chosen], np.int64)
        fields: Fields = {}
        for name, shape in self.preparation.shapes.items():
            if name == "id":
                fields[name] = rows.astype(np.uint32)
            elif name in VECTOR_FIELDS:
                fields[name] = self._vectors(name, chosen)
            elif name in IMAGE_FIELDS and self.preparation.draws:
                fields[name] = _stack([one.images[name] for one in chosen], shape)
            else:
                fields[name] = self._kept[name][rows]
        return fields


def only_class(value: Any) -> int:
    """Returns the one class that a label feature names: its value, or that of all its entries that are not negative.

    -1 where it names no class, or several: what an image of two things should be called is open.
    """
    named = {int(number) for number in np.ravel(value) if number >= 0}
    return named.pop() if len(named) == 1 else -1


def _stack(images: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    stacked = np.empty((len(images), *shape), np.uint8)
    for row, image in zip(stacked, images, strict=True):
        row[...] = image
    return stacked


def _with_replacements(index: int, peers: range) -> Iterator[int]:
    yield index
    rng = np.random.default_rng(index)
    for _ in range(_REPLACEMENTS):
        yield peers[int(rng.integers(len(peers)))]


def _text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
