"""ADM's U-Net and GLIDE's conditioning in plain float64 NumPy, one function per layer, for tests to compare with.

From Dhariwal & Nichol 2021 (section 3, appendix) and Nichol et al. 2021 (section 3.1); names of weights are ours.
"""

import numpy as np
import transformer_oracle


def silu(x):
    return x / (1 + np.exp(-x))


def conv(w, x):
    kernel = w["kernel"]
    side = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    out = np.zeros(x.shape[:3] + kernel.shape[-1:]) + w["bias"]
    for i in range(side):
        for j in range(side):
            out += padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
    return out


def dense(w, x):
    return x @ w["kernel"] + w["bias"]


def group_norm(w, x, groups=32):
    split = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    split = (split - split.mean((1, 3), keepdims=True)) / np.sqrt(split.var((1, 3), keepdims=True) + 1e-5)
    return split.reshape(x.shape) * w["scale"] + w["bias"]


def resampled(x, how):
    if how == "up":
        return x.repeat(2, 1).repeat(2, 2)
    if how == "down":
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    return x


def res_block(w, x, emb, how="none", scale_shift="film", groups=32):
    h = conv(w["conv_1"], resampled(silu(group_norm(w["norm_1"], x, groups)), how))
    e = dense(w["emb"], silu(emb))[:, None, None]
    if scale_shift == "film":
        half = e.shape[-1] // 2
        h = group_norm(w["norm_2"], h, groups) * (1 + e[..., :half]) + e[..., half:]
    else:
        h = group_norm(w["norm_2"], h + e, groups)
    x = resampled(x, how)
    return (conv(w["skip"], x) if "skip" in w else x) + conv(w["conv_2"], silu(h))


def attention_block(w, x, context, groups=32):
    y = group_norm(w["norm"], x, groups).reshape(x.shape[0], -1, x.shape[-1])
    a = w["attention"]
    q, k, v = np.moveaxis(np.einsum("bnd,djhk->bnjhk", y, a["qkv"]["kernel"]) + a["qkv"]["bias"], 2, 0)
    if context is not None:
        kv = np.einsum("bnd,djhk->bnjhk", context, a["context_kv"]["kernel"]) + a["context_kv"]["bias"]
        k, v = (np.concatenate([kv[:, :, j], own], 1) for j, own in enumerate((k, v)))
    weights = np.exp(np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(q.shape[-1]))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhnm,bmhk,hkd->bnd", weights, v, a["out"]["kernel"]) + a["out"]["bias"]
    return x + out.reshape(x.shape)


def timestep_embedding(t, width):
    half = width // 2
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angles), np.sin(angles)], 1)


def unet(w, x, t, emb=0.0, context=None, *, channel_mult, depth, attends, scale_shift="film", groups=32):
    """`attends` says of each level whether it attends; the middle does where any level does."""

    def block(name, h, level):
        h = res_block(w[name], h, emb, "none", scale_shift, groups)
        return attention_block(w[f"{name}_attention"], h, context, groups) if attends[level] else h

    embedded = dense(w["time_1"], timestep_embedding(t, w["in_conv"]["bias"].size))
    emb = emb + dense(w["time_2"], silu(embedded))
    h = conv(w["in_conv"], x)
    skips = [h]
    last = len(channel_mult) - 1
    for level in range(last + 1):
        for number in range(depth):
            h = block(f"down_{level}_{number}", h, level)
            skips.append(h)
        if level < last:
            h = res_block(w[f"down_{level}"], h, emb, "down", scale_shift, groups)
            skips.append(h)
    h = res_block(w["middle_0"], h, emb, "none", scale_shift, groups)
    if any(attends):
        h = attention_block(w["middle_attention"], h, context, groups)
    h = res_block(w["middle_1"], h, emb, "none", scale_shift, groups)
    for level in range(last, -1, -1):
        for number in range(depth + 1):
            h = block(f"up_{level}_{number}", np.concatenate([h, skips.pop()], -1), level)
        if level > 0:
            h = res_block(w[f"up_{level}"], h, emb, "up", scale_shift, groups)
    assert not skips
    return conv(w["out_conv"], silu(group_norm(w["out_norm"], h, groups)))


def read_captions(w, captions):
    """GLIDE's text encoder on captions of ids, each up to its end: every position, [b, n, width].

    Positions after the end hold a learned vector each and are read like any other.
    """
    encoded = []
    for ids in captions:
        words = w["token"]["embedding"][ids] + w["position"][: len(ids)]
        x = np.concatenate([words, w["padding"][len(ids) :]])
        x = transformer_oracle.transformer(x, w["transformer"], causal=False)
        encoded.append(transformer_oracle.layer_norm(x, w["final_norm"]))
    return np.stack(encoded)


def decoder(w, x, t, captions, z_i=None, **fields):
    """The U-Net under captions and, where there are any, CLIP embeddings (Ramesh et al. 2022, section 2.1)."""
    context = read_captions(w["text_encoder"], captions)
    emb = dense(w["text_emb"], context[:, -1])
    if z_i is not None:
        emb = emb + dense(w["clip_emb"], z_i)
        tokens = dense(w["clip_context"], z_i).reshape(len(z_i), -1, context.shape[-1])
        context = np.concatenate([context, tokens], 1)
    return unet(w["network"], x, t, emb, context, **fields)
