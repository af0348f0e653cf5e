"""What a run reads: its data, batch by batch, and the frozen networks of earlier runs."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from unclip_jax import checkpoint, hosts
from unclip_jax.data import datasets, embeddings, order, pipeline, sources
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.program import Program
from unclip_jax.stages import base

_LOG = logging.getLogger(__name__)
# What evaluators may read -> the key of config.evaluation that names its split, and that of config.data, where there is
# no other.
_SPLITS = {
    "evaluation": ("", "eval_split"),
    "labelled": ("label_split", "eval_split"),
    "labelled_training": ("label_train_split", "split"),
}


class Input:
    """The data of a run: batches by step, evaluation batches, and the fingerprint that a resume must match."""

    def __init__(self, program: Program, networks: Mapping[str, str] | None = None):
        """Opens the data of a run.

        Args:
          program: the run's.
          networks: fingerprint of each frozen network, by name. They are held to the embeddings that
            `config.data.embeddings` names; without them those are not opened, and training data cannot be read.

        Raises:
          InputError: data, vocabulary or embeddings are not there or not for this run.
        """
        self._program, self._config = program, program.config
        data = self._config.data
        self._parts = _parts(data)
        # Of the one data set that is evaluated on; without a mixture it is trained on, too.
        self.directory = _located(data.dataset, data.variant, data_dir=data.data_dir)
        if data.cache and data.workers:
            raise InputError(
                f"config.data.cache=True leaves nothing for config.data.workers={data.workers} to do; unset one of them"
            )
        fields = program.stage.predict_specs(1)["loss"]
        reads_text = any(name.endswith("tokens") for name in fields)
        self.tokenizer = Tokenizer(data.vocabulary) if reads_text else None
        if self.tokenizer and self.tokenizer.vocab_size != program.stage.vocab_size:
            raise InputError(
                f"the vocabulary {data.vocabulary!r} has {self.tokenizer.vocab_size} entries, the model's vocab_size "
                f"is {program.stage.vocab_size}; set one to the other"
            )
        self.fingerprint = {
            **(self._mixture_fingerprint() if self._parts else datasets.fingerprint(self.directory, data.split)),
            "tokenizer": self.tokenizer.digest if self.tokenizer else "",
            "loader": _loader(),
        }
        reads = networks is not None and data.get("embeddings")
        self._embeddings = self._open_embeddings(networks or {}) if reads else []
        if self._embeddings:
            self.fingerprint["embeddings"] = [one.fingerprint for one in self._embeddings]

    def _mixture_fingerprint(self) -> dict[str, Any]:
        """Returns the fingerprints of all data sets of the mixture, in order, with their weights."""
        try:
            prints = [datasets.fingerprint(part.directory, part.split) for part in self._parts]
        except InputError as error:
            raise InputError(f"config.data.mixture: {error}") from error
        return {"mixture": [{**one, "weight": part.weight} for one, part in zip(prints, self._parts, strict=True)]}

    def _open_embeddings(self, networks: Mapping[str, str]) -> list[embeddings.Stored]:
        """Opens the embeddings of every data set that is trained on, in order, and holds them to data and CLIP."""
        where = self._config.data.embeddings
        fields = self._program.stage.batch_spec(1)
        if not any(name in embeddings.FIELDS for name in fields):
            raise InputError(
                f"config.data.embeddings={where!r}, but this {self._config.stage} reads no embeddings; leave it empty"
            )
        sets = data_sets(self._config.data)
        if len(sets) > 1 and where != "auto":
            raise InputError(
                f"config.data.embeddings={where!r} is one folder, config.data.mixture has {len(sets)} data sets; "
                "'auto' reads those that lie beside each"
            )
        return [self._stored(one, where, networks["clip"], reads_z_t="z_t" in fields) for one in sets]

    def _stored(self, one: "DataSet", where: str, clip: str, *, reads_z_t: bool) -> embeddings.Stored:
        stage: Any = self._program.stage
        flip, workdir = self._config.data.flip, self._config.frozen.clip
        split, first, count = datasets.slice_of(one.directory, one.split)
        root = beside(one.directory, clip) if where == "auto" else str(epath.Path(where).expanduser())
        here: dict[str, Any] = {"data": datasets.fingerprint(one.directory, split), "clip": clip}
        here |= {"network": json.loads(json.dumps(base.clip_fields(stage.clip)))}
        here |= {"tokenizer": self.tokenizer.digest} if reads_z_t and self.tokenizer else {}
        here |= {"mirrored": True} if flip else {}
        command = f"python -m unclip_jax.embed --clip={workdir} --data={one.directory} --split={split}"
        command += " --mirrored" * flip + f" --out={where}" * (where != "auto")
        try:
            stored = embeddings.Stored(os.path.join(root, split))
        except InputError as error:
            beside_it = sorted(path.name for path in epath.Path(root).parent.glob("*")) if where == "auto" else []
            others = f", only of other CLIPs ({', '.join(beside_it)})" if beside_it and clip not in beside_it else ""
            raise InputError(f"config.data.embeddings={where!r}: {error}{others}; make them: {command}") from error
        there = stored.job.as_json()
        if wrong := embeddings.differences({key: there[key] for key in here}, here):
            raise InputError(
                f"the embeddings in {stored.folder} are not this run's: {embeddings.named(wrong)}; make them anew, in "
                f"an empty folder: {command}"
            )
        return stored.sliced(first, count)

    def _source(self) -> sources.Source:
        """Opens what is trained on."""
        if not self._parts:
            return datasets.open_source(self.directory, self._config.data.split)
        return sources.Mixture(
            [
                sources.Member(part.name, datasets.open_source(part.directory, part.split), part.weight)
                for part in self._parts
            ]
        )

    def _batches(self, *, seed: int, start_step: int, batch_size: int, host: int, hosts: int, cache: bool):
        data = self._config.data
        stored = self._embeddings
        return pipeline.training_batches(
            self._source(),
            spec=self._program.stage.batch_spec(batch_size),
            tokenizer=self.tokenizer,
            seed=seed,
            batch_size=batch_size,
            start_step=start_step,
            host_index=host,
            host_count=hosts,
            workers=data.workers,
            cache="memory" if cache else "none",
            crop=data.crop_fraction,
            flip=0.5 if data.flip else 0.0,
            degradation=data.degradation,
            embeddings=embeddings.Joined(stored) if len(stored) > 1 else stored[0] if stored else None,
            max_bad_fraction=data.max_bad_percent / 100,
        )

    def training(self, start_step: int):
        """Returns this host's batches from `start_step` on, as an endless iterator."""
        return self._batches(
            seed=self._config.seed,
            start_step=start_step,
            batch_size=self._config.batch_size,
            host=jax.process_index(),
            hosts=jax.process_count(),
            cache=self._config.data.cache,
        )

    def fitting(self, first: int, *, batch_size: int):
        """Returns batches of the training data in an order of their own, whole on every host, from the first-th on."""
        # The order of another seed; few examples of a large set, so not worth a cache.
        return self._batches(
            seed=self._config.seed + 1, start_step=first, batch_size=batch_size, host=0, hosts=1, cache=False
        )

    def evaluation(self) -> "EvaluationData":
        """Returns what evaluators read (`evaluation.base.Data`)."""
        return EvaluationData(self._program, self.directory, self.tokenizer)


class EvaluationData:
    """The evaluation split, and labelled examples: of the same data set, or of `config.evaluation.label_dataset`."""

    def __init__(self, program: Program, directory: str, tokenizer: Tokenizer | None):
        """Args: the run's program; the folder of its data; its tokenizer, None where it reads no captions."""
        self._program, self._directory, self._tokenizer = program, directory, tokenizer
        self._config = program.config
        self._opened: dict[str, sources.Source] = {}

    def _place(self, source: str) -> tuple[str, str, str]:
        """Returns the folder and split of a source, and the key of the config that names the split."""
        data, labels = self._config.data, self._config.evaluation
        key, otherwise = _SPLITS[source]
        if labels.get(key):
            return self._labelled_directory(), labels[key], f"evaluation.{key}"
        if key and labels.get("label_dataset"):
            raise InputError(
                f"config.evaluation.label_dataset={labels.label_dataset!r} needs config.evaluation.{key}, one of its "
                "splits"
            )
        return self._directory, data[otherwise], f"data.{otherwise}"

    def _labelled_directory(self) -> str:
        other = self._config.evaluation.get("label_dataset")
        return str(epath.Path(other).expanduser()) if other else self._directory

    def _open(self, source: str) -> sources.Source:
        if source in self._opened:
            return self._opened[source]
        directory, split, key = self._place(source)
        # Labelled images need neither captions nor ids.
        required = ("image", self._config.evaluation.label) if source != "evaluation" else datasets.REQUIRED_FEATURES
        try:
            self._opened[source] = datasets.open_source(directory, split, required=required)
        except InputError as error:
            hint = "slices hold a part out, as --config.data.split='train[:95%]' --config.data.eval_split='train[95%:]'"
            raise InputError(f"config.{key}: {error}" + f"; {hint}" * (key == "data.eval_split")) from error
        return self._opened[source]

    def count(self, source: str) -> int:
        """Returns the number of examples of a source.

        Raises:
          InputError: its data set or split is not there or lacks what is read.
        """
        return len(self._open(source))

    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes that `config.evaluation.label` tells apart.

        Raises:
          InputError: the records have no such label.
        """
        try:
            return datasets.class_names(self._labelled_directory(), self._config.evaluation.get("label", ""))
        except InputError as error:
            keys = "label_dataset and label" if self._config.evaluation.get("label_dataset") else "label"
            raise InputError(f"config.evaluation.{keys}: {error}") from error

    def batches(
        self, spec: Mapping[str, jax.ShapeDtypeStruct], *, source: str, limit: int, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's part of at most `limit` examples of a source, see `evaluation.base.Data`."""
        data = self._config.data
        # Training may be on crops; whoever asks for another size of image wants all of it.
        trained = self._program.stage.batch_spec(1).get("image")
        whole = trained is not None and "image" in spec and spec["image"].shape[1:] != trained.shape[1:]
        batches = pipeline.evaluation_batches(
            self._open(source),
            spec=spec,
            tokenizer=self._tokenizer,
            batch_size=batch_size,
            limit=limit,
            shuffle_seed=0 if source == "labelled_training" else None,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            crop=1.0 if whole else data.crop_fraction,
            degradation=data.degradation,
            label=self._config.evaluation.get("label", ""),
            max_bad_fraction=data.max_bad_percent / 100,
        )
        yield from batches
        batches.close()


def _loader() -> str:
    """Returns a digest of known answers: another version that orders or draws otherwise would break exact resume."""
    positions = np.arange(64, dtype=np.int64)
    rng = np.random.default_rng((1, 2, 3))  # as examples draw; Grain draws nothing and orders nothing
    answers = [
        *order.shuffled(positions, count=37, seed=1),
        *order.mixed(positions, quotas=(600, 400), seed=1),
        rng.random(4),
        rng.integers(1000, size=4),
        rng.normal(size=4),
    ]
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in answers)).hexdigest()[:16]


class DataSet(NamedTuple):
    """A data set that is trained on: what it is called, its folder, its split, and its weight in a mixture."""

    name: str
    directory: str
    split: str
    weight: float


def data_sets(data: ConfigDict) -> list[DataSet]:
    """Returns what `config.data` trains on: the data sets of its mixture in order, or its one.

    Raises:
      InputError: one of them is not named as it must be; a built-in one that is missing is written.
    """
    if data.get("mixture"):
        return _parts(data)
    return [DataSet(data.dataset, _located(data.dataset, data.variant, data_dir=data.data_dir), data.split, 1.0)]


def beside(directory: str, clip: str) -> str:
    """Returns where the embeddings lie that a CLIP of this fingerprint makes of the data set in a folder."""
    return os.path.join(directory, "embeddings", clip)


def _parts(data: ConfigDict) -> list[DataSet]:
    """Reads `config.data.mixture`, in which all that can be is checked before any data set is written."""
    entries = data.get("mixture", ())
    for entry in entries:
        texts = isinstance(entry, tuple) and len(entry) == 4 and all(isinstance(text, str) for text in entry[:3])
        if not texts or not isinstance(entry[3], int | float):
            raise InputError(
                f"config.data.mixture holds entries (data set, variant, split, weight), not {entry!r}: write "
                "(('captioned_shapes', 'tiny', 'train', 1.0), ('emoji', 'default', 'train', 1.0)), with '' for the "
                "variant of a folder"
            )
    names = ["/".join(filter(None, entry[:3])) for entry in entries]
    try:
        if entries:
            sources.quotas([(name, entry[3]) for name, entry in zip(names, entries, strict=True)])
        folders = [_located(*entry[:2], data_dir=data.data_dir) for entry in entries]
    except InputError as error:
        raise InputError(f"config.data.mixture: {error}") from error
    parts = [DataSet(name, folder, *entry[2:]) for name, folder, entry in zip(names, folders, entries, strict=True)]
    for number, part in enumerate(parts):
        for other in parts[:number]:
            if (part.directory, part.split) == (other.directory, other.split):
                raise InputError(f"config.data.mixture: {part.name} is the same data as {other.name}")
    return parts


def _located(dataset: str, variant: str, *, data_dir: str) -> str:
    """Returns the folder of a data set; a built-in one is written there first where it is missing."""
    if not dataset:
        raise InputError(
            "config.data.dataset is not set; name the folder that `python -m unclip_jax.prepare` made of your images, "
            f"or one of {', '.join(sorted(datasets.DATASETS))}: --config.data.dataset=FOLDER"
        )
    if dataset in datasets.DATASETS:
        folder = str(epath.Path(data_dir).expanduser())
        return hosts.one_first("prepare", lambda: datasets.prepare(dataset, data_dir=folder, variant=variant))
    return str(epath.Path(dataset).expanduser())


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
            # Other networks than CLIP are described by the run's own config, and by the shapes of their weights.
            described = name in program.config
            differing = base.clip_differences(there=config.model, here=program.config[name]) if described else []
            if differing:
                raise InputError(f"the network in {workdir} is not config.{name}: {'; '.join(differing)}")
            return tree, {}

        params, _, _, step = checkpoint.load(workdir, abstract)
        _LOG.info("frozen %s: step %d of %s", name, step, workdir)
        frozen[name] = params
    return frozen
