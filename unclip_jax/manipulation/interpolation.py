"""Blends: images between images (section 3.2)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from unclip_jax.errors import InputError, nearest
from unclip_jax.manipulation.latents import Latents

# x_T of the images between: "slerp" turns the one into the other, so that the ends are the two images again; "fixed"
# draws one for all, so that z_i alone changes.
NOISE = ("slerp", "fixed")
# Angles, in radians, nearer to 0 than this are no angle: the arc is the straight line, to float64's precision.
_STRAIGHT = 1e-7

Arrays = Float[np.ndarray, "n *rest"]


def check_thetas(thetas: Sequence[float], *, most: float = 1.0) -> None:
    """Raises InputError unless every theta is in [0, most]."""
    for theta in thetas:
        if not 0 <= theta <= most:
            raise InputError(f"theta is {theta:g}; it says how far to turn, from 0 (not at all) to {most:g}")


def slerp(start: Arrays, end: Arrays, theta: float) -> Arrays:
    """Returns the points at the share theta of the arcs between vectors, each example one vector, float32.

    sin((1 - theta) w) / sin w * start + sin(theta w) / sin w * end, with w the angle between them (Shoemake, 1985). Of
    vectors of length 1 the result has length 1, at theta 0 and 1 it is the one and the other to the last bit.

    Args:
      start, end: n vectors each, of any shape.
      theta: from 0 to 1.

    Raises:
      InputError: theta is out of range, a vector is 0, or two are opposite, which no one arc joins.
    """
    check_thetas([theta])
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (start, end))
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    if not all(length.all() for length in lengths):
        raise InputError("a vector of length 0 has no direction to turn from or to")
    unit_a, unit_b = a / lengths[0], b / lengths[1]
    # By its tangent, for the cosine says little of small angles.
    half = np.arctan2(np.linalg.norm(unit_a - unit_b, axis=1), np.linalg.norm(unit_a + unit_b, axis=1))[:, None]
    angle = 2 * half
    if (np.pi - angle < _STRAIGHT).any():
        raise InputError("two vectors are opposite: no one arc joins them")
    straight = angle < _STRAIGHT
    sine = np.where(straight, 1.0, np.sin(angle))
    weights = [np.where(straight, share, np.sin(share * angle) / sine) for share in (1 - theta, theta)]
    return (weights[0] * a + weights[1] * b).reshape(start.shape).astype(np.float32)


def thetas(frames: int, *, most: float = 1.0) -> list[float]:
    """Returns `frames` shares evenly from 0 to `most`, both included.

    Raises:
      InputError: fewer than two, or `most` is out of range.
    """
    check_thetas([most])
    if frames < 2:
        raise InputError(f"{frames} frames make no path; ask for two at least, its ends")
    return [float(share) for share in np.linspace(0, most, frames)]


def between(start: Latents, end: Latents, shares: Sequence[float], *, noise: str = "slerp") -> Latents:
    """Returns the latents of paths from n images to n others: those of the first pair, one for each share, and so on.

    Args:
      start, end: n each; captions are those of the start up to the middle, then those of the end.
      shares: thetas, from 0 to 1.
      noise: one of NOISE; with "fixed" they are without x_T, which is then drawn: give `Codec.draw` one id for all
        frames of a path.

    Raises:
      InputError: another noise, shares out of range, x_T is missing for "slerp", or there are not as many of both.
    """
    check_thetas(shares)
    if noise not in NOISE:
        raise InputError(f"x_T between images is not {noise!r}; {nearest(noise, NOISE)}")
    if len(start) != len(end):
        raise InputError(f"paths lead from {len(start)} images to {len(end)}; give as many of both")
    parts = [name for name in start.x_T if name in end.x_T] if noise == "slerp" else []
    if noise == "slerp" and not parts:
        raise InputError("these latents have no x_T to turn; encode the images, or use the noise 'fixed'")
    frames = [
        Latents(
            slerp(start.z_i, end.z_i, share),
            {name: slerp(start.x_T[name], end.x_T[name], share) for name in parts},
            start.captions if share <= 0.5 else end.captions,
        )
        for share in shares
    ]
    # Frame by frame, then path by path.
    order = np.arange(len(shares) * len(start)).reshape(len(shares), len(start)).T.reshape(-1)
    return Latents.joined(frames).take(order)
