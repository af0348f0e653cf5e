"""guided-diffusion's networks in torch, read straight off a state dict by its own names: GLIDE's and Karlo's files.

Written from the papers (Dhariwal & Nichol 2021; Nichol et al. 2021) and from what the names say; nothing of ours is in
it, so that a table of names that mixes up two of them is noticed.
"""

import torch
from torch.nn import functional as F


class State:
    """A state dict seen from one prefix."""

    def __init__(self, tensors: dict[str, torch.Tensor], prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def under(self, name: object) -> "State":
        return State(self.tensors, f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return any(key.startswith(self.prefix + name) for key in self.tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self[f"{name}.weight"]
        return F.conv2d(x, weight, self[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def group_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 32, self[f"{name}.weight"], self[f"{name}.bias"], 1e-5)


def sinusoids(t: torch.Tensor, width: int) -> torch.Tensor:
    angles = t.float()[:, None] * 10000 ** (-torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


def time_embedding(state: State, t: torch.Tensor) -> torch.Tensor:
    width = state["time_embed.0.weight"].shape[1]
    return state.linear("time_embed.2", F.silu(state.linear("time_embed.0", sinusoids(t, width))))


def res_block(state: State, x: torch.Tensor, emb: torch.Tensor, resize) -> torch.Tensor:
    h = state.conv("in_layers.2", resize(F.silu(state.group_norm("in_layers.0", x))))
    e = state.linear("emb_layers.1", F.silu(emb))[:, :, None, None]
    if e.shape[1] == 2 * h.shape[1]:
        scale, shift = e.chunk(2, 1)
        h = state.group_norm("out_layers.0", h) * (1 + scale) + shift
    else:
        h = state.group_norm("out_layers.0", h + e)
    h = state.conv("out_layers.3", F.silu(h))
    x = resize(x)
    return h + (state.conv("skip_connection", x) if state.has("skip_connection") else x)


def attention(state: State, x: torch.Tensor, context: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor:
    """Heads of 64; in each of them q, k and v are one after the other."""
    b, c, height, width = x.shape
    flat = state.group_norm("norm", x).reshape(b, c, -1)
    qkv = F.conv1d(flat, state["qkv.weight"], state["qkv.bias"]).reshape(b, c // 64, 3, 64, -1)
    q, k, v = qkv.unbind(2)
    hidden = torch.zeros(b, 1, 1, k.shape[-1])
    if context is not None:
        kv = F.conv1d(context.transpose(1, 2), state["encoder_kv.weight"], state["encoder_kv.bias"])
        more_k, more_v = kv.reshape(b, c // 64, 2, 64, -1).unbind(2)
        k, v = torch.cat([more_k, k], -1), torch.cat([more_v, v], -1)
        seen = torch.ones(b, context.shape[1], dtype=torch.bool) if seen is None else seen
        hidden = torch.cat([torch.where(seen, 0.0, -torch.inf)[:, None, None], hidden], -1)
    logits = torch.einsum("bhkn,bhkm->bhnm", q, k) / 8 + hidden
    y = torch.einsum("bhnm,bhkm->bhkn", logits.softmax(-1), v).reshape(b, c, -1)
    y = F.conv1d(y, state["proj_out.weight"], state["proj_out.bias"])
    return x + y.reshape(b, c, height, width)


def unet(state: State, x, emb, context=None, seen=None, *, depth: int) -> torch.Tensor:
    """The U-Net on an embedding of the timestep and what else is added to it; `depth` residual blocks a level."""

    def same(x):
        return x

    def down(x):
        return F.avg_pool2d(x, 2)

    def up(x):
        return F.interpolate(x, scale_factor=2, mode="nearest")

    def block(state, h, resizes):
        """All that a block's list holds: residual blocks, of which the last may resize, and attention."""
        number = 0
        while state.has(f"{number}."):
            part = state.under(number)
            if part.has("qkv"):
                h = attention(part, h, context, seen)
            else:
                h = res_block(part, h, emb, resizes.pop(0))
            number += 1
        return h

    h = state.conv("input_blocks.0.0", x)
    skips, number = [h], 1
    while state.has(f"input_blocks.{number}."):
        halves = number % (depth + 1) == 0
        h = block(state.under(f"input_blocks.{number}"), h, [down if halves else same])
        skips.append(h)
        number += 1
    h = block(state.under("middle_block"), h, [same, same])
    number = 0
    while state.has(f"output_blocks.{number}."):
        h = torch.cat([h, skips.pop()], 1)
        h = block(state.under(f"output_blocks.{number}"), h, [same, up])
        number += 1
    assert not skips
    return state.conv("out.2", F.silu(state.group_norm("out.0", h)))


def karlo_decoder(state: State, x, t, z_i, z_t, states, seen, *, depth: int) -> torch.Tensor:
    """Karlo's decoder on an embedding, and on CLIP's reading of a caption."""
    emb = time_embedding(state, t) + state.linear("clip_emb", z_i) + state.linear("text_feat_proj", z_t)
    words = state.linear("text_seq_proj.0", states)
    words = F.layer_norm(words, words.shape[-1:], state["text_seq_proj.1.weight"], state["text_seq_proj.1.bias"])
    # Tokens of the embedding are the last axis of what its layer makes.
    tokens = state.linear("clip_tok_proj", z_i).reshape(len(x), words.shape[-1], -1).transpose(1, 2)
    seen = torch.cat([torch.ones(len(x), tokens.shape[1], dtype=torch.bool), seen], 1)
    return unet(state, x, emb, torch.cat([tokens, words], 1), seen, depth=depth)


def karlo_prior(state: State, x, t, z_t, states, seen) -> torch.Tensor:
    """Karlo's prior, heads of 64, q, k and v in each of them one after the other."""
    tokens = [
        state.linear("text_enc_proj", states), state.linear("text_emb_proj", z_t)[:, None],
        time_embedding(state, t)[:, None], state.linear("clip_img_proj", x)[:, None],
        state["prd_emb"].expand(len(x), -1, -1),
    ]  # fmt: skip
    h = torch.cat(tokens, 1) + state["positional_embedding"]
    length = h.shape[1]
    seen = torch.cat([seen, torch.ones(len(x), 4, dtype=torch.bool)], 1)[:, None, None]
    hidden = torch.where(seen & torch.ones(length, length, dtype=torch.bool).tril(), 0.0, -torch.inf)

    def norm(state, name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    number = 0
    while state.has(f"transformer.resblocks.{number}."):
        block = state.under(f"transformer.resblocks.{number}")
        qkv = block.linear("attn.c_qkv", norm(block, "ln_1", h)).reshape(len(x), length, -1, 3, 64)
        q, k, v = qkv.unbind(3)
        weights = (torch.einsum("bnhk,bmhk->bhnm", q, k) / 8 + hidden).softmax(-1)
        y = torch.einsum("bhnm,bmhk->bnhk", weights, v).reshape(len(x), length, -1)
        h = h + block.linear("attn.c_proj", y)
        h = h + block.linear("mlp.c_proj", F.gelu(block.linear("mlp.c_fc", norm(block, "ln_2", h))))
        number += 1
    return state.linear("out_proj", norm(state, "final_ln", h)[:, -1])
