"""Configs of Karlo's networks as diffusers writes them: what is read of them, and what is refused."""

import pytest
import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel

from unclip_jax.errors import InputError
from unclip_jax.interop import karlo_fields

TEXT = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
# Karlo's own sizes (kakaobrain/karlo, configs/; diffusers' conversion of it).
DECODER = {
    "sample_size": 64, "in_channels": 3, "out_channels": 6, "layers_per_block": 3,
    "block_out_channels": [320, 640, 960, 1280],
    "down_block_types": [PLAIN[0], *[TEXT[0]] * 3], "up_block_types": [*[TEXT[1]] * 3, PLAIN[1]],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": 1536, "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift", "class_embed_type": "identity",
}  # fmt: skip
SUPER_RES = {
    "sample_size": 256, "in_channels": 6, "layers_per_block": 3, "block_out_channels": [320, 640, 960, 1280],
    "down_block_types": [PLAIN[0]] * 4, "up_block_types": [PLAIN[1]] * 4, "add_attention": False,
}  # fmt: skip


def written(kind, options):
    """What diffusers writes of such a network: all keys of its class, defaults too."""
    with torch.device("meta"):
        return dict(kind(**options).config)


def test_the_decoder_is_read_from_short_and_from_whole_configs():
    fields = karlo_fields.unet(DECODER, where="decoder")
    assert fields == {
        "in_channels": 3, "out_channels": 6, "channels": 320, "channel_mult": (1, 2, 3, 4), "depth": 3,
        "attention_resolutions": (32, 16, 8), "image_size": 64, "head_channels": 64, "dropout": 0.0,
        "scale_shift": "film", "norm_groups": 32,
    }  # fmt: skip
    small = {**DECODER, "block_out_channels": [64, 128, 192, 256]}
    whole = written(UNet2DConditionModel, small)
    assert len(whole) > len(small) + 10
    assert karlo_fields.unet(whole, where="decoder") == {**fields, "channels": 64}


def test_super_resolution_is_read():
    small = {**SUPER_RES, "block_out_channels": [64, 128, 192, 256]}
    fields = karlo_fields.unet(written(UNet2DModel, small), where="super_res_first")
    assert fields["attention_resolutions"] == () and fields["scale_shift"] == "add" and fields["in_channels"] == 6
    assert fields["channels"] == 64 and karlo_fields.unet(SUPER_RES, where="super_res_first")["channels"] == 320


def test_the_prior_is_read_and_its_defaults_are_karlos():
    karlo = {
        "embed_dim": 768, "context_length": 77, "width": 2048, "depth": 20, "heads": 32, "activation": "gelu",
        "caption": "clip",
    }  # fmt: skip
    assert karlo_fields.prior({}, where="prior") == karlo
    small = written(PriorTransformer, dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=9))
    assert karlo_fields.prior(small, where="prior") == {**karlo, "embed_dim": 9, "width": 16, "depth": 1, "heads": 2}


def test_schedulers_are_read():
    prior = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    assert karlo_fields.diffusion(dict(prior.config), where="prior_scheduler") == {
        "schedule": "cosine", "num_timesteps": 1000, "prediction": "x_start", "variance": "fixed_small",
        "clip_x_start": 5.0, "tables": "float32",
    }  # fmt: skip
    options = {"variance_type": "learned_range", "clip_sample": False}
    decoder = karlo_fields.diffusion(options, where="decoder_scheduler")
    assert (decoder["prediction"], decoder["variance"], decoder["clip_x_start"]) == ("eps", "learned_range", None)


@pytest.mark.parametrize(("read", "config", "change", "sentence"), [
    (karlo_fields.unet, DECODER, {"down_block_types": ["CrossAttnDownBlock2D"] * 4}, "a block 'CrossAttnDownBlock2D'"),
    (karlo_fields.unet, DECODER, {"up_block_types": [PLAIN[1], *[TEXT[1]] * 3]}, "not the same on both ways"),
    (karlo_fields.unet, DECODER, {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D'"),
    (karlo_fields.unet, DECODER, {"block_out_channels": [320, 640, 960, 1000]}, "multiples of the first"),
    (karlo_fields.unet, DECODER, {"layers_per_block": [3, 3, 2, 3]}, "layers_per_block"),
    (karlo_fields.unet, DECODER, {"flip_sin_to_cos": False}, "flip_sin_to_cos=False; our network is as with True"),
    (karlo_fields.unet, DECODER, {"norm_eps": 1e-6}, "norm_eps"),
    (karlo_fields.unet, DECODER, {"resnet_time_scale_shift": "ada_group"}, "ada_group"),
    (karlo_fields.unet, DECODER, {"a_new_thing": 3}, "a_new_thing=3, which none of Karlo's networks has"),
    (karlo_fields.unet, SUPER_RES, {"add_attention": True}, "attends in its middle alone"),
    (karlo_fields.unet, SUPER_RES, {"sample_size": None}, "should have sample_size"),
    (karlo_fields.prior, {}, {"added_emb_type": None}, "added_emb_type=None; our network is as with 'prd'"),
    (karlo_fields.prior, {}, {"time_embed_dim": 64}, "time_embed_dim=64"),
    (karlo_fields.diffusion, {}, {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler"),
    (karlo_fields.diffusion, {}, {"beta_schedule": "linear"}, "'linear'"),
    (karlo_fields.diffusion, {}, {"prediction_type": "v_prediction"}, "v_prediction"),
])  # fmt: skip
def test_what_ours_cannot_be_is_refused(read, config, change, sentence):
    with pytest.raises(InputError, match=sentence):
        read({**config, **change}, where="it")
