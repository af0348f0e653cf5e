"""Runs the frozen CLIP over a data set once and keeps what it returns, for priors and decoder to train on.

    python -m unclip_jax.embed --config=configs/prior_diffusion.py:paper --config.frozen.clip=runs/clip \\
        --config.data.dataset=data/laion
    python -m unclip_jax.embed --clip=runs/clip --data=data/laion --split=train

A run with `--config.data.embeddings=auto` then reads z_i and z_t from there: it runs no CLIP on its training data, and
a prior decodes no picture. They lie beside the data, in embeddings/<fingerprint of CLIP>/<split>/, or in --out.

The work is cut into units of --unit_examples, each a file. Killed at any moment, the same command goes on with the
units that are missing or damaged. Processes that JAX joins share the units; others can be told by --process_index and
--process_count which share is theirs. The files depend on none of this. Exit codes: 0 the share is done, 42 stopped by
SIGTERM or Ctrl-C (run it again), 1 error.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from unclip_jax import config as configs
from unclip_jax import digests, fitting, inputs, metrics, parts, programs, sharding
from unclip_jax.data import datasets, embedding_units, embeddings, pipeline
from unclip_jax.data.embeddings import Job
from unclip_jax.data.sources import Source
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.models.clip import CLIP
from unclip_jax.stages import base
from unclip_jax.stopping import Stopping

CHUNK = fitting.CHUNK  # examples of one call, on one device: the same program for any number of devices
_POLL_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The CLIP that embeds: in float32, as where it runs in training.

    Attributes:
      network, params: what `base.embed_images` takes; params as NumPy arrays.
      fingerprint: of params.
      config: of the run that trained it.
    """

    network: CLIP
    params: Any
    fingerprint: str
    config: ConfigDict


def read_clip(workdir: str) -> Frozen:
    """Reads the moving average of a trained CLIP; all processes must ask.

    Raises:
      InputError: no run of a CLIP, or none of its checkpoints is whole.
    """
    part = parts.read("clip", workdir, sharding.make_mesh({"data": -1}), weights="ema", sampling={})
    fields = {name: value for name, value in part.config.model.items() if name != "logit_scale_max"}
    network = base.network(CLIP, fields, np.dtype(np.float32), where="config.model")
    return Frozen(network, fitting.whole(part.params), digests.fingerprint(part.params), part.config)


class Embedder:
    """Runs CLIP on chunks, on this process's devices in turn."""

    def __init__(self, clip: Frozen, *, mirrored: bool):
        network = clip.network
        self._devices = jax.local_devices()
        self._copies = [jax.device_put(clip.params, device) for device in self._devices]
        self._images = jax.jit(lambda params, pixels: base.embed_images(network, params, pixels, unit=False))
        self._texts = jax.jit(lambda params, tokens: base.embed_tokens(network, params, tokens, unit=False))
        self._mirrored = mirrored
        self.spec = {
            "clip_image": base.pixels(CHUNK, network.image_size),
            "clip_tokens": base.token_ids(CHUNK, network.context_length),
        }

    def embedded(self, chunks: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Yields the rows of each chunk, in order: name -> float32 [CHUNK, d]; zeros where `mask` is False."""
        pending: collections.deque[tuple[dict[str, jax.Array], np.ndarray]] = collections.deque()
        for number, chunk in enumerate(chunks):
            pending.append((self._computed(chunk, number % len(self._devices)), chunk["mask"]))
            if len(pending) > 2 * len(self._devices):  # or inputs would pile up on the devices
                yield _masked(*pending.popleft())
        while pending:
            yield _masked(*pending.popleft())

    def _computed(self, chunk: dict[str, np.ndarray], number: int) -> dict[str, jax.Array]:
        device, params = self._devices[number], self._copies[number]
        pictures = {"z_i": chunk["clip_image"]}
        if self._mirrored:
            pictures[embeddings.MIRRORED] = np.ascontiguousarray(chunk["clip_image"][:, :, ::-1])
        rows = {name: self._images(params, jax.device_put(pixels, device)) for name, pixels in pictures.items()}
        return {**rows, "z_t": self._texts(params, jax.device_put(chunk["clip_tokens"], device))}


def _masked(rows: dict[str, jax.Array], mask: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.where(mask[:, None], np.asarray(row), 0) for name, row in rows.items()}


def embed(
    folder: str,
    job: Job,
    source: Source,
    embedder: Embedder,
    tokenizer: Tokenizer,
    *,
    process: tuple[int, int] = (0, 1),
    workers: int = 0,
    stop: Callable[[], None] = lambda: None,
) -> int:
    """Writes one process's units of a split, but for those that are whole; returns how many it wrote.

    Args:
      folder: where they go, see `data.embeddings`.
      job: what is to be made.
      source: all records of the split.
      embedder, tokenizer: what makes it.
      process: (index, count); a process has every count-th unit.
      workers: processes that decode pictures.
      stop: called after each chunk; ends the program where it was told to end.

    Raises:
      InputError: the folder holds something else or cannot be written, or an embedding is not finite.
    """
    embedding_units.begin(folder, job)
    todo = []
    for number in range(process[0], job.units(), process[1]):
        stop()
        if not embedding_units.is_whole(folder, job, number):
            todo.append(number)
    if not todo:
        return 0
    starts = [start for number in todo for start in _starts(job.examples_of(number))]
    chunks = pipeline.chunks(
        source, spec=embedder.spec, tokenizer=tokenizer, starts=starts, size=CHUNK, workers=workers
    )
    rows = embedder.embedded(chunks)
    total = sum(len(job.examples_of(number)) for number in todo)
    progress = metrics.Progress("embeddings", start=0, total=total, examples_per_step=1)
    done, shown = 0, time.monotonic()
    try:
        for number in todo:
            examples, made = job.examples_of(number), []
            for start in _starts(examples):
                made.append(next(rows))
                stop()
                done += min(CHUNK, examples.stop - start)
                if time.monotonic() - shown > 5 or done == total:
                    progress.report(done, {})
                    shown = time.monotonic()
            unit = {name: np.concatenate([chunk[name] for chunk in made])[: len(examples)] for name in job.names}
            bad = {index: chunks.bad[index].reason for index in examples if index in chunks.bad}
            embedding_units.write_unit(folder, job, number, unit, bad)
    finally:
        progress.close()
        chunks.close()
    return len(todo)


def _starts(examples: range) -> range:
    return range(examples.start, examples.stop, CHUNK)


def _settle(folder: str, job: Job, *, together: bool, stop: Callable[[], None]) -> str:
    """Says what became of a folder; with processes that JAX joined, when all of them are done."""
    while (fingerprint := embedding_units.finish(folder, job)) is None:
        if not together:
            missing = embeddings.missing_units(folder, job)
            return f"{folder}: this share is done; {missing} of {job.units()} units are left to others"
        stop()
        time.sleep(_POLL_SECONDS)
    return f"{folder}: {job.count} examples in {job.units()} units, {job.storage}, fingerprint {fingerprint}"


# ---------------------------------------------------------------- the program


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "Config of a stage that is to train on them.", lock_config=True)
    flags.DEFINE_string("clip", "", "Workdir of the trained CLIP; config.frozen.clip by default.")
    flags.DEFINE_string("data", "", "Prepared data set, a folder or built-in name; the config's by default.")
    flags.DEFINE_string("data_dir", "", "Root of built-in data sets; the config's by default.")
    flags.DEFINE_string("split", "", "Whole split to embed; the one that the config trains on by default.")
    flags.DEFINE_string("vocabulary", "", "Vocabulary of the captions; the config's by default.")
    flags.DEFINE_bool("mirrored", None, "Embed mirrored pictures, too, for config.data.flip; as the config by default.")
    flags.DEFINE_string("out", "", "Folder of the result; by default embeddings/<fingerprint> in the data set's.")
    flags.DEFINE_enum("storage", "float16", list(embeddings.STORAGES), "What each number is kept as.")
    flags.DEFINE_integer("unit_examples", 16384, f"Examples of a unit, a multiple of {CHUNK}.", lower_bound=CHUNK)
    flags.DEFINE_integer("workers", None, "Processes that decode; as the config by default.", lower_bound=0)
    flags.DEFINE_integer("process_index", None, "Which share is this process's, from 0.", lower_bound=0)
    flags.DEFINE_integer("process_count", None, "How many processes share the work.", lower_bound=1)
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def _data_of(options: Any, config: ConfigDict) -> ConfigDict:
    """The config's section `data`, with what the command line says of it."""
    data = ConfigDict(config.data.to_dict())
    if options.data:
        data.update({"dataset": options.data, "mixture": (), "variant": data.variant if not options.config else ""})
    for key in ("data_dir", "split", "vocabulary"):
        if getattr(options, key):
            data[key] = getattr(options, key)
    return data


def _process(options: Any) -> tuple[int, int]:
    given = (options.process_index, options.process_count)
    if given == (None, None):
        return jax.process_index(), jax.process_count()
    if None in given or not given[0] < given[1]:
        raise InputError(
            f"--process_index={given[0]} --process_count={given[1]}: give both, the index from 0 and below the count"
        )
    if jax.process_count() > 1:
        raise InputError("these processes know each other through JAX; leave out --process_index and --process_count")
    return given


def run(options: Any, stop: Callable[[], None]) -> Iterator[str]:
    """Embeds all data sets that the options name; yields a sentence for each.

    Raises:
      InputError: a CLIP, data or folder that is not what the options say, or options that contradict each other.
    """
    if options.unit_examples % CHUNK:
        raise InputError(f"--unit_examples={options.unit_examples} is no multiple of {CHUNK}")
    config = configs.check(options.config) if options.config else None
    workdir = options.clip or (config.get("frozen", {}).get("clip") if config else "")
    if not workdir:
        raise InputError("no CLIP is named; give the workdir of a trained one: --clip=runs/clip")
    process = _process(options)
    clip = read_clip(workdir)
    if config and (wrong := base.clip_differences(there=clip.config.model, here=config.get("clip", {}))):
        raise InputError(f"the network in {workdir} is not config.clip: {'; '.join(wrong)}")
    config = config or clip.config
    data = _data_of(options, config)
    tokenizer = Tokenizer(data.vocabulary)
    if tokenizer.vocab_size != clip.network.vocab_size:
        raise InputError(
            f"the vocabulary {data.vocabulary!r} has {tokenizer.vocab_size} entries, CLIP's vocab_size is "
            f"{clip.network.vocab_size}; give --vocabulary"
        )
    sets = inputs.data_sets(data)
    if options.out and len(sets) > 1:
        raise InputError("--out names one folder, but config.data.mixture several data sets; leave it out")
    mirrored = bool(data.flip) if options.mirrored is None else options.mirrored
    embedder = Embedder(clip, mirrored=mirrored)
    for one in sets:
        split, _, _ = datasets.slice_of(one.directory, one.split)
        job = Job(
            data=datasets.fingerprint(one.directory, split),
            clip=clip.fingerprint,
            network=base.clip_fields(clip.network),
            tokenizer=tokenizer.digest,
            width=clip.network.embed_dim,
            unit=options.unit_examples,
            storage=options.storage,
            mirrored=mirrored,
            backend=jax.default_backend(),
        )
        root = os.path.expanduser(options.out) or inputs.beside(one.directory, clip.fingerprint)
        folder = os.path.join(root, split)
        workers = data.workers if options.workers is None else options.workers
        source = datasets.open_source(one.directory, split)
        embed(folder, job, source, embedder, tokenizer, process=process, workers=workers, stop=stop)
        yield _settle(folder, job, together=jax.process_count() > 1, stop=stop)


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    programs.start_logging()
    stopping = Stopping()  # files are written whole, so that no more than a unit is lost wherever it ends
    programs.start_jax(compile_cache=options.compile_cache)
    for sentence in run(options, stopping.now):
        print(sentence, flush=True)
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main)
