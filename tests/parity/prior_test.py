"""The diffusion prior on CLIP's states against diffusers' PriorTransformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import PriorTransformer
from parity import networks, torch_modules

from unclip_jax.interop import karlo_tables
from unclip_jax.models.captions import EncodedCaption
from unclip_jax.models.prior import DiffusionPrior

# Not of the network: they turn its output into an embedding.
STATISTICS = ("clip_mean", "clip_std")
# Every example at a timestep of its own.
T = np.array([3, 999, 500])

SIZES = {
    "2 blocks of 2 heads": dict(embed_dim=12, context_length=7, width=16, depth=2, heads=2),
    "3 blocks of 4 heads": dict(embed_dim=10, context_length=5, width=48, depth=3, heads=4),
}
# Captions that fill their positions, that end early, with a hole, and with a hidden start.
MASKS = {
    "2 blocks of 2 heads": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
    "3 blocks of 4 heads": [[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("size", SIZES)
def test_prior_is_prior_transformer(size):
    fields, mask = SIZES[size], np.array(MASKS[size], bool)
    t, b, d = T[: len(mask)], len(mask), fields["embed_dim"]
    ours = DiffusionPrior(**fields, vocab_size=3, caption="clip")
    theirs = PriorTransformer(
        num_attention_heads=ours.heads,
        attention_head_dim=ours.width // ours.heads,
        num_layers=ours.depth,
        embedding_dim=d,
        num_embeddings=ours.context_length,
    )
    z, caption = jnp.zeros((b, d)), EncodedCaption(jnp.zeros((b, ours.context_length, d)), jnp.asarray(mask))
    rng = np.random.default_rng(1)
    shapes = {"x_t": (b, d), "z_t": (b, d), "states": (b, ours.context_length, d)}

    def call_theirs(given):
        told = {"encoder_hidden_states": given["states"], "attention_mask": torch.tensor(mask)}
        return {"x_start": theirs(given["x_t"], torch.tensor(t), given["z_t"], **told).predicted_image_embedding}

    def call_ours(params, given):
        caption = EncodedCaption(given["states"], jnp.asarray(mask))
        return {"x_start": ours.apply({"params": params}, given["x_t"], jnp.asarray(t), caption, given["z_t"])}

    networks.agree(
        "PriorTransformer",
        size,
        torch_modules.redraw(theirs),
        call_theirs,
        call_ours,
        karlo_tables.prior(ours).under(ours="params/") + karlo_tables.PRIOR_STATISTICS.under(ours="statistics/"),
        {
            **jax.eval_shape(ours.init, jax.random.key(0), z, jnp.asarray(t), caption, z),
            "statistics": {name: jax.ShapeDtypeStruct((d,), jnp.float32) for name in STATISTICS},
        },
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        without=STATISTICS,
    )
