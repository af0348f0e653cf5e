"""The Inception network that FID is defined by: the frozen TensorFlow graph of 2015-12-05, in Flax.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2015), describe the architecture. The graph
differs from the paper, and from torchvision's network of that name, in ways that change a FID:

- its 3x3 average pools divide by the number of pixels inside the image, without padding;
- the pool branch of its last block takes the maximum, not the average;
- it has 1,008 classes and no auxiliary head;
- it reads (x - 128) / 128 of pixels in [0, 255], RGB;
- it resizes by itself to 299 x 299, bilinearly as TensorFlow 1 did: from pixel i * in / out, without the half pixel
  that later versions add, and without antialiasing;
- batch norm's epsilon is 1e-3, and it has a scale.

Modules are named as in the published PyTorch conversion of the graph, so that weights need no table of names. Every
product asks for full float32, for a TPU would round its operands to bfloat16 otherwise, which changes features by 2e-3.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SIZE = 299
CLASSES = 1008
EPSILON = 1e-3
SPATIAL_CHANNELS = 7
_PRECISION = jax.lax.Precision.HIGHEST


def resized(images: Float[Array, "b h w 3"], size: int = SIZE) -> Float[Array, "b {size} {size} 3"]:
    """Resizes as TensorFlow 1's `resize_bilinear` with align_corners off, in its order of float32 operations."""
    return _interpolated(_interpolated(images, 2, size), 1, size)


def _interpolated(images, axis, size):
    """Pixel i of the result lies at i * in / size between two pixels, the last of which repeats."""
    length = images.shape[axis]
    place = np.arange(size, dtype=np.float32) * np.float32(np.float32(length) / np.float32(size))
    lower = np.floor(place).astype(np.int32)
    weight = (place - lower).reshape([size if at == axis else 1 for at in range(images.ndim)])
    left = jnp.take(images, lower, axis)
    right = jnp.take(images, np.minimum(lower + 1, length - 1), axis)
    return left + (right - left) * weight


def scaled(pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Maps pixels from [0, 255] to what the graph reads."""
    return (pixels - 128.0) / 128.0


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mean of each pixel's neighbours, 3x3, at the border of those that there are."""
    # Counted here: as a program of its own, which `nn.avg_pool` makes of it, this takes the compiler seconds.
    there = [np.minimum(np.arange(length), 1) + np.minimum(np.arange(length)[::-1], 1) + 1 for length in x.shape[1:3]]
    counts = np.outer(*there)[None, :, :, None].astype(np.float32)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / counts


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Maximum of each pixel's neighbours, 3x3."""
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def last_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The pool of the last block, which is where the graph leaves the paper."""
    return max_pool(x)


def reduced(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Maximum of 3x3 pixels, at every second one, without padding."""
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def convolution(features: int, kernel: tuple[int, int], stride: int, padding: str) -> nn.Conv:
    """A convolution without bias, named as the published one."""
    return nn.Conv(
        features, kernel, (stride, stride), padding=padding, use_bias=False, precision=_PRECISION, name="conv"
    )


def classes() -> nn.Dense:
    """The last layer without its bias, as the Inception Score reads it."""
    return nn.Dense(CLASSES, use_bias=False, precision=_PRECISION, name="fc")


class Unit(nn.Module):
    """Convolution, batch norm by the statistics of training, ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        x = convolution(self.features, self.kernel, self.stride, self.padding)(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name="bn")(x))


def _one(features: int, name: str) -> Unit:
    return Unit(features, name=name)


class Pooled35(nn.Module):
    """Mixed_5b to 5d: 1x1, 5x5, two 3x3 and a pool, at 35 x 35 pixels."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        five = Unit(64, (5, 5), name="branch5x5_2")(_one(48, "branch5x5_1")(x))
        double = Unit(96, (3, 3), name="branch3x3dbl_2")(_one(64, "branch3x3dbl_1")(x))
        double = Unit(96, (3, 3), name="branch3x3dbl_3")(double)
        pooled = _one(self.pool_features, "branch_pool")(average_pool(x))
        return jnp.concatenate([_one(64, "branch1x1")(x), five, double, pooled], -1)


class To17(nn.Module):
    """Mixed_6a: from 35 to 17 pixels a side."""

    @nn.compact
    def __call__(self, x):
        three = Unit(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        double = Unit(96, (3, 3), name="branch3x3dbl_2")(_one(64, "branch3x3dbl_1")(x))
        double = Unit(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, reduced(x)], -1)


class Factored17(nn.Module):
    """Mixed_6b to 6e: 7x7 convolutions as rows and columns. Returns the 1x1 branch as well, which sFID reads."""

    width: int

    @nn.compact
    def __call__(self, x):
        row, column = (1, 7), (7, 1)
        first = _one(192, "branch1x1")(x)
        once = Unit(self.width, row, name="branch7x7_2")(_one(self.width, "branch7x7_1")(x))
        once = Unit(192, column, name="branch7x7_3")(once)
        twice = _one(self.width, "branch7x7dbl_1")(x)
        for number, kernel, features in ((2, column, self.width), (3, row, self.width), (4, column, self.width)):
            twice = Unit(features, kernel, name=f"branch7x7dbl_{number}")(twice)
        twice = Unit(192, row, name="branch7x7dbl_5")(twice)
        pooled = _one(192, "branch_pool")(average_pool(x))
        return jnp.concatenate([first, once, twice, pooled], -1), first


class To8(nn.Module):
    """Mixed_7a: from 17 to 8 pixels a side."""

    @nn.compact
    def __call__(self, x):
        three = Unit(320, (3, 3), 2, "VALID", name="branch3x3_2")(_one(192, "branch3x3_1")(x))
        seven = Unit(192, (1, 7), name="branch7x7x3_2")(_one(192, "branch7x7x3_1")(x))
        seven = Unit(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = Unit(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, reduced(x)], -1)


class Widened8(nn.Module):
    """Mixed_7b and 7c, which differ in their `pool`: branches end in a row and a column beside each other."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        def both(x, name):
            return [Unit(384, (1, 3), name=f"{name}a")(x), Unit(384, (3, 1), name=f"{name}b")(x)]

        three = both(_one(384, "branch3x3_1")(x), "branch3x3_2")
        double = Unit(384, (3, 3), name="branch3x3dbl_2")(_one(448, "branch3x3dbl_1")(x))
        double = both(double, "branch3x3dbl_3")
        pooled = _one(192, "branch_pool")(self.pool(x))
        return jnp.concatenate([_one(320, "branch1x1")(x), *three, *double, pooled], -1)


class Inception(nn.Module):
    """The whole network, from pixels of the size that it is for, 299 x 299, to features."""

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
        """Reads float32 pixels in [0, 255], RGB; what it returns, see `inception.features`."""
        x = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(scaled(pixels))
        x = Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = reduced(Unit(64, (3, 3), name="Conv2d_2b_3x3")(x))
        found = {"64": x.mean((1, 2))}
        x = Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(_one(80, "Conv2d_3b_1x1")(x))
        x = reduced(x)
        found["192"] = x.mean((1, 2))
        for letter, features in (("b", 32), ("c", 64), ("d", 64)):
            x = Pooled35(features, name=f"Mixed_5{letter}")(x)
        x = To17(name="Mixed_6a")(x)
        for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x, first = Factored17(width, name=f"Mixed_6{letter}")(x)
            if letter == "d":
                found["spatial"] = first[..., :SPATIAL_CHANNELS].reshape(len(first), -1)
        found["768"] = x.mean((1, 2))
        x = Widened8(average_pool, name="Mixed_7b")(To8(name="Mixed_7a")(x))
        x = Widened8(last_pool, name="Mixed_7c")(x)
        found["2048"] = x.mean((1, 2))
        found["logits_unbiased"] = classes()(found["2048"])
        return found
