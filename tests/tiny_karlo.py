"""A Karlo as small as it can be, in diffusers' own classes with random weights: for importers and exporters.

Every size is one that no other has, where that can be, so that no axis can stand in for another.
"""

import importlib.resources
import json
import pathlib

import numpy as np
import torch
import transformers
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from parity import torch_modules

from unclip_jax.data.vocabulary import training as vocabulary_training

DIM, LENGTH, SMALL, LARGE = 12, 14, 8, 16


def tokenizer(pad: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """The small vocabulary of this package, as transformers' tokenizer."""
    folder = pathlib.Path(str(importlib.resources.files(vocabulary_training.__package__)))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    symbols = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    return transformers.CLIPTokenizer(vocab=symbols, merges=merges, pad_token=pad, model_max_length=LENGTH)


def _text_encoder() -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=2048, hidden_size=DIM, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=DIM, eos_token_id=2047, bos_token_id=2046, pad_token_id=2047,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def _image_encoder() -> torch.nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=DIM,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection(config)


def _prior() -> torch.nn.Module:
    return PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH
    )


def _decoder() -> torch.nn.Module:
    return UNet2DConditionModel(
        sample_size=SMALL, in_channels=3, out_channels=6, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=18,
        attention_head_dim=16, resnet_time_scale_shift="scale_shift", class_embed_type="identity", norm_num_groups=16,
    )  # fmt: skip


def _super_res() -> torch.nn.Module:
    return UNet2DModel(
        sample_size=LARGE, in_channels=6, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False, norm_num_groups=16,
    )  # fmt: skip


def components(seed: int = 0) -> dict[str, object]:
    """All networks, with weights drawn from a seed, and the rest that the two pipelines are made of."""
    text_proj = UnCLIPTextProjModel(
        clip_extra_context_tokens=4, clip_embeddings_dim=DIM, time_embed_dim=4 * 32, cross_attention_dim=18
    )
    networks = {
        "text_encoder": _text_encoder(), "image_encoder": _image_encoder(), "prior": _prior(), "decoder": _decoder(),
        "text_proj": text_proj, "super_res_first": _super_res(), "super_res_last": _super_res(),
    }  # fmt: skip
    for number, network in enumerate(networks.values()):
        torch_modules.redraw(network, 100 * seed + number)
    generator = torch.Generator().manual_seed(seed)
    prior = networks["prior"]
    with torch.no_grad():
        prior.clip_mean.copy_(torch.randn(prior.clip_mean.shape, generator=generator))
        prior.clip_std.copy_(torch.rand(prior.clip_std.shape, generator=generator) + 0.5)
    return {
        **networks,
        "tokenizer": tokenizer(),
        "feature_extractor": transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }


_TEXT_TO_IMAGE = (
    "prior", "decoder", "text_encoder", "tokenizer", "text_proj", "super_res_first", "super_res_last",
    "prior_scheduler", "decoder_scheduler", "super_res_scheduler",
)  # fmt: skip
_VARIATION = (
    "decoder", "text_encoder", "tokenizer", "text_proj", "feature_extractor", "image_encoder", "super_res_first",
    "super_res_last", "decoder_scheduler", "super_res_scheduler",
)  # fmt: skip


def text_to_image(parts: dict[str, object]) -> UnCLIPPipeline:
    """The pipeline of these parts, without its progress bars."""
    pipeline = UnCLIPPipeline(**{name: parts[name] for name in _TEXT_TO_IMAGE})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def variation(parts: dict[str, object]) -> UnCLIPImageVariationPipeline:
    """The pipeline of these parts, without its progress bars."""
    pipeline = UnCLIPImageVariationPipeline(**{name: parts[name] for name in _VARIATION})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Steps of each stage, and what its noise is shaped like, ours.
STEPS = {"prior_diffusion": 25, "decoder": 25, "upsampler_1": 7}
_SHAPES = {"prior_diffusion": (DIM,), "decoder": (SMALL, SMALL, 3), "upsampler_1": (LARGE, LARGE, 3)}


def noise(count: int, seed: int = 0, *, without: tuple[str, ...] = ()) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `UnCLIP.generate` is given for `count` images: of each part where it starts, and that of its steps."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, steps in STEPS.items():
        start = rng.standard_normal((count, *_SHAPES[name])).astype(np.float32)
        drawn[name] = (start, rng.standard_normal((count, steps - 1, *_SHAPES[name])).astype(np.float32))
    return {name: both for name, both in drawn.items() if name not in without}


def _theirs(array: np.ndarray) -> torch.Tensor:
    images = array.ndim == 4
    return torch.tensor(np.ascontiguousarray(array.transpose(0, 3, 1, 2) if images else array))


def latents(given: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The pipelines' arguments for where their stages start."""
    named = {"prior_diffusion": "prior_latents", "decoder": "decoder_latents", "upsampler_1": "super_res_latents"}
    return {named[name]: _theirs(start) for name, (start, _) in given.items()}


def steps_noise(given: dict[str, tuple[np.ndarray, np.ndarray]]):
    """A function in the place of diffusers' `randn_tensor`: it returns the given noise step by step."""
    steps = iter([_theirs(noises[:, k]) for _, noises in given.values() for k in range(noises.shape[1])])

    def randn_tensor(shape, **_):
        drawn = next(steps)
        assert tuple(shape) == tuple(drawn.shape)
        return drawn

    return randn_tensor
