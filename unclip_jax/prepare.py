"""Prepares a data set: your own captioned pictures, or one of the built-in sets by name.

    python -m unclip_jax.prepare --source='laion/*.tar' --out=data/laion --size=256 --workers=8
    python -m unclip_jax.prepare --source=my_folder --out=data/mine --validation_percent=2
    python -m unclip_jax.prepare --source=emoji --out=data

`--source` is a folder or glob of tar shards (img2dataset, webdataset), or a folder with `captions.jsonl` or
`captions.csv`, or `captioned_shapes` or `emoji`. Entries (or a shard's `.json`) may have a `label`, which `--classes`
keeps. The result is a TFDS data set in `--out`. Interrupted in any way, the same command goes on where it was, and the
result does not depend on interruptions or on the number of workers. Examples that cannot be used are left out and named
in `bad_records.jsonl`.
"""

import collections
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from unclip_jax import programs
from unclip_jax.data import folders, image_text, images, shard_workers
from unclip_jax.data.image_text import Settings, UnitReport
from unclip_jax.data.records import Bad, Unit
from unclip_jax.errors import InputError

# Built-in data sets and the variant that is made where none is asked for.
BUILT_IN = {"captioned_shapes": "tiny", "emoji": "default"}
# Below this many examples a share says little; a job that goes wrong is stopped early from here on.
EARLY_STOP_EXAMPLES = 10_000
_WORK, _JOB, _BAD = ".work", "prepare.json", "bad_records.jsonl"


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string(
        "source", None, "Folder or glob of tar shards, folder with captions.jsonl/.csv, or built-in name."
    )
    flags.DEFINE_string("out", None, "Directory of the result.")
    flags.DEFINE_integer("workers", os.cpu_count() or 1, "Worker processes.", lower_bound=1)
    flags.DEFINE_integer("size", 0, "Shrink pictures to this shorter side, in pixels; 0 keeps them.", lower_bound=0)
    flags.DEFINE_float("max_bad_percent", 5.0, "Fail where more of the examples are bad.", 0.0, 100.0)
    flags.DEFINE_float("validation_percent", 0.0, "Share of examples for a validation split.", 0.0, 99.0)
    flags.DEFINE_integer("entries_per_shard", 1000, "Examples per shard, for a folder.", lower_bound=1)
    flags.DEFINE_integer("max_pixels", images.MAX_PIXELS, "Largest picture decoded, width x height.", lower_bound=1)
    flags.DEFINE_string("classes", "", "File of class names, one a line, to keep the field `label` of examples.")
    flags.DEFINE_string("variant", "", "Variant of a built-in data set.")


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    for name in ("source", "out"):
        if not options[name].value:
            raise InputError(f"--{name} is missing; for example --source='shards/*.tar' --out=data/mine")
    if options.source in BUILT_IN:
        from unclip_jax.data import datasets

        print(
            datasets.prepare(options.source, data_dir=options.out, variant=options.variant or BUILT_IN[options.source])
        )
        return programs.DONE
    settings = Settings(
        options.size, options.validation_percent, options.max_pixels, read_classes(options.classes)
    )
    try:
        with _stopped_by_sigterm():
            print(
                prepare(
                    options.source,
                    options.out,
                    settings,
                    workers=options.workers,
                    max_bad_percent=options.max_bad_percent,
                    entries_per_shard=options.entries_per_shard,
                )
            )
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, the same command goes on from here", file=sys.stderr)
        return programs.REQUEUE
    return programs.DONE


def read_classes(path: str) -> tuple[str, ...]:
    """Returns the names that a file lists, one a line; () for no file.

    Raises:
      InputError: it cannot be read, or has no name or one twice.
    """
    if not path:
        return ()
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes={path!r} cannot be read: {error}") from error
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice or not names:
        raise InputError(f"--classes={path!r} has {f'{twice[0]!r} twice' if twice else 'no names'}")
    return tuple(names)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def prepare(
    source: str,
    out: str,
    settings: Settings,
    *,
    workers: int = 1,
    max_bad_percent: float = 5.0,
    entries_per_shard: int = 1000,
) -> str:
    """Prepares the captioned pictures of `source` in the directory `out`; goes on where an earlier call stopped.

    Args:
      source: folder or glob of tar shards, or folder with a caption file.
      out: directory of the result; absent, empty, or that of the same job.
      settings: what is done to each example.
      workers: processes; 1 works in this one.
      max_bad_percent: fails where more of the examples are bad; checked at the end, and from `EARLY_STOP_EXAMPLES` on
        after each unit.
      entries_per_shard: examples per shard of the result, for a folder.

    Returns:
      One sentence that says what was written.

    Raises:
      InputError: nothing usable in the source, too much of it bad, or `out` holds something else.
    """
    units = find_units(source, entries_per_shard=entries_per_shard)
    job = _describe(units, settings)
    work = os.path.join(out, _WORK)
    if _is_prepared(out, job):
        return f"{out} already holds this data set"
    os.makedirs(work, exist_ok=True)
    with _locked(work):
        _begin(work, job)
        reports = _Reports(out, max_bad_percent)
        with contextlib.closing(
            shard_workers.write_units(units, settings, directory=work, workers=workers)
        ) as finished:
            for report in finished:
                reports.add(report)
        reports.finish(source)
        image_text.assemble(units, reports.all, directory=work, out=out, classes=settings.classes)
        os.replace(os.path.join(work, _JOB), os.path.join(out, _JOB))
    shutil.rmtree(work, ignore_errors=True)
    return reports.sentence(out)


def find_units(source: str, *, entries_per_shard: int = 1000) -> list[Unit]:
    """Lists the units of a source, sorted by name.

    Raises:
      InputError: nothing there that can be read, or more than one kind.
    """
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        tars = sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
        files = [path for name in folders.CAPTION_FILES if os.path.isfile(path := os.path.join(source, name))]
    else:
        matches = sorted(glob.glob(source))
        tars = [path for path in matches if path.endswith(".tar")]
        files = [path for path in matches if os.path.basename(path) in folders.CAPTION_FILES]
        if not matches:
            raise InputError(f"{source!r} matches no file, and is none of the built-in sets {', '.join(BUILT_IN)}")
    if bool(tars) + len(files) > 1:
        names = [os.path.basename(path) for path in files] + tars[:1]
        raise InputError(f"{source} is ambiguous: it has {' and '.join(names)}; name the one to read")
    if files:
        return folders.find_chunks(files[0], entries_per_chunk=entries_per_shard)
    units, first_id = [], 0
    for index, path in enumerate(path for path in tars if os.path.isfile(path)):
        size = os.path.getsize(path)
        units.append(Unit(index=index, kind="tar", path=path, size=size, first_id=first_id))
        # An example takes two headers and two blocks of content, so a shard cannot hold more: ids never meet.
        first_id += size // 2048 + 1
    if not units:
        raise InputError(f"{source} has neither tar shards (*.tar) nor {' or '.join(folders.CAPTION_FILES[:2])}")
    return units


def _describe(units: list[Unit], settings: Settings) -> dict:
    """Describes the job; two jobs with equal descriptions have the same result."""
    listing = [{**dataclasses.asdict(unit), "path": os.path.basename(unit.path)} for unit in units]
    digest = hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
    options = dataclasses.asdict(settings)
    classes = list(options.pop("classes"))
    # Jobs of earlier versions, which knew no classes, are described as they were.
    options |= {"classes": classes} if classes else {}
    return {"name": image_text.NAME, "version": image_text.VERSION, "source": digest, **options}


def _is_prepared(out: str, job: dict) -> bool:
    """Says whether `out` holds the whole result; raises InputError where it holds anything else.

    The description of the job is moved into `out` as the last step of all.
    """
    if os.path.isfile(os.path.join(out, _JOB)):
        _check_same(os.path.join(out, _JOB), job)
        shutil.rmtree(os.path.join(out, _WORK), ignore_errors=True)
        return True
    if os.path.isdir(out) and os.listdir(out) and not os.path.isdir(os.path.join(out, _WORK)):
        raise InputError(f"{out} is not empty and holds no data set of this program; choose another --out")
    return False


def _begin(work: str, job: dict) -> None:
    """Writes down what the job is, or checks that the one begun here is the same; clears what was left half-written."""
    path = os.path.join(work, _JOB)
    if os.path.exists(path):
        _check_same(path, job)
    else:
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            json.dump(job, file, indent=2, sort_keys=True)
        os.replace(f"{path}.partial", path)
    for name in os.listdir(work):
        if name.endswith(".partial"):
            os.remove(os.path.join(work, name))


def _check_same(path: str, job: dict) -> None:
    with open(path, encoding="utf-8") as file:
        earlier = json.load(file)
    differing = sorted(key for key in job.keys() | earlier.keys() if job.get(key) != earlier.get(key))
    if differing:
        raise InputError(
            f"{os.path.dirname(path).removesuffix(_WORK)} was begun with another {', '.join(differing)}; choose "
            "another --out, or delete it to begin anew"
        )


@contextlib.contextmanager
def _locked(work: str) -> Iterator[None]:
    with open(os.path.join(work, "lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is preparing {os.path.dirname(work)}") from None
        yield


# ---------------------------------------------------------------- accounts


class _Reports:
    """The reports so far, in the order of the units; enforces the limit of bad examples."""

    def __init__(self, out: str, max_bad_percent: float):
        self.out, self.max_bad_percent = out, max_bad_percent
        self.all: list[UnitReport] = []
        self.bad: list[Bad] = []
        self.seen = 0

    def add(self, report: UnitReport) -> None:
        self.all.append(report)
        self.bad += report.bad
        self.seen += report.seen
        if self.seen >= EARLY_STOP_EXAMPLES:
            self._check()

    def finish(self, source: str) -> None:
        if not self.seen:
            raise InputError(f"{source} has no captioned picture")
        self._check()
        if not sum(report.records["train"] for report in self.all):
            raise InputError(f"{source} has no usable example for training: {self._first()}")
        self._write_bad()

    def _check(self) -> None:
        if len(self.bad) * 100 > self.max_bad_percent * self.seen:
            self._write_bad()
            raise InputError(
                f"{len(self.bad)} of {self.seen} examples are bad, more than "
                f"--max_bad_percent={self.max_bad_percent:g}: {self._first()}; "
                f"all are named in {os.path.join(self.out, _BAD)}"
            )

    def _first(self) -> str:
        # Names come from the archive: escaped, so that none can write to the terminal.
        return "; ".join(
            f"{ascii(bad.source)} {ascii(bad.key[:80])}: {ascii(bad.reason)[1:-1]}" for bad in self.bad[:3]
        )

    def _write_bad(self) -> None:
        path = os.path.join(self.out, _BAD)
        with open(f"{path}.partial", "w", encoding="ascii") as file:
            file.writelines(json.dumps(dataclasses.asdict(bad)) + "\n" for bad in self.bad)
        os.replace(f"{path}.partial", path)

    def sentence(self, out: str) -> str:
        counts: collections.Counter[str] = collections.Counter()
        for report in self.all:
            counts.update(report.records)
        splits = ", ".join(f"{split} {count}" for split, count in counts.items() if count)
        text = f"wrote {counts.total()} examples to {out} ({splits}); {len(self.bad)} bad"
        text += f", named in {os.path.join(out, _BAD)}" if self.bad else ""
        if ignored := sum(report.ignored for report in self.all):
            text += f"; {ignored} other archive members passed over"
        if damaged := [bad for report in self.all for bad in report.damaged]:
            text += f"; {len(damaged)} archives damaged and used in part: {ascii([bad.source for bad in damaged[:5]])}"
        return text


if __name__ == "__main__":
    define_flags()
    programs.run(main)
