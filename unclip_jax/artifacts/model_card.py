"""The card of a model, README.md of every export: what it is, what it was trained on, what it may be used for."""

import importlib.metadata
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from unclip_jax import config as configs
from unclip_jax import jsonl, metrics
from unclip_jax.artifacts.components import Component
from unclip_jax.errors import InputError
from unclip_jax.interop.tensors import Tensor

CARD, TRAINING = "README.md", "training.json"
_LIBRARIES = ("unclip_jax", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint")


def check_license(license: str) -> str:
    """Returns the identifier of a licence, "other" for "".

    Raises:
      InputError: it is none that could stand in a card.
    """
    if license and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise InputError(f"--license={license!r} is no identifier of a licence; write one such as apache-2.0 or other")
    return license.lower() or "other"


def versions() -> dict[str, str]:
    """Returns library -> version, of those that an export depends on."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[library] = "unknown"
    return found


def results(component: Component) -> list[dict[str, Any]]:
    """Returns the last value of each measure that evaluations of a run wrote, up to the exported step."""
    last: dict[str, dict[str, Any]] = {}
    for row in jsonl.read(epath.Path(component.workdir) / metrics.JSONL):
        step = row.get("step")
        if not isinstance(step, int) or step > component.step:
            continue
        for name, value in row.items():
            if name.startswith("evaluation/") and isinstance(value, int | float) and math.isfinite(value):
                measure = name.removeprefix("evaluation/")
                last[measure] = {"part": component.name, "name": measure, "value": value, "step": step}
    return [last[name] for name in sorted(last)]


def parameters(tensors: Mapping[str, Tensor]) -> int:
    """Numbers that training moves."""
    return sum(math.prod(x.shape) for name, x in tensors.items() if not name.startswith("statistics."))


def training(components: Mapping[str, Component]) -> dict[str, Any]:
    """Returns what training.json holds: config, steps and fingerprints of the data, by part."""
    return {
        name: {"config": json.loads(configs.to_json(one.config)), "step": one.step, "trained_on": one.data}
        for name, one in components.items()
    }


def render(
    components: Mapping[str, Component],
    *,
    counts: Mapping[str, int],
    files: Mapping[str, Sequence[str]],
    format: str,
    title: str,
    purpose: str,
    usage: str,
    record: Mapping[str, Any],
    limits: Sequence[str] = (),
) -> str:
    """Returns the card as Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
      components: the parts.
      counts: part -> number of parameters.
      files: part -> names of the files that hold its weights.
      format: of the export.
      title, purpose, usage: what it is, in a few words, in a few sentences, and how to use it.
      record: license, weights, dtype, command, built, versions, and for what expires expires and renewal.
      limits: known of this model besides those of any unCLIP.
    """
    parts = [
        {
            "name": name,
            "stage": one.config.stage,
            "parameters": counts[name],
            "step": one.step,
            "batch_size": one.config.get("batch_size", "?"),
            "weights": ", ".join(f"`{file}`" for file in files[name]),
            "dataset": _data_set(one),
            "data": json.dumps(one.data, sort_keys=True) if one.data else "",
        }
        for name, one in components.items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unclip_jax"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    said = {
        **record,
        "weights": {"ema": "the moving average of training's", "params": "training's last"}[record["weights"]],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "expires": record.get("expires", ""),
        "renewal": record.get("renewal", ""),
    }
    rows = [row for one in components.values() for row in results(one)]
    return environment.get_template("model_card.md.jinja").render(
        said, parts=parts, results=rows, format=format, title=title, purpose=purpose, usage=usage, limits=limits,
        library="diffusers" if format == "diffusers" else "jax",
        pipeline_tag="text-to-image" if "decoder" in components else "feature-extraction",
    )  # fmt: skip


def _data_set(component: Component) -> str:
    data = component.config.get("data", {})
    mixture = data.get("mixture", ())
    named = [str(part[0]) for part in mixture] or [str(data.get("dataset", ""))]
    variant = data.get("variant", "")
    return ", ".join(named) + (f" ({variant})" if variant and not mixture else "")
