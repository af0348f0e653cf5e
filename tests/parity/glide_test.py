"""GLIDE's decoder, unCLIP's, and ADM's upsampler, whole, against the papers' equations in float64 NumPy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle
from flax import traverse_util
from parity import comparison

from unclip_jax.interop import names
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.unet import UNet

# Small: float32 keeps the angle of a large timestep to 3e-5 only, ours as theirs, of which the other tests have plenty.
T = np.array([60, 7, 0])
SOT, EOT = 18, 19
CAPTIONS = [[SOT, 3, 4, EOT], [SOT, 5, 6, 7, 8, 9, EOT], [SOT, EOT]]
TEXT = dict(context_length=7, vocab_size=20, width=24, depth=2, heads=3)
# A caption to drop is read as the empty one.
DROPPED = jnp.array([False, False, True])
TOKENS = jnp.array([[*ids, *[0] * (7 - len(ids))] for ids in [*CAPTIONS[:2], [SOT, 11, EOT]]], jnp.int32)

UNETS: dict[str, dict[str, Any]] = {
    "2 levels of 1 block": dict(channels=32, channel_mult=(1, 2), depth=1, image_size=8, norm_groups=16),
    "3 levels of 2 blocks": dict(channels=32, channel_mult=(1, 1, 2), depth=2, image_size=8, norm_groups=8),
}


def cases():
    for size, fields in UNETS.items():
        attention = dict(attention_resolutions=(4,), head_channels=16)
        yield "GLIDE's decoder", size, Decoder(unet=fields | attention, text=TEXT, embed_dim=0)
        yield "unCLIP's decoder", size, Decoder(unet=fields | attention, text=TEXT, embed_dim=10)
        yield "ADM's upsampler", size, UNet(**fields, in_channels=6, attention_resolutions=())


@pytest.mark.parametrize("module, size, network", list(cases()))
def test_network_is_the_papers(module, size, network):
    unet = network if isinstance(network, UNet) else UNet(**network.unet)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 8, 8, unet.in_channels)).astype(np.float32)
    z_i = (rng.standard_normal((3, 10)) / np.sqrt(10)).astype(np.float32) if "unCLIP" in module else None
    conditions = () if network is unet else (TOKENS, None if z_i is None else jnp.asarray(z_i), DROPPED)
    attends = [unet.image_size >> level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    told = dict(channel_mult=unet.channel_mult, depth=unet.depth, attends=attends, groups=unet.norm_groups)

    def oracle(weights, x):
        if network is unet:
            return unet_oracle.unet(weights, x, T, **told)
        return unet_oracle.decoder(weights, x, T, CAPTIONS, z_i, **told)

    def ours(params, x):
        return network.apply({"params": params}, x, jnp.asarray(T), *conditions)

    params = drawn(network.init, x, jnp.asarray(T), *conditions)
    toward = rng.standard_normal((*x.shape[:3], unet.out_channels))
    agree_with_oracle(f"{module}, NumPy", size, ours, oracle, params, x, toward)


def drawn(init, *inputs):
    """Random weights of the shapes of `init`; matrices and convolutions keep the size of what goes through them."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))["params"]
    weights = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        *_, layer, kind = path.split("/")
        inward = leaf.shape[1 if "blocks" in path else 0 :]  # without the axis of stacked blocks
        inward = inward[:1] if layer in ("qkv", "context_kv") else inward[:-1]
        size = 1 / np.sqrt(np.prod(inward)) if kind == "kernel" else 0.2
        weights[path] = np.float32(size * rng.standard_normal(leaf.shape) + (kind == "scale"))
    return traverse_util.unflatten_dict(weights, sep="/")


def agree_with_oracle(module, size, ours, oracle, params, x, toward):
    """Compares outputs, and the derivatives of their projection on `toward` along one direction for each layer.

    An oracle has no gradient, but in float64 a difference quotient has eight digits. Each tensor of a layer moves along
    our gradient and as far in a random direction: were ours wrong, theirs would not rise as fast.
    """

    def projection(params, x):
        out = ours(params, x)
        return (out * jnp.asarray(toward, jnp.float32)).sum(), out

    differentiated = jax.jit(jax.value_and_grad(projection, (0, 1), has_aux=True))
    (_, out), (of_weights, of_x) = differentiated(params, jnp.asarray(x))
    exact = {"x": np.float64(x), **{f"weights/{path}": np.float64(w) for path, w in names.flattened(params).items()}}
    gradients = {"x": np.float64(of_x)}
    gradients.update((f"weights/{path}", np.float64(g)) for path, g in names.flattened(of_weights).items())

    def of_oracle(moved):
        tree = traverse_util.unflatten_dict(exact | moved, sep="/")
        return oracle(tree["weights"], tree["x"])

    comparison.agree(module, size, "forward", out, of_oracle({}), comparison.FORWARD)
    rng = np.random.default_rng(4)
    by_layer = {}
    for path, gradient in gradients.items():
        random = rng.standard_normal(gradient.shape)
        direction = gradient / np.linalg.norm(gradient) + random / np.linalg.norm(random)
        by_layer.setdefault("/".join(path.split("/")[:-2]), {})[path] = direction
    rises, wanted = {}, {}
    for layer, directions in by_layer.items():
        ahead, behind = (
            of_oracle({path: exact[path] + step * direction for path, direction in directions.items()})
            for step in (1e-5, -1e-5)
        )
        wanted[layer] = ((ahead - behind) * toward).sum() / 2e-5
        rises[layer] = sum((gradients[path] * direction).sum() for path, direction in directions.items())
    comparison.agree(module, size, "gradient", rises, wanted, comparison.GRADIENT)
