"""A decoder that a CLIP of noised images guides (Nichol et al., 2021, section 2.4).

Every step of sampling is moved by s Sigma grad_x (f(x_t, t) . g), where f is that CLIP's image tower, g an embedding of
what is wanted; both have length 1, and their product is taken times the logit scale, as in GLIDE's code. In DDIM, which
has no Sigma, the gradient joins the score.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from unclip_jax.diffusion import samplers
from unclip_jax.errors import InputError
from unclip_jax.stages import base
from unclip_jax.stages.clip import CLIPStage
from unclip_jax.stages.decoder import DecoderStage


class GuidedDecoderStage(DecoderStage):
    """A trained decoder; its weights and config stay as they are.

    "sample" and "pixels" read two more fields, where they are there: `toward` [b, d], embeddings by the noised CLIP,
    and `clip_guidance_scale` [b], s; that CLIP's weights are `frozen["clip_noised"]`.
    """

    def __init__(self, config: ConfigDict, noised: CLIPStage):
        """Takes the config of the decoder's run, and the CLIP.

        Raises:
          InputError: the CLIP was trained on clean images, on other sizes, or on another process of noise.
        """
        super().__init__(config)
        self.noised = noised
        if noised.diffusion is None:
            raise InputError(
                "this CLIP was trained on clean images and cannot guide; train configs/clip.py:tiny_noised"
            )
        if noised.network.image_size != self.side:
            raise InputError(
                f"the noised CLIP reads images of {noised.network.image_size} pixels, the decoder draws {self.side}; "
                "train one of the decoder's size (model.image_size)"
            )
        theirs, ours = noised.diffusion.alpha_bars, self.diffusion.alpha_bars
        if theirs.shape != ours.shape or not np.allclose(theirs, ours, atol=1e-6):
            raise InputError(
                "the noised CLIP was trained on another process than the decoder; train it with the decoder's "
                "config.diffusion.schedule and num_timesteps"
            )

    def guide(self, frozen: Any, batch: base.Batch) -> samplers.Guide | None:
        if "toward" not in batch:
            return None
        scale = batch["clip_guidance_scale"][:, None, None, None]

        def gradient(x_t, t):
            def likeness(x):
                return self.noised.logits(frozen["clip_noised"], x, t, batch["toward"]).sum()

            return scale * jax.grad(likeness)(x_t.astype(jnp.float32))

        return gradient
