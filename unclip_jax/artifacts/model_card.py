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
    about: Mapping[str, Any],
    counts: Mapping[str, int],
    *,
    license: str,
    command: str,
    limits: Sequence[str] = (),
    evaluation: str = "",
) -> str:
    """Returns the card as Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
      components: the parts.
      about: what the export's manifest says.
      counts: part -> number of parameters.
      license: an identifier.
      command: that made the export.
      limits: known of this model besides those of any unCLIP.
      evaluation: Markdown about an evaluation of these weights.
    """
    parts = [
        {
            "name": name,
            "stage": one.config.stage,
            "parameters": counts[name],
            "step": one.step,
            "batch_size": one.config.get("batch_size", "?"),
            "weights": ", ".join(f"`{file}`" for file in about["weights"][name]),
            "dataset": _data_set(one),
            "data": json.dumps(one.data, sort_keys=True) if one.data else "",
        }
        for name, one in components.items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unclip_jax"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    record = about["record"]
    return environment.get_template("model_card.md.jinja").render(
        title=f"{' + '.join(components)} of unCLIP",
        format=about["format"],
        purpose=_PURPOSES[about["format"]],
        usage=_usage(components, about),
        parts=parts,
        results=[row for one in components.values() for row in results(one)],
        limits=limits,
        evaluation=evaluation,
        license=license,
        command=command,
        built=about["built"],
        expires=about.get("expires", ""),
        renewal=about.get("renewal", ""),
        versions=", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        weights={"ema": "the moving average of training's", "params": "training's last"}[record["weights"]],
        dtype=record["dtype"],
        library="diffusers" if about["format"] == "diffusers" else "jax",
        pipeline_tag="text-to-image" if "decoder" in components else "feature-extraction",
    )


_WHAT = "A DALL-E 2 (unCLIP, Ramesh et al., 2022) or a part of it, trained with unclip_jax"
_PURPOSES = {
    "safetensors": f"{_WHAT}: its weights. `names.json` says what each tensor is.",
    "stablehlo": (
        f"{_WHAT}, as compiled functions with their weights beside them. One file of each function holds code for "
        "TPUs, CUDA GPUs and CPUs, for any number of images at once."
    ),
    "diffusers": f"{_WHAT}, as diffusers' pipelines load it.",
}


def _usage(components: Mapping[str, Component], about: Mapping[str, Any]) -> str:
    """Returns how to use an export, as Markdown."""
    if about["format"] == "safetensors":
        return (
            "Linear weights are [in, out], convolutions [height, width, in, out], and blocks that repeat are stacked "
            "along the first axis."
        )
    if about["format"] == "diffusers":
        return _diffusers_usage(components, about["record"])
    said = "`pip install jax flatbuffers` is all it needs. `run.py` checks every file's SHA-256 before it uses any."
    if about["chain"]:
        said += '\n\n    python run.py "a small red star on a white background" --out=star.png --seed=0'
    return said + "\n\nFunctions: " + ", ".join(f"`{name}`" for name in about["functions"]) + ". See `manifest.json`."


def _diffusers_usage(components: Mapping[str, Component], record: Mapping[str, Any]) -> str:
    variant = {"float16": ', variant="fp16"', "bfloat16": ', variant="bf16"'}.get(record["dtype"], "")
    trust = ", trust_remote_code=True" if record["target"] == "hub" else ""
    if record["pipeline"] == "kandinsky_prior":
        steps = _calls(components, {"prior_diffusion": ("num_inference_steps", "guidance_scale")})
        return (
            f"    from diffusers import KandinskyV22PriorPipeline\n"
            f'    pipeline = KandinskyV22PriorPipeline.from_pretrained("FOLDER"{variant})\n'
            f'    z_i = pipeline("a small red star on a white background"{steps}).image_embeds'
        )
    stages = {
        "prior_diffusion": ("prior_num_inference_steps", "prior_guidance_scale"),
        "decoder": ("decoder_num_inference_steps", "decoder_guidance_scale"),
        "upsampler_1": ("super_res_num_inference_steps", ""),
    }
    lines = []
    if "prior_diffusion" in components:
        lines += [
            "    from diffusers import UnCLIPPipeline",
            f'    pipeline = UnCLIPPipeline.from_pretrained("FOLDER"{variant}{trust})',
            f'    image = pipeline("a small red star on a white background"{_calls(components, stages)}).images[0]',
        ]
    if components["clip"].config.model.get("image_tower", True):
        of_images = {name: words for name, words in stages.items() if name != "prior_diffusion"}
        lines += [
            "    from diffusers import UnCLIPImageVariationPipeline",
            f'    pipeline = UnCLIPImageVariationPipeline.from_pretrained("FOLDER"{variant}{trust})',
            f"    image = pipeline(picture{_calls(components, of_images)}).images[0]",
        ]
    return "\n".join(lines)


def _calls(components: Mapping[str, Component], stages: Mapping[str, tuple[str, str]]) -> str:
    """The arguments of a pipeline with which it samples as the runs' configs say."""
    said = ""
    for name, (steps, scale) in stages.items():
        sampling = components[name].config.sampling
        said += f", {steps}={sampling.timesteps}" if sampling.timesteps.isdigit() else ""
        said += f", {scale}={sampling.guidance_scale:g}" if scale else ""
    return said


def _data_set(component: Component) -> str:
    data = component.config.get("data", {})
    mixture = data.get("mixture", ())
    named = [str(part[0]) for part in mixture] or [str(data.get("dataset", ""))]
    variant = data.get("variant", "")
    return ", ".join(named) + (f" ({variant})" if variant and not mixture else "")
