"""Images as two-part latents (z_i, x_T), and back (section 3).

z_i is CLIP's embedding: what CLIP sees of an image. x_T is the noise from which the decoder, sampling by DDIM without
noise of its own, draws that very image of z_i: all else there is to know of it. It is found by running DDIM backwards
(Dhariwal & Nichol, 2021, appendix F). Each upsampler has such a noise, too, so images come back at full resolution.

DDIM's steps follow an ordinary differential equation whose direction is the predicted noise. Backwards, a step between
two noise levels uses the prediction where it starts, forwards it will be that of its other end, so the round trip is
exact only in the limit of many steps. Three things make it worse and are left out unless asked for: guidance, which
bends the path; clipping of predicted pixels, which no inversion undoes; and the step to the noisiest level
(`skip_noisiest`), where next to nothing is left of the image.
"""

import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax import parts, unclip
from unclip_jax.arrays import to_uint8
from unclip_jax.data import resize, sealed
from unclip_jax.errors import InputError, nearest
from unclip_jax.parts import Part
from unclip_jax.predictor import Drawing, Progress
from unclip_jax.stages import base

# What upsamplers start from: the x_T of the image, or noise as in any other drawing.
DETAILS = ("kept", "drawn")
# Side lengths are free: parts draw images of several.
Noise = Float[np.ndarray, "n _ _ 3"]
Pixels = UInt8[np.ndarray, "n _ _ 3"]


@dataclasses.dataclass(frozen=True)
class Latents:
    """What n images are drawn from.

    Attributes:
      z_i: embeddings as the decoder knows them, float32 [n, d].
      x_T: part -> the noise that its sampling starts from, float32 [n, s, s, 3]; drawn for parts that are not there.
      captions: what the decoder reads beside; "" is none.
    """

    z_i: unclip.Vectors
    x_T: Mapping[str, Noise]
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = {"captions": len(self.captions), **{f"x_T of {name}": len(x) for name, x in self.x_T.items()}}
        for what, count in counts.items():
            if count != len(self.z_i):
                raise InputError(f"{len(self.z_i)} embeddings were given, but {what} for {count}; give one for each")

    def __len__(self) -> int:
        return len(self.z_i)

    @classmethod
    def of(cls, z_i: unclip.Vectors, captions: Sequence[str] | None = None) -> "Latents":
        """Returns embeddings without x_T, which is then drawn."""
        return cls(z_i, {}, tuple([""] * len(z_i) if captions is None else captions))

    @classmethod
    def joined(cls, several: Sequence["Latents"]) -> "Latents":
        """Returns them one after another; all have x_T of the same parts."""
        x_T = {name: np.concatenate([one.x_T[name] for one in several]) for name in several[0].x_T}
        captions = tuple(caption for one in several for caption in one.captions)
        return cls(np.concatenate([one.z_i for one in several]), x_T, captions)

    def save(self, path: pathlib.Path) -> None:
        """Writes them as an npz: z_i, captions, and x_T of each part under its name."""
        noise: dict[str, Any] = {f"x_T.{name}": x for name, x in self.x_T.items()}
        with sealed.Replacing(path) as file:
            np.savez(file, z_i=self.z_i, captions=np.asarray(self.captions), **noise)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Latents":
        """Reads what `save` wrote.

        Raises:
          InputError: there is no such file, or it holds something else.
        """
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                x_T = {key.removeprefix("x_T."): file[key] for key in file if key.startswith("x_T.")}
                return cls(file["z_i"], x_T, tuple(str(caption) for caption in file["captions"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} holds no latents that unclip_jax.manipulate encode wrote: {error}") from error

    def take(self, rows: Sequence[int] | np.ndarray) -> "Latents":
        """Returns some of them, in this order; a row may be taken several times."""
        rows = np.asarray(rows, np.int64)
        x_T = {name: x[rows] for name, x in self.x_T.items()}
        return Latents(self.z_i[rows], x_T, tuple(self.captions[row] for row in rows))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """n images as latents, and how well they come back.

    Attributes:
      latents: of them.
      images: part -> the images, reduced to what it draws, uint8 [n, s, s, 3].
      again: part -> what is drawn of the latents at eta 0.
      psnr: part -> of these, in dB; infinite for those that are the same to the last bit.
    """

    latents: Latents
    images: dict[str, Pixels]
    again: dict[str, Pixels]

    @property
    def psnr(self) -> dict[str, Float[np.ndarray, "n"]]:
        return {name: psnr(self.again[name], images) for name, images in self.images.items()}


def psnr(images: Pixels, others: Pixels) -> Float[np.ndarray, "n"]:
    """Returns the peak signal-to-noise ratio of each pair of images, in dB: 10 log10(255^2 / mean squared error)."""
    square = np.square(images.astype(np.float64) - others.astype(np.float64)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / square)


class Codec:
    """A trained unCLIP that encodes images and draws what their latents say, by DDIM.

    Attributes:
      model: what was given.
      drawers: its parts that draw, from the decoder on.
    """

    def __init__(
        self,
        model: unclip.UnCLIP,
        *,
        steps: int | str = 250,
        skip_noisiest: int = 1,
        guidance_scale: float = 1.0,
        threshold: str = "none",
        last: str | None = None,
        details: str = "kept",
    ):
        """Takes a model; its weights are shared, its sampling is not changed.

        Args:
          model: with CLIP, a decoder of embeddings of images, and what upsamplers it has.
          steps: of the decoder and of each upsampler, a number or a spec of `schedules.sampling_timesteps`.
          skip_noisiest: how many of them, from the noisiest, are left out of encoding and drawing alike.
          guidance_scale: of the decoder, in encoding and drawing; 1 is none.
          threshold: what is done with predicted pixels out of range when drawing; "none", "static" or "dynamic".
          last: the part that images are drawn up to; by default the last upsampler.
          details: one of DETAILS. "kept" encodes images for the upsamplers, too, so they come back whole; with "drawn"
            upsamplers sample as their own configs say, for images that are to become others: what an upsampler knows
            of an image (edges, textures) would shine through.

        Raises:
          InputError: the model lacks a part or is of another kind, with what trains one; or an option is unknown.
        """
        model.part("clip")
        check_decoder(model.part("decoder"))
        self.drawers = ["decoder", *model.upsamplers]
        if last is not None:
            if last not in self.drawers:
                raise InputError(f"there is no part {last!r} to draw up to; {nearest(last, self.drawers)}")
            self.drawers = self.drawers[: self.drawers.index(last) + 1]
        if details not in DETAILS:
            raise InputError(f"details are not {details!r}; {nearest(details, DETAILS)}")
        self.model = model
        options = {"method": "ddim", "timesteps": str(steps), "skip_noisiest": skip_noisiest, "threshold": threshold}
        encoded = self.drawers if details == "kept" else ["decoder"]
        self._options: dict[str, dict[str, Any]] = {name: {**options, "eta": 0.0} for name in encoded}
        self._options["decoder"]["guidance_scale"] = guidance_scale
        self._chains: dict[float, unclip.UnCLIP] = {}
        self._parts: dict[Any, Part] = {}
        self.at(0.0)

    @property
    def microbatch(self) -> int:
        """Images per call of a network."""
        return self.model.microbatch

    @property
    def sides(self) -> dict[str, int]:
        """Part -> pixels a side of what it draws."""
        return {name: _stage(self.model.part(name)).side for name in self.drawers}

    def at(self, eta: float) -> unclip.UnCLIP:
        """Returns the chain whose decoder draws with this share of fresh noise, from 0 to 1; all have the same weights.

        Raises:
          InputError: eta is out of range, or an option of sampling is not one.
        """
        if eta not in self._chains:
            kept = {"clip", *self.drawers, *(parts.LAST.get(name, "") for name in self.drawers)}
            options = {**self._options, "decoder": {**self._options["decoder"], "eta": eta}}
            found = {
                name: self._sampled(part, options[name]) if name in options else part
                for name, part in self.model.parts.items()
                if name in kept
            }
            chain = unclip.UnCLIP(
                found,
                models=self.model.models,
                microbatch=self.microbatch,
                devices_per_image=self.model.devices_per_image,
            )
            for other in (self.model, *self._chains.values()):
                chain.predictor.share(other.predictor)
            self._chains[eta] = chain
        return self._chains[eta]

    def embed_text(self, captions: Sequence[str]) -> unclip.Vectors:
        """Returns z_t, float32 [n, d], long as z_i is."""
        return self.model.embed_text(captions)

    def embed_images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> unclip.Vectors:
        """Returns z_i, float32 [n, d], of images of any sizes: of their central squares."""
        side = _stage(self.model.part("clip")).network.image_size
        return self.model.embed_images(np.stack([resize.square(image, size=side) for image in images]))

    def check_images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str] = ()) -> None:
        """Refuses images that are smaller than what is drawn: what enlarging makes up is not theirs to encode.

        Args:
          images: any.
          names: what to call them; by default their numbers.

        Raises:
          InputError: the first that is too small, or there is none.
        """
        part, side = list(self.sides.items())[-1]
        if not len(images):
            raise InputError("there is no image to encode; give at least one")
        for number, image in enumerate(images):
            height, width = image.shape[:2]
            if min(height, width) < side:
                raise InputError(
                    f"image {names[number] if names else number} has {width} x {height} pixels, and {part} draws "
                    f"{side} x {side}: give a larger one, or end at a part that draws smaller ones "
                    f"({', '.join(f'{name} {size}' for name, size in self.sides.items())})"
                )

    def encode(
        self,
        images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
        captions: Sequence[str] | None = None,
        *,
        z_i: unclip.Vectors | None = None,
        progress: Progress | None = None,
    ) -> Encoded:
        """Returns the latents of images and what is drawn of them.

        An upsampler's x_T is that of the image beside the smaller one that the parts before it draw again, for that is
        what it will be given.

        Args:
          images: n of any sizes; their largest central squares are encoded.
          captions: what the decoder reads beside, n; by default none.
          z_i: embeddings to encode beside, in the place of theirs, float32 [n, d].
          progress: see Drawing.

        Raises:
          InputError: an image is too small, or there are more or fewer captions or embeddings.
        """
        self.check_images(images)
        chain = self.at(0.0)
        if z_i is not None and len(z_i) != len(images):
            raise InputError(f"{len(z_i)} embeddings were given for {len(images)} images; give one for each")
        latents = Latents.of(self.embed_images(images) if z_i is None else z_i, captions)
        targets = {name: np.stack([resize.square(image, size=side) for image in images])
                   for name, side in self.sides.items()}  # fmt: skip
        x_T: dict[str, np.ndarray] = {}
        again: dict[str, np.ndarray] = {}
        drawing: Drawing = {"progress": progress}
        before: np.ndarray | None = None
        for name in self.drawers:
            fields = {"image": targets[name], **chain.words(name, latents.captions)}
            fields["z_i" if before is None else "low_res"] = latents.z_i if before is None else before
            if name in self._options:
                x_T[name] = chain.predictor.run(name, "x_T", fields, **drawing)
            before = self._drawn(chain, name, dataclasses.replace(latents, x_T=x_T), before, drawing)
            again[name] = _rounded(before)
        return Encoded(dataclasses.replace(latents, x_T=x_T), targets, again)

    def draw(
        self,
        latents: Latents,
        *,
        eta: float = 0.0,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Pixels]:
        """Returns part -> the images of latents, uint8 [n, s, s, 3].

        Args:
          latents: n.
          eta: share of fresh noise in every step of the decoder, from 0 to 1. At 0 an image is a function of its
            latents.
          seed, ids: which with each other name the noise of an image: that of steps where eta is not 0, and x_T of
            parts for which the latents have none.
          progress: see Drawing.

        Raises:
          InputError: eta is out of range, or the latents are of other sizes than the model's.
        """
        chain = self.at(eta)
        for name, x in latents.x_T.items():
            if name in self.drawers and x.shape[1:] != (self.sides[name], self.sides[name], 3):
                raise InputError(f"x_T of {name} has shape {x.shape[1:]}; it draws {self.sides[name]} pixels a side")
        drawing: Drawing = {"seed": seed, "ids": range(len(latents)) if ids is None else ids, "progress": progress}
        made: dict[str, np.ndarray] = {}
        before: np.ndarray | None = None
        for name in self.drawers:
            before = self._drawn(chain, name, latents, before, drawing)
            made[name] = _rounded(before)
        return made

    def _sampled(self, part: Part, options: Mapping[str, Any]) -> Part:
        """A part that samples in another way; the same one for the same way, whose programs chains then share."""
        key = (part.name, tuple(options.items()))
        if key not in self._parts:
            config = parts.with_sampling(part.config, options, name=part.name)
            self._parts[key] = dataclasses.replace(part, config=config, stage=base.create(config))
        return self._parts[key]

    @staticmethod
    def _drawn(
        chain: unclip.UnCLIP, name: str, latents: Latents, before: np.ndarray | None, drawing: Drawing
    ) -> np.ndarray:
        """What one part makes of latents and of the images that the part before it has made."""
        noise = {part: (x, None) for part, x in latents.x_T.items() if part == name}
        given: Drawing = {**drawing, "noise": noise}
        if before is None:
            return chain.decode(latents.z_i, latents.captions, **given)
        fields = {"low_res": before, **chain.words(name, latents.captions)}
        return chain.predictor.run(name, "sample", fields, **given)


def check_decoder(part: Part) -> None:
    """Refuses a decoder that draws from no embeddings of images.

    Raises:
      InputError: with the command that trains one that does.
    """
    stage = _stage(part)
    if stage.embed_dim and stage.condition == "image":
        return
    reads = "embeddings of texts" if stage.embed_dim else "captions and no embedding"
    raise InputError(
        f"the decoder in {part.workdir} reads {reads}, so images have no z_i that it knows; train one that reads their "
        "embeddings: python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/mine/decoder "
        "--config.frozen.clip=runs/mine/clip"
    )


def _stage(part: Part) -> Any:
    return part.stage


def _rounded(images: np.ndarray) -> np.ndarray:
    return images if images.dtype == np.uint8 else np.asarray(to_uint8(jnp.asarray(images)))
