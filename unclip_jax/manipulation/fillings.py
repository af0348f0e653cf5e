"""The commands of `unclip_jax.manipulate` that fill pictures or rank them: inpaint, outpaint, edit, rerank."""

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from unclip_jax import metrics, parts, unclip
from unclip_jax.data import captions as captions_lib
from unclip_jax.data import resize
from unclip_jax.errors import InputError, nearest
from unclip_jax.manipulation import clip_guidance, edits, inpainting, masks, motion, outpainting, reranking
from unclip_jax.manipulation.results import Results
from unclip_jax.manipulation.session import Frame, Picture, Session
from unclip_jax.predictor import Extra

SHEET, RANKING = "sheet", "ranking"
# In a prior's place, where the embedding is that of the given picture.
IMAGE = "image"
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
# What commands that fill read, each.
READS = ("samples", "prior", "negative_prompt", "clip_guidance_scale")
# Flag -> key of the decoder's config.sampling, which holds where the flag is not given.
OVERRIDES = {"guidance_scale": "guidance_scale", "steps": "timesteps", "threshold": "threshold", "method": "method"}


def define_flags() -> None:
    """Defines the flags of these commands."""
    flags.DEFINE_multi_string("mask", [], "inpaint: picture file, white where to fill: one for all, or one each.")
    flags.DEFINE_multi_string("box", [], "inpaint: what to fill, x0,y0,x1,y1 in pixels of the picture: as --mask.")
    flags.DEFINE_string("prior", "diffusion", "Makes z_i of the caption: diffusion, ar, none (z_t), dropped; or image.")
    flags.DEFINE_string("negative_prompt", None, "What not to draw: guidance steers away from it.")
    flags.DEFINE_float("clip_guidance_scale", 0.0, "How much the noised CLIP leads the decoder; 0 is not.", 0.0)
    flags.DEFINE_string("method", None, "Sampler of the decoder, in the place of its run's.")
    for side in outpainting.SIDES:
        flags.DEFINE_string(side, "0", f"outpaint: what to add at the {side}, in pixels, or as a share (0.5, 50%).")
    flags.DEFINE_float("overlap", 0.5, "outpaint: share of a window that it has in common with the next.", 0.1, 0.9)
    flags.DEFINE_string("edits", None, "edit: JSON file, a list or an object a line: prompt, and box or mask.")
    flags.DEFINE_string("folder", None, "rerank: folder of pictures, beside or in place of --image.")
    flags.DEFINE_integer("keep", None, "rerank: how many of the best are written; by default all.", lower_bound=1)


class _Filling(NamedTuple):
    """All that filling is given, read and checked.

    Attributes:
      model: what fills.
      size: pixels a side of what it draws.
      pictures, captions: n.
      results: the folder.
    """

    model: unclip.UnCLIP
    size: int
    pictures: list[Picture]
    captions: list[str]
    results: Results


# Of (their squares or the pictures themselves, numbers of them, z_i or None, Drawing) -> the images in each state.
_Fill = Callable[[Sequence[int], unclip.Vectors | None, dict[str, Any]], list[np.ndarray]]


def inpaint(session: Session) -> str:
    """Fills a part of pictures."""
    options = session.options
    if bool(options.mask) == bool(options.box):
        raise InputError("inpaint needs --mask=FILE or --box=x0,y0,x1,y1, and not both: what is to be filled")
    pictures = session.pictures(options.image)
    given = _masks(options, pictures)
    digests = [picture.digest for picture in session.pictures(options.mask)]
    filling = _begun(session, pictures, digests)
    squares = _squares(filling)
    fill = np.stack([masks.square(mask, size=filling.size) for mask in given])

    def one(numbers: Sequence[int], z_i: unclip.Vectors | None, drawing: dict[str, Any]) -> list[np.ndarray]:
        rows = np.asarray(numbers)
        said = [filling.captions[number] for number in numbers]
        return [inpainting.inpaint(filling.model, squares[rows], fill[rows], said, z_i=z_i, **drawing).last]

    shown = [np.where(mask[..., None], 128, image).astype(np.uint8) for mask, image in zip(fill, squares, strict=True)]
    return _filled(session, filling, one, list(squares), before={"to fill": shown})


def outpaint(session: Session) -> str:
    """Continues pictures beyond their edges, at their own size."""
    options = session.options
    pictures = session.pictures(options.image)
    filling = _begun(session, pictures, [], whole=True)
    added: list[dict[str, Any]] = []
    for picture in pictures:
        height, width = picture.pixels.shape[:2]
        lengths = {"left": width, "right": width, "top": height, "bottom": height}
        added.append({side: outpainting.extent(options[side].value, of=of) for side, of in lengths.items()})

    def one(numbers: Sequence[int], z_i: unclip.Vectors | None, drawing: dict[str, Any]) -> list[np.ndarray]:
        (number,) = numbers  # pictures are of different sizes
        made = outpainting.outpaint(
            filling.model,
            filling.pictures[number].pixels[None],
            [filling.captions[number]],
            overlap=options.overlap,
            z_i=z_i,
            **added[number],
            **drawing,
        )
        return [made]

    return _filled(session, filling, one, [picture.pixels for picture in pictures], at_once=1)


def edit(session: Session) -> str:
    """Fills pictures again and again, by a list of masks and prompts."""
    options = session.options
    if options.prior == IMAGE:
        raise InputError("--prior=image draws what is there already, and edit has prompts; use a prior that reads them")
    pictures = session.pictures(options.image)
    listed = [edits.read(options.edits, height=x.pixels.shape[0], width=x.pixels.shape[1]) for x in pictures]
    content = pathlib.Path(options.edits).expanduser().read_bytes()
    filling = _begun(session, pictures, [hashlib.sha256(content).hexdigest()])
    squares = _squares(filling)
    steps = [[edits.Edit(x.prompt, masks.square(x.mask, size=filling.size)) for x in own] for own in listed]

    def one(numbers: Sequence[int], z_i: unclip.Vectors | None, drawing: dict[str, Any]) -> list[np.ndarray]:
        (number,) = numbers  # masks of pictures of other sizes are others
        drawing = {**drawing, "extra": None}  # each edit is led to its own prompt
        lead = options.clip_guidance_scale
        return edits.edit(filling.model, squares[number][None], steps[number], clip_guidance_scale=lead, **drawing)

    prompts = [step.prompt for step in steps[0]]
    return _filled(session, filling, one, list(squares), at_once=1, prompts=prompts)


def rerank(session: Session) -> str:
    """Writes pictures in the order in which CLIP finds them like a caption."""
    options = session.options
    paths = [*options.image]
    if options.folder:
        folder = pathlib.Path(options.folder).expanduser()
        paths += sorted(str(path) for path in folder.glob("*") if path.suffix.lower() in _ENDINGS)
    if not paths:
        raise InputError("there is no picture to rank; give --image=FILE, several times, or --folder=FOLDER")
    if len(options.caption) != 1:
        raise InputError(f"{len(options.caption)} captions were given; rerank compares all pictures with one --caption")
    caption = captions_lib.clean(options.caption[0])
    if not caption:
        raise InputError(f"--caption={options.caption[0]!r} is empty; describe an image in words")
    pictures = session.pictures(paths)
    model = unclip.UnCLIP.load(options.models, only=["clip"], microbatch=options.batch_size)
    results = session.results(model, [picture.digest for picture in pictures])
    ranking = reranking.rerank(model, [picture.pixels for picture in pictures], caption)
    kept = ranking.order[: options.keep]
    rows = []
    for place, number in enumerate(kept):
        picture, score = pictures[number], float(ranking.similarity[number])
        name = f"rank{place:05d}-{picture.name}"
        results.save(name, picture.pixels, {"caption": caption, "similarity": f"{score:.6f}", "image": picture.digest})
        rows.append({"file": f"{name}.png", "picture": picture.path, "similarity": score})
    if "sheet" in options.format:
        shown = [_on_square(pictures[number].pixels) for number in kept]
        labels = [f"{row['similarity']:.3f} {caption}" for row in rows]
        results.save(SHEET, motion.sheet(labels, [[image] for image in shown], headings=["best first"]), {})
    results.finish({"caption": caption, RANKING: rows})
    return f"{len(rows)} of {len(pictures)} pictures are in {results.folder}, the best first"


def _masks(options: Any, pictures: Sequence[Picture]) -> list[masks.Mask]:
    """Reads what is to be filled of each picture, at its own size."""
    given = list(options.mask or options.box)
    if len(given) not in (1, len(pictures)):
        raise InputError(f"{len(given)} masks or boxes were given for {len(pictures)} pictures; give one, or one each")
    given = given * (len(pictures) if len(given) == 1 else 1)
    found = []
    for text, picture in zip(given, pictures, strict=True):
        height, width = picture.pixels.shape[:2]
        if options.mask:
            found.append(masks.read(text, height=height, width=width))
        else:
            found.append(masks.box(masks.parse_box(text), height=height, width=width))
    return found


def _begun(session: Session, pictures: Sequence[Picture], others: Sequence[str], *, whole: bool = False) -> _Filling:
    """Reads the model and checks what it is given; `whole` pictures may be smaller than what it draws."""
    options = session.options
    captions = session.captions(len(pictures))
    if options.prior not in (IMAGE, "dropped") and "" in captions and session.command != "edit":
        raise InputError("--caption is missing: what is the whole picture to show? Or leave it to --prior=image")
    motion.check_formats(options.format)
    model = _model(session)
    size = inpainting.side(model)
    for picture in pictures:
        height, width = picture.pixels.shape[:2]
        if min(height, width) < size and not whole:
            raise InputError(
                f"image {picture.path} has {width} x {height} pixels, and the model draws {size} x {size}: give a "
                "larger one, or end at a part that draws smaller ones (--last=decoder)"
            )
    sampling = {name: part.config.sampling.to_dict() for name, part in model.parts.items() if "sampling" in part.config}
    results = session.results(model, [picture.digest for picture in pictures] + [*others], sampling=sampling)
    return _Filling(model, size, list(pictures), captions, results)


def _model(session: Session) -> unclip.UnCLIP:
    """Reads the parts that filling needs, with what flags say of the decoder's sampling."""
    options = session.options
    if options.prior not in (*unclip.PRIORS, IMAGE):
        raise InputError(f"--prior={options.prior} is unknown; {nearest(options.prior, (*unclip.PRIORS, IMAGE))}")
    names = unclip.names_for(options.models, priors=[options.prior])
    leads = options.clip_guidance_scale > 0
    drawers = [name for name in names if name == "decoder" or parts.STAGES[name] == "upsampler"]
    if options.last is not None:
        cascade = [name for name in drawers if name not in parts.LAST.values()]
        if options.last not in cascade:
            raise InputError(f"--last={options.last}: there is no such part; {nearest(options.last, cascade)}")
        left_out = cascade[cascade.index(options.last) + 1 :]
        left_out += [parts.LAST.get(name, "") for name in left_out]
        names = [name for name in names if name not in left_out]
    sampling = {key: options[flag].value for flag, key in OVERRIDES.items() if options[flag].present}
    model = unclip.UnCLIP.load(
        options.models,
        only=[*names, *([parts.NOISED] if leads else [])],
        sampling={"decoder": sampling},
        weights=options.weights,
        microbatch=options.batch_size,
        devices_per_image=options.devices_per_image,
    )
    if options.prior != IMAGE:
        model.check(prior=options.prior, negative=_negative(options))
    return clip_guidance.guided(model) if leads else model


def _negative(options: Any) -> str | None:
    if options.negative_prompt is None:
        return None
    said = captions_lib.clean(options.negative_prompt)
    if not said:
        raise InputError("--negative_prompt is empty; leave it out: the empty caption is what guidance leaves anyway")
    return said


def _squares(filling: _Filling) -> np.ndarray:
    return np.stack([resize.square(picture.pixels, size=filling.size) for picture in filling.pictures])


def _filled(
    session: Session,
    filling: _Filling,
    fill: _Fill,
    given: Sequence[np.ndarray],
    *,
    before: dict[str, list[np.ndarray]] | None = None,
    at_once: int = 0,
    prompts: Sequence[str] = (),
) -> str:
    """Fills each picture --samples times, and shows what was given, `before` and what came of it.

    Args:
      session, filling: what is wanted.
      fill: makes pictures.
      given: what the sheet shows of each picture first.
      before: heading -> pictures that it shows next.
      at_once: how many `fill` takes; by default a microbatch.
      prompts: where there are several states: what each was made by.
    """
    options, results = session.options, filling.results
    seeds = range(options.seed, options.seed + options.samples)
    frames = [
        Frame(f"{picture.name}-seed{seed}", unclip.image_id(picture.digest, seed), {
            "image": picture.digest, "seed": str(seed), "caption": filling.captions[number], "prior": options.prior,
        })
        for number, picture in enumerate(filling.pictures)
        for seed in seeds
    ]  # fmt: skip
    count = len(seeds)
    states = [f"-edit{place:02d}" for place in range(len(prompts))] or [""]
    missing = [place for place, frame in enumerate(frames) if not results.has(frame.name + states[-1])]
    progress = metrics.Progress("images", start=len(frames) - len(missing), total=len(frames), examples_per_step=1)
    step = at_once or filling.model.microbatch
    for start in range(0, len(missing), step):
        session.check_stop()
        batch = missing[start : start + step]
        numbers = [place // count for place in batch]
        captions = [filling.captions[number] for number in numbers]
        drawing: dict[str, Any] = {
            "ids": [frames[place].noise_id for place in batch],
            "negative": _negative(options),
            "extra": _led(filling.model, options, captions),
        }
        z_i = None
        if options.prior == IMAGE:
            z_i = filling.model.embed_images(np.stack([_square(filling, number) for number in numbers]))
        else:
            drawing["prior"] = options.prior
        made = fill(numbers, z_i, drawing)
        for row, place in enumerate(batch):
            for state, images, prompt in zip(states, made, [*prompts] or [captions[row]], strict=True):
                text = {**frames[place].text, "caption": prompt}
                results.save(frames[place].name + state, images[row], text)
        progress.report(len(frames) - len(missing) + start + len(batch), {})
    progress.close()
    return _shown(session, filling, frames, states, given, before or {}, prompts)


def _on_square(image: np.ndarray) -> np.ndarray:
    """Returns a picture in the middle of a white square, for sheets show squares."""
    height, width = image.shape[:2]
    side = max(height, width)
    if height == width:
        return image
    paper = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    paper[top : top + height, left : left + width] = image
    return paper


def _square(filling: _Filling, number: int) -> np.ndarray:
    return resize.square(filling.pictures[number].pixels, size=filling.size)


def _led(model: unclip.UnCLIP, options: Any, captions: Sequence[str]) -> Extra | None:
    """What the noised CLIP leads the decoder to, where it is to."""
    if not options.clip_guidance_scale:
        return None
    return clip_guidance.towards(model, captions, scale=options.clip_guidance_scale)


def _shown(
    session: Session,
    filling: _Filling,
    frames: Sequence[Frame],
    states: Sequence[str],
    given: Sequence[np.ndarray],
    before: dict[str, list[np.ndarray]],
    prompts: Sequence[str],
) -> str:
    """Writes the sheet, films of edits, and the list of what there is; returns a sentence."""
    options, results = session.options, filling.results
    count = options.samples
    if "sheet" in options.format:
        rows, labels = [], []
        for number, picture in enumerate(filling.pictures):
            first = [given[number], *(images[number] for images in before.values())]
            own = frames[number * count : (number + 1) * count]
            if prompts:  # a row for each sample, a column for each state
                rows += [[*first, *(results.whole(frame.name + state) for state in states)] for frame in own]
                labels += [f"{picture.name} seed {frame.text['seed']}" for frame in own]
            else:
                rows.append([*first, *(results.whole(frame.name) for frame in own)])
                labels.append(filling.captions[number] or picture.name)
        seeds = range(options.seed, options.seed + count)
        heads = ["given", *before, *([*prompts] or [f"seed {seed}" for seed in seeds])]
        rows = [[_on_square(image) for image in row] for row in rows]
        results.save(SHEET, motion.sheet(labels, rows, headings=heads), {})
    if prompts:
        for place, frame in enumerate(frames):
            film = [given[place // count], *(results.whole(frame.name + state) for state in states)]
            results.save_motion(frame.name, film, options.format, fps=options.fps)
    files = sorted(path.name for path in results.folder.iterdir() if path.suffix in (".png", ".gif", ".mp4"))
    results.finish({"files": files})
    return f"{len(files)} files are in {results.folder}"
