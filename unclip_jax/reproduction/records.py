"""What an experiment found: the paper's claim and numbers, what was measured, and a verdict by one rule for all.

A claim is written as comparisons, numbers that are above 0 if it is true, each with a 95% interval. It *holds* where
all intervals lie above 0, does *not hold here* where one lies below, and *cannot be told at this size* otherwise, or
where a model cannot do what the experiment needs, which is then said.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from unclip_jax import ablation_tables
from unclip_jax.data import sealed
from unclip_jax.evaluation.uncertainty import Estimate, Measured

HOLDS, FAILS, UNKNOWN = "holds", "does not hold here", "cannot be told at this size"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
      label: what it is of.
      quantity: what it is: rows of one quantity are comparable.
      value: the number; a share is from 0 to 1.
      half: half of its 95% interval, 0 for what is counted and not measured.
      percent: whether it is a share, to be written in percent.
    """

    label: str
    quantity: str
    value: float
    half: float
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A number that is above 0 if the claim is true, with half of its 95% interval."""

    what: str
    value: float
    half: float

    @classmethod
    def of(cls, what: str, estimate: Estimate) -> "Comparison":
        """Takes a value with its standard error."""
        return cls(what, float(estimate.value), ablation_tables.Z * float(estimate.standard_error))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to show: its title and file, below the folder of experiments."""

    title: str
    file: str


@dataclasses.dataclass(frozen=True)
class Record:
    """An experiment.

    Attributes:
      name, title: of the experiment.
      section: of the paper.
      claim: what the paper says, in our words.
      paper: (what, number) as the paper prints them.
      how: what was done here.
      rows, comparisons: see Row and Comparison.
      blocked: why the models cannot show it, or "".
      pictures: see Picture.
      seeds: of sampling.
    """

    name: str
    title: str
    section: str
    claim: str
    paper: tuple[tuple[str, str], ...]
    how: str
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    blocked: str
    pictures: tuple[Picture, ...]
    seeds: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """HOLDS, FAILS or UNKNOWN, by the rule above."""
        return verdict(self.comparisons, blocked=self.blocked)


def verdict(comparisons: Sequence[Comparison], *, blocked: str = "") -> str:
    """Returns HOLDS, FAILS or UNKNOWN by the rule above; a comparison that is not a number tells nothing."""
    if blocked or not comparisons or any(math.isnan(one.value + one.half) for one in comparisons):
        return UNKNOWN
    if any(one.value + one.half < 0 for one in comparisons):
        return FAILS
    return HOLDS if all(one.value - one.half > 0 for one in comparisons) else UNKNOWN


def row(label: str, quantity: str, values: Float[np.ndarray, "seeds captions"], *, percent: bool = False) -> Row:
    """Returns the mean of one number for each seed and caption, with its interval over captions."""
    mean, half = ablation_tables.interval(values)
    return Row(label, quantity, mean, half, percent)


def difference(
    what: str, more: Float[np.ndarray, "seeds captions"], less: Float[np.ndarray, "seeds captions"]
) -> Comparison:
    """Returns how much larger the one is, caption by caption."""
    return Comparison(what, *ablation_tables.interval(more - less))


def distance(label: str, found: Measured) -> Row:
    """Returns a Fréchet distance with its interval over draws."""
    return Row(label, "Fréchet distance", found.value, ablation_tables.Z * found.standard_error)


def write(path: pathlib.Path, record: Record, *, key: str, seconds: float) -> None:
    """Writes a record, sealed, with the key of all that it depends on and what it took."""
    sealed.write(path, sealed.sealed({"key": key, "seconds": seconds, "record": _plain(record)}))


def read(path: pathlib.Path, *, key: str) -> tuple[Record, float] | None:
    """Returns a record and the seconds that it took; None where there is none of this key."""
    found = sealed.read(path)
    if found is None or found["key"] != key:
        return None
    return _record(found["record"]), float(found["seconds"])


def _plain(record: Record) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(record)))
    return plain


def _record(value: Mapping[str, Any]) -> Record:
    return Record(**{
        **value,
        "paper": tuple((what, number) for what, number in value["paper"]),
        "rows": tuple(Row(**one) for one in value["rows"]),
        "comparisons": tuple(Comparison(**one) for one in value["comparisons"]),
        "pictures": tuple(Picture(**one) for one in value["pictures"]),
        "seeds": tuple(value["seeds"]),
    })  # fmt: skip
