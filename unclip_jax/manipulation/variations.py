"""Variations: images that share z_i, drawn with fresh noise in the decoder's steps (section 3.1)."""

import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.manipulation.latents import Latents


def repeated(latents: Latents, *, samples: int) -> Latents:
    """Returns each of n latents `samples` times: those of the first image, then those of the next.

    `Codec.draw` at eta 0 draws each image again. The larger eta, the more of x_T gives way to noise of the ids, so that
    samples differ in what z_i does not say.

    Raises:
      InputError: no samples are asked for.
    """
    if samples < 1:
        raise InputError(f"{samples} variations are none; ask for one at least")
    return latents.take(np.repeat(np.arange(len(latents)), samples))
