"""Looks into CLIP's image embeddings with a trained unCLIP: what they hold, and what is lost in them.

    python -m unclip_jax.probe pca --models=runs/quickstart --out=probes/pca
    python -m unclip_jax.probe typographic --models=runs/quickstart --out=probes/typographic --image=apple.png \\
        --text=ipod --labels="an apple,an ipod,a pizza"
    python -m unclip_jax.probe binding --models=runs/quickstart --out=probes/binding
    python -m unclip_jax.probe rank --clip=runs/plain/clip --clip=runs/sam/clip --out=probes/rank

`pca` fits principal components to the embeddings of a split and draws pictures from ever more of them (section 4,
Figure 7). `typographic` writes words over pictures, says what CLIP takes them for before and after, and draws what the
embeddings mean (Figure 6). `binding` renders scenes of two objects, draws them again from their own embeddings and from
a prior's, and counts with an oracle whose attributes are mixed up (section 7). `rank` counts the dimensions that
embeddings use (section 2.2), of one CLIP or of several.

Each writes a sheet, whose name and text carry its seed, and `results.json`. Exit codes: 0 done, 42 stopped by SIGTERM
or Ctrl-C (run it again), 1 error. The same as functions: `unclip_jax.probing`.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from unclip_jax import hosts, inputs, metrics, parts, picture_files, programs, provenance, unclip
from unclip_jax.data import resize, sealed
from unclip_jax.errors import InputError, nearest
from unclip_jax.predictor import Drawing
from unclip_jax.probing import binding, components, pictures, rank, sheets, typographic
from unclip_jax.stopping import Stopping

RESULTS = "results.json"
_SHOWN_BINDINGS = 12


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("models", "", "Folder with the workdirs of the trained parts, such as runs/quickstart.")
    flags.DEFINE_string("out", "", "Folder of the results.")
    flags.DEFINE_integer("seed", 0, "Seed of what is drawn, the first one where there are several.", 0, 2**31 - 1)
    flags.DEFINE_integer("batch_size", 32, "Images made at once.", lower_bound=1)
    flags.DEFINE_string("steps", None, "Steps of the decoder, a number or a named subset.")
    flags.DEFINE_string("guidance_scale", None, "Guidance of the decoder; 1 is none.")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "The moving average of the weights, or the last ones.")
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")
    flags.DEFINE_multi_string("image", [], "pca, typographic: a picture; may be given several times.")
    flags.DEFINE_integer("pictures", 4, "pca, typographic: without --image, so many of the evaluation split.", 1)
    flags.DEFINE_string("data", "", "pca, rank: a built-in data set or a folder; by default what CLIP was trained on.")
    flags.DEFINE_string("data_dir", "", "Root of built-in data sets; by default that of CLIP's run.")
    flags.DEFINE_string("variant", "", "Variant of the built-in data set.")
    flags.DEFINE_string("split", "", "pca, rank: split to embed; by default the training split of CLIP's run.")
    flags.DEFINE_integer("examples", 4096, "pca, rank: examples of the split to embed; 0 takes all.", lower_bound=0)
    flags.DEFINE_list("components", [], "pca: numbers of components; by default the paper's, or as large shares.")
    flags.DEFINE_string("text", "", "typographic: what to write.")
    flags.DEFINE_float("width", typographic.WIDTH, "typographic: of the note, as a share of the picture's.")
    flags.DEFINE_list("labels", [], "typographic: what a picture may be, separated by commas.")
    flags.DEFINE_multi_string("template", ["{}"], "typographic: a sentence with {} for a label; several are averaged.")
    flags.DEFINE_integer("samples", 3, "typographic: pictures to draw of each embedding.", lower_bound=1)
    flags.DEFINE_multi_string("caption", [], "binding: a scene of captioned_shapes with two objects.")
    flags.DEFINE_integer("scenes", 64, "binding: without --caption, so many scenes are drawn up.", lower_bound=2)
    flags.DEFINE_integer("seeds", 3, "binding: how often each scene is drawn.", lower_bound=1)
    flags.DEFINE_string("prior", "diffusion", "binding: diffusion, ar or none.")
    flags.DEFINE_multi_string("clip", [], "rank: workdir of a CLIP, in the place of --models; several are compared.")
    flags.DEFINE_float("lost", rank.LOST, "rank: share of the variance that components may lose.")


class Results:
    """Writes a folder that holds one command's results."""

    def __init__(self, folder: str, record: Mapping[str, Any]):
        """Claims a folder; InputError where it holds results that were made otherwise."""
        self.folder, self.record = pathlib.Path(folder).expanduser(), json.loads(json.dumps(record))
        path = self.folder / RESULTS
        if path.exists():
            there = json.loads(path.read_text()).get("record", {})
            apart = sorted(key for key in {**there, **self.record} if there.get(key) != self.record.get(key))
            if apart:
                raise InputError(f"{path} was made with another {', '.join(apart)}; choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)

    def sheet(self, command: str, seed: int, pixels: sheets.Sheet) -> pathlib.Path:
        """Writes a picture, its seed in its name and text."""
        path = self.folder / f"{command}-seed{seed}.png"
        marks = provenance.marks(f"unclip_jax {provenance.versions()['unclip_jax']}")
        text = {"seed": str(seed), **marks, "unclip_jax": json.dumps(self.record, sort_keys=True)}
        picture_files.save(path, pixels, text)
        return path

    def write(self, content: Mapping[str, Any]) -> None:
        """Writes results.json."""
        with sealed.Replacing(self.folder / RESULTS) as file:
            file.write((json.dumps({"record": self.record, **content}, indent=1) + "\n").encode())


def progress() -> Callable[[str, int, int], None]:
    """Returns what shows how far each part is; for Drawing."""
    bars: dict[str, metrics.Progress] = {}

    def report(part: str, done: int, total: int) -> None:
        bar = bars.setdefault(part, metrics.Progress(part, start=0, total=total, examples_per_step=1))
        bar.report(done, {})
        if done == total:
            bars.pop(part).close()

    return report


def read(options: Any, *, priors: Sequence[str] = (), still: bool = False) -> unclip.UnCLIP:
    """Reads the models that the flags name.

    `still` samples pixels by DDIM with eta 0, as the paper does to compare embeddings: what is drawn is then a function
    of embedding and x_T.
    """
    if not options.models:
        raise InputError("--models is missing; for example --models=runs/quickstart")
    names = unclip.names_for(options.models, priors=["image", *priors])
    sampling: dict[str, dict[str, Any]] = {}
    for name in names:
        if parts.STAGES[name] in ("decoder", "upsampler") and still:
            sampling[name] = {"method": "ddim", "eta": 0.0}
    given = {"timesteps": options.steps, "guidance_scale": options.guidance_scale}
    sampling["decoder"] = {**sampling.get("decoder", {}), **{key: value for key, value in given.items() if value}}
    return unclip.UnCLIP.load(
        options.models, only=names, sampling=sampling, weights=options.weights, microbatch=options.batch_size
    )


def data_of(options: Any, config: ConfigDict) -> ConfigDict:
    """Returns the section `data` of a CLIP's config, with what the flags say of it."""
    data = ConfigDict(config.data.to_dict())
    if options.data:
        data.update({"dataset": options.data, "mixture": (), "variant": ""})
    for key in ("data_dir", "variant", "split"):
        if getattr(options, key):
            data[key] = getattr(options, key)
    return data


def embeddings(model: unclip.UnCLIP, options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns z_i of the examples of a split, float32 [n, d], and what they are of."""
    one = inputs.data_sets(data_of(options, model.part("clip").config))[0]
    found = pictures.examples(one.directory, one.split, limit=options.examples)
    z = np.concatenate(list(pictures.embedded(model, found)))
    return z, {"data": one.name, "split": one.split, "examples": len(z)}


def chosen(model: unclip.UnCLIP, options: Any) -> tuple[list[np.ndarray], list[str]]:
    """Returns the pictures to probe, and what to call them: the given ones, or the first of the evaluation split."""
    if options.image:
        found = [picture_files.read(path)[0] for path in options.image]
        return found, [pathlib.Path(path).name for path in options.image]
    config = model.part("clip").config
    one = inputs.data_sets(data_of(options, config))[0]
    shown = list(pictures.examples(one.directory, config.data.eval_split, limit=options.pictures))
    return [example.image for example in shown], [example.caption for example in shown]


def record_of(command: str, options: Any, model: unclip.UnCLIP | None = None) -> dict[str, Any]:
    """Returns all that a command's results depend on."""
    own = ("seed", "weights", "steps", "guidance_scale", *COMMANDS[command][1])
    found = model.parts if model else {}
    return {
        "command": command,
        "models": {name: {"workdir": part.workdir, "step": part.step} for name, part in found.items()},
        **{name: getattr(options, name) for name in own},
        "versions": provenance.versions(),
    }


def pca(options: Any, stop: Callable[[], None]) -> str:
    """Draws pictures from ever more principal components of their embeddings."""
    asked = tuple(_whole(text) for text in options.components)
    model = read(options, still=True)
    kept = components.counts(model.part("clip").config.model.embed_dim, asked)
    images, labels = chosen(model, options)
    results = Results(options.out, record_of("pca", options, model))
    z, said = embeddings(model, options)
    stop()
    fitted = components.fit([z])
    size = model.part("clip").config.model.image_size
    squares = [resize.square(image, size=size) for image in images]
    z_i = model.embed_images(np.stack(squares))
    made = components.drawn(model, fitted, z_i, kept, seed=options.seed, progress=progress())
    variances = fitted.variances / fitted.variances.sum()
    shares = [float(variances[:count].sum()) for count in kept]
    side = made.shape[2]
    originals = [resize.square(image, size=side) for image in images]
    path = results.sheet("pca", options.seed, sheets.components(made, originals, kept, shares, labels))
    lost = {count: float(components.lost(fitted, z, count).mean()) for count in kept}
    results.write({**said, "pictures": labels, "variance_kept": dict(zip(map(str, kept), shares, strict=True)),
                   "length_lost": {str(count): share for count, share in lost.items()},
                   "rank": rank.of_variances(fitted.variances).numbers()})  # fmt: skip
    return f"{path}: {len(images)} pictures from {', '.join(map(str, kept))} of {z.shape[1]} components"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"--components={text} is no number of components; write --components=20,40,80") from error


def attack(options: Any, stop: Callable[[], None]) -> str:
    """Writes words over pictures and looks at what becomes of them."""
    if not options.text or len(options.labels) < 2:
        raise InputError("give --text, to be written over the pictures, and --labels, two or more things they may show")
    model = read(options)
    images, labels = chosen(model, options)
    size = model.part("clip").config.model.image_size
    typographic.written(np.zeros((size, size, 3), np.uint8), options.text, width=options.width)
    results = Results(options.out, record_of("typographic", options, model))
    stop()
    found = typographic.attack(
        model, images, options.text, options.labels,
        templates=options.template, samples=options.samples, width=options.width,
        seed=options.seed, progress=progress(),
    )  # fmt: skip
    path = results.sheet("typographic", options.seed, sheets.attacks(found, options.labels, options.text))
    rows = [
        {"picture": label, "before": before.tolist(), "after": after.tolist()}
        for label, before, after in zip(labels, found.before, found.after, strict=True)
    ]
    results.write({"labels": options.labels, "text": options.text, "probabilities": rows})
    odds = ", ".join(
        f"{label} {before:.1%} -> {after:.1%}"
        for label, before, after in zip(options.labels, found.before.mean(0), found.after.mean(0), strict=True)
    )
    return f"{path}: CLIP's probabilities, the mean of {len(images)} pictures: {odds}"


def bind(options: Any, stop: Callable[[], None]) -> str:
    """Draws scenes of two objects again, and counts what is mixed up."""
    if options.prior not in unclip.PRIORS or options.prior == "dropped":
        hint = nearest(options.prior, ["diffusion", "ar", "none"])
        raise InputError(f"--prior={options.prior} makes no embedding; {hint}")
    if options.caption:
        given = binding.of_captions(options.caption, seed=options.seed)
    else:
        given = binding.problems(options.scenes, seed=options.seed)
    if len(given) < 2:
        raise InputError("one scene gives no error bar; give --caption twice or more")
    model = read(options, priors=[options.prior])
    reads: Any = model.part("decoder").stage
    sources = [binding.OWN, binding.PRIOR, *([binding.BOTH] if reads.reads_captions else [])]
    results = Results(options.out, record_of("binding", options, model))
    seeds = range(options.seed, options.seed + options.seeds)
    drawn: dict[str, list[np.ndarray]] = {source: [] for source in sources}
    for source in sources:
        for seed in seeds:
            drawing: Drawing = {"seed": seed, "progress": progress()}
            drawn[source].append(binding.redrawn(model, given, source, prior=options.prior, **drawing))
            stop()
    found = {
        source: binding.shares([binding.counted(images, given.captions) for images in several])
        for source, several in drawn.items()
    }
    # A render reads as present and bound, or its reading says nothing of what is drawn.
    found["renders"] = binding.shares([binding.counted(given.pictures, given.captions)])
    few = slice(0, _SHOWN_BINDINGS)
    sheet = sheets.bindings(given.captions[few], given.pictures[few], {s: [x[few] for x in drawn[s]] for s in sources})
    path = results.sheet("binding", options.seed, sheet)
    results.write({
        "captions": list(given.captions), "seeds": list(seeds),
        "shares": {s: {name: _stated(value) for name, value in one.items()} for s, one in found.items()},
    })  # fmt: skip
    lines = [
        f"{source:24}  " + "  ".join(f"{name} {_percent(value)}" for name, value in one.items())
        for source, one in found.items()
    ]
    return "\n".join([*lines, str(path)])


def count_rank(options: Any, stop: Callable[[], None]) -> str:
    """Counts the dimensions that embeddings use, of each CLIP."""
    workdirs = [{"clip": folder} for folder in options.clip] or ([options.models] if options.models else [])
    if not workdirs:
        raise InputError("no CLIP is named; give --clip=runs/mine/clip, or --models=runs/mine")
    if not 0 < options.lost < 1:
        raise InputError(f"--lost={options.lost:g} is no share of the variance; give one between 0 and 1")
    found, said = {}, {}
    results: Results | None = None
    for workdir in workdirs:
        model = unclip.UnCLIP.load(workdir, only=["clip"], microbatch=options.batch_size)
        results = results or Results(options.out, record_of("rank", options))
        z, about = embeddings(model, options)
        stop()
        name = model.part("clip").workdir
        found[name] = {key: _stated(value) for key, value in rank.measured(z, lost=options.lost).items()}
        said[name] = {**about, "dimensions": z.shape[1], "sam_rho": model.part("clip").config.sam.rho}
        said[name]["variances"] = rank.of(z, lost=options.lost).variances.tolist()
    assert results
    results.write({"rank": found, "of": said})
    lines = [
        f"{name} ({said[name]['dimensions']} dimensions, SAM rho {said[name]['sam_rho']:g}): "
        + ", ".join(f"{key} {value['value']:.4g} ± {value['standard_error']:.2g}" for key, value in numbers.items())
        for name, numbers in found.items()
    ]
    return "\n".join(lines)


def _stated(value: Any) -> dict[str, float | None]:
    """A number and its error for JSON, which knows no NaN."""
    numbers = {"value": value.value, "standard_error": value.standard_error}
    return {name: None if np.isnan(number) else float(number) for name, number in numbers.items()}


def _percent(value: Any) -> str:
    if np.isnan(value.value):
        return "–"
    return f"{100 * value.value:.1f} ± {196 * value.standard_error:.1f}%"


# Command -> what does it, and the flags besides the common ones that its results depend on.
COMMANDS: dict[str, tuple[Callable[[Any, Callable[[], None]], str], tuple[str, ...]]] = {
    "pca": (pca, ("image", "pictures", "data", "data_dir", "variant", "split", "examples", "components")),
    "typographic": (
        attack, ("image", "pictures", "data", "data_dir", "variant", "text", "width", "labels", "template", "samples")
    ),
    "binding": (bind, ("caption", "scenes", "seeds", "prior")),
    "rank": (count_rank, ("models", "clip", "data", "data_dir", "variant", "split", "examples", "lost")),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    options = flags.FLAGS
    programs.start_logging()
    if len(argv) < 2:
        raise InputError(f"say what to look for: python -m unclip_jax.probe COMMAND, one of {', '.join(COMMANDS)}")
    if not options.out:
        raise InputError("--out is missing; for example --out=probes/pca")
    stopping = Stopping()  # files are written whole, so that nothing is lost wherever it ends
    programs.start_jax(compile_cache=options.compile_cache)
    if hosts.count() > 1:
        raise InputError("one process probes; set UNCLIP_HOSTS=one")
    print(COMMANDS[argv[1]][0](options, stopping.now), flush=True)
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main, commands=tuple(COMMANDS))
