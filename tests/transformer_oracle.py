"""The transformer's equations in float64 NumPy, one matrix product at a time, for tests to compare with."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from scipy.special import erf

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def random_weights(init, *inputs, seed=0):
    """Weights of the shapes that `init(key, *inputs)` gives, all of them random, also where training starts at zero.

    Returns float32 arrays without their boxes.
    """
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.2 * rng.standard_normal(shape.shape), jnp.float32)

    shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def attention(x, p, causal, context):
    """x: [n, width] of one example; the context, if any, [m, width], goes through the same weights unnormalised."""
    seen = x if context is None else np.concatenate([context, x])
    qkv = np.einsum("nw,wchk->chnk", seen, p["qkv"]["kernel"]) + p["qkv"]["bias"][:, :, None]
    heads = []
    for q, k, v in zip(*qkv, strict=True):
        logits = q[-len(x) :] @ k.T / np.sqrt(q.shape[-1])
        if causal:
            logits = np.where(np.tril(np.ones_like(logits), len(seen) - len(x)) > 0, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.einsum("hnk,hkw->nw", heads, p["out"]["kernel"]) + p["out"]["bias"]


def _block(blocks, index):
    return jax.tree.map(lambda w: np.asarray(w, np.float64)[index], blocks)


def transformer(x, p, *, causal, activation="gelu", context=None):
    """The residual stream of one example [n, width] after all blocks; p has blocks stacked on axis 0."""
    x = np.asarray(x, np.float64)
    for index in range(len(p["blocks"]["norm_1"]["scale"])):
        block = _block(p["blocks"], index)
        x = x + attention(layer_norm(x, block["norm_1"]), block["attention"], causal, context)
        hidden = ACTIVATIONS[activation](linear(layer_norm(x, block["norm_2"]), block["mlp"]["up"]))
        x = x + linear(hidden, block["mlp"]["down"])
    return x
