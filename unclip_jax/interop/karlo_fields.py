"""Which of our networks one of Karlo's is: read off diffusers' configs, or off the shapes of the published files."""

import re
from collections.abc import Mapping
from typing import Any

from unclip_jax.errors import InputError
from unclip_jax.interop.clip_fields import blocks, shape
from unclip_jax.interop.tensors import Tensor

Fields = dict[str, Any]
Json = Mapping[str, Any]

# Keys that diffusers' configs may hold, with what their classes take where one is left out (0.42.1). Of the first kind
# of each class we read the value; of the second, ours are as these values say, and others are refused; the third change
# nothing in Karlo's networks. A key in none of them is refused where it is set.
_PRIOR_READ: Fields = {
    "num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20, "embedding_dim": 768, "num_embeddings": 77,
}  # fmt: skip
_PRIOR_FIXED: Fields = {
    "additional_embeddings": 4, "time_embed_act_fn": "silu", "norm_in_type": None, "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear", "added_emb_type": "prd",
}  # fmt: skip
_UNET_READ: Fields = {
    "sample_size": None, "in_channels": None, "out_channels": None, "layers_per_block": 2, "block_out_channels": None,
    "down_block_types": (), "up_block_types": (), "mid_block_type": None, "resnet_time_scale_shift": "default",
    "norm_num_groups": 32, "attention_head_dim": 8, "add_attention": True, "cross_attention_dim": 1280, "dropout": 0.0,
}  # fmt: skip
_UNET_FIXED: Fields = {
    "center_input_sample": False, "time_embedding_type": "positional", "flip_sin_to_cos": True, "freq_shift": 0,
    "norm_eps": 1e-5, "act_fn": "silu", "dual_cross_attention": False, "mid_block_scale_factor": 1,
    "only_cross_attention": False, "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None, "time_embedding_dim": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attn_norm_num_groups": None, "encoder_hid_dim": None,
    "addition_embed_type": None, "num_attention_heads": None,
}  # fmt: skip
# Of blocks that are not here, of initial weights, of sizes that weights have anyway, or of memory alone.
_UNET_IDLE = {
    "downsample_padding", "attention_type", "use_linear_projection", "upcast_attention", "transformer_layers_per_block",
    "reverse_transformer_layers_per_block", "projection_class_embeddings_input_dim", "num_class_embeds",
    "num_train_timesteps", "downsample_type", "upsample_type", "conv_type", "class_embed_type", "cross_attention_norm",
    "class_embeddings_concat", "encoder_hid_dim_type", "addition_embed_type_num_heads", "addition_time_embed_dim",
    "mid_block_only_cross_attention",
}  # fmt: skip
_TEXT_DOWN, _PLAIN_DOWN = "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"
_TEXT_UP, _PLAIN_UP = "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"
_TEXT_MIDDLE = "UNetMidBlock2DSimpleCrossAttn"


def _read(config: Json, read: Fields, fixed: Fields, idle: set[str], where: str) -> Fields:
    """Returns the values of the keys that are read, with their defaults; refuses what we cannot be."""
    for key, value in config.items():
        known = key in read or key in idle or key.startswith("_")
        if key in fixed and value != fixed[key]:
            raise InputError(f"{where} has {key}={value!r}; our network is as with {fixed[key]!r}")
        if not known and key not in fixed and value not in (None, False):
            raise InputError(f"{where} has {key}={value!r}, which none of Karlo's networks has")
    return {key: config.get(key, default) for key, default in read.items()}


def prior(config: Json, *, where: str) -> Fields:
    """Returns the fields of our DiffusionPrior that is diffusers' PriorTransformer of this config.

    Raises:
      InputError: it has what ours has not.
    """
    widths = {"time_embed_dim", "embedding_proj_dim", "clip_embed_dim", "dropout"}
    values = _read(config, _PRIOR_READ, _PRIOR_FIXED, widths, where)
    width = values["num_attention_heads"] * values["attention_head_dim"]
    for key, ours in (("time_embed_dim", width), ("embedding_proj_dim", None), ("clip_embed_dim", None)):
        wanted = values["embedding_dim"] if ours is None else ours
        if config.get(key) not in (None, wanted):
            raise InputError(f"{where} has {key}={config[key]}; our network is as with {wanted}")
    return {
        "embed_dim": values["embedding_dim"],
        "context_length": values["num_embeddings"],
        "width": width,
        "depth": values["num_layers"],
        "heads": values["num_attention_heads"],
        "activation": "gelu",
        "caption": "clip",
    }


def unet(config: Json, *, where: str) -> Fields:
    """Returns the fields of our UNet that is diffusers' UNet2DConditionModel or UNet2DModel of this config.

    Raises:
      InputError: it has other blocks than Karlo's, or something else that ours has not.
    """
    values = _read(config, _UNET_READ, _UNET_FIXED, _UNET_IDLE, where)
    for key in ("sample_size", "block_out_channels"):
        if not values[key]:
            raise InputError(f"{where} should have {key}")
    widths, depth = list(values["block_out_channels"]), values["layers_per_block"]
    if not isinstance(depth, int):
        if len(set(depth)) != 1:
            raise InputError(f"{where} has layers_per_block={depth}; our levels have equally many")
        depth = depth[0]
    if any(width % widths[0] for width in widths):
        raise InputError(f"{where} has block_out_channels={widths}; ours are multiples of the first")
    attends = [_attends(kind, _TEXT_DOWN, _PLAIN_DOWN, where) for kind in values["down_block_types"]]
    upward = [_attends(kind, _TEXT_UP, _PLAIN_UP, where) for kind in values["up_block_types"]]
    if attends != upward[::-1] or len(attends) != len(widths):
        raise InputError(f"{where} has blocks that are not the same on both ways; ours are")
    if any(attends) and values["mid_block_type"] != _TEXT_MIDDLE:
        raise InputError(f"{where} has mid_block_type={values['mid_block_type']!r} where {_TEXT_MIDDLE!r} should be")
    if not any(attends) and values["add_attention"]:
        raise InputError(f"{where} attends in its middle alone (add_attention is not false); ours does so nowhere then")
    shifts = {"scale_shift": "film", "default": "add"}
    if values["resnet_time_scale_shift"] not in shifts:
        raise InputError(f"{where} has resnet_time_scale_shift={values['resnet_time_scale_shift']!r}, known: {shifts}")
    heads = values["attention_head_dim"]
    channels = 4 if any(attends) else 3  # UNet2DConditionModel's where none are given, and UNet2DModel's
    return {
        "in_channels": values["in_channels"] or channels,
        "out_channels": values["out_channels"] or channels,
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "depth": depth,
        "attention_resolutions": tuple(values["sample_size"] >> level for level, here in enumerate(attends) if here),
        "image_size": values["sample_size"],
        "head_channels": heads if isinstance(heads, int) else heads[0],
        "dropout": float(values["dropout"]),
        "scale_shift": shifts[values["resnet_time_scale_shift"]],
        "norm_groups": values["norm_num_groups"],
    }


def _attends(kind: str, text: str, plain: str, where: str) -> bool:
    if kind not in (text, plain):
        raise InputError(f"{where} has a block {kind!r}; Karlo's are {text!r} and {plain!r}")
    return kind == text


def text_projection(config: Json) -> Fields:
    """Returns the fields of our Decoder that diffusers' UnCLIPTextProjModel of this config determines."""
    return {
        "embed_dim": config.get("clip_embeddings_dim", 768),
        "clip_tokens": config.get("clip_extra_context_tokens", 4),
        "context_width": config.get("cross_attention_dim", 0),
        "null_clip": "learned",
        "clip_scale": 1.0,
        "caption": "clip",
        "text": None,
    }


def diffusion(config: Json, *, where: str) -> Fields:
    """Returns what our `config.diffusion` says of a process that diffusers' UnCLIPScheduler of this config samples.

    Raises:
      InputError: another scheduler, or one of another schedule.
    """
    name = config.get("_class_name", "UnCLIPScheduler")
    if name != "UnCLIPScheduler" or config.get("beta_schedule", "squaredcos_cap_v2") != "squaredcos_cap_v2":
        schedule = config.get("beta_schedule")
        raise InputError(f"{where} is a {name} with schedule {schedule!r}, not Karlo's UnCLIPScheduler")
    predictions = {"epsilon": "eps", "sample": "x_start"}
    variances = {"fixed_small_log": "fixed_small", "learned_range": "learned_range"}
    prediction = config.get("prediction_type", "epsilon")
    variance = config.get("variance_type", "fixed_small_log")
    if prediction not in predictions or variance not in variances:
        raise InputError(f"{where} predicts {prediction!r} with variance {variance!r}, which UnCLIPScheduler does not")
    return {
        "schedule": "cosine",
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "prediction": predictions[prediction],
        "variance": variances[variance],
        "clip_x_start": float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None,
        "tables": "float32",
    }


# The published files hold no sizes; those that shapes do not tell are Karlo's own.
_HEAD = 64


def original_prior(state: Mapping[str, Tensor]) -> Fields:
    """Returns the fields of our DiffusionPrior with the weights of `prior-ckpt-…`."""
    _, positions, width = shape(state, "model.positional_embedding", 3)
    return {
        "embed_dim": shape(state, "model.out_proj.weight", 2)[0],
        "context_length": positions - 4,
        "width": width,
        "depth": blocks(state, r"model\.transformer\.resblocks\.(\d+)\."),
        "heads": max(width // _HEAD, 1),
        "activation": "gelu",
        "caption": "clip",
    }


def original_unet(state: Mapping[str, Tensor], prefix: str, *, image_size: int) -> Fields:
    """Returns the fields of our UNet with the weights that stand under `prefix`, of images of this size."""
    count = blocks(state, re.escape(prefix) + r"input_blocks\.(\d+)\.")
    widths = [
        shape(state, f"{prefix}input_blocks.{number}.0.in_layers.2.weight", 4)[0] for number in range(1, count)
    ]
    # Each level but the last ends with the block that halves the size, which is as wide as its level.
    levels = list(dict.fromkeys(widths))
    depth = widths.count(levels[-1])
    if [widths.count(level) for level in levels] != [depth + 1] * (len(levels) - 1) + [depth]:
        raise InputError(f"{prefix}input_blocks have widths {widths}, which are no levels of one depth")
    channels, in_channels = shape(state, f"{prefix}input_blocks.0.0.weight", 4)[:2]
    firsts = [1 + level * (depth + 1) for level in range(len(levels))]
    attention = [f"{prefix}input_blocks.{first}.1.qkv.weight" in state for first in firsts]
    emb = shape(state, f"{prefix}input_blocks.1.0.emb_layers.1.weight", 2)[0]
    return {
        "in_channels": in_channels,
        "out_channels": shape(state, f"{prefix}out.2.weight", 4)[0],
        "channels": channels,
        "channel_mult": tuple(level // channels for level in levels),
        "depth": depth,
        "attention_resolutions": tuple(image_size >> level for level, here in enumerate(attention) if here),
        "image_size": image_size,
        "head_channels": _HEAD,
        "dropout": 0.0,
        "scale_shift": "film" if emb == 2 * levels[0] else "add",
        "norm_groups": 32,
    }


def original_text_projection(state: Mapping[str, Tensor]) -> Fields:
    """Returns the fields of our Decoder beside its U-Net with the weights of `decoder-ckpt-…`."""
    width, embed_dim = shape(state, "model.text_seq_proj.0.weight", 2)
    return text_projection(
        {
            "clip_embeddings_dim": embed_dim,
            "cross_attention_dim": width,
            "clip_extra_context_tokens": shape(state, "model.clip_tok_proj.weight", 2)[0] // width,
        }
    )
