"""CLIPs of others, as ours: OpenAI's, transformers' and OpenCLIP's."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from unclip_jax.errors import InputError, nearest
from unclip_jax.importing import formats, workdirs
from unclip_jax.importing.formats import Request
from unclip_jax.interop import clip_fields, clip_names, names, tensors
from unclip_jax.interop.tensors import Tensor
from unclip_jax.models.clip import CLIP
from unclip_jax.models.layers import ACTIVATIONS

Parts = Iterator[tuple[str, workdirs.Imported]]


def openai(request: Request) -> Parts:
    """OpenAI's own files, such as ViT-L-14.pt and RN50.pt: archives of TorchScript, or state dicts of them."""
    request.check_options()
    state = tensors.open_tensors(request.path)
    fields = clip_fields.of_openai(state)
    yield "clip", _imported(request, fields, state, clip_names.openai(network(fields)))


def transformers(request: Request) -> Parts:
    """A folder that CLIPModel.save_pretrained wrote, or the Hub has: config.json and weights."""
    request.check_options()
    fields = clip_fields.of_transformers(request.path)
    state = tensors.open_tensors(request.path)
    yield "clip", _imported(request, fields, state, clip_names.transformers(network(fields)))


def open_clip(request: Request) -> Parts:
    """OpenCLIP's weights: a folder of the Hub with open_clip_config.json, or a file with its config or activation."""
    request.check_options(("config_json", "activation"))
    state = _unwrapped(tensors.open_tensors(request.path))
    text = "text." if "text.token_embedding.weight" in state else ""
    described = request.option("config_json") or _beside(request.path, "open_clip_config.json")
    if described:
        config = clip_fields.read_json(pathlib.Path(described).expanduser())
        fields = clip_fields.of_open_clip(state, config, text=text)
    else:
        fields = clip_fields.of_open_clip_shapes(state, text=text, activation=_activation(request))
    clip = network(fields)
    if clip.vision_pool == "attention":
        state = _of_coca(state)
    yield "clip", _imported(request, fields, state, clip_names.openai(clip, text=text))


def network(fields: dict[str, Any]) -> CLIP:
    """Returns the CLIP of fields that a file gave."""
    try:
        return CLIP(**fields, dtype=jnp.float32)
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"the sizes {fields} make no CLIP: {error}") from error


def _imported(
    request: Request, fields: dict[str, Any], state: dict[str, Tensor], table: names.Table
) -> workdirs.Imported:
    config = request.base("clip", "small")
    config.model = {**fields, "remat": "full", "logit_scale_max": 100.0}
    config.data.vocabulary = request.vocabulary or _beside_vocabulary(request.path)
    return formats.network(config, table, state, request)


def _activation(request: Request) -> str:
    activation = request.option("activation")
    if not activation:
        raise InputError(
            f"{request.path} does not say which activation its towers have, and a wrong one goes unnoticed: give its "
            "config, --config_json, or --activation=gelu (most of OpenCLIP's) or quick_gelu (those named so)"
        )
    if activation not in ACTIVATIONS:
        raise InputError(f"--activation={activation} is unknown; {nearest(activation, ACTIVATIONS)}")
    return activation


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes off what training on several devices put in front of all names."""
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _of_coca(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what makes CoCa's captions: its text decoder, and all queries of the image tower but the first."""
    name = "visual.attn_pool.query"
    kept = {key: tensor for key, tensor in state.items() if not key.startswith("text_decoder.")}
    if name in kept and len(kept[name].shape) == 2:
        queries = kept[name]
        kept[name] = Tensor((1, queries.shape[1]), queries.dtype, lambda: queries.read()[:1])
    return kept


def _beside(path: str, name: str) -> str:
    place = pathlib.Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    return str(folder / name) if (folder / name).is_file() else ""


def _beside_vocabulary(path: str) -> str:
    """Returns the folder of the weights where it holds a vocabulary, too."""
    for name in ("vocab.json", "tokenizer.json"):
        if found := _beside(path, name):
            return str(pathlib.Path(found).parent)
    return ""
