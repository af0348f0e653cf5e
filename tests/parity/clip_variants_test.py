"""OpenAI's ResNets and OpenCLIP's variants of both transformers against `clip_oracle`: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformer_oracle
from flax.core import meta
from parity import clip_names, clip_oracle, comparison

from unclip_jax.models.clip_resnet import ModifiedResNet
from unclip_jax.models.clip_towers import MEAN, STD, TextTransformer, VisionTransformer

STATISTICS = ("running_mean", "running_var")
# A bias of keys shifts all logits of a softmax alike: it has no gradient but rounding.
KEYS = "attnpool.k_proj.bias"

TRANSFORMER = {"depth": 2, "heads": 2, "embed_dim": 12}
VISION = {
    "CLIPA: no norm before the blocks, mean of patches": {"input_norm": False, "pool": "average", "width": 24},
    "ViT-bigG/14: wide MLP; layer scale; mean of normed patches": {
        "mlp_ratio": 4.9231,
        "layer_scale": 0.1,
        "pool": "normed_average",
        "activation": "quick_gelu",
        "epsilon": 1e-3,
        "width": 26,
    },
    "CoCa: a query reads the patches": {"pool": "attention", "pool_heads": 3, "width": 24},
}
TEXT = {
    "CLIPA: bidirectional, last": {"causal": False, "pool": "last"},
    "SigLIP: tanh GELU, bias": {
        "causal": False,
        "pool": "last",
        "activation": "gelu_tanh",
        "projection": "biased",
        "mlp_ratio": 3.7362,
        "epsilon": 1e-3,
    },
    "xlm-v: another end token": {"pool": "end", "end_id": 2},
    "largest token": {"pool": "argmax", "activation": "quick_gelu"},
    "first": {"causal": False, "pool": "first"},
    "CoCa: class token": {"pool": "class"},
}
RESNETS = {
    "stages of 1, 2": {"layers": (1, 2), "width": 8, "heads": 4, "image_size": 16},
    "stages of 2, 1, 3, 1": {"layers": (2, 1, 3, 1), "width": 4, "heads": 2, "image_size": 64},
}


def _compare(kind, size, ours, params, inputs, rename, theirs_read):
    """Weighs each output by random numbers and compares the outputs and the gradients of the sum."""
    named = clip_oracle.double(rename(params), STATISTICS)
    outputs = theirs_read(named)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(x.shape) for x in outputs]
    sum((x * torch.from_numpy(w)).sum() for x, w in zip(outputs, weights, strict=True)).backward()

    @jax.jit
    def read(params, inputs):
        def loss(params):
            got = ours.apply({"params": params}, inputs)
            return sum((x * jnp.float32(w)).sum() for x, w in zip(got, weights, strict=True)), got

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, got), gradients = read(params, inputs)
    forward = [dict(zip(("embedding", "hidden"), x, strict=True)) for x in (got, [x.detach().numpy() for x in outputs])]
    comparison.agree(kind, size, "forward", *forward, comparison.FORWARD)
    gradients = rename(jax.device_get(gradients))
    wanted = {name: tensor.grad.numpy() for name, tensor in named.items() if tensor.requires_grad}
    if KEYS in wanted:
        assert max(np.abs(wanted.pop(KEYS)).max(), np.abs(gradients.pop(KEYS)).max()) < 1e-4
    for name in set(gradients) - set(wanted):
        assert name.endswith(STATISTICS) and not gradients.pop(name).any()
    comparison.agree(kind, size, "gradient", gradients, wanted, comparison.GRADIENT)


def _images(side):
    images = np.random.default_rng(2).uniform(-1, 1, (3, side, side, 3)).astype(np.float32)
    pixels = ((np.float64(images) + 1) / 2 - MEAN) / STD
    return jnp.asarray(images), torch.from_numpy(pixels.transpose(0, 3, 1, 2))


def _oracle_options(tower, *names):
    return {name: getattr(tower, name) for name in ("heads", "activation", "epsilon", "pool", *names)}


@pytest.mark.parametrize("variant", VISION)
def test_vision_transformers_follow_the_oracle(variant):
    ours = VisionTransformer(image_size=12, patch_size=4, **(TRANSFORMER | VISION[variant]))
    images, pixels = _images(12)
    params = transformer_oracle.random_weights(ours.init, images)["params"]
    options = _oracle_options(ours, "pool_heads")
    _compare(
        "CLIP's vision transformer",
        variant,
        ours,
        params,
        images,
        clip_names.vision_transformer,
        lambda w: clip_oracle.vision_transformer(w, pixels, **options),
    )


@pytest.mark.parametrize("variant", TEXT)
def test_text_transformers_follow_the_oracle(variant):
    ours = TextTransformer(context_length=7, vocab_size=15, width=16, **(TRANSFORMER | TEXT[variant]))
    tokens = np.array([[13, 3, 5, 2, 0, 0, 0], [13, 2, 14, 8, 9, 7, 2], [13, 4, 14, 2, 11, 14, 0]])
    params = transformer_oracle.random_weights(ours.init, jnp.asarray(tokens))["params"]
    options = _oracle_options(ours, "causal", "end_id")
    _compare(
        "CLIP's text transformer",
        variant,
        ours,
        params,
        jnp.asarray(tokens),
        clip_names.text_transformer,
        lambda w: clip_oracle.text_transformer(w, torch.from_numpy(tokens), **options),
    )


def _resnet_weights(path, shape, rng):
    """Random in every tensor, and of a size that keeps that of the features."""
    name, noise = path[-1].key, rng.standard_normal(shape.shape)
    if name == "kernel":
        inputs = np.prod(shape.shape[-4:-1]) if len(shape.shape) > 3 else shape.shape[-2]
        return jnp.asarray(noise * np.sqrt(2 / inputs), jnp.float32)
    if name == "running_var":
        return jnp.asarray(rng.uniform(0.5, 2, shape.shape), jnp.float32)
    return jnp.asarray(0.2 * noise + (name == "scale"), jnp.float32)


@pytest.mark.parametrize("size", RESNETS)
def test_resnets_follow_the_oracle(size):
    ours = ModifiedResNet(embed_dim=10, **RESNETS[size])
    images, pixels = _images(ours.image_size)
    rng = np.random.default_rng(0)
    shapes = meta.unbox(jax.eval_shape(ours.init, jax.random.key(0), images))["params"]
    params = jax.tree_util.tree_map_with_path(lambda path, shape: _resnet_weights(path, shape, rng), shapes)
    _compare(
        "CLIP's ResNet",
        size,
        ours,
        params,
        images,
        clip_names.modified_resnet,
        lambda w: clip_oracle.modified_resnet(w, pixels, heads=ours.heads),
    )
