"""Turns prompts into images with trained models.

    python -m unclip_jax.generate --models=runs/quickstart --out=images --samples=4 \
        --prompt="a small red star on a white background" --prompt="a large blue ring on a grey background"

`--models` is a folder with the workdirs `clip`, `prior_diffusion` or `prior_ar`, `decoder`, `upsampler_1` and
`upsampler_2`, as the quickstart leaves it. Each image is a PNG that carries its prompt, seed, versions and training
steps as text; `grid.png` shows all of them with their prompts, `manifest.json` lists them.

Sample k of a prompt has the seed `--seed` + k, and the same prompt, seed, models and options make the same image,
whatever else is asked for. Stopped by SIGTERM or Ctrl-C (exit code 42) it keeps what is written, and the same command
makes the images that are missing. An empty prompt is refused: CLIP never saw an empty caption.

`--image=picture.png` draws variations of a picture: its embedding takes the place of what a prior would make of a
prompt. A prompt may be given beside it, for a decoder that reads captions.
"""

import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from unclip_jax import captioned_grid, hosts, metrics, picture_files, programs, provenance, unclip
from unclip_jax.data import captions as captions_lib
from unclip_jax.errors import InputError, nearest
from unclip_jax.stopping import Polled, Stopping

_LOG = logging.getLogger("unclip_jax.generate")  # __name__ is "__main__" where this is the program
MANIFEST, GRID = "manifest.json", "grid.png"
# In a prior's place where the embedding is that of a given picture.
IMAGE = "image"
# The grid shows at most so many images: beyond that nobody looks, and it would not fit into memory.
_GRID_LIMIT = 256

# Flag -> (parts, key of config.sampling). A flag that is not given leaves the run's own setting.
SAMPLING_FLAGS = {
    "guidance_scale": (("decoder",), "guidance_scale"),
    "decoder_steps": (("decoder",), "timesteps"),
    "decoder_method": (("decoder",), "method"),
    "eta": (("decoder",), "eta"),
    "threshold": (("decoder",), "threshold"),
    "quantile": (("decoder",), "quantile"),
    "prior_guidance_scale": (("prior_diffusion", "prior_ar"), "guidance_scale"),
    "prior_steps": (("prior_diffusion",), "timesteps"),
    "prior_method": (("prior_diffusion",), "method"),
    "candidates": (("prior_diffusion", "prior_ar"), "candidates"),
    "upsampler_steps": (("upsampler_1", "upsampler_2"), "timesteps"),
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One image to make.

    Attributes:
      index: of its prompt in the list of prompts.
      prompt: the caption.
      seed: of its noise.
      prior: a key of `unclip.PRIORS`, or IMAGE.
    """

    index: int
    prompt: str
    seed: int
    prior: str

    @property
    def name(self) -> str:
        """File name without its ending; the prior is in it, so that several may stand in one folder."""
        return f"{self.index:05d}-{self.prior}-seed{self.seed}"


def wanted_images(prompts: Sequence[str], *, priors: Sequence[str], seed: int, samples: int) -> list[Wanted]:
    """Lists the images to make: for each prompt and sample, one by each prior. A repeated prompt gets further seeds."""
    images, used = [], dict.fromkeys(prompts, 0)
    for index, prompt in enumerate(prompts):
        for _ in range(samples):
            number = seed + used[prompt]
            used[prompt] += 1
            images += [Wanted(index, prompt, number, prior) for prior in priors]
    return images


def read_prompts(given: Sequence[str], path: str | None) -> list[str]:
    """Returns the prompts given one by one and those in a text file, one a line; blank lines there are passed over.

    Raises:
      InputError: the file cannot be read as UTF-8, a prompt is empty, or there is none.
    """
    prompts = [captions_lib.clean(prompt) for prompt in given]
    for raw, prompt in zip(given, prompts, strict=True):
        if not prompt:
            raise InputError(f"the prompt {raw!r} is empty; describe an image in words")
    if path:
        try:
            text = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the prompts in {path!r} cannot be read as UTF-8 text: {error}") from error
        lines = [captions_lib.clean(line) for line in text.splitlines()]
        prompts += [line for line in lines if line]
    if not prompts:
        raise InputError(f"there is no prompt{f' in {path!r}' if path else ''}; give --prompt='…' or --prompts=FILE")
    return prompts


class Writer:
    """Writes images into a folder, and knows which are there already.

    The folder belongs to one set of options, `record`, which manifest.json holds; asked to go on with another, it
    refuses, for old and new images could not be told apart.
    """

    def __init__(self, folder: str, *, record: Mapping[str, Any], stages: str):
        self.folder = pathlib.Path(folder).expanduser()
        self.stages = stages
        self.record = json.loads(json.dumps(record))
        self.timings: Mapping[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        if path.exists():
            try:
                content = json.loads(path.read_text())
                there, self.timings = content["record"], content["timings"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is no list of images made by this program; use another --out") from error
            keys = [key for key in {**there, **self.record} if there.get(key) != self.record.get(key)]
            if keys:
                named = "; ".join(f"{key} was {there.get(key)!r}, is {self.record.get(key)!r}" for key in sorted(keys))
                raise InputError(f"{self.folder} holds images made otherwise ({named}); use another --out")
        else:
            self.manifest([], {})

    def has(self, image: Wanted) -> bool:
        """Whether the image is there. Files appear under their name only when whole; the last stage's comes last.

        Raises:
          InputError: the file shows another prompt, and would be overwritten.
        """
        path = self.folder / f"{image.name}.png"
        if not path.exists():
            return False
        try:
            with Image.open(path) as picture:
                picture.load()
                prompt = getattr(picture, "text", {}).get("prompt")
        except OSError:  # damaged since; it is made again
            return False
        if prompt != image.prompt:
            raise InputError(f"{path} shows another prompt, {prompt!r}; use another --out")
        return True

    def write(self, image: Wanted, pixels: Mapping[str, np.ndarray]) -> None:
        """Writes one image: {stage: uint8 [s, s, 3]}, the last stage's under the image's own name."""
        text = {
            "prompt": image.prompt,
            "seed": str(image.seed),
            "prior": image.prior,
            **provenance.marks(f"unclip_jax {self.record['versions']['unclip_jax']}"),
            "unclip_jax": json.dumps(self.record, sort_keys=True),
        }
        if self.record.get("negative_prompt"):
            text["negative_prompt"] = self.record["negative_prompt"]
        *earlier, last = pixels
        for stage in earlier if self.stages == "all" else ():
            picture_files.save(self.folder / f"{image.name}-{stage}.png", pixels[stage], text)
        picture_files.save(self.folder / f"{image.name}.png", pixels[last], text)

    def manifest(self, images: Sequence[Wanted], timings: Mapping[str, Any]) -> None:
        """Writes manifest.json: how the images were made, which there are, and what each part took."""
        rows = [{"file": f"{image.name}.png", **dataclasses.asdict(image)} for image in images]
        timings = _sum(self.timings, timings)
        content = {"record": self.record, "images": rows, "timings": timings}
        _replace(self.folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    def grid(self, images: Sequence[Wanted]) -> None:
        """Writes grid.png, a row of samples for each prompt and prior, its prompt beside it."""
        rows: dict[tuple[str, str], list[np.ndarray]] = {}
        for image in images[:_GRID_LIMIT]:
            with Image.open(self.folder / f"{image.name}.png") as picture:
                rows.setdefault((image.prompt, image.prior), []).append(np.asarray(picture.convert("RGB")))
        several = len({image.prior for image in images}) > 1
        labels = [f"{prompt} [{prior}]" if several else prompt for prompt, prior in rows]
        picture_files.save(self.folder / GRID, captioned_grid.draw(labels, list(rows.values())), {})


def _sum(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the numbers of two trees of dictionaries."""
    total = dict(old)
    for key, value in new.items():
        nested = isinstance(value, Mapping)
        total[key] = _sum(old.get(key, {}), value) if nested else old.get(key, 0) + value
    return total


def _replace(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def make(
    model: unclip.UnCLIP,
    writer: Writer,
    images: Sequence[Wanted],
    stop: Polled,
    *,
    negative: str | None = None,
    picture: np.ndarray | None = None,
) -> int:
    """Makes the images that are missing, a microbatch of one prior at a time; returns an exit code.

    Those whose prior is IMAGE are variations of `picture`, uint8 [h, w, 3].
    """
    missing = [image for image in images if not writer.has(image)]
    done = len(images) - len(missing)
    if done:
        _LOG.info("%d of %d images are there already", done, len(images))
    progress = metrics.Progress("images", start=done, total=len(images), examples_per_step=1)
    for prior in (*unclip.PRIORS, IMAGE):
        own = [image for image in missing if image.prior == prior]
        for start in range(0, len(own), model.microbatch):
            if stop.poll():
                progress.close()
                _LOG.info("stopped after %d of %d images; the same command makes the others", done, len(images))
                return programs.REQUEUE
            batch = own[start : start + model.microbatch]
            said = [image.prompt for image in batch]
            ids = [unclip.image_id(image.prompt, image.seed) for image in batch]
            if picture is None:
                made = model.generate(said, ids=ids, prior=prior, negative=negative)
            else:
                made = model.vary(np.stack([picture] * len(batch)), said, ids=ids)
            for row, image in enumerate(batch):
                writer.write(image, {stage: pixels[row] for stage, pixels in made.images.items()})
            done += len(batch)
            progress.report(done, {})
    progress.close()
    return programs.DONE


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("models", None, "Folder with the workdirs of the trained parts, such as runs/quickstart.")
    flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
    flags.DEFINE_string("prompts", None, "Text file with one prompt a line.")
    flags.DEFINE_string("negative_prompt", None, "What not to draw: guidance steers away from it.")
    flags.DEFINE_string("image", None, "A picture to draw variations of, in the place of a prior.")
    flags.DEFINE_string("out", None, "Folder for the images.")
    flags.DEFINE_integer("seed", 0, "Seed of the first sample of each prompt.", 0, 2**31 - 1)
    flags.DEFINE_integer("samples", 1, "Images per prompt.", lower_bound=1)
    flags.DEFINE_list("prior", ["diffusion"], "diffusion, ar, none (z_t in z_i's place), dropped (no z_i); or several.")
    flags.DEFINE_string("guidance_scale", None, "Guidance of the decoder; 1 is none.")
    flags.DEFINE_string("decoder_steps", None, "Steps of the decoder, a number or a named subset such as fast27.")
    flags.DEFINE_string("decoder_method", None, "Sampler of the decoder.")
    flags.DEFINE_string("eta", None, "Noise of DDIM in the decoder, 0 to 1.")
    flags.DEFINE_string("threshold", None, "What the decoder does with pixels out of range: static, dynamic or none.")
    flags.DEFINE_string("quantile", None, "Of dynamic thresholding.")
    flags.DEFINE_string("prior_guidance_scale", None, "Guidance of the prior; 1 is none.")
    flags.DEFINE_string("prior_steps", None, "Steps of the diffusion prior.")
    flags.DEFINE_string("prior_method", None, "Sampler of the diffusion prior; analytic needs unclip_jax.statistics.")
    flags.DEFINE_string("candidates", None, "Embeddings that the prior draws, of which the one nearest to z_t is kept.")
    flags.DEFINE_string("upsampler_steps", None, "Steps of both upsamplers.")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "The moving average of the weights, or the last ones.")
    flags.DEFINE_enum("stages", "last", ["last", "all"], "Write the last stage's images only, or every stage's.")
    flags.DEFINE_integer("batch_size", 16, "Images made at once.", lower_bound=1)
    flags.DEFINE_integer("devices_per_image", 1, "Devices that share an image that one cannot hold.", lower_bound=1)
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def sampling_options(parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns part -> {key: value} of the sampling flags that were given, for the parts that take part."""
    options: dict[str, dict[str, Any]] = {}
    for flag, (names, key) in SAMPLING_FLAGS.items():
        value = flags.FLAGS[flag].value
        for name in names:
            if value is not None and name in parts:
                options.setdefault(name, {})[key] = value
    return options


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    for name in ("models", "out"):
        if not options[name].value:
            raise InputError(f"--{name} is missing; for example --models=runs/quickstart --out=images --prompt='…'")
    for prior in options.prior:
        if prior not in unclip.PRIORS:
            raise InputError(f"--prior={prior} is unknown; {nearest(prior, unclip.PRIORS)}")
    priors = list(dict.fromkeys(options.prior))
    picture, digest = picture_files.read(options.image) if options.image else (None, None)
    if picture is None:
        prompts = read_prompts(options.prompt, options.prompts)
    else:
        priors = [IMAGE]
        if options.negative_prompt:
            raise InputError("--negative_prompt and --image do not go together")
        prompts = read_prompts(options.prompt, options.prompts) if options.prompt or options.prompts else [""]
    negative = options.negative_prompt and captions_lib.clean(options.negative_prompt)
    if negative == "":
        raise InputError("--negative_prompt is empty; leave it out: the empty caption is what guidance leaves anyway")
    programs.start_logging()
    stop = Stopping()  # files are written whole, so that nothing is lost wherever it ends
    programs.start_jax(compile_cache=options.compile_cache)
    if hosts.count() > 1:
        raise InputError("images are drawn by one process; set UNCLIP_HOSTS=one, and give each host its own prompts")
    began = time.monotonic()
    names = unclip.names_for(options.models, priors=priors)
    sampling = sampling_options(names)
    model = unclip.UnCLIP.load(
        options.models,
        only=names,
        sampling=sampling,
        weights=options.weights,
        microbatch=options.batch_size,
        devices_per_image=options.devices_per_image,
    )
    for prior in priors:
        if picture is None:
            model.check(prior=prior, negative=negative)
    record = {
        "models": {name: {"workdir": part.workdir, "step": part.step} for name, part in model.parts.items()},
        "sampling": {
            name: part.config.sampling.to_dict() for name, part in model.parts.items() if "sampling" in part.config
        },
        "weights": options.weights,
        "negative_prompt": negative,
        **({"image": digest} if digest else {}),
        "versions": provenance.versions(),
        "device": jax.devices()[0].device_kind,
    }
    images = wanted_images(prompts, priors=priors, seed=options.seed, samples=options.samples)
    writer = Writer(options.out, record=record, stages=options.stages)
    code = make(model, writer, images, stop, negative=negative, picture=picture)
    timings = {name: dataclasses.asdict(timing) for name, timing in model.timings.items()}
    there = [image for image in images if writer.has(image)]
    writer.manifest(there, {**timings, "seconds": time.monotonic() - began})
    if code == programs.DONE:
        writer.grid(images)
        print(f"{len(images)} images are in {writer.folder}; all of them: {writer.folder / GRID}")
    return code


if __name__ == "__main__":
    define_flags()
    programs.run(main)
