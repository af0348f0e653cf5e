"""Configs: loaded by `file:variant`, checked key by key, saved as JSON beside what they made.

A config is an `ml_collections.ConfigDict` of strings, numbers, booleans and tuples. Files under `configs/` make
them; nothing here imports those files' values, and they import nothing from here. Every key of every config has a
rule below: its type and its range. A key without a rule is a typo.
"""

import fnmatch
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from unclip_jax import hosts
from unclip_jax.errors import InputError, nearest


class Rule(NamedTuple):
    """What a key's value may be: its type, its inclusive range, and whether None is allowed."""

    kind: type | tuple[type, ...]
    low: float = -math.inf
    high: float = math.inf
    optional: bool = False


COUNT = Rule(int, 0)
SIZE = Rule(int, 1)
SIZES = Rule(tuple, 1)
RATE = Rule(float, 0)
FRACTION = Rule(float, 0, 1)
TEXT = Rule(str)
SWITCH = Rule(bool)
NUMBER = Rule(float)
DURATION = {"steps": Rule(int, 0, optional=True), "examples": Rule(int, 0, optional=True),
            "percent": Rule(float, 0, 100, optional=True)}  # fmt: skip


def _durations(*names: str) -> dict[str, Rule]:
    return {f"{name}_{unit}": rule for name in names for unit, rule in DURATION.items()}


_CLIP = {
    "image_size": SIZE, "patch_size": SIZE, "vision_width": SIZE, "vision_depth": SIZE, "vision_heads": SIZE,
    "context_length": SIZE, "vocab_size": Rule(int, 3), "text_width": SIZE, "text_depth": SIZE, "text_heads": SIZE,
    "embed_dim": SIZE, "activation": TEXT, "vision_stem": SIZES, "remat": TEXT, "image_tower": SWITCH,
    "vision_layers": SIZES, "vision_mlp_ratio": Rule(float, 0.1), "vision_layer_scale": RATE,
    "vision_input_norm": SWITCH, "vision_pool": TEXT, "vision_pool_heads": SIZE, "vision_projection": TEXT,
    "text_mlp_ratio": Rule(float, 0.1), "text_causal": SWITCH, "text_pool": TEXT,
    "text_end_id": Rule(int, 0, optional=True), "text_projection": TEXT, "norm_epsilon": Rule(float, 1e-12, 1),
    "mean": Rule(tuple, 0, 1), "std": Rule(tuple, 1e-3, 1), "noised": SWITCH,
}  # fmt: skip
_TEXT_ENCODER = {
    "context_length": SIZE, "vocab_size": Rule(int, 3), "width": SIZE, "depth": SIZE, "heads": SIZE,
    "activation": TEXT, "remat": TEXT, "bare": SWITCH,
}  # fmt: skip
_UNET = {
    "in_channels": SIZE, "out_channels": SIZE, "channels": SIZE, "channel_mult": SIZES, "depth": SIZE,
    "attention_resolutions": SIZES, "image_size": SIZE, "head_channels": SIZE, "dropout": Rule(float, 0, 0.99),
    "scale_shift": TEXT, "norm_groups": SIZE, "remat": TEXT,
}  # fmt: skip

# Of an evaluation: texts, of which "" stands for what a part was trained with.
_SAMPLED = {key: TEXT for key in ("method", "timesteps", "guidance_scale", "eta", "candidates")}

# Section -> key -> rule. `model` differs by stage; the union of its keys is allowed here, and the network's own
# fields refuse what does not belong.
RULES: dict[str, Any] = {
    "stage": TEXT, "seed": COUNT, "batch_size": SIZE, "dtype": TEXT, "max_nonfinite_steps": SIZE,
    **_durations("total"),
    "model": {
        **_CLIP, **_TEXT_ENCODER, "embed_dim": COUNT, "components": SIZE, "buckets": Rule(int, 2),
        "dot_buckets": Rule(int, 2),
        "unet": _UNET, "text": _TEXT_ENCODER, "clip_tokens": COUNT, "null_clip": TEXT, "clip_scale": RATE,
        "caption": TEXT, "context_width": COUNT,
        "logit_scale_max": Rule(float, 1),
    },
    "unet": _UNET,
    "clip": _CLIP,
    "text": _TEXT_ENCODER,  # of an upsampler that reads captions
    "inpaint": SWITCH,
    "begin_from": TEXT,
    "low_res_size": SIZE,
    "enlarge": TEXT,
    "round_pixels": SWITCH,
    "condition": TEXT,
    "drop": {"text": FRACTION, "clip": FRACTION},
    "embedding": {"scaling": TEXT, "scale": Rule(float, 1e-6), "norm": TEXT},
    "embedding_scale": Rule(float, 1e-6),  # of configs before `embedding`
    "fit_examples": SIZE,
    "dot_top": Rule(float, 0.01, 1),
    "diffusion": {"schedule": TEXT, "num_timesteps": SIZE, "prediction": TEXT, "variance": TEXT,
                  "clip_x_start": Rule(float, 0, optional=True), "tables": TEXT},
    "sampling": {"method": TEXT, "timesteps": TEXT, "guidance_scale": NUMBER, "eta": FRACTION, "candidates": SIZE,
                 "temperature": Rule(float, 0, 10), "threshold": TEXT, "quantile": FRACTION, "last_steps": COUNT,
                 "skip_noisiest": COUNT},
    "data": {"dataset": TEXT, "variant": TEXT, "mixture": Rule(tuple), "data_dir": TEXT, "split": TEXT,
             "eval_split": TEXT, "vocabulary": TEXT, "workers": COUNT, "cache": SWITCH, "flip": SWITCH,
             "degradation": TEXT, "crop_fraction": Rule(float, 0.01, 1), "embeddings": TEXT,
             "max_bad_percent": Rule(float, 0, 100)},
    "optim": {"learning_rate": RATE, "schedule": TEXT, "final_fraction": FRACTION, "beta1": Rule(float, 0, 0.9999999),
              "beta2": Rule(float, 0, 0.9999999), "eps": Rule(float, 0, 1), "weight_decay": RATE, "decay": TEXT,
              "grad_clip": RATE, "accumulation": SIZE, "ema_decay": FRACTION, "ema_warmup": SWITCH,
              **_durations("warmup")},
    "sam": {"rho": RATE, "pairs": SIZE, "negatives": TEXT},
    "frozen": {"clip": TEXT, "last": TEXT},
    "mesh": {"slice": Rule(int, -1), "data": Rule(int, -1), "fsdp": Rule(int, -1), "model": Rule(int, -1)},
    "sharding": Rule(tuple),
    "checkpoint": {**_durations("every"), "keep": SIZE, "every_minutes": RATE},
    "log": {**_durations("every"), "tensorboard": SWITCH, "profile_start": COUNT, "profile_steps": COUNT,
            "watchdog_seconds": RATE},
    "evaluation": {**_durations("every"), "evaluators": Rule(tuple), "examples": SIZE, "batch_size": SIZE,
                   "recall_at": SIZES, "templates": Rule(tuple), "classes": Rule(tuple), "label": TEXT,
                   "label_dataset": TEXT, "label_split": TEXT, "label_train_split": TEXT, "probe_examples": SIZE},
    # Of `python -m unclip_jax.evaluate`, configs/eval_*.py.
    "protocols": Rule(tuple), "features": Rule(tuple), "inception": TEXT, "clip_workdir": TEXT, "data_dir": TEXT,
    "coco_files": {"annotations": TEXT, "images": TEXT, "tfds": TEXT}, "removed": TEXT, "reference": TEXT,
    "prior": TEXT, "weights": TEXT, "microbatch": SIZE, "unit_rows": SIZE,
    "sweep": {"decoder": Rule(tuple), "prior": Rule(tuple)},
    "sampled": {part: _SAMPLED for part in ("prior", "decoder", "upsampler_1", "upsampler_2")},
    "max_bad_percent": Rule(float, 0, 100),
}  # fmt: skip

# Keys that may differ when a run is resumed: they change where and how it runs, never what it computes.
FREE_ON_RESUME = ("mesh.*", "sharding", "checkpoint.*", "log.*", "evaluation.*", "data.workers", "data.cache",
                  "data.data_dir", "data.eval_split", "frozen.*", "sampling.*", "*.remat")  # fmt: skip


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns the checked config of `path/to/file.py:variant`, with overrides such as {"optim.eps": 1e-6}.

    Raises:
      InputError: no such file or variant, or a key or value that no rule allows.
    """
    path, _, variant = spec.partition(":")
    if not os.path.exists(path):
        raise InputError(f"config file {path!r} does not exist; configs are written file:variant, configs/clip.py:tiny")
    module_spec = importlib.util.spec_from_file_location("unclip_jax_config", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    root = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if root not in sys.path:
        sys.path.insert(0, root)  # config files import configs.common
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
    except (ValueError, SyntaxError) as error:
        raise InputError(f"{path}: {error}") from error
    for key, value in (overrides or {}).items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, AttributeError) as error:
            known = [name for name, _ in leaves(config)]
            raise InputError(f"cannot set config.{key}={value!r} ({error}); {nearest(key, known)}") from error
    return check(config)


def leaves(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every leaf, in order of the keys."""
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping | ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check(config: ConfigDict) -> ConfigDict:
    """Returns the config if every key is known and every value is of its type and in its range.

    Raises:
      InputError: names the first key that is not, with the nearest known key or the allowed range.
    """
    _check_section(config, RULES, "config.")
    return config


def _check_section(section: Mapping[str, Any] | ConfigDict, rules: Mapping[str, Any], prefix: str) -> None:
    for key, value in section.items():
        name = prefix + key
        if key not in rules:
            raise InputError(f"{name} is not a known key; {nearest(key, rules)}")
        rule = rules[key]
        is_section = isinstance(value, Mapping | ConfigDict)
        if isinstance(rule, Rule):
            if is_section:
                raise InputError(f"{name} is a section; it must be a value")
            _check_value(name, value, rule)
        elif is_section:
            _check_section(value, rule, name + ".")
        elif value is not None:
            raise InputError(f"{name}={value!r} is a value; it must be a section with {', '.join(sorted(rule))}")


def _check_value(name: str, value: Any, rule: Rule) -> None:
    if value is None and rule.optional:
        return
    kind = rule.kind
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        wanted = getattr(kind, "__name__", str(kind))
        raise InputError(f"{name}={value!r} is of type {type(value).__name__}; it must be {wanted}")
    numbers = list(value) if isinstance(value, tuple) else [value]
    if rule is SIZES and any(type(number) is not int for number in numbers):
        raise InputError(f"{name}={value!r} must hold whole numbers only")
    for number in numbers:
        # An infinity is in no range, not even in an open one: JSON has no word for it.
        if isinstance(number, int | float) and not (math.isfinite(number) and rule.low <= number <= rule.high):
            raise InputError(f"{name}={value!r} is out of range; it must lie in [{rule.low:g}, {rule.high:g}]")


def duration(section: ConfigDict, name: str, *, batch_size: int, total_steps: int | None = None) -> int:
    """Returns a duration in steps, given as exactly one of `name_steps`, `name_examples` or `name_percent`.

    Args:
      section: the config section that holds it.
      name: such as "warmup".
      batch_size: examples per step.
      total_steps: what percent is of.

    Raises:
      InputError: none or several of the three are given.
    """
    given = {unit: section.get(f"{name}_{unit}") for unit in DURATION}
    given = {unit: value for unit, value in given.items() if value is not None}
    if len(given) != 1:
        keys = ", ".join(f"{name}_{unit}" for unit in DURATION)
        raise InputError(f"give exactly one of {keys}; {len(given)} are set (set the others to None)")
    ((unit, value),) = given.items()
    if unit == "percent":
        if total_steps is None:
            raise InputError(f"{name}_percent is a percentage of nothing; give {name}_steps or {name}_examples")
        return round(total_steps * value / 100)
    return value if unit == "steps" else math.ceil(value / batch_size)


def total_steps(config: ConfigDict) -> int:
    """Returns the length of the run in steps."""
    return duration(config, "total", batch_size=config.batch_size)


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON, sorted and indented."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the checked, locked config of a JSON text; lists become tuples.

    Raises:
      InputError: the text is no JSON, or no config.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"a config is not whole JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"a config is a JSON object, not {type(value).__name__}")
    return from_json_value(value)


def from_json_value(value: Any) -> ConfigDict:
    """Returns the checked, locked config of parsed JSON."""

    def tuples(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: tuples(inner) for key, inner in item.items()}
        return tuple(tuples(inner) for inner in item) if isinstance(item, list) else item

    return check(ConfigDict(tuples(value)).lock())


def difference(
    old: ConfigDict, new: ConfigDict, *, ignore: Sequence[str] = FREE_ON_RESUME
) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old, new)} of the leaves that differ, but for keys that match one of `ignore`."""
    before, after = dict(leaves(old)), dict(leaves(new))
    keys = [key for key in sorted(before | after) if not any(fnmatch.fnmatchcase(key, name) for name in ignore)]
    # A key that a config did not have yet counts as none, or as empty.
    missing = (None, (), "")
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b and not (a in missing and b in missing)}


def claim_workdir(workdir: epath.PathLike, config: ConfigDict, *, accept_changes: bool = False) -> dict[str, Any]:
    """Writes config.json into a new workdir, or checks that the one there is of the same run.

    Returns:
      The differences that were accepted.

    Raises:
      InputError: the workdir belongs to a run with another config; the differing keys are named.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    changed = {}
    if path.exists():
        try:
            there = from_json(path.read_text())
        except InputError as error:
            raise InputError(f"{path} cannot be read: {error}; use another workdir, or remove that file") from error
        changed = difference(there, config)
        if changed and not accept_changes:
            named = "; ".join(f"config.{key}: {old!r} there, {new!r} here" for key, (old, new) in changed.items())
            raise InputError(
                f"{workdir} holds a run with another config ({named}); use another workdir, or --accept_changes"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    if hosts.index() == 0:
        # Whole or not there at all, wherever the process is killed.
        whole = workdir / f".config-{os.getpid()}.json"
        whole.write_text(to_json(config))
        whole.replace(path)
    return changed
