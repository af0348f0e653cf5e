"""The configs named "diffusers": their networks are ones that diffusers and transformers have, weight by weight."""

from typing import Any

import flax.linen as nn
import jax
import pytest
import torch
import transformers
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

from unclip_jax import config as configs
from unclip_jax import quickstart
from unclip_jax.interop import clip_names, karlo_tables, names
from unclip_jax.models.unet import UNet
from unclip_jax.stages import base

VARIANT = "diffusers"


def _blocks(unet: Any) -> dict[str, Any]:
    attends = [unet.image_size >> level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    kinds = [("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
             ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")]  # fmt: skip
    return dict(
        sample_size=unet.image_size, in_channels=unet.in_channels, out_channels=unet.out_channels,
        layers_per_block=unet.depth, block_out_channels=tuple(unet.channels * mult for mult in unet.channel_mult),
        down_block_types=tuple(kinds[here][0] for here in attends),
        up_block_types=tuple(kinds[here][1] for here in reversed(attends)), norm_num_groups=unet.norm_groups,
        resnet_time_scale_shift={"film": "scale_shift", "add": "default"}[unet.scale_shift],
    )  # fmt: skip


def _clip(network: Any) -> tuple[names.Table, dict[str, torch.nn.Module]]:
    text = transformers.CLIPTextConfig(
        vocab_size=network.vocab_size, hidden_size=network.text_width, intermediate_size=4 * network.text_width,
        num_hidden_layers=network.text_depth, num_attention_heads=network.text_heads,
        max_position_embeddings=network.context_length, projection_dim=network.embed_dim,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=network.vision_width, intermediate_size=4 * network.vision_width,
        num_hidden_layers=network.vision_depth, num_attention_heads=network.vision_heads,
        image_size=network.image_size, patch_size=network.patch_size, projection_dim=network.embed_dim,
    )  # fmt: skip
    table = names.table(
        clip_names.transformers_text(network).under(ours="text/", theirs="text_encoder."),
        clip_names.transformers_vision(network).under(ours="vision/", theirs="image_encoder."),
        names.array("logit_scale", "logit_scale"),
    )
    towers = transformers.CLIPTextModelWithProjection(text), transformers.CLIPVisionModelWithProjection(vision)
    return table, dict(zip(("text_encoder.", "image_encoder."), towers, strict=True))


def _prior(network: Any) -> tuple[names.Table, dict[str, torch.nn.Module]]:
    theirs = PriorTransformer(
        num_attention_heads=network.heads, attention_head_dim=network.width // network.heads,
        num_layers=network.depth, embedding_dim=network.embed_dim, num_embeddings=network.context_length,
    )  # fmt: skip
    return karlo_tables.prior(network), {"": theirs}


def _decoder(network: Any) -> tuple[names.Table, dict[str, torch.nn.Module]]:
    unet = UNet(**network.unet)
    theirs = UNet2DConditionModel(
        **_blocks(unet), mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=network.context_width,
        attention_head_dim=unet.head_channels, class_embed_type="identity",
    )  # fmt: skip
    projection = UnCLIPTextProjModel(
        clip_extra_context_tokens=network.clip_tokens, clip_embeddings_dim=network.embed_dim,
        time_embed_dim=4 * unet.channels, cross_attention_dim=network.context_width,
    )  # fmt: skip
    return karlo_tables.decoder(network), {"decoder.": theirs, "text_proj.": projection}


def _upsampler(network: Any) -> tuple[names.Table, dict[str, torch.nn.Module]]:
    return karlo_tables.upsampler(network), {"": UNet2DModel(**_blocks(network), add_attention=False)}


THEIRS = {"clip": _clip, "prior_diffusion": _prior, "decoder": _decoder, "upsampler": _upsampler}
# Beside their weights: what a prior has of statistics, and of ours the temperature of a loss.
APART = {"clip_mean", "clip_std", "logit_scale"}


@pytest.mark.parametrize("kind", THEIRS)
def test_all_weights_have_a_place_of_their_shape(kind):
    stage: Any = base.create(configs.load(f"configs/{kind}.py:{VARIANT}"))
    params = nn.meta.unbox(jax.eval_shape(stage.init, jax.random.key(0)))["params"]
    with torch.device("meta"):
        table, modules = THEIRS[kind](stage.network)
    theirs = {
        f"{prefix}{name}": tuple(weight.shape)
        for prefix, module in modules.items()
        for name, weight in module.state_dict().items()
    }
    ours = {name: tensor.shape for name, tensor in names.exported(table, params).items()}
    assert {name: shape for name, shape in ours.items() if name not in APART} == {
        name: shape for name, shape in theirs.items() if name not in APART and not name.endswith("position_ids")
    }


def test_stages_are_what_the_pipelines_can_express():
    """What no weight shows."""
    stages, priors = quickstart.stack(VARIANT)
    loaded = {name: configs.load(f"configs/{file}.py:{VARIANT}{suffix}") for name, (file, suffix) in stages.items()}
    assert set(loaded) == {"clip", "prior_diffusion", "decoder", "upsampler_1"} and "ar" not in priors
    clip, prior, decoder, upsampler = (loaded[n] for n in ("clip", "prior_diffusion", "decoder", "upsampler_1"))
    described = {name: value for name, value in clip.model.items() if name not in ("logit_scale_max", "remat")}
    for reader in (prior, decoder):
        assert not base.clip_differences(there=reader.clip, here=described)
        assert reader.embedding.norm == "raw" and reader.model.caption == "clip"
    assert prior.embedding.scaling == "whiten" and prior.sampling.candidates == 1
    assert prior.model.activation == "gelu" and clip.model.text_width == clip.model.embed_dim
    assert decoder.diffusion.variance == "learned_range" and decoder.model.unet.out_channels == 6
    assert decoder.model.null_clip == "learned" and decoder.model.clip_scale == 1 and not decoder.round_pixels
    assert decoder.model.unet.image_size == upsampler.low_res_size and upsampler.enlarge == "bicubic"
    for config in (prior, decoder, upsampler):
        assert config.diffusion.schedule == "cosine" and config.diffusion.prediction in ("eps", "x_start")
        assert config.sampling.method == "ddpm" and config.sampling.timesteps.isdigit()
        assert config.diffusion.tables == "float32" and config.diffusion.clip_x_start
    for unet in (decoder.model.unet, upsampler.unet):  # one number of groups for all norms, also of joined channels
        widths = [unet.channels * mult for mult in unet.channel_mult]
        assert all(width % unet.norm_groups == 0 for width in widths)
