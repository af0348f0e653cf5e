"""The U-Net against diffusers' UNet2DConditionModel of SimpleCrossAttn blocks, and UNet2DModel without attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from parity import networks, torch_modules

from unclip_jax.interop import unets
from unclip_jax.models.unet import UNet

# Every example at a timestep of its own.
T = np.array([999, 4])

DECODERS: dict[str, dict[str, Any]] = {
    "2 levels of 1 block": dict(
        channels=32, channel_mult=(1, 2), depth=1, attention_resolutions=(4,), image_size=8, head_channels=16,
        norm_groups=8,
    ),
    "3 levels of 2 blocks": dict(
        channels=32, channel_mult=(1, 2, 3), depth=2, attention_resolutions=(8, 4), image_size=16, head_channels=32,
        norm_groups=16,
    ),
}
UPSAMPLERS: dict[str, dict[str, Any]] = {
    "2 levels of 1 block": dict(channels=32, channel_mult=(1, 2), depth=1, image_size=8, norm_groups=16),
    "3 levels of 2 blocks": dict(channels=64, channel_mult=(1, 1, 2), depth=2, image_size=8),
}
WIDTH = 12  # of the context
# Which of 5 vectors of the context may be looked at.
MASKS = {"2 levels of 1 block": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], "3 levels of 2 blocks": [[0, 1, 0, 0, 1]] * 2}


def nchw(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2)


def nhwc(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1)


def blocks(ours: UNet, *, down: str, up: str) -> dict[str, Any]:
    """Names of the blocks of each level, and the sizes that both networks have in common."""
    attends = [ours.image_size >> level in ours.attention_resolutions for level in range(len(ours.channel_mult))]
    return dict(
        sample_size=ours.image_size,
        in_channels=ours.in_channels,
        out_channels=ours.out_channels,
        layers_per_block=ours.depth,
        block_out_channels=tuple(ours.channels * mult for mult in ours.channel_mult),
        down_block_types=tuple(down if here else "ResnetDownsampleBlock2D" for here in attends),
        up_block_types=tuple(up if here else "ResnetUpsampleBlock2D" for here in reversed(attends)),
        norm_num_groups=ours.norm_groups,
    )


def drawn(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("size", DECODERS)
def test_unet_is_unet_2d_condition_model(size):
    ours = UNet(**DECODERS[size])
    theirs = UNet2DConditionModel(
        **blocks(ours, down="SimpleCrossAttnDownBlock2D", up="SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=ours.head_channels,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    mask = np.array(MASKS[size], bool)

    def call_theirs(given):
        out = theirs(
            nchw(given["x"]),
            torch.tensor(T),
            given["context"],
            class_labels=given["emb"],
            attention_mask=torch.tensor(mask),
        )
        return {"prediction": nhwc(out.sample)}

    def call_ours(params, given):
        args = given["x"], jnp.asarray(T), given["emb"], given["context"]
        return {"prediction": ours.apply({"params": params}, *args, seen=jnp.asarray(mask))}

    side = ours.image_size
    inputs = drawn(x=(2, side, side, 3), emb=(2, 4 * ours.channels), context=(2, 5, WIDTH))
    table = unets.diffusers(ours, context=True).under(ours="params/")
    shapes = jax.eval_shape(ours.init, jax.random.key(0), inputs["x"], T, inputs["emb"], inputs["context"])
    redrawn = torch_modules.redraw(theirs)
    networks.agree("UNet2DConditionModel", size, redrawn, call_theirs, call_ours, table, shapes, inputs)


@pytest.mark.parametrize("size", UPSAMPLERS)
def test_unet_without_attention_is_unet_2d_model(size):
    ours = UNet(in_channels=6, out_channels=3, attention_resolutions=(), scale_shift="add", **UPSAMPLERS[size])
    theirs = UNet2DModel(
        **blocks(ours, down="", up=""),
        add_attention=False,
        resnet_time_scale_shift="default",
    )

    def call_theirs(given):
        return {"prediction": nhwc(theirs(nchw(given["x"]), torch.tensor(T)).sample)}

    def call_ours(params, given):
        return {"prediction": ours.apply({"params": params}, given["x"], jnp.asarray(T))}

    # Any size that halves will do, without attention; not a square.
    inputs = drawn(x=(2, ours.image_size, 2 * ours.image_size, 6))
    table = unets.diffusers(ours, context=False).under(ours="params/")
    shapes = jax.eval_shape(ours.init, jax.random.key(0), inputs["x"], T)
    redrawn = torch_modules.redraw(theirs)
    networks.agree("UNet2DModel", size, redrawn, call_theirs, call_ours, table, shapes, inputs)
