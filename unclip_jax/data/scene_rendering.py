"""Draws a scene as pixels, antialiased, at any resolution: a smaller picture is the larger one area-averaged.

Each shape is a function whose sign says inside (negative) or outside and whose value near the outline is the
distance to it, so that coverage of a pixel is a clipped distance. Below 128 pixels the picture is computed on a
finer grid and averaged, because points of stars are then narrower than a pixel.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from unclip_jax.data.scenes import BACKGROUNDS, COLOURS, Kind, Placement, Scene
from unclip_jax.errors import InputError

Field = Float[np.ndarray, "h w"]

# The dark half of a texture, relative to its colour: dark enough to see at 64 pixels, of the same hue.
SHADE = 0.55
# Period in image sides. At 64 pixels a stripe is 3.5 pixels wide; at 16 stripes blend into one mean colour.
_PERIOD = {"striped": 0.11, "checkered": 0.14}
_MIN_GRID = 128


def render(scene: Scene, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Draws the scene with `resolution` pixels a side.

    Args:
      scene: what to draw.
      resolution: at least 4.

    Returns:
      sRGB pixels, [0, 255]. Mixed colours (edges, fine textures) are means of sRGB values, not of light.

    Raises:
      InputError: resolution below 4.
    """
    if resolution < 4:
        raise InputError(f"resolution is {resolution}; a scene needs at least 4 pixels a side")
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    image = np.empty((resolution, resolution, 3), np.float32)
    image[:] = background
    for kind, placement in zip(scene.kinds, scene.placements, strict=True):
        rows, columns, coverage, light = _object(kind, placement, resolution)
        colour = np.array(COLOURS[kind.colour], np.float32)
        patch = image[rows, columns]
        # `light` is already weighted by coverage: the share of the pixel that shows the light half of the texture.
        patch += coverage[..., None] * (SHADE * colour - patch) + light[..., None] * ((1.0 - SHADE) * colour)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _object(kind: Kind, placement: Placement, resolution: int) -> tuple[slice, slice, Field, Field]:
    """Coverage and lit coverage of the pixels of one object's box; the rest of the image it leaves alone."""
    samples = max(1, -(-_MIN_GRID // resolution))
    reach = 1.1 * placement.radius + 1.0 / resolution
    columns, x = _span(placement.x, reach, resolution, samples)
    rows, y = _span(placement.y, reach, resolution, samples)
    cos, sin = np.float32(np.cos(placement.angle)), np.float32(np.sin(placement.angle))
    u = cos * x[None, :] + sin * y[:, None]
    v = cos * y[:, None] - sin * x[None, :]
    step = 1.0 / (resolution * samples)
    coverage = shape_coverage(kind.shape, u / np.float32(placement.radius), v / np.float32(placement.radius),
                              step=step / placement.radius)
    light = coverage * _texture(kind.texture, u, v, step)
    return rows, columns, _pool(coverage, samples), _pool(light, samples)


def _span(centre: float, reach: float, resolution: int, samples: int) -> tuple[slice, Float[np.ndarray, " s"]]:
    """The pixels that an object reaches along one axis, and the offsets of their sample points from its centre."""
    first = max(0, int(np.floor((centre - reach) * resolution)))
    last = min(resolution, int(np.ceil((centre + reach) * resolution)))
    points = (np.arange(first * samples, last * samples) + 0.5) / (resolution * samples) - centre
    return slice(first, last), points.astype(np.float32)


def _pool(field: Field, samples: int) -> Float[np.ndarray, "rows columns"]:
    if samples == 1:
        return field
    height, width = field.shape
    return field.reshape(height // samples, samples, width // samples, samples).mean((1, 3))


def shape_coverage(shape: str, u: Field, v: Field, *, step: float) -> Field:
    """Share of each sample's cell that a shape covers, in [0, 1].

    Args:
      shape: a word of `SHAPES`.
      u, v: sample points in the shape's own frame, where its box is about [-1, 1]; v runs down.
      step: side of a sample's cell in that frame.
    """
    return np.clip(0.5 - _OUTLINES[shape](u, v) / np.float32(step), 0.0, 1.0)


def _circle(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 0.95


def _square(u: Field, v: Field) -> Field:
    return np.maximum(np.abs(u), np.abs(v)) - 0.83


def _triangle(u: Field, v: Field) -> Field:
    """Equilateral, pointing up; its circumscribed circle has radius 1.06."""
    down = v - 0.265
    side = np.float32(np.sqrt(0.75)) * np.abs(u) - 0.5 * down
    return np.maximum(side, down) - 0.53


def _star(u: Field, v: Field) -> Field:
    """Five points at radius 1.05, notches at 0.47: folding the plane at its ten mirror axes leaves one edge."""
    sector = np.float32(np.pi / 5.0)
    angle = np.abs(np.mod(np.arctan2(u, -v) + sector, 2.0 * sector) - sector)
    radius = np.hypot(u, v)
    tip, notch = np.array([1.05, 0.0]), 0.47 * np.array([np.cos(np.pi / 5.0), np.sin(np.pi / 5.0)])
    edge = notch - tip
    normal = (np.array([edge[1], -edge[0]]) / np.hypot(*edge)).astype(np.float32)
    return normal[0] * (radius * np.cos(angle) - np.float32(tip[0])) + normal[1] * radius * np.sin(angle)


def _cross(u: Field, v: Field) -> Field:
    """A plus sign with arms 0.62 wide."""
    across, down = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(across, down) - 0.31, np.maximum(across, down) - 0.93)


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.735) - 0.235


def _heart(u: Field, v: Field) -> Field:
    """A square on its corner, with a disc over each of its upper sides."""
    half = 0.78  # of the square's diagonal
    across, down = np.abs(u), v - 0.1035 * half
    square = (across + np.abs(down) - half) * np.float32(np.sqrt(0.5))
    disc = np.hypot(across - 0.5 * half, down + 0.5 * half) - half * np.float32(np.sqrt(0.5))
    return np.minimum(square, disc)


_OUTLINES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
    "cross": _cross, "ring": _ring, "heart": _heart,
}


def _texture(texture: str, u: Field, v: Field, step: float) -> Field | np.float32:
    """Share of each sample's cell that shows the light half of a texture, in [0, 1]; u, v in image sides."""
    if texture == "solid":
        return np.float32(1.0)
    period = _PERIOD[texture]
    if texture == "striped":
        # Along a diagonal a cell is wider than its side.
        return 0.5 + 0.5 * _square_wave((u + v) * np.float32(np.sqrt(0.5)), period, 1.2 * step)
    return 0.5 + 0.5 * _square_wave(u, period, step) * _square_wave(v, period, step)


def _square_wave(x: Field, period: float, width: float) -> Field:
    """Mean over [x - width/2, x + width/2] of a wave of +1 and -1: no moire where pixels are coarser than it.

    The integral of a square wave is a triangle wave, so that the mean is a difference of two of those.
    """
    half = np.float32(0.5 * width / period)
    phase = x / np.float32(period)
    return (_triangle_wave(phase + half) - _triangle_wave(phase - half)) / (2.0 * half)


def _triangle_wave(phase: Field) -> Field:
    """Integral from 0 of the wave that is +1 on [0, 1/2) and -1 on [1/2, 1), continued with period 1."""
    return np.float32(0.5) - np.abs(phase - np.floor(phase) - np.float32(0.5))
