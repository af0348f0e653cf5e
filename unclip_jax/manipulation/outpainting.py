"""Images continued beyond their edges, by a model of squares: windows of its size are filled one after another.

Each window shows some of what is known, the image or what earlier windows drew, and its rest is filled
(`inpainting.inpaint`). Windows lie on a grid that begins at the image's own corner; of those that have something left
to fill, the one of which most is known comes next.
"""

from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
from jaxtyping import Bool, UInt8

from unclip_jax import unclip
from unclip_jax.errors import InputError
from unclip_jax.manipulation import inpainting
from unclip_jax.predictor import Drawing

SIDES = ("left", "top", "right", "bottom")


def extent(text: str, *, of: int) -> int:
    """Returns pixels, given as such ("16") or as a share of what is to be extended ("0.5", "50%").

    Raises:
      InputError: it is neither, or negative.
    """
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise InputError(f"{text!r} is no extent; give pixels (16), or a share of the side (0.5 or 50%)") from error
    whole = text.isdigit()
    if not 0 <= share < float("inf"):
        raise InputError(
            f"an image cannot be extended by {text}; give pixels (16), or a share of the side (0.5 or 50%)"
        )
    return int(text) if whole else round(share * of)


def places(start: int, length: int, size: int, *, side: int, stride: int) -> list[int]:
    """Returns where windows begin along one axis of a canvas, ascending: all of it is covered.

    Args:
      start, length: of the image in the canvas.
      size: of the canvas, at least `side`.
      side: of a window.
      stride: between windows, at most `side`.
    """
    steps = range(-(start // stride) - 1, (size - start) // stride + 2)
    inside = {min(max(start + step * stride, 0), size - side) for step in steps}
    # One that ends where the image does sees more of it.
    inside.add(min(max(start + length - side, 0), size - side))
    return sorted(inside)


def windows(
    known: Bool[np.ndarray, "h w"], rows: Sequence[int], columns: Sequence[int], *, side: int
) -> Iterator[tuple[slice, slice]]:
    """Yields windows in the order in which they are to be filled, until nothing is left to fill."""
    known = known.copy()
    grid = [(slice(y, y + side), slice(x, x + side)) for y in rows for x in columns]
    while not known.all():
        best = max((window for window in grid if not known[window].all()), key=lambda window: known[window].sum())
        yield best
        known[best] = True


def outpaint(
    model: unclip.UnCLIP,
    images: UInt8[np.ndarray, "n h w 3"],
    captions: Sequence[str],
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    overlap: float = 0.5,
    z_i: unclip.Vectors | None = None,
    prior: str = "diffusion",
    negative: str | None = None,
    **drawing: Unpack[Drawing],
) -> UInt8[np.ndarray, "n h2 w2 3"]:
    """Returns images continued by so many pixels a side; the images themselves are in them bit for bit.

    Args:
      model: as for `inpainting.inpaint`.
      images: uint8 [n, h, w, 3]; with what is added, at least as high and as wide as the model's.
      captions: n; what all of it is to show.
      left, top, right, bottom: pixels to add.
      overlap: share of a window's side that it has in common with the next, from 0.1 to 0.9.
      z_i: embeddings to decode, float32 [n, d]; by default those that the prior makes of the captions, once.
      prior, negative, drawing: as for `inpainting.inpaint`.

    Raises:
      InputError: there is nothing to add, or the canvas is smaller than what the model draws, or as `inpaint` does.
    """
    size = inpainting.side(model)
    count, height, width, _ = images.shape
    added = dict(zip(SIDES, (left, top, right, bottom), strict=True))
    if min(added.values()) < 0 or not any(added.values()):
        raise InputError(
            f"there is nothing to add ({added}); give pixels for {', '.join(SIDES)}, none of them negative"
        )
    if not 0.1 <= overlap <= 0.9:
        raise InputError(f"windows cannot overlap by {overlap:g} of their side; give a share from 0.1 to 0.9")
    whole = (height + top + bottom, width + left + right)
    if min(whole) < size:
        raise InputError(
            f"the image with what is added has {whole[1]} x {whole[0]} pixels, and the model draws squares of {size}; "
            "enlarge the image, or add more"
        )
    if z_i is None and prior != "dropped":
        z_i = model.sample_prior(captions, prior=prior, negative=_steers(model, prior, negative), **drawing)
    canvas = np.zeros((count, *whole, 3), np.uint8)
    inner = (slice(top, top + height), slice(left, left + width))
    canvas[:, inner[0], inner[1]] = images
    known = np.zeros(whole, bool)
    known[inner] = True
    ids = drawing.get("ids")
    numbers = range(count) if ids is None else ids
    stride = max(1, round(size * (1 - overlap)))
    rows = places(top, height, whole[0], side=size, stride=stride)
    columns = places(left, width, whole[1], side=size, stride=stride)
    for order, window in enumerate(list(windows(known, rows, columns, side=size))):
        part = canvas[:, window[0], window[1]]
        masks = np.broadcast_to(~known[window], (count, size, size))
        # Each window has noise of its own: with the same, neighbours would repeat each other.
        own: Drawing = {**drawing, "ids": [unclip.image_id(f"window {order}", int(number)) for number in numbers]}
        made = inpainting.inpaint(model, part, masks, captions, z_i=z_i, prior=prior, negative=negative, **own)
        canvas[:, window[0], window[1]] = made.last
        known[window] = True
    return canvas


def _steers(model: unclip.UnCLIP, prior: str, negative: str | None) -> str | None:
    """The negative prompt, for a prior that reads one."""
    known = prior in unclip.PRIORS  # one that is not is refused by `sample_prior`
    return negative if known and unclip.PRIORS[prior] in model.steered(prior) else None
