"""Results of an evaluation job (`unclip_jax.evaluate`), as a model's card tells them."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from unclip_jax import evaluation_pages
from unclip_jax.artifacts.components import Component
from unclip_jax.errors import InputError

_RESULTS = "results.json"


def read(folder: str, found: Mapping[str, Component], *, weights: str) -> dict[str, Any]:
    """Returns what a job came to, if these are the weights that it scored; {} where no folder is named.

    Args:
      folder: of a job that is done, the --workdir of `unclip_jax.evaluate`; or "".
      found: the parts of an export. The job may have scored more, and must have scored one of them.
      weights: "ema" or "params", those exported.

    Raises:
      InputError: it holds no results, or they are of other weights.
    """
    if not folder:
        return {}
    path = pathlib.Path(folder).expanduser() / _RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        manifest, models = results["manifest"], results["manifest"]["models"]
        evaluation_pages.markdown(results)
        scored = {name: (models[name]["step"], models[name]["digest"]) for name in found if name in models}
        used = manifest["weights"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--evaluation={folder} holds no results that can be read ({error!r}); it should be the --workdir of a "
            "python -m unclip_jax.evaluate that is done"
        ) from error
    if not scored:
        raise InputError(f"--evaluation={folder} scored {', '.join(models)}, none of which is exported")
    for name, (step, digest) in scored.items():
        # Of CLIP the moving average counts in any case; of other last weights only the step is known here.
        same = used == weights or name == "clip"
        told = weights == "ema" or name == "clip"
        if not same or step != found[name].step or (told and digest != found[name].fingerprint):
            raise InputError(
                f"--evaluation={folder} scored other weights of {name} (step {step}, {used}) than those exported "
                f"(step {found[name].step} of {found[name].workdir}, {weights})"
            )
    return results


def render(results: Mapping[str, Any]) -> str:
    """Returns the results as Markdown: how the images were drawn, then a row for each protocol and guidance."""
    if not results:
        return ""
    manifest = results["manifest"]
    sampled = "; ".join(
        f"{name}: {options['method']}, {options['timesteps']} steps" if "method" in options else name
        for name, options in manifest["sampling"].items()
    )
    said = (
        f"Scored by `unclip_jax.evaluate` (job `{results['run']}`), prior `{manifest['prior']}`, seed "
        f"{manifest['seed']}. Sampling: {sampled}. A protocol's digest stands for all that its numbers depend on but "
        "the model; ± is one standard error over captions and images, not over training runs."
    )
    return f"{said}\n\n{evaluation_pages.markdown(results)}"
