"""The laptop configs of every stage, made smaller still: networks that compile in seconds and learn nothing."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax.stages import base

# Sizes by name, wherever the name stands in a config. Depth 2 where blocks are scanned: one would hide a mixed order.
_SMALL = {
    "patch_size": 8, "vision_stem": (8, 8, 8), "vision_width": 16, "vision_depth": 2, "vision_heads": 2,
    "text_width": 16, "text_depth": 2, "text_heads": 2, "width": 16, "heads": 2, "embed_dim": 16, "components": 6,
    "buckets": 8, "dot_buckets": 8, "channels": 32, "channel_mult": (1, 2), "head_channels": 16,
}  # fmt: skip
# Sections whose depth counts blocks of a transformer; a U-Net's counts residual blocks of a level.
_UNETS = ("unet",)

# Every stage of the table, the upsampler twice: first and second of the cascade.
VARIANTS = {
    "clip": "clip.py:tiny",
    "prior_ar": "prior_ar.py:tiny",
    "prior_diffusion": "prior_diffusion.py:tiny",
    "decoder": "decoder.py:tiny",
    "upsampler": "upsampler.py:tiny_1",
    "upsampler_2": "upsampler.py:tiny_2",
}
# Of stages that stand above already, as something else.
FURTHER = {"clip_noised": "clip.py:tiny_noised"}


def _shrunk(section: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            small[key] = _shrunk(value, name=key)
        elif key == "depth":
            small[key] = 1 if name in _UNETS else 2
        elif key == "attention_resolutions":
            small[key] = value[:1]
        else:
            small[key] = _SMALL.get(key, value)
    return small


def small(case: str, *, batch_size: int = 16, **overrides: Any) -> ConfigDict:
    """Returns the small config of one of VARIANTS or FURTHER; overrides are written `optim__grad_clip=0.0`.

    Captions and embeddings are dropped half of the time, so that 16 examples hold every kind; the learning rate is
    constant from the first step on; and Adam's epsilon is large, so that rounding cannot flip an update's sign.
    """
    values = _shrunk(configs.load(f"configs/{(VARIANTS | FURTHER)[case]}").to_dict(), name="")
    values["batch_size"] = batch_size
    values["optim"].update({"schedule": "constant", "warmup_steps": 0, "warmup_percent": None, "warmup_examples": None})
    values["optim"]["eps"] = 1e-2
    for key in values.get("drop", {}):
        values["drop"][key] = 0.5
    if "timesteps" in values.get("sampling", {}):
        values["sampling"]["timesteps"] = "3"
    if case == "upsampler_2":  # one level, for variety
        values["unet"]["channel_mult"] = (1,)
    for key, value in overrides.items():
        *sections, last = key.split("__")
        section = values
        for part in sections:
            section = section[part]
        section[last] = value
    return configs.from_json_value(values)


assert set(base.TABLE) <= set(VARIANTS), "a stage without a small config"
