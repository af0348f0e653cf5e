"""Karlo, the open unCLIP: as diffusers' UnCLIPPipeline and UnCLIPImageVariationPipeline, and as it was published.

The networks become a folder that `generate --models` takes: clip, prior_diffusion, decoder, upsampler_1, and
upsampler_1_last, which takes the last of the upsampler's steps. Each is sampled as its source samples it: diffusers
with float32 tables, a prior clipped to what its scheduler says and 25 steps of the decoder; Kakao Brain's code with
float64 tables, a prior clipped to [-10, 10] and 50 steps.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from unclip_jax.errors import InputError
from unclip_jax.importing import clips, formats, workdirs
from unclip_jax.importing.formats import Request
from unclip_jax.interop import clip_fields, clip_names, karlo_fields, karlo_tables, names, tensors
from unclip_jax.interop.tensors import Tensor
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.models.unet import UNet

Parts = Iterator[tuple[str, workdirs.Imported]]
Fields = dict[str, Any]

# Files of the publication; how many steps they were trained is in the names of some.
_FILES = {
    "clip": "ViT-L-14.pt",
    "statistics": "ViT-L-14_stats.th",
    "prior": "prior-ckpt-*.ckpt",
    "decoder": "decoder-ckpt-*.ckpt",
    "upsampler": "improved-sr-ckpt-*.ckpt",
}
# log 100, at which OpenAI's CLIPs ended; towers that are kept one by one come without it.
_LOGIT_SCALE = np.float32(math.log(100))


def diffusers(request: Request) -> Parts:
    """A folder of UnCLIPPipeline or UnCLIPImageVariationPipeline, or one with the sub-folders of both."""
    request.check_options()
    root = pathlib.Path(request.path).expanduser()
    there = [name for name in ("text_encoder", "prior", "decoder", "super_res_first") if (root / name).is_dir()]
    if not there:
        raise InputError(
            f"{request.path!r} should hold the folders of diffusers' UnCLIPPipeline: text_encoder, prior, decoder, …"
        )
    request = _with_vocabulary(request, root)
    clip = _towers(request, root)
    yield "clip", clip
    described = clip.config.model.to_dict()
    del clip
    if "prior" in there:
        process = _scheduler(root / "prior_scheduler", prediction_type="sample", clip_sample_range=5.0)
        yield "prior_diffusion", _diffusers_prior(request, root, described, process)
    if "decoder" in there:
        fields = karlo_fields.text_projection(_config(root / "text_proj"))
        fields["unet"] = karlo_fields.unet(_config(root / "decoder"), where="decoder/config.json")
        process = _scheduler(root / "decoder_scheduler", variance_type="learned_range")
        config = _decoder(request, fields, described, process, timesteps="25")
        state = _together(root, "decoder", "text_proj")
        yield "decoder", formats.network(config, karlo_tables.decoder(_network(Decoder, config.model)), state, request)
    if "super_res_first" in there:
        process = _scheduler(root / "super_res_scheduler")
        for name, folder in (("upsampler_1_last", "super_res_last"), ("upsampler_1", "super_res_first")):
            fields = karlo_fields.unet(_config(root / folder), where=f"{folder}/config.json")
            low_res_size = _config(root / "decoder").get("sample_size") if "decoder" in there else None
            config = _upsampler(request, fields, process, low_res_size, last_steps=int(name == "upsampler_1"))
            table = karlo_tables.upsampler(_network(UNet, config.unet))
            yield name, formats.network(config, table, tensors.open_tensors(root / folder), request)


def kandinsky(request: Request) -> Parts:
    """A folder of KandinskyPriorPipeline (2.1) or KandinskyV22PriorPipeline: a prior as Karlo's, clipped to [-10, 10].

    Its embeddings are for Kandinsky's own decoders, which are not here.
    """
    request.check_options()
    root = pathlib.Path(request.path).expanduser()
    lacking = [name for name in ("text_encoder", "prior") if not (root / name).is_dir()]
    if lacking:
        raise InputError(f"{request.path!r} is no folder of Kandinsky's prior: it has no {' and no '.join(lacking)}")
    request = _with_vocabulary(request, root)
    clip = _towers(request, root)
    yield "clip", clip
    described = clip.config.model.to_dict()
    del clip
    process = _scheduler(root / "scheduler", prediction_type="sample", clip_sample_range=10.0)
    yield "prior_diffusion", _diffusers_prior(request, root, described, process)


def _diffusers_prior(request: Request, root: pathlib.Path, clip: Fields, process: Fields) -> workdirs.Imported:
    fields = karlo_fields.prior(_config(root / "prior"), where="prior/config.json")
    config = _prior(request, fields, clip, process, guidance_scale=4.0)
    table = karlo_tables.prior(_network(DiffusionPrior, config.model))
    state = tensors.open_tensors(root / "prior")
    return formats.network(config, table, state, request, statistics=karlo_tables.PRIOR_STATISTICS)


def _with_vocabulary(request: Request, root: pathlib.Path) -> Request:
    vocabulary = request.vocabulary or (str(root / "tokenizer") if (root / "tokenizer").is_dir() else "")
    return dataclasses.replace(request, vocabulary=vocabulary)


def original(request: Request) -> Parts:
    """A folder with the files that Kakao Brain published; captions need --vocabulary, which is not among them."""
    request.check_options()
    root = pathlib.Path(request.path).expanduser()
    ((_, clip),) = clips.openai(dataclasses.replace(request, path=str(_file(root, "clip"))))
    yield "clip", clip
    described = clip.config.model.to_dict()
    del clip
    state = dict(tensors.open_tensors(_file(root, "prior")))
    measured = tensors.open_tensors(_file(root, "statistics"))
    if len(measured) != 2:
        raise InputError(f"{_FILES['statistics']} should hold a mean and a deviation; it holds {len(measured)} tensors")
    mean, std = measured.values()
    process = _process("x_start", "fixed_small", 10.0)
    config = _prior(request, karlo_fields.original_prior(state), described, process, guidance_scale=4.0)
    table = karlo_tables.original_prior(_network(DiffusionPrior, config.model))
    whitening = names.array("clip_mean", "statistics.0") + names.array("clip_std", "statistics.1")
    state |= {"statistics.0": _row(mean), "statistics.1": _row(std)}
    yield "prior_diffusion", formats.network(config, table, state, request, statistics=whitening)
    state = tensors.open_tensors(_file(root, "decoder"))
    fields = karlo_fields.original_text_projection(state)
    fields["unet"] = karlo_fields.original_unet(state, "model.", image_size=64)
    config = _decoder(request, fields, described, _process("eps", "learned_range", 1.0), timesteps="50")
    table = karlo_tables.original_decoder(_network(Decoder, config.model))
    yield "decoder", formats.network(config, table, state, request)
    yield from _upsamplers(request, root)


def _upsamplers(request: Request, root: pathlib.Path) -> Parts:
    """Both networks of the one file `improved-sr-ckpt-…`."""
    both = tensors.open_tensors(_file(root, "upsampler"))
    for name, prefix in (("upsampler_1_last", "model_last_step."), ("upsampler_1", "model_first_steps.")):
        state = {key: tensor for key, tensor in both.items() if key.startswith(prefix)}
        if name == "upsampler_1":  # so that nothing of the file is passed over
            state |= {key: tensor for key, tensor in both.items() if not key.startswith("model_last_step.")}
        fields = karlo_fields.original_unet(state, prefix, image_size=256)
        process = _process("eps", "fixed_small", 1.0)
        config = _upsampler(request, fields, process, 64, last_steps=int(name == "upsampler_1"))
        table = karlo_tables.original_upsampler(_network(UNet, config.unet), last=name == "upsampler_1_last")
        yield name, formats.network(config, table, state, request)


# Configs: ours of a stage, in which what the weights or their source determine is replaced.


def _prior(request: Request, fields: Fields, clip: Fields, process: Fields, *, guidance_scale: float) -> ConfigDict:
    config = request.base("prior_diffusion", "small")
    config.model = {**fields, "vocab_size": clip["vocab_size"], "remat": "full"}
    config.embedding = {"scaling": "whiten", "scale": 1.0, "norm": "raw"}
    config.drop = {"text": 0.2}
    sampling = {"method": "ddpm", "timesteps": "25", "eta": 0.0, "threshold": "static"}
    config.sampling = {**sampling, "guidance_scale": guidance_scale, "candidates": 1}
    return _reads_clip(config, request, clip, process)


def _decoder(request: Request, fields: Fields, clip: Fields, process: Fields, *, timesteps: str) -> ConfigDict:
    config = request.base("decoder", "small")
    config.model = {**fields, "unet": {**fields["unet"], "remat": "full"}}
    config.embedding = {"scaling": "whiten", "scale": 1.0, "norm": "raw"}
    config.drop = {"text": 0.3, "clip": 0.1}
    config.round_pixels = False
    config.sampling.update({"method": "ddpm", "timesteps": timesteps, "guidance_scale": 8.0, "threshold": "static"})
    return _reads_clip(config, request, clip, process)


def _upsampler(
    request: Request, fields: Fields, process: Fields, low_res_size: int | None, *, last_steps: int
) -> ConfigDict:
    config = request.base("upsampler", "small_1")
    config.unet = {**fields, "remat": "full"}
    config.low_res_size = low_res_size or fields["image_size"] // 4
    config.enlarge = "bicubic"
    config.diffusion = process
    config.data.degradation = "none"
    config.sampling.update({"method": "ddpm", "timesteps": "7", "threshold": "static", "temperature": 1.0})
    config.sampling.last_steps = last_steps
    if last_steps:
        config.frozen = {"last": ""}
    return config


def _reads_clip(config: ConfigDict, request: Request, clip: Fields, process: Fields) -> ConfigDict:
    config.clip = {name: value for name, value in clip.items() if name not in ("logit_scale_max", "remat")}
    config.diffusion = process
    config.data.vocabulary = request.vocabulary
    return config


def _network(kind: Any, fields: ConfigDict) -> Any:
    try:
        return kind(**fields.to_dict())
    except TypeError as error:
        raise InputError(f"the sizes {fields.to_dict()} make no {kind.__name__}: {error}") from error


def _process(prediction: str, variance: str, clip_x_start: float) -> Fields:
    process = {"schedule": "cosine", "num_timesteps": 1000, "prediction": prediction, "variance": variance}
    return {**process, "clip_x_start": clip_x_start, "tables": "float64"}


# Files and folders.


def _towers(request: Request, root: pathlib.Path) -> workdirs.Imported:
    """The CLIP, whose text tower diffusers keeps in one folder and, for variations, its image tower in another."""
    vision = _config(root / "image_encoder") if (root / "image_encoder").is_dir() else None
    fields = clip_fields.of_towers(_config(root / "text_encoder"), vision)
    for folder in ("feature_extractor", "image_processor"):
        if (root / folder / "preprocessor_config.json").is_file():
            found = clip_fields.read_json(root / folder / "preprocessor_config.json")
            fields |= clip_fields.statistics(found, "image_mean", "image_std")
    clip = clips.network(fields)
    table = clip_names.transformers_text(clip).under(ours="text/", theirs="text_encoder.")
    table += names.array("logit_scale", "logit_scale")
    state = _together(root, "text_encoder")
    if vision is not None:
        table += clip_names.transformers_vision(clip).under(ours="vision/", theirs="image_encoder.")
        state |= _together(root, "image_encoder")
    state["logit_scale"] = Tensor.of(np.asarray(_LOGIT_SCALE))
    config = request.base("clip", "small")
    config.model = {**fields, "remat": "full", "logit_scale_max": 100.0}
    config.data.vocabulary = request.vocabulary
    return formats.network(config, table, state, request)


def _config(folder: pathlib.Path) -> dict[str, Any]:
    return clip_fields.read_json(folder / "config.json")


def _scheduler(folder: pathlib.Path, **otherwise: Any) -> Fields:
    """What a scheduler's folder says, or where there is none, Karlo's."""
    path = folder / "scheduler_config.json"
    config: Mapping[str, Any] = clip_fields.read_json(path) if path.is_file() else otherwise
    return karlo_fields.diffusion(config, where=f"{folder.name}/scheduler_config.json")


def _together(root: pathlib.Path, *folders: str) -> dict[str, Tensor]:
    """The tensors of several folders, each name behind that of its folder."""
    found = {folder: tensors.open_tensors(root / folder) for folder in folders}
    return {f"{folder}.{name}": tensor for folder, state in found.items() for name, tensor in state.items()}


def _file(root: pathlib.Path, what: str) -> pathlib.Path:
    found = sorted(root.glob(_FILES[what])) if root.is_dir() else []
    if len(found) != 1:
        which = "none" if not found else "several"
        raise InputError(f"{str(root)!r} should hold one file {_FILES[what]}, and holds {which}")
    return found[0]


def _row(vector: Tensor) -> Tensor:
    """A vector, whatever axes of length one it was saved with."""
    return Tensor((math.prod(vector.shape),), vector.dtype, lambda: vector.read().reshape(-1))
