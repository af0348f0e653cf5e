"""CLIP's towers against transformers': outputs, hidden states, and the gradients of every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from parity import clip_names, comparison, torch_modules

from unclip_jax.models.clip_towers import MEAN, STD, TextTransformer, VisionTransformer

SIZES = {
    "two blocks of 32": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "three blocks of 24": {
        "hidden_size": 24,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
}
ACTIVATIONS = {"two blocks of 32": "quick_gelu", "three blocks of 24": "gelu"}


def _config(size, **more):
    return {
        **SIZES[size],
        "hidden_act": ACTIVATIONS[size],
        "projection_dim": 20,
        "attn_implementation": "eager",
        **more,
    }


def _fields(size):
    theirs = SIZES[size]
    return {
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "mlp_ratio": theirs["intermediate_size"] / theirs["hidden_size"],
        "embed_dim": 20,
        "activation": ACTIVATIONS[size],
    }


def _compare(tower, size, module, ours, ours_read, theirs_read):
    """Both read the same input; each output is weighed by random numbers, and the gradients of the sum compared."""
    outputs = theirs_read(module)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(x.shape).astype(np.float32) for x in outputs]
    sum((x * torch.from_numpy(w)).sum() for x, w in zip(outputs, weights, strict=True)).backward()

    def convert(arrays):
        return clip_names.from_transformers(tower, arrays, ours.heads)

    @jax.jit
    def both(params):
        def loss(params):
            got = ours_read(params)
            return sum((x * w).sum() for x, w in zip(got, weights, strict=True)), got

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, got), gradients = both(jax.tree.map(jnp.asarray, convert(torch_modules.state(module))))
    name = f"CLIP{tower.capitalize()}ModelWithProjection"
    named = [dict(zip(("embedding", "hidden"), x, strict=True)) for x in (got, [x.detach().numpy() for x in outputs])]
    comparison.agree(name, size, "forward", *named, comparison.FORWARD)
    wanted = convert(torch_modules.gradients(module))
    both_gradients = [clip_names.by_path(x) for x in (gradients, wanted)]
    comparison.agree(name, size, "gradient", *both_gradients, comparison.GRADIENT)


@pytest.mark.parametrize("size", SIZES)
def test_text_tower_is_that_of_transformers(size):
    end = 49
    config = transformers.CLIPTextConfig(
        **_config(size, vocab_size=50, max_position_embeddings=9, eos_token_id=end, bos_token_id=48)
    )
    module = torch_modules.redraw(transformers.CLIPTextModelWithProjection(config))
    tokens = np.array(
        [[48, 3, 5, end, 0, 0, 0, 0, 0], [48, 7, 1, 2, 4, 6, 8, 9, end], [48, end, 3, end, 7, 7, 7, 7, 7]]
    )
    ours = TextTransformer(context_length=9, vocab_size=50, **_fields(size))

    def theirs_read(module):
        out = module(torch.from_numpy(tokens))
        return out.text_embeds, out.last_hidden_state

    _compare("text", size, module, ours, lambda p: ours.apply({"params": p}, jnp.asarray(tokens)), theirs_read)


@pytest.mark.parametrize("size", SIZES)
def test_vision_tower_is_that_of_transformers(size):
    patch = {"two blocks of 32": 4, "three blocks of 24": 6}[size]
    config = transformers.CLIPVisionConfig(**_config(size, image_size=12, patch_size=patch))
    module = torch_modules.redraw(transformers.CLIPVisionModelWithProjection(config))
    images = np.random.default_rng(2).uniform(-1, 1, (3, 12, 12, 3)).astype(np.float32)
    ours = VisionTransformer(image_size=12, patch_size=patch, **_fields(size))

    def theirs_read(module):
        pixels = ((images + 1) / 2 - np.float32(MEAN)) / np.float32(STD)
        out = module(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        return out.image_embeds, out.last_hidden_state

    _compare("vision", size, module, ours, lambda p: ours.apply({"params": p}, jnp.asarray(images)), theirs_read)
