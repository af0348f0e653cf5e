"""Which of our weights is which of diffusers', and how one is laid out as the other.

A table has an entry for each of our weights: the names of theirs that it is made of and the layout between them. Every
layout only moves numbers, so gradients go the same way as weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from unclip_jax.models.unet import UNet

Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How several of their tensors make one of ours, and back."""

    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


class Entry(NamedTuple):
    names: tuple[str, ...]
    layout: Layout


Table = dict[str, Entry]


def to_ours(table: Table, state: Arrays, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """Our tree of their tensors; every one of them is used, but for those named in `without`."""
    used = {name for entry in table.values() for name in entry.names}
    assert used == set(state) - set(without), f"only on one side: {sorted(used ^ (set(state) - set(without)))}"
    flat = {path: layout.join([state[name] for name in names]) for path, (names, layout) in table.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def to_theirs(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors of our tree; every one of ours is used."""
    flat = flatten(params)
    assert set(flat) == set(table), f"only on one side: {sorted(set(flat) ^ set(table))}"
    state: dict[str, np.ndarray] = {}
    for path, (names, layout) in table.items():
        state.update(zip(names, layout.split(flat[path]), strict=True))
    return state


def flatten(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our weights by path, a/b/c."""
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


# Layouts.

SAME = Layout(lambda parts: parts[0], lambda ours: [ours])
TRANSPOSED = Layout(lambda parts: parts[0].T, lambda ours: [ours.T])
# [out, in, height, width] and [height, width, in, out].
CONV = Layout(lambda parts: parts[0].transpose(2, 3, 1, 0), lambda ours: [ours.transpose(3, 2, 0, 1)])


def with_ones(axes: int) -> Layout:
    """Theirs has axes of length one in front."""
    return Layout(
        lambda parts: parts[0].reshape(parts[0].shape[axes:]),
        lambda ours: [ours.reshape((1,) * axes + ours.shape)],
    )


def per_head(heads: int) -> Layout:
    """Projections to heads: each of theirs is [heads * k, in], ours [in, how many, heads, k]; biases without `in`."""

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([part.T.reshape(*part.T.shape[:-1], heads, -1) for part in parts], -3)

    def split(ours: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(*part.shape[:-2], -1).T for part in np.moveaxis(ours, -3, 0)]

    return Layout(join, split)


def from_heads(heads: int) -> Layout:
    """The projection back: theirs [out, heads * k], ours [heads, k, out]."""
    return Layout(
        lambda parts: parts[0].T.reshape(heads, -1, parts[0].shape[0]),
        lambda ours: [ours.reshape(-1, ours.shape[-1]).T],
    )


def interleaved(count: int) -> Layout:
    """A projection to `count` tokens: output i of theirs belongs to token i % count, of ours to token i // width."""

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        ours = parts[0].T
        return ours.reshape(*ours.shape[:-1], -1, count).swapaxes(-1, -2).reshape(ours.shape)

    def split(ours: np.ndarray) -> list[np.ndarray]:
        return [ours.reshape(*ours.shape[:-1], count, -1).swapaxes(-1, -2).reshape(ours.shape).T]

    return Layout(join, split)


def stacked(tables: Sequence[Table]) -> Table:
    """Blocks of one kind, each with a table, whose weights we stack on the first axis."""
    stack: Table = {}
    for path, (names, layout) in tables[0].items():
        count = len(names)

        def join(parts: Sequence[np.ndarray], layout: Layout = layout, count: int = count) -> np.ndarray:
            return np.stack([layout.join(parts[i : i + count]) for i in range(0, len(parts), count)])

        def split(ours: np.ndarray, layout: Layout = layout) -> list[np.ndarray]:
            return [part for block in ours for part in layout.split(block)]

        stack[path] = Entry(tuple(name for table in tables for name in table[path].names), Layout(join, split))
    return stack


# Layers.


def dense(ours: str, theirs: str) -> Table:
    return {
        f"{ours}/kernel": Entry((f"{theirs}.weight",), TRANSPOSED),
        f"{ours}/bias": Entry((f"{theirs}.bias",), SAME),
    }


def conv(ours: str, theirs: str) -> Table:
    return {f"{ours}/kernel": Entry((f"{theirs}.weight",), CONV), f"{ours}/bias": Entry((f"{theirs}.bias",), SAME)}


def norm(ours: str, theirs: str) -> Table:
    return {f"{ours}/scale": Entry((f"{theirs}.weight",), SAME), f"{ours}/bias": Entry((f"{theirs}.bias",), SAME)}


def attention(ours: str, theirs: str, heads: int, *, context: bool) -> Table:
    projections = {"qkv": ("to_q", "to_k", "to_v")} | ({"context_kv": ("add_k_proj", "add_v_proj")} if context else {})
    table = {}
    for name, parts in projections.items():
        for kind, theirs_kind in (("kernel", "weight"), ("bias", "bias")):
            names = tuple(f"{theirs}.{part}.{theirs_kind}" for part in parts)
            table[f"{ours}/{name}/{kind}"] = Entry(names, per_head(heads))
    table[f"{ours}/out/kernel"] = Entry((f"{theirs}.to_out.0.weight",), from_heads(heads))
    table[f"{ours}/out/bias"] = Entry((f"{theirs}.to_out.0.bias",), SAME)
    return table


# Networks.


def prior(depth: int, heads: int) -> Table:
    """`DiffusionPrior` with captions from CLIP, and PriorTransformer but for its clip_mean and clip_std."""

    def block(number: int) -> Table:
        ours, theirs = "stack/blocks", f"transformer_blocks.{number}"
        return (
            norm(f"{ours}/norm_1", f"{theirs}.norm1")
            | attention(f"{ours}/attention", f"{theirs}.attn1", heads, context=False)
            | norm(f"{ours}/norm_2", f"{theirs}.norm3")
            | dense(f"{ours}/mlp/up", f"{theirs}.ff.net.0.proj")
            | dense(f"{ours}/mlp/down", f"{theirs}.ff.net.2")
        )

    return {
        "positions": Entry(("positional_embedding",), with_ones(1)),
        "query": Entry(("prd_embedding",), with_ones(2)),
        **dense("states", "encoder_hidden_states_proj"),
        **dense("text_embedding", "embedding_proj"),
        **dense("time_1", "time_embedding.linear_1"),
        **dense("time_2", "time_embedding.linear_2"),
        **dense("image_embedding", "proj_in"),
        **stacked([block(number) for number in range(depth)]),
        **norm("norm", "norm_out"),
        **dense("readout", "proj_to_clip_embeddings"),
    }


def unet(network: UNet, *, context: bool) -> Table:
    """`UNet`, and UNet2DConditionModel of SimpleCrossAttn blocks or, without attention, UNet2DModel."""
    levels = len(network.channel_mult)
    widths = [network.channels * mult for mult in network.channel_mult]
    table = {
        **conv("in_conv", "conv_in"),
        **dense("time_1", "time_embedding.linear_1"),
        **dense("time_2", "time_embedding.linear_2"),
        **norm("out_norm", "conv_norm_out"),
        **conv("out_conv", "conv_out"),
    }

    def add_res_block(ours: str, theirs: str, into: int, out: int) -> None:
        table.update(norm(f"{ours}/norm_1", f"{theirs}.norm1"))
        table.update(conv(f"{ours}/conv_1", f"{theirs}.conv1"))
        table.update(dense(f"{ours}/emb", f"{theirs}.time_emb_proj"))
        table.update(norm(f"{ours}/norm_2", f"{theirs}.norm2"))
        table.update(conv(f"{ours}/conv_2", f"{theirs}.conv2"))
        if into != out:
            table.update(conv(f"{ours}/skip", f"{theirs}.conv_shortcut"))

    def add_attention(ours: str, theirs: str, channels: int) -> None:
        heads = channels // network.head_channels
        table.update(norm(f"{ours}_attention/norm", f"{theirs}.group_norm"))
        table.update(attention(f"{ours}_attention/attention", theirs, heads, context=context))

    def attends(level: int) -> bool:
        return network.image_size >> level in network.attention_resolutions

    skips = [network.channels]
    into = network.channels
    for level, width in enumerate(widths):
        for block in range(network.depth):
            add_res_block(f"down_{level}_{block}", f"down_blocks.{level}.resnets.{block}", into, width)
            if attends(level):
                add_attention(f"down_{level}_{block}", f"down_blocks.{level}.attentions.{block}", width)
            into = width
            skips.append(width)
        if level != levels - 1:
            add_res_block(f"down_{level}", f"down_blocks.{level}.downsamplers.0", width, width)
            skips.append(width)
    for block in range(2):
        add_res_block(f"middle_{block}", f"mid_block.resnets.{block}", into, into)
    if network.attention_resolutions:
        add_attention("middle", "mid_block.attentions.0", into)
    for number, level in enumerate(reversed(range(levels))):
        width = widths[level]
        for block in range(network.depth + 1):
            add_res_block(f"up_{level}_{block}", f"up_blocks.{number}.resnets.{block}", into + skips.pop(), width)
            if attends(level):
                add_attention(f"up_{level}_{block}", f"up_blocks.{number}.attentions.{block}", width)
            into = width
        if level:
            add_res_block(f"up_{level}", f"up_blocks.{number}.upsamplers.0", width, width)
    return table


def conditioning(clip_tokens: int) -> Table:
    """The part of `Decoder` that `condition` uses with captions from CLIP, and UnCLIPTextProjModel."""
    tokens = "clip_extra_context_tokens_proj"
    return {
        "null_embedding": Entry(("learned_classifier_free_guidance_embeddings",), SAME),
        **dense("text_emb", "embedding_proj"),
        **dense("clip_emb", "clip_image_embeddings_project_to_time_embeddings"),
        "clip_context/kernel": Entry((f"{tokens}.weight",), interleaved(clip_tokens)),
        "clip_context/bias": Entry((f"{tokens}.bias",), interleaved(clip_tokens)),
        **dense("states", "encoder_hidden_states_proj"),
        **norm("states_norm", "text_encoder_hidden_states_norm"),
    }


def under(prefix: str, table: Table) -> Table:
    """The table of a network that is a part of ours, named `prefix` there."""
    return {f"{prefix}/{path}": entry for path, entry in table.items()}
