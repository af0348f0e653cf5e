"""Folders that diffusers' unCLIP pipelines load: their configs, and our weights under their names, without torch.

UnCLIPPipeline and UnCLIPImageVariationPipeline share one folder, whose model_index.json names the components of both.
Where the class of text_proj is found has moved between versions of diffusers, so there are three targets:

  local   diffusers from 0.38 on, from a folder of this machine (the class by its module's dotted path)
  hub     any version, also from the Hugging Face Hub; from 0.38 on with trust_remote_code=True (a file that imports it)
  legacy  diffusers up to 0.37.1 (the name that Karlo was published with)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unclip_jax.artifacts import components, karlo_configs, safetensors_files
from unclip_jax.artifacts.components import Component
from unclip_jax.artifacts.folders import Folder
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError
from unclip_jax.interop import clip_names, karlo_tables, names
from unclip_jax.interop.tensors import Tensor
from unclip_jax.models.unet import UNet
from unclip_jax.parts import Part

PIPELINES = ("unclip", "kandinsky_prior")
TARGETS = {
    "local": "diffusers.pipelines.deprecated.unclip.text_proj", "hub": "unclip", "legacy": "unclip"
}  # fmt: skip
_HUB_FILE = '''"""Finds the class in whichever place this version of diffusers has it."""

try:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
except ImportError:
    from diffusers.pipelines.unclip.text_proj import UnCLIPTextProjModel

__all__ = ["UnCLIPTextProjModel"]
'''
# Files with weights are named after the library that reads them; half precision has a variant's name in it.
_FILES = {"diffusers": "diffusion_pytorch_model{}.safetensors", "transformers": "model{}.safetensors"}
_VARIANTS = {"float32": "", "float16": ".fp16", "bfloat16": ".bf16"}


def check(found: Mapping[str, Component], *, pipeline: str) -> None:
    """Raises InputError where the pipeline cannot be these parts; all reasons are named."""
    reasons = karlo_configs.refusals(found, pipeline=pipeline)
    if reasons:
        raise InputError(f"diffusers' {pipeline} pipeline cannot be this model: {'; '.join(reasons)}")


def write(
    folder: Folder,
    found: Mapping[str, Component],
    tokenizer: Tokenizer,
    *,
    pipeline: str,
    target: str,
    weights: str,
    dtype: str,
    poll: Callable[[], None],
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Writes the folders of all components, one part in memory at a time.

    Args:
      folder: that of the export.
      found: the parts, which `check` has passed.
      tokenizer: of captions.
      pipeline, target: see above.
      weights: "ema" or "params".
      dtype: of the weights in the files.
      poll: called before each tensor.

    Returns:
      Part -> names of its files, and part -> number of its parameters.
    """
    writer = _Writer(folder, dtype=dtype, poll=poll)
    files, counts = {}, {}
    for name, one in found.items():
        poll()
        before = set(folder.files)
        part = components.load(one, weights=weights)
        counts[name] = sum(math.prod(x.shape) for x in names.flattened(part.params).values())
        _WRITERS[name](writer, one, part, found)
        files[name] = [file for file in folder.files if file not in before and file.endswith(".safetensors")]
        del part
    _write_tokenizer(folder, tokenizer, found["clip"])
    index = _INDICES[pipeline](found, target)
    folder.json("model_index.json", index)
    if pipeline == "unclip" and target == "hub":
        folder.text("text_proj/unclip.py", _HUB_FILE)
    return files, counts


class _Writer:
    """Writes components of one precision."""

    def __init__(self, folder: Folder, *, dtype: str, poll: Callable[[], None]):
        self.folder = folder
        self._dtype, self._poll = dtype, poll

    def component(self, name: str, library: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes one component's folder: config.json and its weights."""
        self.folder.json(f"{name}/config.json", config)
        stored = safetensors_files.converted(tensors, safetensors_files.DTYPES[self._dtype])
        file = f"{name}/{_FILES[library].format(_VARIANTS[self._dtype])}"
        # Both libraries ask for this word in the header.
        safetensors_files.write(self.folder, file, stored, metadata={"format": "pt"}, poll=self._poll)

    def scheduler(self, name: str, one: Component) -> None:
        """Writes a scheduler's folder."""
        self.folder.json(f"{name}/scheduler_config.json", karlo_configs.scheduler(one))


def _clip(writer: _Writer, one: Component, part: Part, found: Mapping[str, Component]) -> None:
    network, towers = one.stage.network, part.params["params"]
    text = names.exported(clip_names.transformers_text(network), towers["text"])
    writer.component("text_encoder", "transformers", karlo_configs.text_encoder(network), text)
    if network.image_tower:
        vision = names.exported(clip_names.transformers_vision(network), towers["vision"])
        writer.component("image_encoder", "transformers", karlo_configs.image_encoder(network), vision)
        processor = "feature_extractor" if "decoder" in found else "image_processor"
        writer.folder.json(f"{processor}/preprocessor_config.json", karlo_configs.preprocessor(network))


def _prior(writer: _Writer, one: Component, part: Part, found: Mapping[str, Component]) -> None:
    tensors = names.exported(karlo_tables.prior(one.stage.network), part.params["params"])
    width = one.stage.network.embed_dim
    # Where nothing is whitened this is what changes nothing: left out, PriorTransformer's zeros would hide all.
    whitening = {"clip_mean": np.zeros(width, np.float32), "clip_std": np.ones(width, np.float32)}
    whitening |= {name: part.statistics[name] for name in whitening if name in part.statistics}
    tensors |= names.exported(karlo_tables.PRIOR_STATISTICS, whitening)
    writer.component("prior", "diffusers", karlo_configs.prior(one), tensors)
    writer.scheduler("prior_scheduler" if "decoder" in found else "scheduler", one)


def _decoder(writer: _Writer, one: Component, part: Part, found: Mapping[str, Component]) -> None:
    both = names.exported(karlo_tables.decoder(one.stage.network), part.params["params"])
    for name, config in (("decoder", karlo_configs.decoder(one)), ("text_proj", karlo_configs.text_projection(one))):
        own = {key.removeprefix(f"{name}."): x for key, x in both.items() if key.startswith(f"{name}.")}
        writer.component(name, "diffusers", config, own)
    writer.scheduler("decoder_scheduler", one)


def _upsampler(writer: _Writer, one: Component, part: Part, found: Mapping[str, Component]) -> None:
    network: UNet = one.stage.network
    tensors = names.exported(karlo_tables.upsampler(network), part.params["params"])
    config = karlo_configs.upsampler(one)
    if one.name == "upsampler_1":
        writer.component("super_res_first", "diffusers", config, tensors)
        writer.scheduler("super_res_scheduler", one)
    if one.name == "upsampler_1_last" or not one.config.sampling.get("last_steps", 0):
        # With no network of their own the last steps are the first one's, too.
        writer.component("super_res_last", "diffusers", config, tensors)


_WRITERS: dict[str, Callable[[_Writer, Component, Part, Mapping[str, Component]], None]] = {
    "clip": _clip, "prior_diffusion": _prior, "decoder": _decoder,
    "upsampler_1": _upsampler, "upsampler_1_last": _upsampler,
}  # fmt: skip


def _write_tokenizer(folder: Folder, tokenizer: Tokenizer, clip: Component) -> None:
    config = karlo_configs.tokenizer(clip.stage.network)
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    folder.json("tokenizer/tokenizer_config.json", config)
    folder.json("tokenizer/special_tokens_map.json", special)
    for name, content in tokenizer.files().items():
        folder.text(f"tokenizer/{name}", content)


def _unclip_index(found: Mapping[str, Component], target: str) -> dict[str, Any]:
    """model_index.json of both pipelines: each takes the components that it knows."""
    scheduler = ["diffusers", "UnCLIPScheduler"]
    prior = {"prior": ["diffusers", "PriorTransformer"], "prior_scheduler": scheduler}
    images = {
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    with_prior = "prior_diffusion" in found
    return {
        "_class_name": "UnCLIPPipeline" if with_prior else "UnCLIPImageVariationPipeline",
        "_diffusers_version": karlo_configs.DIFFUSERS,
        **(prior if with_prior else {}),
        "decoder": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_proj": [TARGETS[target], "UnCLIPTextProjModel"],
        **(images if found["clip"].stage.network.image_tower else {}),
        "super_res_first": ["diffusers", "UNet2DModel"],
        "super_res_last": ["diffusers", "UNet2DModel"],
        "decoder_scheduler": scheduler,
        "super_res_scheduler": scheduler,
    }


def _kandinsky_index(found: Mapping[str, Component], target: str) -> dict[str, Any]:
    del found, target
    return {
        "_class_name": "KandinskyV22PriorPipeline",
        "_diffusers_version": karlo_configs.DIFFUSERS,
        "prior": ["diffusers", "PriorTransformer"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "UnCLIPScheduler"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    }


_INDICES = {"unclip": _unclip_index, "kandinsky_prior": _kandinsky_index}
