"""Probes of what people like: fits them to what they said, and says of images what they would.

    python -m unclip_jax.preferences fit-ratings --table=ava.csv --clip=runs/clip --out=aesthetic.json
    python -m unclip_jax.preferences fit-pairs --table=answers.jsonl --clip=runs/clip --out=preference.json
    python -m unclip_jax.preferences import --weights=sac+logos+ava1-l14-linearMSE.pth --clip=runs/l14 --out=laion.json
    python -m unclip_jax.preferences apply --probe=aesthetic.json --images=samples --clip=runs/clip --out=scores.jsonl
    python -m unclip_jax.preferences apply --probe=preference.json --images=a --against=b --clip=runs/clip --out=b.jsonl

A rating is fit by least squares, a preference between two images by logistic regression on the difference of their
embeddings: the two probes of DALL-E 2's paper (section 5.5 and appendix A). Tables are of image files, which the CLIP
of a trained workdir embeds, or of embeddings (`evaluation/judgements.py` says how); `--clip` is not needed where an
NPZ names its CLIP. A probe belongs to that CLIP and is refused with another. What is held out says how far to trust it:
a fifth of the table, which the last fit then takes in.

`apply` writes a line of JSON for each image, or for each pair of files of the same name, and prints the mean with its
standard error.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from scipy import special

from unclip_jax import digests, hosts, metrics, parts, programs, sharding
from unclip_jax.data import images, records, resize
from unclip_jax.errors import InputError
from unclip_jax.evaluation import affine_probes, feature_sets, judgements, pairwise, probes, ratings, uncertainty
from unclip_jax.evaluation.affine_probes import PAIRS, RATINGS, AffineProbe
from unclip_jax.evaluation.judgements import Table
from unclip_jax.interop import tensors
from unclip_jax.predictor import Predictor
from unclip_jax.stopping import Stopping

COMMANDS = ("fit-ratings", "fit-pairs", "import", "apply")
_BATCH = 64
_HELD_OUT = 5  # one row in so many is held out
_GRID = "grid.png"  # what `generate` puts beside its images


class Clip:
    """A trained CLIP's image tower, read when it is first asked for."""

    def __init__(self, workdir: str, stop: Callable[[], None]):
        mesh = sharding.make_mesh({"data": -1})
        self._part = parts.read("clip", workdir, mesh, weights="ema", sampling={})
        if "z_i" not in self._part.stage.predict_fns():
            raise InputError(f"the CLIP in {workdir} has no image encoder; take one that has")
        self._predictor = Predictor({"clip": self._part}, microbatch=_BATCH, mesh=mesh)
        self._stop = stop
        self.fingerprint = digests.fingerprint(self._part.params)
        self.width = int(self._part.config.model.embed_dim)

    def embed(self, files: Sequence[pathlib.Path]) -> np.ndarray:
        """Returns z_i of image files, float32 [n, d] of length 1; the whole centre square of each, as in training.

        Raises:
          InputError: a file that cannot be read.
        """
        size = self._part.stage.predict_specs(1)["z_i"]["clip_image"].shape[1]
        progress = metrics.Progress("images", start=0, total=len(files), examples_per_step=1)
        made = []
        try:
            for start in range(0, len(files), self._predictor.microbatch):
                self._stop()
                batch = files[start : start + self._predictor.microbatch]
                pixels = np.stack([resize.square(_decoded(file), size=size) for file in batch])
                made.append(self._predictor.run("clip", "z_i", {"clip_image": pixels}))
                progress.report(start + len(batch), {})
        finally:
            progress.close()
        return np.concatenate(made)


def _decoded(file: pathlib.Path) -> np.ndarray:
    try:
        return images.decode(file.read_bytes())
    except (OSError, InputError) as error:
        raise InputError(f"the image {str(file)!r} cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A table whose images are embeddings: its sides float [n, d], what was said, and by which CLIP they were made."""

    sides: tuple[np.ndarray, ...]
    values: np.ndarray | None
    clip: str


def embedded(table: Table, workdir: str, stop: Callable[[], None]) -> Embedded:
    """Embeds the images of a table; one of embeddings is only asked for its CLIP.

    Raises:
      InputError: no CLIP is named, or another than the table's.
    """
    if not workdir and not table.clip:
        what = "does not say which CLIP made its embeddings" if table.embedded else "has images, which a CLIP reads"
        raise InputError(f"the table {what}; give the workdir of that CLIP: --clip=runs/clip")
    if table.embedded:
        clip = Clip(workdir, stop).fingerprint if workdir else table.clip
        if table.clip and clip != table.clip:
            raise InputError(f"the table's embeddings are of the CLIP {table.clip!r}, --clip={workdir} is {clip!r}")
        return Embedded(table.embeddings, table.values, clip)
    network = Clip(workdir, stop)
    files = list(dict.fromkeys(file for side in table.files for file in side))  # an image may stand in many pairs
    place = {file: row for row, file in enumerate(files)}
    z = network.embed(files)
    sides = tuple(z[[place[file] for file in side]] for side in table.files)
    return Embedded(sides, table.values, network.fingerprint)


def held_out(count: int, seed: int) -> np.ndarray:
    """Which rows the first fit does not see, bool [count]: a fifth, drawn by a seed."""
    chosen = np.zeros(count, bool)
    chosen[feature_sets.drawn(count, count // _HELD_OUT, seed=seed)] = True
    return chosen


def fit_ratings(table: Embedded, *, ridge: float, seed: int) -> AffineProbe:
    """Fits the aesthetic probe; `about` says how well it does on a fifth that was held out.

    Raises:
      InputError: as `ratings.fit`.
    """
    (z,), values = table.sides, np.asarray(table.values)
    weights, bias = ratings.fit(z, values, ridge=ridge)
    about: dict[str, Any] = {"examples": len(z), "ridge": ridge, "seed": seed}
    out = held_out(len(z), seed)
    if out.sum() > 1 and (ridge or (~out).sum() > z.shape[1]):
        first = AffineProbe(RATINGS, *ratings.fit(z[~out], values[~out], ridge=ridge), table.clip, {})
        guessed, said = first.scores(z[out]), values[out]
        spread = ((said - said.mean()) ** 2).sum()
        about["held_out"] = {
            "examples": int(out.sum()),
            "mean_squared_error": float(((guessed - said) ** 2).mean()),
            "explained_variance": float(1 - ((guessed - said) ** 2).sum() / spread) if spread else None,
        }
    return AffineProbe(RATINGS, weights, bias, table.clip, about)


def fit_pairs(table: Embedded, *, strength: float | None, seed: int) -> AffineProbe:
    """Fits the preference probe; a strength that is not given is chosen on a fifth that is held out.

    Raises:
      InputError: as `pairwise.fit`, or too few pairs to choose a strength on.
    """
    read, said = pairwise.differences(*table.sides), np.asarray(table.values)
    pairwise.check(said, len(read))
    out = held_out(len(read), seed)
    about: dict[str, Any] = {"examples": len(read), "seed": seed}
    if strength is None and not out.any():
        raise InputError(f"{len(read)} pairs are too few to choose a penalty on a fifth of them; give --strength")

    def of(strength: float) -> np.ndarray:
        return pairwise.fit(read[~out], said[~out], strength=strength)

    if strength is None:
        strength = probes.sweep(lambda tried: pairwise.log_likelihood(read[out], said[out], of(tried)))
    if out.any():
        first = of(strength)
        sides = np.sign(read[out] @ first) / 2 + 0.5
        decided = said[out] != 0.5
        about["held_out"] = {
            "examples": int(out.sum()),
            "log_likelihood": pairwise.log_likelihood(read[out], said[out], first),
            "agreement": float((1 - np.abs(sides - np.round(said[out])))[decided].mean()) if decided.any() else None,
        }
    weights = pairwise.fit(read, said, strength=strength)
    return AffineProbe(PAIRS, weights, 0.0, table.clip, {**about, "strength": strength})


def imported(path: str, clip: Clip) -> AffineProbe:
    """Reads a published predictor of affine layers alone (see `ratings.folded`), which does not say its CLIP.

    Raises:
      InputError: the file holds something else, or reads embeddings of another width than this CLIP's.
    """
    found = {name: tensor.read().astype(np.float64) for name, tensor in tensors.open_tensors(path).items()}
    weights, bias = ratings.folded(found)
    if len(weights) != clip.width:
        raise InputError(
            f"{path} reads embeddings of {len(weights)} numbers, this CLIP makes {clip.width}; give the one it is for"
        )
    return AffineProbe(RATINGS, weights, bias, clip.fingerprint, {"file": pathlib.Path(path).name})


# ---------------------------------------------------------------- applying


def image_files(folder: str) -> list[pathlib.Path]:
    """Returns the pictures of a folder by name, but not the grid that `generate` makes of them.

    Raises:
      InputError: there are none.
    """
    root = pathlib.Path(folder).expanduser()
    known = {f".{ending}" for ending in records.PICTURE_EXTENSIONS}
    found = sorted(root.iterdir()) if root.is_dir() else []
    files = [file for file in found if file.suffix.lower() in known and file.name != _GRID]
    if not files:
        raise InputError(f"the folder {folder!r} holds no picture; give one with {', '.join(sorted(known))}")
    return files


def paired_files(folder: str, against: str) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns the pictures of two folders, those of one name side by side.

    Raises:
      InputError: one has a picture that the other has not.
    """
    first, second = image_files(folder), image_files(against)
    alone = {file.name for file in first} ^ {file.name for file in second}
    if alone:
        name = sorted(alone)[0]
        raise InputError(f"{folder!r} and {against!r} are compared file by file, but {name!r} is in one of them only")
    return first, second


def applied(probe: AffineProbe, table: Embedded, names: Sequence[Sequence[Any]]) -> tuple[list[dict[str, Any]], str]:
    """Returns a row for each image or pair, and a sentence with the mean.

    Args:
      probe: either kind.
      table: one side: each image's score. Two: the difference of scores, for PAIRS as a probability.
      names: of each side's images, or their rows.

    Raises:
      InputError: the table's CLIP is not the probe's, or there are fewer than two rows.
    """
    probe.check_clip(table.clip)
    scores = [probe.scores(side) for side in table.sides]
    columns, value, values = judgements.COLUMNS[RATINGS][0], "score", scores[0]
    if len(scores) == 2:
        columns, value, values = judgements.COLUMNS[PAIRS][0], "difference", scores[0] - scores[1]
        if probe.kind == PAIRS:
            value, values = "probability", special.expit(values)
    rows = [
        {**dict(zip(columns, named, strict=True)), value: float(number)}
        for *named, number in zip(*names, values, strict=True)
    ]
    mean = uncertainty.mean(values)
    return rows, f"mean {value} {mean.value:.4f} +- {mean.standard_error:.4f} (standard error) of {len(rows)}"


def _table_to_apply(options: Any, probe: AffineProbe) -> Table:
    if bool(options.images) == bool(options.table):
        raise InputError("give what the probe is to look at: --images=FOLDER, or --table=FILE")
    if options.against and not options.images:
        raise InputError("--against is a second folder beside --images=FOLDER")
    if options.against:
        return Table(files=paired_files(options.images, options.against))
    if options.images:
        return Table(files=(image_files(options.images),))
    return judgements.read(options.table, probe.kind, answered=False)


# ---------------------------------------------------------------- the program


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("table", "", "What people said: .csv or .jsonl of image files, or .npz of embeddings.")
    flags.DEFINE_string("clip", "", "Workdir of the CLIP that embeds, or that made a table's embeddings.")
    flags.DEFINE_string("out", "", "File of the result.")
    flags.DEFINE_float("ridge", 0.0, "fit-ratings: penalty on the weights, in examples.", lower_bound=0.0)
    flags.DEFINE_float("strength", None, "fit-pairs: penalty, in pairs; chosen on a held-out fifth by default.")
    flags.DEFINE_integer("seed", 0, "Of the rows that are held out.", 0, 2**32 - 1)
    flags.DEFINE_string("weights", "", "import: the published predictor's file.")
    flags.DEFINE_string("probe", "", "apply: a probe that this program wrote.")
    flags.DEFINE_string("images", "", "apply: folder of images.")
    flags.DEFINE_string("against", "", "apply: second folder, whose files of the same names are compared with these.")
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


_NEEDS = {"fit-ratings": ("table", "out"), "fit-pairs": ("table", "out"), "import": ("weights", "clip", "out"),
          "apply": ("probe", "out")}  # fmt: skip


def run(command: str, options: Any, stop: Callable[[], None]) -> Iterator[str]:
    """Does what a command says; yields sentences.

    Raises:
      InputError: an option that is missing, a table or probe that does not do, or another CLIP than the probe's.
    """
    for name in _NEEDS[command]:
        if not getattr(options, name):
            raise InputError(f"{command} needs --{name}")
    out = pathlib.Path(options.out).expanduser()
    if not out.parent.is_dir():
        raise InputError(f"--out={options.out}: there is no folder {str(out.parent)!r}")
    if command == "apply":
        yield f"{out}: {_apply(options, out, stop)}"
        return
    if command == "import":
        probe = imported(options.weights, Clip(options.clip, stop))
    elif command == "fit-ratings":
        table = embedded(judgements.read(options.table, RATINGS), options.clip, stop)
        probe = fit_ratings(table, ridge=options.ridge, seed=options.seed)
    else:
        table = embedded(judgements.read(options.table, PAIRS), options.clip, stop)
        probe = fit_pairs(table, strength=options.strength, seed=options.seed)
    probe.write(out)
    yield f"{out}: a probe of {probe.kind} for the CLIP {probe.clip}; {json.dumps(dict(probe.about))}"


def _apply(options: Any, out: pathlib.Path, stop: Callable[[], None]) -> str:
    probe = affine_probes.read(options.probe)
    table = _table_to_apply(options, probe)
    names: list[Sequence[Any]] = [[file.name for file in side] for side in table.files]
    rows, sentence = applied(
        probe, embedded(table, options.clip, stop), names or [range(len(z)) for z in table.embeddings]
    )
    temporary = out.with_name(f".{out.name}.new")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(out)
    return sentence


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2:
        raise InputError(f"say what to do: python -m unclip_jax.preferences {'|'.join(COMMANDS)} --…")
    options = flags.FLAGS
    programs.start_logging()
    stopping = Stopping()  # the result is written whole, at the end
    programs.start_jax(compile_cache=options.compile_cache)
    if hosts.count() > 1:
        raise InputError("probes are fit by one process; set UNCLIP_HOSTS=one")
    for sentence in run(argv[1], options, stopping.now):
        print(sentence, flush=True)
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main, commands=COMMANDS)
