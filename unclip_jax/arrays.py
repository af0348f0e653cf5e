"""Array types of the project's signatures, and the two pixel conversions that every part shares.

Shapes are written with jaxtyping and checked only under pytest. One letter is one axis everywhere:
`b` examples, `h w` pixels, `c` channels, `n` tokens, `d` embedding dimensions.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

# Images as networks see them, float in [-1, 1].
Images = Float[Array, "b h w c"]
# Images as they are stored and moved, [0, 255].
PixelImages = UInt8[Array, "b h w c"]
Tokens = Int[Array, "b n"]
Embeddings = Float[Array, "b d"]
Timesteps = Int[Array, "b"]
# One random key per example, so that no example's noise depends on the batch it stands in.
ExampleKeys = Key[Array, "b"]


def from_uint8(pixels: UInt8[Array, "*shape"] | UInt8[np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Maps pixels from uint8 [0, 255] to float32 [-1, 1]."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Maps images from float [-1, 1] to the nearest uint8 in [0, 255]; values outside are clipped."""
    scaled = (jnp.asarray(images, jnp.float32) + 1.0) * 127.5
    return jnp.clip(jnp.round(scaled), 0, 255).astype(jnp.uint8)
