"""Writes trained models for those who do not use this package.

    python -m unclip_jax.export --workdir=runs/quickstart --out=exports/shapes --format=stablehlo
    python exports/shapes/run.py "a small red star on a white background" --out=star.png

`--workdir` is one run's, or a folder with the workdirs `clip`, `prior_diffusion`, `decoder` and so on. Formats:

  safetensors   the weights, with a table of their names
  stablehlo     compiled samplers for TPU, CUDA and CPU in one file each, with a script that runs them by jax alone
  diffusers     a folder that UnCLIPPipeline, UnCLIPImageVariationPipeline or KandinskyV22PriorPipeline load

Every export has a model card (README.md), the runs' configs (training.json) and a manifest with the SHA-256 of each
file. It runs on the CPU of one host, whatever mesh the run had, and holds one part's weights at a time. `--out` appears
when all of it is written; stopped by SIGTERM or Ctrl-C (exit code 42), nothing is left, and the same command begins
again. `--re_export=FOLDER` makes an export again with the options that its manifest records, from the checkpoints.
"""

import datetime
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from unclip_jax import hosts, programs, provenance
from unclip_jax.artifacts import (
    components,
    diffusers_folders,
    evaluations,
    folders,
    karlo_configs,
    model_card,
    safetensors_files,
    stablehlo,
)
from unclip_jax.artifacts.components import Component
from unclip_jax.artifacts.folders import Folder
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError, nearest
from unclip_jax.stopping import Stopping

_LOG = logging.getLogger("unclip_jax.export")  # __name__ is "__main__" where this is the program
# Flags that an export's manifest records, and --re_export takes from there.
_RECORDED = (
    "format", "workdir", "parts", "clip", "weights", "dtype", "compute", "prior", "sampling", "pipeline", "target",
    "vocabulary", "license", "shard_mb", "evaluation",
)  # fmt: skip
_FORMAT_VERSION = 1


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("workdir", None, "Workdir of a training run, or a folder with those of several.")
    flags.DEFINE_string("out", None, "Folder to make; it must not exist, or be empty.")
    flags.DEFINE_enum("format", "safetensors", list(_WRITERS), "What to write.")
    flags.DEFINE_string("re_export", None, "Folder of an earlier export, whose options are taken.")
    flags.DEFINE_list("parts", [], "The parts to export, such as clip,prior_diffusion; by default all that are there.")
    flags.DEFINE_string("clip", "", "Workdir of CLIP, in place of the one that the run's config names.")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "The moving average of the weights, or the last ones.")
    flags.DEFINE_enum("dtype", "float32", list(safetensors_files.DTYPES), "How weights are stored.")
    flags.DEFINE_enum("compute", "", ["", "float32", "bfloat16"], "stablehlo: type of products; '' as in the config.")
    flags.DEFINE_string("prior", "", "stablehlo: diffusion, ar, none (z_t in z_i's place) or dropped.")
    flags.DEFINE_multi_string("sampling", [], "stablehlo: an option of a part's sampler, as decoder.timesteps=27.")
    flags.DEFINE_enum("pipeline", "unclip", diffusers_folders.PIPELINES, "diffusers: unCLIP's, or Kandinsky's prior.")
    flags.DEFINE_enum("target", "local", list(diffusers_folders.TARGETS), "diffusers: where the folder is loaded from.")
    flags.DEFINE_string("vocabulary", "", "The vocabulary of the runs, where it has moved.")
    flags.DEFINE_string("license", "", "Identifier of the weights' licence, for the model card.")
    flags.DEFINE_string("evaluation", "", "Workdir of unclip_jax.evaluate whose results the model card is to show.")
    flags.DEFINE_integer("shard_mb", 4096, "Larger weights of a part are written as several files.", lower_bound=1)


def sampling_options(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns part -> {key: value} of options written as part.key=value."""
    options: dict[str, dict[str, str]] = {}
    for one in given:
        name, equals, value = one.partition("=")
        part, dot, key = name.partition(".")
        if not (equals and dot and part and key):
            raise InputError(f"--sampling={one} is not written as PART.KEY=VALUE, such as decoder.timesteps=27")
        options.setdefault(part, {})[key] = value
    return options


def _recorded(options: Any) -> dict[str, Any]:
    """The options of this export: the flags, and where an export is made again those of its manifest."""
    record = {name: options[name].value for name in _RECORDED}
    if not options.re_export:
        return record
    old = folders.read_manifest(options.re_export)["record"]
    return {name: record[name] if options[name].present else old.get(name, record[name]) for name in _RECORDED}


def run(record: Mapping[str, Any], out: str, *, command: str, poll: Callable[[], None]) -> str:
    """Makes one export; returns a sentence that says what it is.

    Args:
      record: the options, by name.
      out: the folder to make.
      command: that asked for it, for the card.
      poll: called between tensors; may end the program.
    """
    folders.check(out)
    license = model_card.check_license(record["license"])
    kind = record["format"]
    where = components.find(record["workdir"], with_clip=kind != "safetensors", clip=record["clip"])
    where = _chosen(where, record["parts"])
    found = components.describe(where, sampling=sampling_options(record["sampling"]), dtype=record["compute"])
    results = evaluations.read(record["evaluation"], found, weights=record["weights"])
    if kind == "stablehlo":  # what would fail after minutes of writing fails here
        stablehlo.functions(found, stablehlo.chain(found, prior=record["prior"]))
    elif kind == "diffusers":
        diffusers_folders.check(found, pipeline=record["pipeline"])
    tokenizer = components.tokenizer(found, record["vocabulary"]) if kind != "safetensors" else None
    about: dict[str, Any] = {
        "format": kind,
        "format_version": _FORMAT_VERSION,
        "built": _now().isoformat(timespec="seconds"),
        "versions": model_card.versions(),
        "record": {**record, "workdir": str(record["workdir"])},
        "parts": {name: {"workdir": one.workdir, "step": one.step} for name, one in found.items()},
    }
    about["marks"] = provenance.marks(f"unclip_jax {about['versions']['unclip_jax']} (export)")
    with folders.writing(out) as folder:
        about, counts = _WRITERS[kind](folder, found, tokenizer, about, out, poll)
        folder.json(model_card.TRAINING, model_card.training(found))
        folder.manifest(about)
        card = model_card.render(
            found, about, counts, license=license, command=command,
            limits=karlo_configs.notes(found) if kind == "diffusers" else (), evaluation=evaluations.render(results),
        )  # fmt: skip
        (folder.path / model_card.CARD).write_text(card, encoding="utf-8")
    size = sum(file["bytes"] for file in folder.files.values())
    return f"{out} holds {', '.join(found)} as {kind}, {size / 1e6:,.1f} MB in {len(folder.files)} files"


def _chosen(where: Mapping[str, str], parts: Sequence[str]) -> dict[str, str]:
    for name in parts:
        if name not in where:
            raise InputError(f"--parts names {name!r}, which is not there; {nearest(name, where)}")
    return {name: folder for name, folder in where.items() if name in parts or not parts}


# Writers of the formats. Each returns what the manifest says, and part -> number of parameters.


def _safetensors(
    folder: Folder, found: Mapping[str, Component], tokenizer: Tokenizer | None, about: dict[str, Any], out: str,
    poll: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    del tokenizer, out
    files, counts, _ = _write_weights(folder, found, about["record"], poll)
    return {**about, "weights": files}, counts


def _stablehlo(
    folder: Folder, found: Mapping[str, Component], tokenizer: Tokenizer | None, about: dict[str, Any], out: str,
    poll: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    files, counts, abstract = _write_weights(folder, found, about["record"], poll)
    for name, content in tokenizer.files().items() if tokenizer else ():
        folder.text(name, content)
    expires = (_now() + stablehlo.LIFETIME).isoformat(timespec="seconds")
    renewal = f"python -m unclip_jax.export --re_export={shlex.quote(out)} --out=NEW_FOLDER"
    compiled = stablehlo.write(folder, found, abstract, prior=about["record"]["prior"], poll=poll)
    return {**about, "weights": files, "expires": expires, "renewal": renewal, **compiled}, counts


def _diffusers(
    folder: Folder, found: Mapping[str, Component], tokenizer: Tokenizer | None, about: dict[str, Any], out: str,
    poll: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    del out
    assert tokenizer is not None  # CLIP is among the parts
    options = {key: about["record"][key] for key in ("pipeline", "target", "weights", "dtype")}
    files, counts = diffusers_folders.write(folder, found, tokenizer, **options, poll=poll)
    return {**about, "weights": files}, counts


_WRITERS = {"safetensors": _safetensors, "stablehlo": _stablehlo, "diffusers": _diffusers}


def _write_weights(
    folder: Folder, found: Mapping[str, Component], record: Mapping[str, Any], poll: Callable[[], None]
) -> tuple[dict[str, list[str]], dict[str, int], dict[str, Any]]:
    """Writes each part's weights, one in memory at a time, and the table of their names.

    Returns:
      part -> names of its files; part -> number of parameters; part -> name -> shape and type as it was written.
    """
    files, counts, abstract, table = {}, {}, {}, {}
    for name, one in found.items():
        poll()
        tensors = components.tensors(components.load(one, weights=record["weights"]))
        counts[name] = model_card.parameters(tensors)
        table[name] = {
            key: {"path": key.split("."), "shape": list(x.shape), "trained_as": x.dtype.name}
            for key, x in tensors.items()
        }
        stored = safetensors_files.converted(tensors, safetensors_files.DTYPES[record["dtype"]])
        abstract[name] = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in stored.items()}
        files[name] = safetensors_files.write_shards(
            folder, name, stored, limit=record["shard_mb"] * 1_000_000, metadata={"format": "np"}, poll=poll
        )
        _LOG.info("%s: step %d of %s, %d parameters", name, one.step, one.workdir, counts[name])
        del tensors, stored
    folder.json("names.json", table)
    return files, counts, abstract


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns a sentence: whether an export's weights are those of an earlier one, by the files of their manifests."""
    weights = [name for name in {**old, **new} if name.endswith(".safetensors")]
    differing = sorted(name for name in weights if old.get(name) != new.get(name))
    if differing:
        return f"the weights are NOT those of the earlier export: {', '.join(differing)} differ"
    return "the weights are, byte for byte, those of the earlier export"


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    record = _recorded(options)
    for name, value in (("workdir", record["workdir"]), ("out", options.out)):
        if not value:
            raise InputError(f"--{name} is missing; for example --workdir=runs/quickstart --out=exports/shapes")
    old = folders.read_manifest(options.re_export) if options.re_export else None
    programs.start_logging()
    stopping = Stopping()  # nothing is lost wherever it ends: the folder appears whole
    jax.config.update("jax_platforms", "cpu")
    programs.start_jax()
    if hosts.count() > 1:
        raise InputError("an export is made by one process; set UNCLIP_HOSTS=one")
    command = shlex.join(["python", "-m", "unclip_jax.export", *sys.argv[1:]])
    print(run(record, options.out, command=command, poll=stopping.now))
    if old:
        print(compared(old["files"], folders.read_manifest(options.out)["files"]))
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main)
