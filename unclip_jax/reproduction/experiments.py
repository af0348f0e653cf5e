"""The experiments by name, what each needs, and the files that say what they found."""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable

from unclip_jax import quickstart_results as results
from unclip_jax.reproduction import (
    attributes,
    autoregression,
    components,
    guidance,
    prior,
    records,
    sharpness_rank,
    variations,
)
from unclip_jax.reproduction.records import Record
from unclip_jax.reproduction.studio import EXPERIMENTS, Studio


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
      run: does it.
      parts: names of the parts that it draws with.
      after: an experiment whose cells it reads, or "".
    """

    run: Callable[[Studio], Record]
    parts: tuple[str, ...]
    after: str = ""


# In the order of the report.
TABLE = {
    "prior": Experiment(prior.run, prior.PARTS),
    "autoregression": Experiment(autoregression.run, autoregression.PARTS),
    "guidance": Experiment(guidance.run, guidance.PARTS),
    "recall": Experiment(guidance.recall, guidance.PARTS, after="guidance"),
    "variations": Experiment(variations.run, variations.PARTS),
    "components": Experiment(components.run, components.PARTS),
    "attributes": Experiment(attributes.run, attributes.PARTS),
    "sharpness_rank": Experiment(sharpness_rank.run, sharpness_rank.PARTS),
}


def key(studio: Studio, name: str) -> str:
    """Returns the digest of all that an experiment's record depends on."""
    known = [name, studio.known(TABLE[name].parts), dataclasses.asdict(studio.plan), results.versions()]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def path(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the file of an experiment's record."""
    return workdir / EXPERIMENTS / f"{name}.json"


def found(studio: Studio, name: str) -> tuple[Record, float] | None:
    """Returns what an experiment found and its seconds, or None where it is still to be done with these models.

    A record whose pictures are gone counts as none.
    """
    there = records.read(path(studio.workdir, name), key=key(studio, name))
    if there is None or not all((studio.workdir / EXPERIMENTS / one.file).exists() for one in there[0].pictures):
        return None
    return there


def run(studio: Studio, name: str) -> Record:
    """Does an experiment, unless it is done, and writes its record."""
    there = found(studio, name)
    if there is not None:
        return there[0]
    studio.needs(*TABLE[name].parts)
    began = time.monotonic()
    made = TABLE[name].run(studio)
    records.write(path(studio.workdir, name), made, key=key(studio, name), seconds=time.monotonic() - began)
    return made
