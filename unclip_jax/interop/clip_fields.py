"""Which of our CLIPs a published one is: read off its config, or where it has none, off the shapes of its weights."""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from unclip_jax.errors import InputError, nearest
from unclip_jax.interop.tensors import Tensor

Fields = dict[str, Any]

_HEAD_WIDTH = 64  # in all of OpenAI's
# transformers' names for activations -> ours.
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# What transformers 5 takes for a key that a config leaves out (CLIPTextConfig, CLIPVisionConfig).
_TEXT_DEFAULTS: Fields = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
_VISION_DEFAULTS: Fields = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
# OpenCLIP's image towers whose heads are not 64 wide: ViT-H, ViT-g, ViT-bigG and ViT-e (src/open_clip/model_configs).
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      InputError: it is not there, or holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} should hold a JSON object, not {type(value).__name__}")
    return value


def shape(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor that must be there, with so many axes.

    Raises:
      InputError: it is not.
    """
    if name not in tensors:
        raise InputError(f"the weights are not a CLIP's by OpenAI's names: there is no {name}")
    if len(tensors[name].shape) != axes:
        raise InputError(f"{name} should have {axes} axes; its shape is {list(tensors[name].shape)}")
    return tensors[name].shape


def blocks(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Returns how many different numbers the group of `pattern` matches in names."""
    found = [re.match(pattern, name) for name in tensors]
    return len({match.group(1) for match in found if match})


def _heads(width: int, what: str, head_width: int = _HEAD_WIDTH) -> int:
    if width % head_width:
        raise InputError(
            f"the {what} has width {width}, which heads of {head_width} do not share; give the config with its heads"
        )
    return width // head_width


def of_openai(tensors: Mapping[str, Tensor], *, text: str = "") -> Fields:
    """Returns the fields of a CLIP by OpenAI's names, from shapes alone, as OpenAI's own loader does.

    Args:
      tensors: a state dict.
      text: what stands in front of the names of the text tower.

    Raises:
      InputError: a tensor that tells a size is missing or has other axes.
    """
    vocab_size, text_width = shape(tensors, f"{text}token_embedding.weight", 2)
    fields: Fields = {
        "context_length": shape(tensors, f"{text}positional_embedding", 2)[0],
        "vocab_size": vocab_size,
        "text_width": text_width,
        "text_depth": blocks(tensors, re.escape(text) + r"transformer\.resblocks\.(\d+)\."),
        "text_heads": _heads(text_width, "text tower"),
        "embed_dim": shape(tensors, f"{text}text_projection", 2)[1],
        "activation": "quick_gelu",
        "text_pool": "argmax",
    }
    if "visual.layer1.0.conv1.weight" in tensors:
        return fields | _of_resnet(tensors)
    width, _, patch, _ = shape(tensors, "visual.conv1.weight", 4)
    return fields | {
        "image_size": patch * _side(shape(tensors, "visual.positional_embedding", 2)[0] - 1),
        "patch_size": patch,
        "vision_width": width,
        "vision_depth": blocks(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
        "vision_heads": _heads(width, "image tower"),
    }


def _of_resnet(tensors: Mapping[str, Tensor]) -> Fields:
    stages = blocks(tensors, r"visual\.layer(\d+)\.")
    layers = tuple(blocks(tensors, rf"visual\.layer{stage + 1}\.(\d+)\.") for stage in range(stages))
    width = shape(tensors, "visual.layer1.0.conv1.weight", 4)[0]
    places, last = shape(tensors, "visual.attnpool.positional_embedding", 2)
    shrinks = 4 * 2 ** (stages - 1)
    return {
        "image_size": shrinks * _side(places - 1),
        "vision_layers": layers,
        "vision_width": width,
        "vision_heads": _heads(last, "ResNet's last stage"),
    }


def _ratio(hidden: int, width: int) -> float:
    """Returns a ratio by which our MLPs have exactly so many hidden features: they are rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _side(places: int) -> int:
    side = math.isqrt(max(places, 0))
    if side * side != places:
        raise InputError(f"the image tower has positions for {places} places, which are no square")
    return side


def of_transformers(folder: str | os.PathLike) -> Fields:
    """Returns the fields of transformers' CLIPModel from its config.json, and preprocessor_config.json if it is there.

    Raises:
      InputError: the config is missing, is of another model, or describes what our CLIP cannot be.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder; transformers' models are folders with a config.json")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise InputError(f"{str(folder)!r} holds a {config.get('model_type')!r}; model_type should be 'clip'")
    # In old configs the *_config_dict, where there is one, counts before the other.
    text, vision = (
        defaults | (config.get(f"{tower}_config") or {}) | (config.get(f"{tower}_config_dict") or {})
        for tower, defaults in (("text", _TEXT_DEFAULTS), ("vision", _VISION_DEFAULTS))
    )
    try:
        fields = _of_configs(text, vision, int(config.get("projection_dim", 512)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(folder / 'config.json')!r} is no CLIP's: {error!r}") from error
    if (folder / "preprocessor_config.json").is_file():
        fields |= statistics(read_json(folder / "preprocessor_config.json"), "image_mean", "image_std")
    return fields


def of_towers(text: Mapping[str, Any], vision: Mapping[str, Any] | None) -> Fields:
    """Returns the fields of a CLIP of transformers' CLIPTextModelWithProjection and CLIPVisionModelWithProjection.

    Args:
      text, vision: their configs, in which what is left out is as in transformers; None where there is no such tower.

    Raises:
      InputError: they make embeddings of different widths, or are what our CLIP cannot be.
    """
    embed_dim = text.get("projection_dim", 512)
    if vision is not None and vision.get("projection_dim", 512) != embed_dim:
        raise InputError(f"the towers make embeddings of {embed_dim} and {vision.get('projection_dim', 512)} numbers")
    words = {**_TEXT_DEFAULTS, **text}
    if vision is None:
        # One that is nowhere near the other's settings would be refused, so it has the same.
        same = {name: words[name] for name in ("hidden_act", "layer_norm_eps")}
        fields = _of_configs(words, {**_VISION_DEFAULTS, **same}, embed_dim)
        return {name: x for name, x in fields.items() if not name.startswith("vision_mlp")} | {"image_tower": False}
    return _of_configs(words, {**_VISION_DEFAULTS, **vision}, embed_dim)


def _of_configs(text: Fields, vision: Fields, embed_dim: int) -> Fields:
    for key in ("hidden_act", "layer_norm_eps"):
        if text[key] != vision[key]:
            raise InputError(f"the towers have {key}={text[key]!r} and {vision[key]!r}; ours have one for both")
    if text["hidden_act"] not in _ACTIVATIONS:
        raise InputError(f"hidden_act={text['hidden_act']!r} is unknown; {nearest(text['hidden_act'], _ACTIVATIONS)}")
    if vision["num_channels"] != 3:
        raise InputError(f"the image tower reads {vision['num_channels']} channels; ours reads 3")
    fields: Fields = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "vision_width": vision["hidden_size"],
        "vision_depth": vision["num_hidden_layers"],
        "vision_heads": vision["num_attention_heads"],
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "text_width": text["hidden_size"],
        "text_depth": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "embed_dim": embed_dim,
        "activation": _ACTIVATIONS[text["hidden_act"]],
        "vision_mlp_ratio": _ratio(vision["intermediate_size"], vision["hidden_size"]),
        "text_mlp_ratio": _ratio(text["intermediate_size"], text["hidden_size"]),
        "norm_epsilon": float(text["layer_norm_eps"]),
    }
    # The end token was given as 2 by mistake once, and since then 2 stands for the largest id.
    end = text["eos_token_id"]
    return fields | ({"text_pool": "argmax"} if end == 2 else {"text_pool": "end", "text_end_id": end})


def statistics(config: Mapping[str, Any], mean: str, std: str) -> Fields:
    """Returns mean and deviation of pixels, where a config has them by these names."""
    found = {ours: config.get(theirs) for ours, theirs in (("mean", mean), ("std", std))}
    return {name: tuple(map(float, values)) for name, values in found.items() if values}


def of_open_clip(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, text: str) -> Fields:
    """Returns the fields of an OpenCLIP model from its config: `open_clip_config.json`, or one of its model configs.

    Args:
      tensors: its state dict, for what configs do not say.
      config: parsed; the part `model_cfg` counts where there is one.
      text: what stands in front of the names of the text tower.

    Raises:
      InputError: it is not one of OpenCLIP's own two towers, or has something that ours do not.
    """
    model = _Section(config.get("model_cfg", config), "model_cfg")
    embed_dim = model.take("embed_dim")
    vision, words = _Section(model.take("vision_cfg"), "vision_cfg"), _Section(model.take("text_cfg"), "text_cfg")
    quick = model.take("quick_gelu", False)
    model.take("custom_text", False)
    kind = model.take("multimodal_cfg", None)
    width = words.take("width", 512)
    fields: Fields = {
        "embed_dim": embed_dim,
        "activation": "quick_gelu" if quick else "gelu",
        "context_length": words.take("context_length", 77),
        "vocab_size": words.take("vocab_size", 49408),
        "text_width": width,
        "text_depth": words.take("layers", 12),
        "text_heads": words.take("heads", 8),
        "text_mlp_ratio": float(words.take("mlp_ratio", 4.0)),
        "text_causal": not words.take("no_causal_mask", False),
        "text_pool": words.take("pool_type", "argmax"),
        "text_projection": "biased" if words.take("proj_bias", False) else "linear",
    }
    if words.take("embed_cls", False):
        fields |= {"text_pool": "class"}
    if words.take("proj_type", "linear") == "none":
        fields |= {"text_projection": "none"}
    words.ignore("hf_tokenizer_name", "tokenizer_kwargs", "output_tokens", "pad_id")
    layers = vision.take("layers", 12)
    fields |= _open_clip_resnet(vision, layers) if isinstance(layers, list) else _open_clip_vit(vision, layers)
    for section in (vision, words, model):
        section.ignore("init_logit_scale", "patch_dropout")
        section.done()
    if kind is not None and fields["text_pool"] != "class":
        raise InputError("its multimodal_cfg describes a text tower that is not CoCa's; ours are CLIP's and CoCa's")
    preprocess = config.get("preprocess_cfg") or {}
    return fields | statistics(preprocess, "mean", "std")


def _open_clip_resnet(vision: "_Section", layers: list[int]) -> Fields:
    width = vision.take("width", 64)
    heads = _heads(32 * width, "ResNet's last stage", vision.take("head_width", 64))
    size = vision.take("image_size", 224)
    vision.ignore("patch_size")
    return {"image_size": size, "vision_layers": tuple(layers), "vision_width": width, "vision_heads": heads}


def _open_clip_vit(vision: "_Section", layers: int) -> Fields:
    width = vision.take("width", 768)
    fields: Fields = {
        "image_size": vision.take("image_size", 224),
        "patch_size": vision.take("patch_size", 16),
        "vision_width": width,
        "vision_depth": layers,
        "vision_heads": _heads(width, "image tower", vision.take("head_width", 64)),
        "vision_mlp_ratio": float(vision.take("mlp_ratio", 4.0)),
        "vision_layer_scale": float(vision.take("ls_init_value", None) or 0.0),
        "vision_input_norm": not vision.take("no_ln_pre", False),
    }
    after = vision.take("final_ln_after_pool", False)
    pool = vision.take("pool_type", "tok")
    if vision.take("attentional_pool", False) is True:
        fields |= {"vision_pool": "attention", "vision_pool_heads": vision.take("attn_pooler_heads", 8)}
        vision.ignore("attn_pooler_queries", "output_tokens")
    elif vision.take("global_average_pool", False) or pool == "avg":
        fields |= {"vision_pool": "average" if after else "normed_average"}
    elif pool != "tok":
        raise InputError(f"its image tower has pool_type={pool!r}; known are tok and avg")
    # Sines as positions are among the weights like any others.
    vision.ignore("output_tokens", "pos_embed_type")
    return fields


class _Section:
    """A section of OpenCLIP's config, of which every key must be understood."""

    def __init__(self, values: Any, name: str):
        if not isinstance(values, Mapping):
            raise InputError(f"OpenCLIP's config should have a section {name}, not {values!r}")
        self._left, self._name = dict(values), name

    def take(self, key: str, *default: Any) -> Any:
        if key not in self._left and not default:
            raise InputError(f"OpenCLIP's config has no {self._name}.{key}")
        return self._left.pop(key, *default)

    def ignore(self, *keys: str) -> None:
        for key in keys:
            self._left.pop(key, None)

    def done(self) -> None:
        wanted = {key: value for key, value in self._left.items() if value not in (None, False)}
        if wanted:
            named = ", ".join(f"{self._name}.{key}={value!r}" for key, value in wanted.items())
            raise InputError(f"the model has what our CLIP does not: {named}")


def of_open_clip_shapes(tensors: Mapping[str, Tensor], *, text: str, activation: str) -> Fields:
    """Returns the fields of an OpenCLIP model from shapes, where only its activation is known beside them.

    Raises:
      InputError: it has parts from which sizes cannot be told; its config is needed.
    """
    odd = [name for name in tensors if re.search(r"(attn_pool|cls_emb|\.ls_1\.)", name)]
    if odd or "visual.ln_pre.weight" not in tensors and "visual.layer1.0.conv1.weight" not in tensors:
        raise InputError(
            "of this model one cannot tell from shapes alone how it pools and norms; give its config, --config_json"
        )
    fields = of_openai(tensors, text=text)
    width = fields["vision_width"]
    if "patch_size" in fields:
        fields["vision_heads"] = _heads(width, "image tower", _HEAD_WIDTHS.get(width, _HEAD_WIDTH))
        up = shape(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        fields["vision_mlp_ratio"] = _ratio(up, width)
    return fields | {"activation": activation}
