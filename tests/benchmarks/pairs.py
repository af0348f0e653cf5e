"""The networks that are timed: each of ours beside diffusers' with the same random weights, and inputs for both."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity import torch_modules, weights

from unclip_jax.models.captions import EncodedCaption
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.models.unet import UNet

Arrays = list[np.ndarray]


class Pair(NamedTuple):
    """Two networks and what they are given. Images are [b, h, w, c] on both sides, so that both return the same.

    Attributes:
      name: with the number of weights.
      theirs, table, without: the module, the table of `weights`, and its parameters that do not take part.
      params: of ours.
      x, t, conditions: inputs; conditions are of twice the batch, for guidance.
      predict: ours, of (params, x, t, *conditions).
      predict_theirs: theirs, of (x, t, *conditions).
      read, denoise: ours in sampling: `read(params, *conditions)` once, `denoise(params, that, x, t)` at each step.
      channels: how many guidance acts on; None for all.
      process: of `GaussianDiffusion.create`, for ours.
      scheduler: theirs.
    """

    name: str
    theirs: Any
    table: weights.Table
    without: tuple[str, ...]
    params: Any
    x: np.ndarray
    t: np.ndarray
    conditions: Arrays
    predict: Callable[..., Any]
    predict_theirs: Callable[..., torch.Tensor]
    read: Callable[..., Any]
    denoise: Callable[..., Any]
    channels: int | None
    process: dict[str, Any]
    scheduler: Any


def randn(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def beginnings(count: int, length: int) -> np.ndarray:
    """Which positions of captions of several lengths may be looked at."""
    return np.arange(length) < np.resize([length, length // 2, length // 4, length // 8], count)[:, None]


def named(kind: str, module: torch.nn.Module) -> str:
    return f"{kind}, {sum(weight.numel() for weight in module.parameters()) / 1e6:.1f}M"


def unet() -> Pair:
    """The decoder's U-Net at 64 px: 62M weights, 4 images, 81 vectors of context."""
    batch, side, length, width = 4, 64, 81, 512
    ours = UNet(channels=96, channel_mult=(1, 2, 3, 4), depth=2, image_size=side, head_channels=48)
    theirs: Any = diffusers.UNet2DConditionModel(
        sample_size=side,
        out_channels=ours.out_channels,
        layers_per_block=ours.depth,
        block_out_channels=tuple(ours.channels * mult for mult in ours.channel_mult),
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        in_channels=ours.in_channels,
        cross_attention_dim=width,
        attention_head_dim=ours.head_channels,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    table = weights.unet(ours, context=True)
    params = weights.to_ours(table, torch_modules.state(torch_modules.redraw(theirs)))

    def predict(params: Any, x: jax.Array, t: jax.Array, emb: Any, context: Any, seen: Any) -> Any:
        return ours.apply(params, x, t, emb, context, seen=seen)

    def predict_theirs(x: torch.Tensor, t: torch.Tensor, emb: Any, context: Any, seen: Any) -> torch.Tensor:
        out = theirs(x.movedim(-1, 1), t, context, class_labels=emb, attention_mask=seen).sample
        return out.movedim(1, -1)

    return Pair(
        named("U-Net", theirs),
        theirs,
        table,
        (),
        jax.tree.map(jnp.asarray, {"params": params}),
        randn(batch, side, side, 3, seed=1),
        np.array([900, 500, 100, 3]),
        [randn(2 * batch, 4 * 96, seed=2), randn(2 * batch, length, width, seed=3), beginnings(2 * batch, length)],
        predict,
        predict_theirs,
        lambda params, *conditions: conditions,
        lambda params, conditions, x, t: predict(params, x, t, *conditions),
        3,
        {},
        diffusers.UnCLIPScheduler(variance_type="learned_range"),
    )


def prior() -> Pair:
    """The diffusion prior: 40M weights, 8 captions of 77 positions, and 4 tokens more."""
    batch, length, dim = 8, 77, 768
    ours = DiffusionPrior(
        embed_dim=dim, context_length=length, vocab_size=3, width=512, depth=12, heads=8, caption="clip"
    )
    theirs: Any = diffusers.PriorTransformer(
        num_attention_heads=ours.heads,
        attention_head_dim=ours.width // ours.heads,
        num_layers=ours.depth,
        embedding_dim=dim,
        num_embeddings=length,
    )
    table, without = weights.prior(ours.depth, ours.heads), ("clip_mean", "clip_std")
    params = weights.to_ours(table, torch_modules.state(torch_modules.redraw(theirs)), without=without)

    def predict(params: Any, x: jax.Array, t: jax.Array, states: Any, seen: Any, z_t: Any) -> Any:
        return ours.apply(params, x, t, EncodedCaption(states, seen), z_t)

    def predict_theirs(x: torch.Tensor, t: torch.Tensor, states: Any, seen: Any, z_t: Any) -> torch.Tensor:
        out = theirs(x, t, z_t, encoder_hidden_states=states, attention_mask=seen)
        return out.predicted_image_embedding

    return Pair(
        named("prior", theirs),
        theirs,
        table,
        without,
        jax.tree.map(jnp.asarray, {"params": params}),
        randn(batch, dim, seed=1),
        np.arange(batch) * 100,
        [randn(2 * batch, length, dim, seed=2), beginnings(2 * batch, length), randn(2 * batch, dim, seed=3)],
        predict,
        predict_theirs,
        lambda params, states, seen, z_t: ours.apply(params, EncodedCaption(states, seen), z_t, method="prefix"),
        lambda params, prefix, x, t: ours.apply(params, prefix, x, t, method="denoise"),
        None,
        {"prediction": "x_start", "variance": "fixed_small", "clip_x_start": (-5.0, 5.0)},
        diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
    )


PAIRS = {"unet": unet, "prior": prior}
