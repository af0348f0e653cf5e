"""What the leading principal components of CLIP's image embeddings hold (Ramesh et al., 2022, section 4, Figure 7).

An embedding is rebuilt from its first k components, and the decoder draws what it then means, from one x_T: "lower
dimensions preserve coarse-grained semantic information", the later ones finer detail.
"""

from collections.abc import Iterable, Sequence
from typing import Unpack

import numpy as np
from jaxtyping import Float, Float32, UInt8

from unclip_jax import unclip
from unclip_jax.errors import InputError
from unclip_jax.models.quantizer import Moments, PrincipalComponents
from unclip_jax.predictor import Drawing
from unclip_jax.probing import pictures
from unclip_jax.unclip import Vectors

# Of Figure 7, where an embedding has 1,024 numbers and 320 components lose less than 1% of it (section 2.2).
PAPER_COUNTS = (20, 30, 40, 80, 120, 160, 200, 320)


def fit(batches: Iterable[Float[np.ndarray, "_ d"]]) -> PrincipalComponents:
    """Returns all principal components of embeddings that come in batches, float [n, d].

    Raises:
      InputError: fewer than two embeddings, or one that is not finite.
    """
    total: Moments | None = None
    for z in batches:
        own = Moments.of(z)
        total = own if total is None else Moments(*(a + b for a, b in zip(total, own, strict=True)))
    if total is None or total.count < 2:
        raise InputError("principal components need at least 2 embeddings; give more pictures")
    return PrincipalComponents.of(total, components=len(total.total))


def counts(width: int, asked: Sequence[int] = ()) -> tuple[int, ...]:
    """Returns how many components to rebuild embeddings of `width` numbers from, ascending.

    Args:
      width: d, of the embeddings.
      asked: what somebody wants. By default the paper's counts, where an embedding has so many numbers; a narrower
        one is given the same shares of its own, the last of which is all of them.

    Raises:
      InputError: more components than dimensions, or none, are asked for.
    """
    wrong = [count for count in asked if not 1 <= count <= width]
    if wrong:
        raise InputError(f"{wrong[0]} components were asked for, and embeddings of this CLIP have 1 to {width}")
    if asked:
        return tuple(sorted(set(asked)))
    scale = min(1.0, width / PAPER_COUNTS[-1])
    return tuple(sorted({max(1, round(scale * count)) for count in PAPER_COUNTS}))


def rebuilt(components: PrincipalComponents, z: Vectors, count: int, *, unit: bool = False) -> Vectors:
    """Returns embeddings from their first components: mean + sum of the first `count` projections, float32 [n, d].

    Args:
      components: as `fit` returns them.
      z: embeddings, float32 [n, d].
      count: components to keep; all of them give z back.
      unit: whether the result is given length 1, which the decoder was trained on.

    Raises:
      InputError: more components than there are, or none.
    """
    width = components.basis.shape[1]
    if not 1 <= count <= width:
        raise InputError(f"{count} components were asked for, and there are 1 to {width}")
    found = components.mean + components.project(z)[:, :count] @ components.basis[:, :count].T
    if unit:
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found.astype(np.float32)


def lost(components: PrincipalComponents, z: Vectors, count: int) -> Float32[np.ndarray, "n"]:
    """Returns the share of each embedding's squared length that the first `count` components do not give back."""
    missing = np.square(z - rebuilt(components, z, count)).sum(1)
    return (missing / np.square(z).sum(1)).astype(np.float32)


def drawn(
    model: unclip.UnCLIP,
    components: PrincipalComponents,
    z_i: Vectors,
    kept: Sequence[int],
    **drawing: Unpack[Drawing],
) -> UInt8[np.ndarray, "n k s s 3"]:
    """Draws embeddings rebuilt from ever more components, and in the last column from all that they are.

    All of a row come from one x_T, and rows from different ones: noise is numbered by the row, where `ids` says nothing
    else. Where noise is not drawn in between (DDIM with eta 0, as in the paper), columns differ by z_i alone.

    Args:
      model: with a decoder that draws from z_i; the upsamplers that are there enlarge what it draws.
      components: as `fit` returns them.
      z_i: embeddings of n pictures, float32 [n, d], long as the decoder knows them.
      kept: numbers of components.
      drawing: see Drawing; an id, and noise, for each row.

    Raises:
      InputError: a number of components that cannot be, or the decoder draws from no embeddings of images.
    """
    given = drawing.get("noise")
    columns = len(kept) + 1
    unit = bool(np.allclose(np.linalg.norm(z_i, axis=1), 1, atol=1e-3))
    rows = np.stack([*(rebuilt(components, z_i, count, unit=unit) for count in kept), z_i], 1)
    ids = np.arange(len(z_i)) if drawing.get("ids") is None else np.asarray(drawing["ids"])
    repeated: Drawing = {**drawing, "ids": np.repeat(ids, columns).tolist()}
    if given is not None:
        repeated["noise"] = {
            part: (np.repeat(x_T, columns, axis=0), steps if steps is None else np.repeat(steps, columns, axis=0))
            for part, (x_T, steps) in given.items()
        }
    images = pictures.drawn(model, rows.reshape(-1, z_i.shape[1]), **repeated)
    return images.reshape(len(z_i), columns, *images.shape[1:])
