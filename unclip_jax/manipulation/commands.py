"""The commands of `unclip_jax.manipulate` that change latents, from `encode` to `arithmetic`."""

import itertools
from collections.abc import Sequence

import numpy as np
from absl import flags

from unclip_jax import unclip
from unclip_jax.data import captions as captions_lib
from unclip_jax.data import resize
from unclip_jax.errors import InputError
from unclip_jax.manipulation import arithmetic as sums
from unclip_jax.manipulation import interpolation, motion, text_diffs
from unclip_jax.manipulation.latents import Codec, Encoded, Latents, psnr
from unclip_jax.manipulation.results import Results
from unclip_jax.manipulation.session import Frame, Picture, Session
from unclip_jax.manipulation.variations import repeated

SHEET = "sheet"


def define_flags() -> None:
    """Defines the flags of these commands."""
    flags.DEFINE_list("eta", ["0.5"], "variations: share of fresh noise in each step, 0 to 1; several are rows.")
    flags.DEFINE_integer("samples", 4, "variations: images of each picture and eta.", lower_bound=1)
    flags.DEFINE_integer("frames", 9, "interpolate, textdiff: images of a path, its ends included.", lower_bound=2)
    flags.DEFINE_enum("noise", "slerp", interpolation.NOISE, "interpolate: x_T turns as z_i does, or is drawn once.")
    flags.DEFINE_integer("draws", 1, "interpolate --noise=fixed: x_T that are drawn, each a path.", lower_bound=1)
    flags.DEFINE_multi_string("text", [], "textdiff: what to make of the pictures; several are tried one by one.")
    flags.DEFINE_string("baseline", "a photo", "textdiff: what they are, or a dummy; '' leaves it out.")
    flags.DEFINE_float("theta", text_diffs.FARTHEST, "textdiff: how far to turn, above 0 and up to 1.")
    flags.DEFINE_multi_string("plus", [], "arithmetic: text to add; may be given several times.")
    flags.DEFINE_multi_string("minus", [], "arithmetic: text to take away.")
    flags.DEFINE_multi_string("plus_image", [], "arithmetic: picture to add.")
    flags.DEFINE_multi_string("minus_image", [], "arithmetic: picture to take away.")
    flags.DEFINE_list("strength", ["0", "0.5", "1"], "arithmetic: weight of what is added and taken away; a row each.")


def encode(session: Session) -> str:
    """Encodes pictures and draws them again."""
    codec, pictures, captions = _begun(session)
    results = _opened(session, codec, pictures)

    def each(numbers: Sequence[int], found: Encoded) -> None:
        for row, number in enumerate(numbers):
            for name in codec.drawers:
                text = {"caption": captions[number], "part": name}
                results.save(f"{pictures[number].name}-{name}-given", found.images[name][row], text)
                results.save(f"{pictures[number].name}-{name}", found.again[name][row], text)

    session.encoded(codec, pictures, captions, results, each=each)
    shown, said = [], []
    for picture in pictures:
        pairs = {name: [results.whole(f"{picture.name}-{name}{end}") for end in ("-given", "")]
                 for name in codec.drawers}  # fmt: skip
        shown.append([image for pair in pairs.values() for image in pair])
        said.append({name: float(psnr(again[None], given[None])[0]) for name, (given, again) in pairs.items()})
    headings = [f"{what}, {side} px" for side in codec.sides.values() for what in ("given", "again")]
    labels = [" ".join(f"{name} {_db(value)}" for name, value in row.items()) for row in said]
    results.save(SHEET, motion.sheet(labels, shown, headings=headings), {})
    rows = [{"image": picture.path, "psnr_db": {name: _db(value) for name, value in row.items()}}
            for picture, row in zip(pictures, said, strict=True)]  # fmt: skip
    results.finish({"pictures": rows})
    means = {name: float(np.mean([row[name] for row in said])) for name in codec.drawers}
    return f"{len(pictures)} pictures come back at " + ", ".join(f"{name} {_db(x)}" for name, x in means.items())


def variations(session: Session) -> str:
    """Draws pictures again with fresh noise in the steps."""
    options = session.options
    etas = numbers_of(options.eta, "eta")
    if not all(0 <= eta <= 1 for eta in etas):
        raise InputError(f"--eta={','.join(options.eta)}: the share of fresh noise is from 0 to 1")
    codec, pictures, captions = _begun(session)
    results = _opened(session, codec, pictures)
    latents = session.encoded(codec, pictures, captions, results)
    rows = repeated(latents, samples=options.samples)
    frames: dict[float, list[Frame]] = {}
    for eta in etas:
        frames[eta] = [
            _frame(picture, f"eta{eta:g}-seed{seed}", seed, {"eta": f"{eta:g}"})
            for picture in pictures
            for seed in range(options.seed, options.seed + options.samples)
        ]
        session.draw(codec, frames[eta], rows, results, eta=eta)
    side = list(codec.sides.values())[-1]
    shown, labels = [], []
    for number, picture in enumerate(pictures):
        for eta in etas:
            own = frames[eta][number * options.samples : (number + 1) * options.samples]
            shown.append([resize.square(picture.pixels, size=side), *(results.whole(frame.name) for frame in own)])
            labels.append(f"{picture.name} eta {eta:g}")
    heads = ["given", *(f"seed {seed}" for seed in range(options.seed, options.seed + options.samples))]
    return _finished(session, results, {SHEET: (labels, shown, heads)}, {})


def interpolate(session: Session) -> str:
    """Draws what lies between each picture and the next."""
    options = session.options
    shares = interpolation.thetas(options.frames)
    if len(options.image) < 2:
        raise InputError("interpolate needs two pictures at least: --image=ONE --image=OTHER")
    if options.draws > 1 and options.noise != "fixed":
        raise InputError(f"--draws={options.draws} draws x_T, and --noise={options.noise} does not; use --noise=fixed")
    codec, pictures, captions = _begun(session)
    results = _opened(session, codec, pictures)
    latents = session.encoded(codec, pictures, captions, results)
    count = len(pictures) - 1
    path = interpolation.between(
        latents.take(range(count)), latents.take(range(1, count + 1)), shares, noise=options.noise
    )
    seeds = range(options.seed, options.seed + options.draws)
    fixed = options.noise == "fixed"
    frames = [
        _frame(
            pictures[number],
            f"to-{pictures[number + 1].name}-{step:03d}" + (f"-seed{seed}" if fixed else ""),
            seed,
            {"theta": f"{share:.4f}", "x_T": options.noise},
        )
        for number, seed in itertools.product(range(count), seeds)
        for step, share in enumerate(shares)
    ]
    whole = np.arange(len(path)).reshape(count, 1, len(shares)).repeat(len(seeds), axis=1).reshape(-1)
    session.draw(codec, frames, path.take(whole), results)
    names = [
        f"{pictures[number].name}-to-{pictures[number + 1].name}" + (f"-seed{seed}" if fixed else "")
        for number, seed in itertools.product(range(count), seeds)
    ]
    return _paths(session, results, names, frames, shares)


def textdiff(session: Session) -> str:
    """Turns pictures from what they are to what a caption says."""
    options = session.options
    if not options.text:
        raise InputError("--text is missing; say what to make of the picture: --text='a red star'")
    if not 0 < options.theta <= 1:
        raise InputError(f"--theta={options.theta:g} is out of range: above 0 and up to 1; the paper's are 0.25 to 0.5")
    shares = interpolation.thetas(options.frames, most=options.theta)
    texts = [_said(text, "text") for text in options.text]
    codec, pictures, captions = _begun(session)
    baseline = captions_lib.clean(options.baseline)
    z_t = codec.embed_text([*texts, *([baseline] if baseline else [])])
    z_t0 = z_t[len(texts) :].repeat(len(texts), axis=0) if baseline else None
    z_d = text_diffs.direction(z_t[: len(texts)], z_t0)
    results = _opened(session, codec, pictures)
    latents = session.encoded(codec, pictures, captions, results)
    pairs = list(itertools.product(range(len(pictures)), range(len(texts))))
    path = text_diffs.along(latents.take([n for n, _ in pairs]), z_d[[k for _, k in pairs]], shares)
    frames = [
        _frame(
            pictures[number],
            f"text{k:02d}-{step:03d}",
            options.seed,
            {"text": texts[k], "baseline": baseline, "theta": f"{share:.4f}"},
        )
        for number, k in pairs
        for step, share in enumerate(shares)
    ]
    session.draw(codec, frames, path, results)
    names = [f"{pictures[number].name}-text{k:02d}" for number, k in pairs]
    return _paths(session, results, names, frames, shares, labels=[texts[k] for _, k in pairs])


def arithmetic(session: Session) -> str:
    """Adds embeddings of texts and pictures to those of pictures, and takes others away."""
    options = session.options
    strengths = numbers_of(options.strength, "strength")
    signs = {1.0: (options.plus, options.plus_image), -1.0: (options.minus, options.minus_image)}
    if not any(itertools.chain(*signs.values())):
        raise InputError("there is nothing to add or to take away; give --plus, --minus, --plus_image or --minus_image")
    others = {sign: ([_said(text, "plus or --minus") for text in texts], session.pictures(images))
              for sign, (texts, images) in signs.items()}  # fmt: skip
    given = [picture.digest for _, images in others.values() for picture in images]
    codec, pictures, captions = _begun(session)
    terms: list[tuple[float, unclip.Vectors]] = []
    for sign, (texts, images) in others.items():
        found = [codec.embed_text(texts)] if texts else []
        found += [codec.embed_images([picture.pixels for picture in images])] if images else []
        terms += [(sign, z[None]) for z in np.concatenate(found)] if found else []
    z_i = codec.embed_images([picture.pixels for picture in pictures])
    wanted = [sums.combined([(1.0, z_i), *((strength * sign, z) for sign, z in terms)]) for strength in strengths]
    results = _opened(session, codec, pictures, others=given)
    latents = session.encoded(codec, pictures, captions, results)
    moved = [Latents(z, latents.x_T, latents.captions) for z in wanted]
    frames = [
        _frame(
            picture,
            f"strength{strength:g}",
            options.seed,
            {"plus": "; ".join(options.plus), "minus": "; ".join(options.minus), "strength": f"{strength:g}"},
        )
        for strength in strengths
        for picture in pictures
    ]
    session.draw(codec, frames, Latents.joined(moved), results)
    shown = [[results.whole(frame.name) for frame in frames[number :: len(pictures)]]
             for number in range(len(pictures))]  # fmt: skip
    what = " ".join([*(f"+ {text}" for text in options.plus + options.plus_image),
                     *(f"- {text}" for text in options.minus + options.minus_image)])  # fmt: skip
    labels, heads = [f"{picture.name} {what}" for picture in pictures], [f"{strength:g}" for strength in strengths]
    return _finished(session, results, {SHEET: (labels, shown, heads)}, {})


def numbers_of(words: Sequence[str], flag: str) -> list[float]:
    """Returns the numbers of a flag that lists them, each once.

    Raises:
      InputError: one is none, or there is none.
    """
    try:
        found = [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"--{flag}={','.join(words)}: these are to be numbers, such as 0,0.5,1") from error
    if not found or not np.isfinite(found).all():
        raise InputError(f"--{flag}={','.join(words)}: give numbers, such as 0,0.5,1")
    return list(dict.fromkeys(found))


def _begun(session: Session) -> tuple[Codec, list[Picture], list[str]]:
    """Reads and checks all that a command is given; nothing is computed."""
    pictures = session.pictures(session.options.image)
    captions = session.captions(len(pictures))
    codec = session.codec(session.model())
    codec.check_images([picture.pixels for picture in pictures], [picture.path for picture in pictures])
    return codec, pictures, captions


def _opened(session: Session, codec: Codec, pictures: Sequence[Picture], *, others: Sequence[str] = ()) -> Results:
    """Opens the folder, once nothing is left to be refused but the folder itself."""
    return session.results(codec.model, [*(picture.digest for picture in pictures), *others])


def _frame(picture: Picture, what: str, seed: int, text: dict[str, str]) -> Frame:
    # The noise is named by the picture and the seed, so it does not depend on what else is drawn.
    noise_id = unclip.image_id(picture.digest, seed)
    return Frame(f"{picture.name}-{what}", noise_id, {"image": picture.digest, "seed": str(seed), **text})


def _paths(
    session: Session,
    results: Results,
    names: Sequence[str],
    frames: Sequence[Frame],
    shares: Sequence[float],
    *,
    labels: Sequence[str] = (),
) -> str:
    """Shows paths, whose frames stand one after another: a row of the sheet and a film for each."""
    shown = [[results.whole(frame.name) for frame in frames[first : first + len(shares)]]
             for first in range(0, len(frames), len(shares))]  # fmt: skip
    heads = [f"{share:.3g}" for share in shares]
    return _finished(session, results, {SHEET: (labels or names, shown, heads)}, dict(zip(names, shown, strict=True)))


def _finished(
    session: Session,
    results: Results,
    sheets: dict[str, tuple[Sequence[str], list[list[np.ndarray]], Sequence[str]]],
    films: dict[str, list[np.ndarray]],
) -> str:
    """Writes sheets, films and the list of what there is; returns a sentence."""
    formats = session.options.format
    for name, (labels, shown, heads) in sheets.items() if "sheet" in formats else ():
        results.save(name, motion.sheet(labels, shown, headings=heads), {})
    for name, images in films.items():
        results.save_motion(name, motion.there_and_back(images), formats, fps=session.options.fps)
    files = sorted(path.name for path in results.folder.iterdir() if path.suffix in (".png", ".gif", ".mp4"))
    results.finish({"files": files})
    return f"{len(files)} files are in {results.folder}"


def _said(text: str, flag: str) -> str:
    said = captions_lib.clean(text)
    if not said:
        raise InputError(f"--{flag}={text!r} is empty; describe an image in words")
    return said


def _db(value: float) -> str:
    return "identical" if np.isinf(value) else f"{value:.2f} dB"
