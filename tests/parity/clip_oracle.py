"""CLIP's towers in float64 torch, written from their descriptions, on weights by OpenAI's and OpenCLIP's names.

Radford et al., 2021, section 2.4 and their model card describe OpenAI's; the README and the model configs of OpenCLIP
say in what its towers differ. Each function reads every weight from a dictionary, so a name that is missing fails.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional

Weights = Mapping[str, torch.Tensor]

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def double(arrays: Mapping[str, np.ndarray], fixed: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """float64 tensors that ask for gradients, but for names that end like one of `fixed`."""
    return {
        name: torch.tensor(np.asarray(array, np.float64), requires_grad=not name.endswith(fixed or ("\0",)))
        for name, array in arrays.items()
    }


def linear(x, w: Weights, name: str):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(x, w: Weights, name: str, epsilon: float):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    )


def attend(q, k, v, heads: int, seen=None):
    """q [b, m, d] reads k, v [b, n, d] with each of `heads` equal parts of d; `seen` [b, m, n] is where it may."""
    outputs = []
    for part in torch.arange(q.shape[-1]).chunk(heads):
        logits = q[..., part] @ k[..., part].transpose(1, 2) / len(part) ** 0.5
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf)
        outputs.append(logits.softmax(-1) @ v[..., part])
    return torch.cat(outputs, -1)


def blocks(x, w: Weights, *, heads: int, activation: str, epsilon: float, seen=None):
    number = 0
    while (at := f"transformer.resblocks.{number}") + ".ln_1.weight" in w:
        y = norm(x, w, f"{at}.ln_1", epsilon)
        q, k, v = (y @ w[f"{at}.attn.in_proj_weight"].T + w[f"{at}.attn.in_proj_bias"]).chunk(3, -1)
        y = linear(attend(q, k, v, heads, seen), w, f"{at}.attn.out_proj")
        x = x + y * w.get(f"{at}.ls_1.gamma", 1.0)
        y = ACTIVATIONS[activation](linear(norm(x, w, f"{at}.ln_2", epsilon), w, f"{at}.mlp.c_fc"))
        x = x + linear(y, w, f"{at}.mlp.c_proj") * w.get(f"{at}.ls_2.gamma", 1.0)
        number += 1
    assert number, "no blocks"
    return x


def vision_transformer(w: Weights, pixels, *, heads, activation, epsilon, pool, pool_heads):
    """pixels: normalised [b, 3, h, w]. Returns embeddings and the residual stream after the last block."""
    x = functional.conv2d(pixels, w["conv1.weight"], stride=w["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    if "ln_pre.weight" in w:
        x = norm(x, w, "ln_pre", epsilon)
    x = blocks(x, w, heads=heads, activation=activation, epsilon=epsilon)
    if pool == "attention":
        at = "attn_pool.attn"
        seen = norm(x, w, "attn_pool.ln_k", epsilon)
        biases = w[f"{at}.in_proj_bias"].chunk(3)
        query = norm(w["attn_pool.query"], w, "attn_pool.ln_q", epsilon).expand(len(x), -1, -1)
        q, k, v = (
            tokens @ w[f"{at}.{name}_proj_weight"].T + bias
            for tokens, name, bias in zip((query, seen, seen), "qkv", biases, strict=True)
        )
        read = linear(attend(q, k, v, pool_heads), w, f"{at}.out_proj")
        pooled = norm(read, w, "ln_post", epsilon)[:, 0]
    elif pool == "average":
        pooled = norm(x[:, 1:].mean(1), w, "ln_post", epsilon)
    elif pool == "normed_average":
        pooled = norm(x[:, 1:], w, "ln_post", epsilon).mean(1)
    else:
        pooled = norm(x[:, 0], w, "ln_post", epsilon)
    return pooled @ w["proj"], x


def text_transformer(w: Weights, tokens, *, heads, activation, epsilon, causal, pool, end_id):
    """tokens: [b, n]. Returns embeddings and the normed vectors of the tokens."""
    x = w["token_embedding.weight"][tokens]
    if pool == "class":
        x = torch.cat([x, w["cls_emb"].expand(len(x), 1, -1)], 1)
    length = x.shape[1]
    x = x + w["positional_embedding"][:length]
    seen = torch.ones(len(x), length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            if causal and key > query:
                seen[:, query, key] = False
            if pool == "class" and key > 0:  # padding hides the position after it
                seen[:, query, key] &= tokens[:, key - 1] != 0
    x = norm(blocks(x, w, heads=heads, activation=activation, epsilon=epsilon, seen=seen), w, "ln_final", epsilon)
    read = {
        "end": lambda caption: caption.tolist().index(end_id),
        "argmax": lambda caption: caption.tolist().index(max(caption.tolist())),
        "first": lambda caption: 0,
        "last": lambda caption: len(caption) - 1,
        "class": lambda caption: len(caption),
    }[pool]
    pooled = torch.stack([row[read(caption)] for row, caption in zip(x, tokens, strict=True)])
    projected = pooled @ w["text_projection"] if "text_projection" in w else linear(pooled, w, "text_projection")
    return projected, x[:, : tokens.shape[1]]


def _layer(x, w: Weights, conv: str, norm: str, stride=1):
    kernel = w[f"{conv}.weight"]
    x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    mean, var, scale, bias = (
        w[f"{norm}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + bias


def modified_resnet(w: Weights, pixels, *, heads):
    """pixels: normalised [b, 3, h, w]. Returns embeddings and the features that are pooled, [b, places, channels]."""
    x = pixels
    for number in (1, 2, 3):
        x = torch.relu(_layer(x, w, f"conv{number}", f"bn{number}", stride=2 if number == 1 else 1))
    x = functional.avg_pool2d(x, 2)
    stage = 1
    while f"layer{stage}.0.conv1.weight" in w:
        number = 0
        while (at := f"layer{stage}.{number}") + ".conv1.weight" in w:
            shrink = functional.avg_pool2d if stage > 1 and number == 0 else lambda x, _: x
            y = torch.relu(_layer(x, w, f"{at}.conv1", f"{at}.bn1"))
            y = torch.relu(_layer(y, w, f"{at}.conv2", f"{at}.bn2"))
            y = _layer(shrink(y, 2), w, f"{at}.conv3", f"{at}.bn3")
            if number == 0:  # every stage's first block changes the number of channels
                x = _layer(shrink(x, 2), w, f"{at}.downsample.0", f"{at}.downsample.1")
            x = torch.relu(x + y)
            number += 1
        stage += 1
    places = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([places.mean(1, keepdim=True), places], 1) + w["attnpool.positional_embedding"]
    q = linear(tokens[:, :1], w, "attnpool.q_proj")
    k, v = (linear(tokens, w, f"attnpool.{name}_proj") for name in "kv")
    return linear(attend(q, k, v, heads), w, "attnpool.c_proj")[:, 0], places
