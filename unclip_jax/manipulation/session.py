"""What the commands of `unclip_jax.manipulate` share: pictures read, models loaded, latents found, images written."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax import metrics, parts, picture_files, provenance, unclip
from unclip_jax.data import captions as captions_lib
from unclip_jax.errors import InputError
from unclip_jax.manipulation.latents import Codec, Encoded, Latents
from unclip_jax.manipulation.results import Results
from unclip_jax.stopping import Polled, Stopped

_LOG = logging.getLogger("unclip_jax.manipulate")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was given.

    Attributes:
      path: its file.
      name: what its results are called: its place among the pictures and its file's name.
      pixels: uint8 [h, w, 3].
      digest: SHA-256 of the file.
    """

    path: str
    name: str
    pixels: np.ndarray
    digest: str


@dataclasses.dataclass(frozen=True)
class Frame:
    """An image to draw: the name of its file without ending, the number of its noise, and text for its metadata."""

    name: str
    noise_id: int
    text: Mapping[str, str]


class Session:
    """One run of a command.

    Attributes:
      options: values of its flags.
      command: its name.
    """

    def __init__(self, command: str, options: Any, given: Mapping[str, Any], stop: Polled):
        """Takes the command, the values of all flags, those that results depend on, and who says when to stop."""
        self.command, self.options, self._given, self._stop = command, options, dict(given), stop

    def check_stop(self) -> None:
        """Raises Stopped when the run is to end; what is written stays."""
        if self._stop.poll():
            raise Stopped

    def pictures(self, paths: Sequence[str]) -> list[Picture]:
        """Reads pictures.

        Raises:
          InputError: one cannot be read.
        """
        found = []
        for number, path in enumerate(paths):
            pixels, digest = picture_files.read(path)
            stem = re.sub(r"[^A-Za-z0-9_]+", "_", pathlib.Path(path).stem)[:40]
            found.append(Picture(path, f"{number:05d}-{stem}", pixels, digest))
        return found

    def captions(self, count: int) -> list[str]:
        """Returns what the decoder reads beside each of `count` pictures: one --caption each, one for all, or none.

        Raises:
          InputError: there are more or fewer.
        """
        given = [captions_lib.clean(caption) for caption in self.options.caption]
        if len(given) not in (0, 1, count):
            raise InputError(f"{len(given)} captions were given for {count} pictures; give one for each, one, or none")
        return (given or [""]) * (1 if len(given) == count else count)

    def model(self, needed: Sequence[str] = ("clip", "decoder")) -> unclip.UnCLIP:
        """Reads --models: the parts that are needed, and what upsamplers there are up to --last.

        Raises:
          InputError: a part is missing, with the command that trains it; or damaged, or parts do not fit.
        """
        options = self.options
        there = parts.folders(options.models)
        for name in needed:
            if name not in there:
                raise InputError(parts.missing(name, options.models))
        upsamplers = [name for name in there if parts.STAGES[name] == "upsampler"]
        if options.last == "decoder":
            upsamplers = []
        return unclip.UnCLIP.load(
            options.models,
            only=[*needed, *upsamplers],
            weights=options.weights,
            microbatch=options.batch_size,
            devices_per_image=options.devices_per_image,
        )

    def codec(self, model: unclip.UnCLIP) -> Codec:
        """Returns the model set to encode and draw as the flags say."""
        options = self.options
        return Codec(
            model,
            steps=options.steps,
            skip_noisiest=options.skip_noisiest,
            guidance_scale=options.guidance_scale,
            threshold=options.threshold,
            last=options.last,
            details=options.details,
        )

    def results(
        self, model: unclip.UnCLIP, images: Sequence[str], *, sampling: Mapping[str, Any] | None = None
    ) -> Results:
        """Returns the folder --out, of results of these images (their digests).

        `sampling` is how parts draw, by name, where flags do not say all of it.

        Raises:
          InputError: it holds something else.
        """
        return Results(
            self.options.out,
            record={
                "command": self.command,
                "options": self._given,
                "models": {name: {"workdir": part.workdir, "step": part.step} for name, part in model.parts.items()},
                "images": list(images),
                "versions": provenance.versions(),
                "device": jax.devices()[0].device_kind,
                **({"sampling": dict(sampling)} if sampling else {}),
            },
        )

    def encoded(
        self,
        codec: Codec,
        pictures: Sequence[Picture],
        captions: Sequence[str],
        results: Results,
        *,
        each: Callable[[Sequence[int], Encoded], None] | None = None,
    ) -> Latents:
        """Returns the latents of pictures: read from the folder, as far as they are there, else found and written.

        Args:
          codec: see `codec`.
          pictures: large enough (`Codec.check_images`).
          captions: one for each.
          results: the folder.
          each: called for each batch that is encoded, with its pictures' numbers, before their latents are written.

        Raises:
          Stopped: see `check_stop`.
        """
        paths = [results.folder / f"{picture.name}-latents.npz" for picture in pictures]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        progress = metrics.Progress("encoded", start=0, total=len(missing), examples_per_step=1)
        for start in range(0, len(missing), codec.microbatch):
            self.check_stop()
            batch = missing[start : start + codec.microbatch]
            found = codec.encode([pictures[n].pixels for n in batch], [captions[n] for n in batch])
            if each:
                each(batch, found)
            for row, number in enumerate(batch):
                found.latents.take([row]).save(paths[number])
            progress.report(start + len(batch), {name: float(x.mean()) for name, x in found.psnr.items()})
        progress.close()
        return Latents.joined([Latents.load(path) for path in paths])

    def draw(
        self, codec: Codec, frames: Sequence[Frame], latents: Latents, results: Results, *, eta: float = 0.0
    ) -> None:
        """Draws and writes the frames that are not there yet, one of the latents each, a microbatch at a time.

        Raises:
          Stopped: see `check_stop`.
        """
        missing = [number for number, frame in enumerate(frames) if not results.has(frame.name)]
        done = len(frames) - len(missing)
        if done:
            _LOG.info("%d of %d images are there already", done, len(frames))
        progress = metrics.Progress("images", start=done, total=len(frames), examples_per_step=1)
        for start in range(0, len(missing), codec.microbatch):
            self.check_stop()
            batch = missing[start : start + codec.microbatch]
            made = codec.draw(latents.take(batch), eta=eta, ids=[frames[number].noise_id for number in batch])
            for row, number in enumerate(batch):
                self._save(results, frames[number], {name: images[row] for name, images in made.items()})
            done += len(batch)
            progress.report(done, {})
        progress.close()

    def _save(self, results: Results, frame: Frame, images: Mapping[str, np.ndarray]) -> None:
        """Writes an image of every part, or of the last; the last one's comes last, under the frame's own name."""
        *earlier, last = images
        for name in earlier if self.options.stages == "all" else ():
            results.save(f"{frame.name}-{name}", images[name], frame.text)
        results.save(frame.name, images[last], frame.text)
