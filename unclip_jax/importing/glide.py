"""GLIDE's published models: the base as a decoder that reads captions alone, the upsampler as one that does too.

Sizes are read off the weights. What weights do not tell is as in glide_text2im/model_creation.py and the notebooks:
attention from 32 pixels on, heads of 64, cosine schedule and 100 steps with guidance 3 for the base, linear schedule
and 27 steps at temperature 0.997 for the upsampler, by DDIM, or for inpainting ancestral ones.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from unclip_jax.errors import InputError
from unclip_jax.importing import formats, workdirs
from unclip_jax.importing.formats import Request
from unclip_jax.interop import glide_tables, tensors
from unclip_jax.interop.clip_fields import blocks, shape
from unclip_jax.interop.tensors import Tensor
from unclip_jax.models.decoder import Decoder

_HEAD_WIDTH = 64
_ATTENDS_FROM = 32  # pixels
# Channels of the input -> whether it is an upsampler, and whether it is given a part of the image (3 and a mask).
_KINDS = {3: (False, False), 6: (True, False), 7: (False, True), 10: (True, True)}


def glide(request: Request) -> Iterator[tuple[str, workdirs.Imported]]:
    """One of GLIDE's files: base.pt, upsample.pt, or those for inpainting."""
    request.check_options()
    state = tensors.open_tensors(request.path)
    unet, text = unet_fields(state), text_fields(state)
    if unet["in_channels"] not in _KINDS:
        raise InputError(
            f"{request.path} is no model of GLIDE's: its U-Net reads {unet['in_channels']} channels; known are "
            f"{', '.join(map(str, _KINDS))}"
        )
    upsamples, inpaints = _KINDS[unet["in_channels"]]
    config = _upsampler(request, unet, text) if upsamples else _base(request, unet, text)
    config.data.vocabulary = request.vocabulary
    if inpaints:
        config.inpaint = True
        config.sampling.method = "ddpm"
    network = Decoder(unet=unet, text=text, embed_dim=0, clip_tokens=0)
    table = glide_tables.glide(network)
    yield "upsampler_1" if upsamples else "decoder", formats.network(config, table, state, request)


def _base(request: Request, unet: dict[str, Any], text: dict[str, Any]):
    config = request.base("decoder", "small_glide")
    config.model = {"unet": unet, "text": text, "embed_dim": 0, "clip_tokens": 0}
    config.diffusion.update({"schedule": "cosine", "prediction": "eps", "variance": "learned_range"})
    config.sampling.update({"method": "ddpm", "timesteps": "100", "guidance_scale": 3.0})
    return config


def _upsampler(request: Request, unet: dict[str, Any], text: dict[str, Any]):
    config = request.base("upsampler", "small_1")
    config.unet, config.text = unet, text
    config.low_res_size = unet["image_size"] // 4
    config.enlarge = "bilinear"
    config.data.crop_fraction = 1.0
    config.diffusion.update({"schedule": "linear", "prediction": "eps", "variance": "learned_range"})
    config.sampling.update({"method": "ddim", "timesteps": "fast27", "temperature": 0.997})
    return config


def text_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the fields of the text encoder."""
    rows, width = shape(state, "token_embedding.weight", 2)
    if width % _HEAD_WIDTH:
        raise InputError(f"the text transformer has width {width}, which heads of {_HEAD_WIDTH} do not share")
    return {
        "context_length": shape(state, "positional_embedding", 2)[0],
        "vocab_size": rows,
        "width": width,
        "depth": blocks(state, r"transformer\.resblocks\.(\d+)\."),
        "heads": width // _HEAD_WIDTH,
        "bare": True,
    }


def unet_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the fields of the U-Net.

    Raises:
      InputError: it is not ADM's with resampling in residual blocks.
    """
    channels, in_channels = shape(state, "input_blocks.0.0.weight", 4)[:2]
    # The first block of the way up that has a residual block behind its first one, to enlarge, ends its level.
    ends = (n for n in range(100) if any(f"output_blocks.{n}.{place}.in_layers.0.weight" in state for place in (1, 2)))
    depth = next(ends, None)
    count = blocks(state, r"input_blocks\.(\d+)\.")
    if not depth or count % (depth + 1):
        raise InputError("the weights are no U-Net of GLIDE's: its levels cannot be told apart")
    firsts = range(1, count, depth + 1)
    widths = [shape(state, f"input_blocks.{first}.0.in_layers.2.weight", 4)[0] for first in firsts]
    attends = [any(re.match(rf"input_blocks\.{first}\.1\.qkv\.", name) for name in state) for first in firsts]
    if not any(attends) or any(width % channels for width in widths):
        raise InputError("the weights are no U-Net of GLIDE's: it attends, and its widths are multiples of the first")
    image_size = _ATTENDS_FROM << attends.index(True)
    return {
        "in_channels": in_channels,
        "out_channels": shape(state, "out.2.weight", 4)[0],
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "depth": depth,
        "attention_resolutions": tuple(image_size >> level for level, here in enumerate(attends) if here),
        "image_size": image_size,
        "head_channels": _HEAD_WIDTH,
        "dropout": 0.1,
        "scale_shift": "film",
    }
