"""What diffusers and transformers call our networks: the JSON configs of a Karlo, and why a network has none.

diffusers' unCLIP pipelines know Karlo's networks and no others. The way back is in `importing.karlo` and
`interop.karlo_fields`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from unclip_jax.artifacts.components import Component, as_part
from unclip_jax.models.clip import CLIP
from unclip_jax.models.unet import UNet
from unclip_jax.parts import raw_embeddings

Json = dict[str, Any]
# The version whose classes these configs were read in and tested with.
DIFFUSERS = "0.42.1"
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_PREDICTIONS = {"eps": "epsilon", "x_start": "sample"}
_VARIANCES = {"fixed_small": "fixed_small_log", "learned_range": "learned_range"}
_SHIFTS = {"film": "scale_shift", "add": "default"}


def refusals(found: Mapping[str, Component], *, pipeline: str) -> list[str]:
    """Returns why a pipeline cannot be these parts, one reason after the other; [] where it can.

    Args:
      found: the parts.
      pipeline: "unclip" or "kandinsky_prior".
    """
    wanted = {"unclip": ("clip", "decoder", "upsampler_1"), "kandinsky_prior": ("clip", "prior_diffusion")}[pipeline]
    reasons = [f"it needs the part {name}, which is not in the folder" for name in wanted if name not in found]
    known = {"clip", "prior_diffusion"}
    known |= {"decoder", "upsampler_1", "upsampler_1_last"} if pipeline == "unclip" else set()
    reasons += [f"it has no place for {name}; choose others by --parts" for name in found if name not in known]
    checks = {"clip": _clip, "prior_diffusion": _prior, "decoder": _decoder}
    for name in (name for name in found if name in known):
        check = checks.get(name, _upsampler)
        reasons += [f"{name}: {reason}" for reason in check(found[name])]
    has_image_tower = "clip" in found and found["clip"].config.model.get("image_tower", True)
    if pipeline == "unclip" and "prior_diffusion" not in found and not has_image_tower:
        reasons.append("it has neither a prior, for text to image, nor CLIP's image tower, for variations")
    last_steps = found["upsampler_1"].config.sampling.get("last_steps", 0) if "upsampler_1" in found else 0
    if bool(last_steps) != ("upsampler_1_last" in found) and "upsampler_1" in found:
        reasons.append(f"upsampler_1 has last_steps={last_steps}: with 1 upsampler_1_last takes part, with 0 not")
    if pipeline == "kandinsky_prior" and "clip" in found and not has_image_tower:
        reasons.append("clip: it has no image tower, which the pipeline embeds a black image by")
    return reasons


def _clip(one: Component) -> Iterator[str]:
    network = one.stage.network
    if network.text_width != network.embed_dim:
        yield f"text_width={network.text_width} is not embed_dim={network.embed_dim}, and one layer reads both"
    if network.activation not in _ACTIVATIONS:
        yield f"transformers' CLIP has no activation {network.activation!r}"
    if not network.text_causal or network.text_pool not in ("end", "argmax") or network.text_projection != "linear":
        yield "its text tower is not that of OpenAI's CLIP"
    usual = {"vision_stem": (), "vision_layers": (), "vision_layer_scale": 0.0, "vision_input_norm": True,
             "vision_pool": "class", "vision_projection": "linear"}  # fmt: skip
    odd = [name for name, value in usual.items() if tuple_or_same(getattr(network, name)) != value]
    if network.image_tower and odd:
        yield f"transformers' CLIP has no {', '.join(odd)} in its image tower"


def tuple_or_same(value: Any) -> Any:
    """A sequence as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else value


def _process(one: Component, *, variance: str) -> Iterator[str]:
    process = one.config.diffusion
    if process.schedule != "cosine":
        yield f"UnCLIPScheduler knows the cosine schedule alone, not {process.schedule!r}"
    if process.prediction not in _PREDICTIONS:
        yield f"UnCLIPScheduler knows predictions of eps and x_start, not of {process.prediction!r}"
    if process.variance != variance:
        yield f"the pipeline samples it with the variance {variance!r}, not {process.variance!r}"


def _prior(one: Component) -> Iterator[str]:
    yield from _process(one, variance="fixed_small")
    space = one.stage.space
    if one.stage.network.caption != "clip":
        yield "it reads captions by itself, PriorTransformer as CLIP reads them (model.caption='clip')"
    if one.stage.network.activation != "gelu":
        yield f"PriorTransformer's activation is gelu, not {one.stage.network.activation!r}"
    if not raw_embeddings(as_part(one)):
        yield "it knows embeddings of length 1, the pipeline has them as CLIP returns them (embedding.norm='raw')"
    elif space.scaling != "whiten" and space.factor != 1:
        yield "it scales z_t, the pipeline does not (embedding.scaling='whiten')"


def _decoder(one: Component) -> Iterator[str]:
    stage = one.stage
    yield from _process(one, variance="learned_range")
    if not stage.clip_reads or not stage.embed_dim or stage.condition != "image":
        yield "the pipeline's decoder reads captions as CLIP reads them, and z_i (model.caption='clip')"
        return
    if not raw_embeddings(as_part(one)):
        yield "it knows embeddings of length 1, the pipeline has them as CLIP returns them (embedding.norm='raw')"
    if stage.network.null_clip != "learned" or stage.network.clip_scale != 1 or not stage.network.clip_tokens:
        yield "UnCLIPTextProjModel has null_clip='learned', clip_scale=1 and some clip_tokens"
    unet = UNet(**stage.network.unet)
    if unet.out_channels != 2 * unet.in_channels or unet.in_channels != 3:
        yield "the pipeline's decoder has 3 channels in and 6 out"
    if not unet.attention_resolutions:
        yield "it attends nowhere, the pipeline's attends at least in its middle"


def _upsampler(one: Component) -> Iterator[str]:
    stage = one.stage
    yield from _process(one, variance="fixed_small")
    if one.config.get("text") is not None:
        yield "it reads captions, the pipeline's reads none"
    if one.config.get("enlarge", "bilinear") != "bicubic":
        yield "the pipeline enlarges small images bicubically (enlarge='bicubic')"
    if stage.network.attention_resolutions:
        yield "it attends, the pipeline's does not"
    if (stage.network.in_channels, stage.network.out_channels) != (6, 3):
        yield "the pipeline's upsampler has 6 channels in and 3 out"
    if one.config.sampling.get("last_steps", 0) > 1:
        yield "the pipeline gives one last step to the other network, not more"


def notes(found: Mapping[str, Component]) -> list[str]:
    """Returns what of our sampling the pipelines do otherwise; the weights are the same."""
    said = []
    for name, one in found.items():
        sampling = one.config.get("sampling", {})
        if sampling.get("method", "ddpm") not in ("ddpm", "ddpm_small"):
            said.append(f"{name} is sampled here by {sampling.method}; the pipeline samples ancestrally.")
        if sampling.get("candidates", 1) > 1:
            said.append(f"{name} takes the best of {sampling.candidates} embeddings here; the pipeline draws one.")
        if sampling.get("threshold", "static") == "dynamic":
            said.append(f"{name} thresholds dynamically here; the pipeline clips.")
        if sampling.get("temperature", 1.0) != 1:
            said.append(f"{name} starts from noise of deviation {sampling.temperature} here; the pipeline from 1.")
        if "diffusion" in one.config and one.config.diffusion.get("tables", "float64") != "float32":
            said.append(f"{name} has tables of float64 here; the pipeline's float32 moves single steps by up to 0.002.")
    if "decoder" in found and getattr(found["decoder"].stage, "rounds", False):
        said.append("Images are rounded to 8 bits between decoder and upsampler here; the pipeline does not round.")
    return said


# Configs.


def text_encoder(network: CLIP) -> Json:
    """CLIPTextModelWithProjection."""
    # transformers takes 2 for "the largest id ends a caption", as early configs had it by mistake.
    end = network.vocab_size - 1 if network.text_end_id is None else network.text_end_id
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": network.vocab_size,
        "hidden_size": network.text_width,
        "intermediate_size": int(network.text_width * network.text_mlp_ratio),
        "num_hidden_layers": network.text_depth,
        "num_attention_heads": network.text_heads,
        "max_position_embeddings": network.context_length,
        "projection_dim": network.embed_dim,
        "hidden_act": _ACTIVATIONS[network.activation],
        "layer_norm_eps": network.norm_epsilon,
        "bos_token_id": network.vocab_size - 2,
        "eos_token_id": 2 if network.text_pool == "argmax" else end,
        "pad_token_id": network.vocab_size - 1,
        "torch_dtype": "float32",
    }


def image_encoder(network: CLIP) -> Json:
    """CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": network.vision_width,
        "intermediate_size": int(network.vision_width * network.vision_mlp_ratio),
        "num_hidden_layers": network.vision_depth,
        "num_attention_heads": network.vision_heads,
        "image_size": network.image_size,
        "patch_size": network.patch_size,
        "projection_dim": network.embed_dim,
        "hidden_act": _ACTIVATIONS[network.activation],
        "layer_norm_eps": network.norm_epsilon,
        "torch_dtype": "float32",
    }


def preprocessor(network: CLIP) -> Json:
    """CLIPImageProcessor: the largest centred square, enlarged or reduced bicubically."""
    side = network.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(network.mean),
        "image_std": list(network.std),
    }


def tokenizer(network: CLIP) -> Json:
    """CLIPTokenizer. Captions are padded with the end token: nothing that comes after the first one is ever read."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": network.context_length,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "do_lower_case": True,
        "errors": "replace",
    }


def prior(one: Component) -> Json:
    """PriorTransformer."""
    network = one.stage.network
    return _of("PriorTransformer") | {
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "num_layers": network.depth,
        "embedding_dim": network.embed_dim,
        "num_embeddings": network.context_length,
        "additional_embeddings": 4,
    }


def decoder(one: Component) -> Json:
    """UNet2DConditionModel."""
    network = one.stage.network
    unet = UNet(**network.unet)
    context = network.context_width or 4 * unet.channels
    return _of("UNet2DConditionModel") | _unet(unet, "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D") | {
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": context,
        "attention_head_dim": unet.head_channels,
        "class_embed_type": "identity",
    }


def text_projection(one: Component) -> Json:
    """UnCLIPTextProjModel."""
    network = one.stage.network
    width = 4 * UNet(**network.unet).channels
    return _of("UnCLIPTextProjModel") | {
        "clip_extra_context_tokens": network.clip_tokens,
        "clip_embeddings_dim": network.embed_dim,
        "time_embed_dim": width,
        "cross_attention_dim": network.context_width or width,
    }


def upsampler(one: Component) -> Json:
    """UNet2DModel, without attention in the middle, which it has by default."""
    return _of("UNet2DModel") | _unet(one.stage.network, "", "") | {"add_attention": False}


def scheduler(one: Component) -> Json:
    """UnCLIPScheduler."""
    process = one.config.diffusion
    return _of("UnCLIPScheduler") | {
        "variance_type": _VARIANCES[process.variance],
        "prediction_type": _PREDICTIONS[process.prediction],
        "num_train_timesteps": process.num_timesteps,
        "clip_sample": process.clip_x_start is not None and one.config.sampling.get("threshold", "static") != "none",
        "clip_sample_range": 1.0 if process.clip_x_start is None else float(process.clip_x_start),
        "beta_schedule": "squaredcos_cap_v2",
    }


def _of(name: str) -> Json:
    return {"_class_name": name, "_diffusers_version": DIFFUSERS}


def _unet(network: UNet, down: str, up: str) -> Json:
    levels = range(len(network.channel_mult))
    attends = [network.image_size >> level in network.attention_resolutions for level in levels]
    return {
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "layers_per_block": network.depth,
        "block_out_channels": [network.channels * mult for mult in network.channel_mult],
        "down_block_types": [down if here else "ResnetDownsampleBlock2D" for here in attends],
        "up_block_types": [up if here else "ResnetUpsampleBlock2D" for here in reversed(attends)],
        "resnet_time_scale_shift": _SHIFTS[network.scale_shift],
        "norm_num_groups": network.norm_groups,
        "norm_eps": 1e-5,
    }
