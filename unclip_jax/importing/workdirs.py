"""Imported weights as a run's workdir, which every program takes as one that was trained here."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from unclip_jax import checkpoint, digests, serial_storage
from unclip_jax import config as configs
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.stages import base

_LOG = logging.getLogger(__name__)
_VOCABULARY = "vocabulary"  # of a workdir


@dataclasses.dataclass(frozen=True)
class Imported:
    """One network, imported.

    Attributes:
      config: of a run that trains such a network.
      params: its weights, as NumPy arrays.
      statistics: what its stage would have measured of the training data.
      about: JSON for the checkpoint's `meta`, under "imported": format, path and what was found there.
    """

    config: ConfigDict
    params: Any
    statistics: Mapping[str, Any]
    about: Mapping[str, Any]


def shapes(config: ConfigDict) -> tuple[Any, Any]:
    """Returns shapes of the weights and of the statistics of a config's network.

    Raises:
      InputError: the config describes no network.
    """
    stage, key = base.create(configs.check(config)), jax.eval_shape(lambda: jax.random.key(0))
    params = nn.meta.unbox(jax.eval_shape(stage.init, key))
    statistics = nn.meta.unbox(jax.eval_shape(stage.init_frozen, key).get("statistics", {}))
    return params, statistics


def check_free(workdir: str | os.PathLike) -> pathlib.Path:
    """Returns the workdir as an absolute path, if nothing is there yet.

    Raises:
      InputError: there is.
    """
    path = pathlib.Path(workdir).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{workdir} exists and is not empty; imported weights need a folder of their own")
    return path


def write(
    workdir: str | os.PathLike,
    imported: Imported,
    *,
    vocabulary: str = "",
    trained_on: Mapping[str, Any] | None = None,
) -> None:
    """Makes the workdir of a run at step 0 that holds these weights. It appears whole, by one rename.

    Args:
      workdir: a folder that is empty or does not exist.
      imported: the network.
      vocabulary: of its captions: "tiny", or a folder in CLIP's format, which is copied into the workdir; "" for a
        network that reads none, or for one that is to be given one later.
      trained_on: fingerprints of frozen networks that it was trained with, as {"frozen.clip": …}.

    Raises:
      InputError: there is something in the workdir, or the tokenizer is not for these weights.
    """
    final = check_free(workdir)
    tokenizer = Tokenizer(vocabulary) if vocabulary else None
    stage = base.create(imported.config)
    if tokenizer and stage.vocab_size not in (0, tokenizer.vocab_size):
        raise InputError(
            f"the vocabulary {vocabulary!r} has {tokenizer.vocab_size} entries, the imported network reads "
            f"{stage.vocab_size}; give --vocabulary, that which it was trained with"
        )
    if stage.vocab_size and not tokenizer:
        _LOG.warning("%s: no vocabulary lies beside the weights; to read captions, import with --vocabulary", workdir)
    config = ConfigDict(imported.config.to_dict())
    config.data.vocabulary = vocabulary if vocabulary in ("", "tiny") else str(final / _VOCABULARY)
    config = configs.check(config.lock())
    part = final.with_name(f".{final.name}-importing")
    shutil.rmtree(part, ignore_errors=True)  # of an import that was killed
    part.mkdir(parents=True)
    known = {"tokenizer": tokenizer.digest} if tokenizer else {}
    extra = {"data": {**known, **(trained_on or {})}, "imported": dict(imported.about)}
    _save(part, imported.params, dict(imported.statistics), config=config, extra=extra)
    if tokenizer and vocabulary != "tiny":
        (part / _VOCABULARY).mkdir()
        tokenizer.save(part / _VOCABULARY)
    (part / "config.json").write_text(configs.to_json(config))
    (part / "imported.json").write_text(json.dumps(extra, indent=2, sort_keys=True) + "\n")
    if final.exists():
        final.rmdir()
    part.rename(final)


def _save(
    workdir: pathlib.Path, params: Any, statistics: Any, *, config: ConfigDict, extra: Mapping[str, Any]
) -> None:
    """Saves weights that were trained elsewhere as step 0 of a new run: they are their own moving average.

    Args:
      workdir: of the run, without checkpoints.
      params, statistics: as in a state; NumPy arrays, which are not copied. Beside them a few pieces are in memory.
      config: what they are weights of.
      extra: more JSON for `meta`: `data`, what they were trained on, and where they are from.
    """
    items = {"params": params, **({"statistics": statistics} if jax.tree.leaves(statistics) else {})}
    arrays = {name: digests.described(tree) for name, tree in items.items()}
    arrays["ema"] = arrays["params"]
    meta = {"step": 0, "config": config.to_dict(), "arrays": arrays, "items": {"ema": "params"}, **extra}
    meta["digest"] = checkpoint.meta_digest(meta)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)
    handlers: dict[str, Any] = {name: serial_storage.handler() for name in items}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    with ocp.CheckpointManager(workdir / checkpoint.FOLDER, options=options, item_handlers=handlers) as manager:
        saves = {name: serial_storage.saving(tree) for name, tree in items.items()}
        manager.save(0, args=ocp.args.Composite(**saves, meta=ocp.args.JsonSave(meta)))
