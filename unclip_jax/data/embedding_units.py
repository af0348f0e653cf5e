"""Writes embeddings, unit by unit, as `embeddings` reads them."""

import io
import os
import pathlib
import time
import zlib
from collections.abc import Mapping

import numpy as np

from unclip_jax.data import sealed
from unclip_jax.data.embeddings import JOB, STORAGES, UNITS, WHOLE, Job, differences, kind_of, named, report
from unclip_jax.errors import InputError

# Seconds after which a half-written file is one that a kill left behind.
_ABANDONED = 3600


def begin(folder: str, job: Job) -> None:
    """Claims a folder for a job, or checks that the one there is the same.

    Raises:
      InputError: it holds another job or something else, or cannot be written.
    """
    root = pathlib.Path(folder)
    try:
        if not (root / JOB).exists() and root.is_dir() and any(root.iterdir()):
            raise InputError(f"{folder} is not empty and holds no embeddings; choose another --out")
        (root / UNITS).mkdir(parents=True, exist_ok=True)
        if sealed.read(root / JOB) is None:  # damaged, or not there; units know whose they are
            sealed.write(root / JOB, sealed.sealed(job.as_json()))
        if not os.access(root / UNITS, os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}; choose another --out") from error
    wrong = differences(sealed.read(root / JOB) or {}, job.as_json())
    if wrong:
        raise InputError(
            f"{folder} was begun with another {named(wrong)}; choose another --out, or delete it to begin anew"
        )


def write_unit(folder: str, job: Job, number: int, rows: Mapping[str, np.ndarray], bad: Mapping[int, str]) -> None:
    """Writes one unit: rows first, then what says that they are whole.

    Args:
      folder: claimed by `begin`.
      job: the job.
      number: of the unit.
      rows: name -> float32 [n, width] of the unit's n examples, zeros where there is none.
      bad: index -> why an example has no embedding.

    Raises:
      InputError: a number is not finite in the job's storage, or the disk cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, _packed(job, number, rows))
    data = buffer.getvalue()
    said = {
        "job": job.seal,
        "digest": sealed.digest(data),
        "bytes": len(data),
        "bad": {str(index): reason for index, reason in sorted(bad.items())},
    }
    root = pathlib.Path(folder) / UNITS
    try:
        with sealed.Replacing(root / f"{number:05d}.npy") as file:
            file.write(data)
        sealed.write(root / f"{number:05d}.json", sealed.sealed(said))
    except OSError as error:
        raise InputError(f"{root} cannot be written: {error}") from error


def _packed(job: Job, number: int, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the structured array of a unit."""
    examples = job.examples_of(number)
    table = np.zeros(len(examples), job.row)
    for name in job.names:
        with np.errstate(over="ignore"):
            kept = rows[name].astype(kind_of(job.storage))
        wild = np.flatnonzero(~np.isfinite(kept.astype(np.float32)).all(-1))
        if wild.size:
            raise InputError(
                f"CLIP's embedding {name} of example {examples[int(wild[0])]} is not finite in {job.storage}"
                + ("; try --storage=float32" if np.isfinite(rows[name][wild[0]]).all() else "")
            )
        table[name] = kept.view(STORAGES[job.storage])
    raw = table.view(np.uint8).reshape(len(table), job.row.itemsize)
    table["crc"] = [zlib.crc32(row[:-4].tobytes()) for row in raw]
    return table


def is_whole(folder: str, job: Job, number: int) -> bool:
    """Whether a unit is there, bit for bit as it was written; one that is damaged does not count as done from here."""
    if report(folder, job, number, verify=True) is not None:
        return True
    (pathlib.Path(folder) / UNITS / f"{number:05d}.json").unlink(missing_ok=True)
    return False


def finish(folder: str, job: Job) -> str | None:
    """Writes embeddings.json where all units have reports; returns its fingerprint, or None where some are missing.

    All processes may call it: whoever finds the last unit there writes, and all would write the same.
    """
    reports = [report(folder, job, number, verify=False) for number in range(job.units())]
    if any(report is None for report in reports):
        return None
    whole = sealed.sealed({"job": job.as_json(), "units": reports})
    root = pathlib.Path(folder)
    if sealed.read(root / WHOLE) != {"job": job.as_json(), "units": reports}:
        sealed.write(root / WHOLE, whole)
        for left in (*root.glob("*.partial-*"), *(root / UNITS).glob("*.partial-*")):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink(missing_ok=True)
    return whole["seal"][:16]
