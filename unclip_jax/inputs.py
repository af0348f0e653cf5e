"""What a run reads: its data, batch by batch, and the frozen networks of earlier runs."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from unclip_jax import checkpoint, sharding
from unclip_jax.data import datasets, pipeline
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.program import Program

_LOG = logging.getLogger(__name__)


class Input:
    """The data of a run: batches by step, evaluation batches, and the fingerprint that a resume must match."""

    def __init__(self, program: Program):
        self._program, self._config = program, program.config
        data = self._config.data
        builtin = data.dataset in datasets.DATASETS
        data_dir = str(epath.Path(data.data_dir).expanduser())
        self.directory = (
            datasets.prepare(data.dataset, data_dir=data_dir, variant=data.variant)
            if builtin
            else str(epath.Path(data.dataset).expanduser())
        )
        if data.cache and data.workers:
            raise InputError(
                f"config.data.cache=True leaves nothing for config.data.workers={data.workers} to do; unset one of them"
            )
        fields = program.stage.batch_spec(1)
        reads_text = any(name.endswith("tokens") for name in fields)
        self.tokenizer = Tokenizer(data.vocabulary) if reads_text else None
        if self.tokenizer and self.tokenizer.vocab_size != program.stage.vocab_size:
            raise InputError(
                f"the vocabulary {data.vocabulary!r} has {self.tokenizer.vocab_size} entries, the model's vocab_size "
                f"is {program.stage.vocab_size}; set one to the other"
            )
        self.fingerprint = {
            **datasets.fingerprint(self.directory, data.split),
            "tokenizer": self.tokenizer.digest if self.tokenizer else "",
        }

    def check_evaluation(self) -> None:
        """Opens the evaluation split, so that one that is not there is found before the first step."""
        try:
            datasets.open_source(self.directory, self._config.data.eval_split)
        except InputError as error:
            raise InputError(
                f"config.data.eval_split: {error}; slices hold a part out, as --config.data.split='train[:95%]' "
                "--config.data.eval_split='train[95%:]'"
            ) from error

    def _batches(self, *, seed: int, start_step: int):
        data, config = self._config.data, self._config
        return pipeline.training_batches(
            datasets.open_source(self.directory, data.split),
            spec=self._program.stage.batch_spec(config.batch_size),
            tokenizer=self.tokenizer,
            seed=seed,
            batch_size=config.batch_size,
            start_step=start_step,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            workers=data.workers,
            cache="memory" if data.cache else "none",
            crop=data.crop_fraction,
            flip=0.5 if data.flip else 0.0,
            degradation=data.degradation,
            max_bad_fraction=data.max_bad_percent / 100,
        )

    def training(self, start_step: int):
        """Returns this host's batches from `start_step` on, as an endless iterator."""
        return self._batches(seed=self._config.seed, start_step=start_step)

    def fitting(self, examples: int) -> Iterator[dict[str, jax.Array]]:
        """Yields global batches of the training data, about `examples` examples, in an order of their own."""
        batches = self._batches(seed=self._config.seed + 1, start_step=0)
        for _ in range(-(-examples // self._config.batch_size)):
            yield sharding.put_batch(next(batches), self._program.batch_sharding)
        batches.close()

    def evaluation(
        self, spec: Mapping[str, jax.ShapeDtypeStruct], *, limit: int, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's part of the first `limit` examples of the evaluation split, in order."""
        data = self._config.data
        # Training may be on crops; whoever asks for another size of image wants all of it.
        trained = self._program.stage.batch_spec(1).get("image")
        whole = trained is not None and "image" in spec and spec["image"].shape[1:] != trained.shape[1:]
        batches = pipeline.evaluation_batches(
            datasets.open_source(self.directory, data.eval_split),
            spec=spec,
            tokenizer=self.tokenizer,
            batch_size=batch_size,
            limit=limit,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            crop=1.0 if whole else data.crop_fraction,
            degradation=data.degradation,
            max_bad_fraction=data.max_bad_percent / 100,
        )
        yield from batches
        batches.close()


def load_frozen(program: Program) -> dict[str, Any]:
    """Reads the frozen networks that `config.frozen` names from the workdirs of their own runs (their EMA).

    Raises:
      InputError: a workdir is not given, holds no run, or holds another network than `config.<name>` describes.
    """
    frozen = {}
    for name, tree in program.frozen.items():
        workdir = program.config.frozen[name]
        if not workdir:
            raise InputError(
                f"config.frozen.{name} is not set; name the workdir of a trained {name}: "
                f"--config.frozen.{name}=runs/{name}"
            )

        def abstract(config, tree=tree, name=name, workdir=workdir):
            here = program.config[name].to_dict()
            there = {key: value for key, value in config.model.to_dict().items() if key in here}
            keys = [key for key in here if there.get(key) != here[key]]
            differing = [f"{key}={there.get(key)!r} there, {here[key]!r} here" for key in keys]
            if differing:
                raise InputError(f"the network in {workdir} is not config.{name}: {'; '.join(differing)}")
            return tree, {}

        params, _, _, step = checkpoint.load(workdir, abstract)
        _LOG.info("frozen %s: step %d of %s", name, step, workdir)
        frozen[name] = params
    return frozen
