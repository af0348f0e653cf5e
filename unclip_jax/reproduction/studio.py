"""Where experiments draw: trained parts, held-out captions, and cells of results, made once and kept on disk."""

import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, UInt8

from unclip_jax import ablation_cells, captioned_grid, checkpoint, picture_files, provenance, unclip
from unclip_jax import quickstart_results as results
from unclip_jax.ablation_cells import Plan
from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.evaluation.uncertainty import Measured
from unclip_jax.reproduction.records import Picture
from unclip_jax.unclip import Vectors

# Parts that the quickstart does not train: folder below the workdir -> the part that it is.
EXTRA = {"decoder_glide": "decoder", "decoder_text": "decoder", "clip_sam": "clip"}
CELLS, EXPERIMENTS = "cells", "experiments"
_SHOWN = 8

Arrays = dict[str, np.ndarray]
Images = UInt8[np.ndarray, "captions s s 3"]


class Studio:
    """Trained parts and captions of one object; networks are read and compiled once for each way to sample them."""

    def __init__(self, workdir: pathlib.Path, models: pathlib.Path, plan: Plan, stop: Callable[[], None]):
        """Takes folders, what to draw, and what is called between cells, which ends the program if it must stop."""
        self.workdir, self.models, self.plan, self._stop = workdir, models, plan, stop
        self._chains: dict[Any, unclip.UnCLIP] = {}
        for folder in (CELLS, EXPERIMENTS):
            (workdir / folder).mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def pictures(self) -> list[results.Render]:
        """Captions of one object that nothing was trained on, with their pictures."""
        return ablation_cells.pictures(self.plan)

    @property
    def captions(self) -> list[str]:
        """Their captions."""
        return [item.caption for item in self.pictures]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of sampling."""
        return self.plan.seeds

    def real(self, side: int) -> Images:
        """Returns the captions' own pictures."""
        return results.pixels_of(self.pictures, side=side)

    def folder(self, name: str) -> pathlib.Path:
        """Returns where a part's run is: EXTRA ones below the workdir, others among the models."""
        return (self.workdir if name in EXTRA else self.models) / name

    def known(self, parts: Sequence[str]) -> dict[str, Any]:
        """Returns what tells the weights of parts from others."""
        folders = {name: self.folder(name) for name in parts}
        return {
            name: [(folder / "config.json").read_text(), checkpoint.steps_of(folder / checkpoint.FOLDER)]
            for name, folder in folders.items()
        }

    def cell(self, kind: str, setting: Mapping[str, Any], parts: Sequence[str], make: Callable[[], Arrays]) -> Arrays:
        """Returns arrays, made once: they are kept in a file that is named after all that they depend on.

        Args:
          kind: what is made; with the setting it names the arrays.
          setting: numbers, texts and tuples of them.
          parts: names of the parts that it depends on.
          make: makes them.
        """
        known = [kind, dict(setting), self.known(parts), self.captions, results.versions()]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
        path = self.workdir / CELLS / f"{kind}-{digest}.npz"
        if path.exists():
            with np.load(path) as found:
                return dict(found)
        self._stop()
        made = make()
        buffer = io.BytesIO()
        save: Any = np.savez_compressed  # its keywords are arrays
        save(buffer, **made)
        with sealed.Replacing(path) as file:
            file.write(buffer.getvalue())
        return made

    def chain(self, *names: str, **sampling: Mapping[str, Any]) -> unclip.UnCLIP:
        """Returns parts as one model, by the names of their folders; `sampling` as `UnCLIP.load` takes it."""
        key = (names, json.dumps(sampling, sort_keys=True))
        if key not in self._chains:
            workdirs = {EXTRA.get(name, name): str(self.folder(name)) for name in names}
            self._chains[key] = unclip.UnCLIP.load(workdirs, sampling=sampling, microbatch=self.plan.batch_size)
        return self._chains[key]

    def embeddings(self, source: str, seed: int) -> Vectors:
        """Returns z_i of the captions: "true" is that of their pictures, else a key of `unclip.PRIORS`, drawn."""

        def make() -> Arrays:
            if source == "true":
                return {"z_i": self.features(self.real(self.chain("clip").part("clip").config.model.image_size))}
            prior = unclip.PRIORS[source]
            model = self.chain("clip", *([prior] if prior else []))
            return {"z_i": model.sample_prior(self.captions, prior=source, seed=seed)}

        prior = unclip.PRIORS.get(source)
        setting = {"source": source, "seed": seed if prior else 0}
        return self.cell("embeddings", setting, ["clip", *([prior] if prior else [])], make)["z_i"]

    def drawn(self, source: str, seed: int, *, scale: float, decoder: str = "decoder") -> Images:
        """Returns the decoder's images of captions and of z_i from a source; "dropped" leaves the captions alone."""
        prior = unclip.PRIORS.get(source)
        clip = [] if decoder == "decoder_glide" else ["clip"]

        def make() -> Arrays:
            z_i = None if source == "dropped" else self.embeddings(source, seed)
            model = self.chain(*clip, decoder, decoder={"guidance_scale": scale})
            return {"images": model.decode(z_i, self.captions, seed=seed)}

        setting = {"source": source, "seed": seed, "scale": scale, "decoder": decoder}
        return self.cell("images", setting, [*clip, decoder, *([prior] if prior else [])], make)["images"]

    def features(self, images: UInt8[np.ndarray, "n _ _ 3"]) -> Vectors:
        """Returns CLIP's z_i of images, float32 [n, d]: what distances and likeness are measured in."""
        return self.chain("clip").embed_images(images)

    def right(self, images: Sequence[Images], what: str = "both") -> Float64[np.ndarray, "seeds captions"]:
        """Returns whether the oracle finds colour, shape or both of the captions in images, 0 to 1, for each seed."""
        return np.array([ablation_cells.verdicts(one, self.captions)[what] for one in images])

    @functools.cached_property
    def reference(self) -> Vectors:
        """Features of all pictures of the validation split."""
        side = self.chain("decoder", "clip").part("decoder").config.model.unet.image_size

        def make() -> Arrays:
            every = results.renders(self.plan.directory, "validation", count=10**9)
            return {"features": self.features(results.pixels_of(every, side=side))}

        return self.cell("reference", {"side": side}, ["clip"], make)["features"]

    def save(self, experiment: str, title: str, pixels: UInt8[np.ndarray, "_ _ 3"]) -> Picture:
        """Writes a picture of an experiment, with the seeds in its name and text."""
        seeds = "-".join(map(str, self.seeds))
        file = f"{experiment}-{hashlib.sha256(title.encode()).hexdigest()[:6]}-seeds{seeds}.png"
        text = {"seed": seeds, "title": title, **provenance.marks("unclip_jax")}
        picture_files.save(self.workdir / EXPERIMENTS / file, pixels, text)
        return Picture(title, file)

    def grid(
        self, columns: Mapping[str, UInt8[np.ndarray, "n _ _ 3"]], *, captions: Sequence[str] = ()
    ) -> UInt8[np.ndarray, "_ _ 3"]:
        """Draws the first captions in rows, a column of images for each heading; other captions may be given."""
        said = list(captions or self.captions)[:_SHOWN]
        rows = [[images[row] for images in columns.values()] for row in range(len(said))]
        return captioned_grid.draw(said, rows, headings=list(columns))

    def needs(self, *parts: str) -> None:
        """Raises InputError for the first part that has no run."""
        for name in parts:
            if not checkpoint.steps_of(self.folder(name) / checkpoint.FOLDER):
                raise InputError(f"{self.folder(name)} holds no trained part; python -m unclip_jax.reproduce trains it")


def by_caption(found: Measured, seeds: int) -> Measured:
    """Returns a metric of images of several seeds, one after another, with influences of captions.

    Draws of a caption are no independent samples, so an error bar is over captions.
    """
    return Measured(found.value, found.influences.reshape(seeds, -1).mean(0))


def spread(several: Sequence[Float[np.ndarray, "captions d"]]) -> Float64[np.ndarray, "captions"]:
    """Returns how far apart draws of the same caption are: the mean over pairs of 1 - cosine, in [0, 2].

    Args:
      several: features of each seed's images, at least two seeds.
    """
    units = [x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in several]
    pairs = [1 - (a * b).sum(1) for number, a in enumerate(units) for b in units[:number]]
    return np.mean(pairs, axis=0)
