"""Text diffs: an image changed as a caption differs from another (section 3.3)."""

from collections.abc import Sequence

import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.manipulation import interpolation
from unclip_jax.manipulation.latents import Latents
from unclip_jax.unclip import Vectors

# The paper turns to between 0.25 and 0.5; further on, little is left of the image.
FARTHEST = 0.5


def direction(z_t: Vectors, z_t0: Vectors | None = None) -> Vectors:
    """Returns z_d = norm(z_t - z_t0), float32 [n, d] of length 1.

    Args:
      z_t: embeddings of captions that describe what is wanted.
      z_t0: of captions that describe what is there, or of a dummy that describes anything; None leaves it out.

    Raises:
      InputError: two captions have one embedding.
    """
    difference = z_t.astype(np.float64) if z_t0 is None else z_t.astype(np.float64) - z_t0
    length = np.linalg.norm(difference, axis=1, keepdims=True)
    if not (length > 1e-6).all():
        row = int(np.argmin(length))
        raise InputError(f"caption {row} and its baseline have the same embedding, so nothing tells what to change")
    return (difference / length).astype(np.float32)


def along(latents: Latents, z_d: Vectors, thetas: Sequence[float]) -> Latents:
    """Returns z_theta = slerp(z_i, z_d, theta) for every theta: those of the first image, then those of the next.

    x_T stays that of the image, so at theta 0 it is drawn again. Where embeddings have other lengths than 1, z_d is
    given that of z_i.

    Args:
      latents: n.
      z_d: a direction for each, see `direction`.
      thetas: from 0 to 1; see FARTHEST.

    Raises:
      InputError: a theta is out of range, or there are not as many directions.
    """
    interpolation.check_thetas(thetas)
    if len(z_d) != len(latents):
        raise InputError(f"{len(z_d)} directions were given for {len(latents)} images; give one for each")
    wanted = z_d * np.linalg.norm(latents.z_i, axis=1, keepdims=True)
    turned = np.stack([interpolation.slerp(latents.z_i, wanted, theta) for theta in thetas], axis=1)
    rows = latents.take(np.repeat(np.arange(len(latents)), len(thetas)))
    return Latents(turned.reshape(len(rows), -1), rows.x_T, rows.captions)
