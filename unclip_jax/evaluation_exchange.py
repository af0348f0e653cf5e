"""Images and references in others' formats: a job's results for their programs, and anyone's samples for ours."""

import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from unclip_jax import inception_file
from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.evaluation import frechet, image_sets, inception, inception_paths, protocols, scoring
from unclip_jax.evaluation import references as reference_files
from unclip_jax.evaluation.units import JOB, Units

_LOG = logging.getLogger(__name__)
_REDRAWN = "redrawn"


def _units(folder: pathlib.Path, count: Callable[[Mapping[str, Any]], int]) -> Units:
    manifest = sealed.read(folder / JOB)
    if manifest is None:
        raise InputError(f"{folder / JOB} is missing or damaged; run the evaluation again, which writes it")
    return Units(folder, manifest, rows=count(manifest), unit_rows=manifest["unit_rows"])


def _kind(folder: pathlib.Path) -> str:
    return (sealed.read(folder / JOB) or {}).get("kind", "")


def export(workdir: pathlib.Path, out: pathlib.Path, *, form: str, reference: pathlib.Path | None = None) -> list[str]:
    """Writes a job's images, and the moments of its real images, for other programs.

    Args:
      workdir: of a finished evaluation.
      out: folder of the result: `<point>.npz` with ADM's `arr_0`, or `<point>/` with a PNG for each row, named by
        caption id; and `reference-<protocol>-<network>.npz` with mu and sigma.
      form: "npz" or "png".
      reference: folder of the real images' features; that of the workdir by default.

    Returns:
      A sentence for each.

    Raises:
      InputError: there is no evaluation, or a row is missing.
    """
    points = [path for path in sorted((workdir / "points").glob("*")) if _kind(path) == "images"]
    if not points:
        raise InputError(f"{workdir} holds no images of an evaluation; give its --workdir")
    out.mkdir(parents=True, exist_ok=True)
    said = []
    for folder in points:
        units = _units(folder, lambda manifest: manifest["rows"]["count"])
        count = units.manifest["rows"]["count"]
        images = (unit["image"] for unit in units.each(("image",)))
        if form == "npz":
            path = out / f"{folder.name}.npz"
            image_sets.write_npz(path, images, count)
        else:
            path = out / folder.name
            image_sets.write_folder(path, images, _caption_ids(workdir))
        said.append(f"{path}: {count} images of run {units.id}")
    for folder in sorted((reference or workdir / "reference").glob("*")):
        units = _units(folder, lambda manifest: manifest["images"])
        path = out / f"reference-{folder.name}.npz"
        said.append(f"{path}: {_write_reference(path, units)}")
    return said


def _caption_ids(workdir: pathlib.Path) -> list[int]:
    with (workdir / "rows.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["caption_id"] for line in file]


def _write_reference(path: pathlib.Path, units: Units) -> str:
    about = {
        "protocol": units.manifest["protocol"]["digest"],
        "name": units.manifest["protocol"]["name"],
        "features": units.manifest["network"]["name"],
        "run": units.id,
    }
    names = ("2048", "spatial") if about["features"].startswith(inception.NAME) else ("z_i",)
    moments = [frechet.moments(units.gathered(name)[name]) for name in names]
    reference_files.write(path, moments[0], spatial=moments[1] if len(moments) > 1 else None, about=about)
    return f"moments of {moments[0].count} real images, {about['name']} by {about['features']}"


def score(options: Any) -> Iterator[str]:
    """Scores samples that somebody made; yields the result as JSON. Progress is in the log.

    Args:
      options: `samples`, an npz with `arr_0` or a folder of pictures; `reference`, the same of real images or a file
        of moments; `inception`, the weights' file or "redrawn"; `protocol`, by whose resizing both are read, and whose
        reference a file of moments must be; `batch_size`; and `out`, a file for the JSON, or "".

    Raises:
      InputError: see `scoring.score`; or the device computes known features wrongly.
    """
    protocol = protocols.named(options.protocol)
    if not options.inception:
        raise InputError(
            "--inception is missing: the file of Inception's weights, or 'redrawn' for weights whose numbers nobody "
            "else has"
        )
    network = inception.redrawn(0) if options.inception == _REDRAWN else inception_file.read(options.inception)
    _LOG.info("features that are known come out at a relative distance of %.1e", inception.check_device(size=64))
    result = scoring.score(
        options.samples,
        options.reference,
        network,
        batch_size=options.batch_size,
        prepare=inception_paths.REAL[protocol.real],
        compute=inception_paths.INCEPTION[protocol.inception],
        expected={"protocol": protocol.digest},
        report=_LOG.info,
    )
    result = {**result, "protocol": {"name": protocol.name, "digest": protocol.digest}}
    text = json.dumps(result, indent=1, default=_plain)
    if options.out:
        with sealed.Replacing(pathlib.Path(options.out).expanduser()) as file:
            file.write((text + "\n").encode())
    yield text


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))
