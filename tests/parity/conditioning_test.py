"""What the decoder makes of captions and embeddings against diffusers' UnCLIPTextProjModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from parity import networks, torch_modules

from unclip_jax.interop import karlo_tables
from unclip_jax.models.captions import EncodedCaption
from unclip_jax.models.decoder import Decoder

SIZES = {
    "4 tokens": dict(clip_tokens=4, embed_dim=12, context_width=20, channels=8),
    "3 tokens": dict(clip_tokens=3, embed_dim=10, context_width=6, channels=4),
}


@pytest.mark.parametrize("size", SIZES)
def test_conditioning_is_text_proj(size):
    """Under guidance: theirs makes a batch of dropped embeddings, then kept ones, each with a caption of its own."""
    tokens, d, width, channels = SIZES[size].values()
    unet = dict(channels=channels, channel_mult=(1,), depth=1, attention_resolutions=(), image_size=1)
    ours = Decoder(
        unet=unet, text=None, embed_dim=d, clip_tokens=tokens, null_clip="learned", caption="clip", context_width=width
    )
    theirs = UnCLIPTextProjModel(
        clip_extra_context_tokens=tokens, clip_embeddings_dim=d, time_embed_dim=4 * channels, cross_attention_dim=width
    )
    b, n = 2, 5
    seen = jnp.asarray(np.arange(2 * b * n).reshape(2 * b, n) % 3 > 0)
    caption = EncodedCaption(jnp.zeros((2 * b, n, d)), seen)
    nothing = caption, jnp.zeros((2 * b, d)), None, seen[:, 0], jnp.zeros((2 * b, d))
    rng = np.random.default_rng(1)
    shapes = {"z_i": (b, d), "z_t": (2 * b, d), "states": (2 * b, n, d)}

    def call_theirs(given):
        context, emb = theirs(
            image_embeddings=given["z_i"],
            prompt_embeds=given["z_t"],
            text_encoder_hidden_states=given["states"],
            do_classifier_free_guidance=True,
        )
        # Attention does not mind which comes first; ours has the caption before the embedding's tokens.
        return {"context": torch.roll(context, -tokens, 1), "emb": emb}

    def call_ours(params, given):
        z_i, drop = jnp.tile(given["z_i"], (2, 1)), jnp.arange(2 * b) < b
        caption = EncodedCaption(given["states"], seen)
        out = ours.apply({"params": params}, caption, z_i, None, drop, given["z_t"], method="condition")
        return {"context": out.context, "emb": out.emb}

    networks.agree(
        "UnCLIPTextProjModel",
        size,
        torch_modules.redraw(theirs),
        call_theirs,
        call_ours,
        karlo_tables.text_projection(ours).under(ours="params/"),
        jax.eval_shape(lambda *given: ours.init(*given, method="condition"), jax.random.key(0), *nothing),
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
    )
