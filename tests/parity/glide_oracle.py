"""GLIDE in float64 torch, on weights by its published names: networks, and the two ways in which they are sampled.

From Nichol et al., 2021 (sections 2 and 4), Dhariwal & Nichol, 2021 (the U-Net), and the names and constants in
github.com/openai/glide-text2im. Which module a name belongs to is told by the names beneath it.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn import functional

Weights = Mapping[str, torch.Tensor]
HEAD = 64


def random_weights(
    *, in_channels: int, channels: int, mult: tuple, attends: tuple, depth: int, text: dict, seed: int
) -> dict[str, np.ndarray]:
    """Weights of a whole model under its names; everything is random, also what training starts at zero."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}

    def add(name, *shape, centre=0.0):
        size = 0.2 if len(shape) < 2 else math.prod(shape[1:]) ** -0.5
        found[name] = np.float32(centre + size * rng.standard_normal(shape))

    def layer(name, out, into, *places):
        add(f"{name}.weight", out, into, *places)
        add(f"{name}.bias", out)

    def norm(name, width):
        add(f"{name}.weight", width, centre=1.0)
        add(f"{name}.bias", width)

    def res(name, into, out):
        norm(f"{name}.in_layers.0", into)
        layer(f"{name}.in_layers.2", out, into, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * out, 4 * channels)
        norm(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            layer(f"{name}.skip_connection", out, into, 1, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        layer(f"{name}.qkv", 3 * width, width, 1)
        layer(f"{name}.encoder_kv", 2 * width, text["width"], 1)
        layer(f"{name}.proj_out", width, width, 1)

    layer("time_embed.0", 4 * channels, channels)
    layer("time_embed.2", 4 * channels, 4 * channels)
    layer("input_blocks.0.0", channels, in_channels, 3, 3)
    here, skips, number = channels, [channels], 1
    for level, factor in enumerate(mult):
        for _ in range(depth):
            res(f"input_blocks.{number}.0", here, factor * channels)
            here = factor * channels
            if attends[level]:
                attention(f"input_blocks.{number}.1", here)
            skips.append(here)
            number += 1
        if level < len(mult) - 1:
            res(f"input_blocks.{number}.0", here, here)
            skips.append(here)
            number += 1
    res("middle_block.0", here, here)
    attention("middle_block.1", here)
    res("middle_block.2", here, here)
    number = 0
    for level in reversed(range(len(mult))):
        for block in range(depth + 1):
            res(f"output_blocks.{number}.0", here + skips.pop(), mult[level] * channels)
            here = mult[level] * channels
            if attends[level]:
                attention(f"output_blocks.{number}.1", here)
            if level and block == depth:
                res(f"output_blocks.{number}.{1 + attends[level]}", here, here)
            number += 1
    norm("out.0", here)
    layer("out.2", 6, here, 3, 3)
    width = text["width"]
    add("token_embedding.weight", text["rows"], width)
    for name in ("positional_embedding", "padding_embedding"):
        add(name, text["length"], width)
    for block in range(text["depth"]):
        at = f"transformer.resblocks.{block}"
        norm(f"{at}.ln_1", width)
        norm(f"{at}.ln_2", width)
        layer(f"{at}.attn.c_qkv", 3 * width, width)
        layer(f"{at}.attn.c_proj", width, width)
        layer(f"{at}.mlp.c_fc", 4 * width, width)
        layer(f"{at}.mlp.c_proj", width, 4 * width)
    norm("final_ln", width)
    layer("transformer_proj", 4 * channels, width)
    return found


def _dense(w: Weights, name: str, x):
    return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def _attend(q, k, v):
    """Each [b, n, heads, k]."""
    weights = (torch.einsum("bnhk,bmhk->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bmhk->bnhk", weights, v).flatten(2)


def _heads(rows, count: int):
    """Projections whose features are, for each head, `count` vectors of `HEAD`."""
    return rows.unflatten(-1, (-1, count, HEAD)).unbind(-2)


def read(w: Weights, tokens: list[list[int]]):
    """Every position of captions that are words and nothing else, [b, n, width]."""
    length, width = w["positional_embedding"].shape
    x = torch.stack([
        torch.cat([w["token_embedding.weight"][ids] + w["positional_embedding"][: len(ids)],
                   w["padding_embedding"][len(ids) :]])
        for ids in tokens
    ])  # fmt: skip
    assert x.shape[1] == length

    def norm(name, x):
        return functional.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    block = 0
    while (at := f"transformer.resblocks.{block}") + ".ln_1.weight" in w:
        q, k, v = _heads(_dense(w, f"{at}.attn.c_qkv", norm(f"{at}.ln_1", x)), 3)
        x = x + _dense(w, f"{at}.attn.c_proj", _attend(q, k, v))
        x = x + _dense(w, f"{at}.mlp.c_proj", functional.gelu(_dense(w, f"{at}.mlp.c_fc", norm(f"{at}.ln_2", x))))
        block += 1
    return norm("final_ln", x)


def unet(w: Weights, x, t, caption):
    """x [b, c, h, w], t [b], a read caption: the six channels that are predicted."""
    channels = len(w["input_blocks.0.0.bias"])
    half = channels // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    emb = _dense(w, "time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
    emb = _dense(w, "time_embed.2", functional.silu(emb)) + _dense(w, "transformer_proj", caption[:, -1])

    def conv(name, x):
        kernel = w[f"{name}.weight"]
        return functional.conv2d(x, kernel, w[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def norm(name, x):
        return functional.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def res(name, x, how):
        h = conv(f"{name}.in_layers.2", how(functional.silu(norm(f"{name}.in_layers.0", x))))
        scale, shift = _dense(w, f"{name}.emb_layers.1", functional.silu(emb))[..., None, None].chunk(2, 1)
        h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        h = conv(f"{name}.out_layers.3", functional.silu(h))
        x = how(x)
        return h + (conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in w else x)

    def attention(name, x):
        rows = norm(f"{name}.norm", x).flatten(2).transpose(1, 2)
        q, k, v = _heads(_dense(w, f"{name}.qkv", rows), 3)
        text_k, text_v = _heads(_dense(w, f"{name}.encoder_kv", caption), 2)
        out = _attend(q, torch.cat([text_k, k], 1), torch.cat([text_v, v], 1))
        return x + _dense(w, f"{name}.proj_out", out).transpose(1, 2).reshape(x.shape)

    def same(x):
        return x

    def shrink(x):
        return functional.avg_pool2d(x, 2)

    def grow(x):
        return functional.interpolate(x, scale_factor=2, mode="nearest")

    def block(at, x, *, shrinks=False):
        place = 0
        while any(name.startswith(f"{at}.{place}.") for name in w):
            name = f"{at}.{place}"
            if f"{name}.qkv.weight" in w:
                x = attention(name, x)
            elif f"{name}.in_layers.0.weight" in w:
                # A second one in a block of the way up enlarges.
                x = res(name, x, shrink if shrinks else grow if place and at.startswith("output") else same)
            else:
                x = conv(name, x)
            place += 1
        return x

    depth = next(n for n in range(9) if any(f"output_blocks.{n}.{k}.in_layers.0.weight" in w for k in (1, 2)))
    skips, number = [], 0
    while any(name.startswith(f"input_blocks.{number}.") for name in w):
        x = block(f"input_blocks.{number}", x, shrinks=number > 0 and number % (depth + 1) == 0)
        skips.append(x)
        number += 1
    x = block("middle_block", x)
    for number in range(len(skips)):
        x = block(f"output_blocks.{number}", torch.cat([x, skips.pop()], 1))
    return conv("out.2", functional.silu(norm("out.0", x)))


def alpha_bars(schedule: str) -> np.ndarray:
    """Of 1,000 timesteps: "cosine" (Nichol & Dhariwal, 2021) or "linear" (Ho et al., 2020)."""
    if schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    time = np.arange(1001) / 1000
    bars = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - bars[1:] / bars[:-1], 0.999))


def sample(
    predict: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    x_T: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    timesteps: list[int],
    schedule: str,
):
    """Goes down `timesteps`: ancestral sampling with learned variances (Nichol & Dhariwal, equation 15), or, without
    noise, DDIM (Song et al., 2020, equation 12 with sigma 0). Predictions of x_start are clipped to [-1, 1].

    Args:
      predict: (x_t, t) -> eps and the variance's channels, each [b, 3, h, w].
      x_T: where it begins.
      noise: [steps, b, 3, h, w].
      timesteps: descending, of the original process.
      schedule: see `alpha_bars`.
    """
    bars = alpha_bars(schedule)
    x = x_T
    for step, t in enumerate(timesteps):
        bar = bars[t]
        before = bars[timesteps[step + 1]] if step + 1 < len(timesteps) else 1.0
        eps, fraction = predict(x, t)
        x_start = ((x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)).clamp(-1, 1)
        if noise is None:
            eps = (x - np.sqrt(bar) * x_start) / np.sqrt(1 - bar)
            x = np.sqrt(before) * x_start + np.sqrt(1 - before) * eps
            continue
        beta = 1 - bar / before
        mean = np.sqrt(before) * beta / (1 - bar) * x_start + np.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
        if step + 1 == len(timesteps):
            return mean
        low, high = np.log(beta * (1 - before) / (1 - bar)), np.log(beta)
        log_variance = low + (high - low) * (fraction + 1) / 2
        x = mean + torch.exp(log_variance / 2) * noise[step]
    return x
