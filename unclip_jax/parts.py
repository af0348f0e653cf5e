"""The trained parts of an unCLIP: read from the workdirs of their runs, and held to fit each other."""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from unclip_jax import checkpoint, digests, sharding
from unclip_jax import config as configs
from unclip_jax.errors import InputError, nearest
from unclip_jax.stages import base

_LOG = logging.getLogger(__name__)

# Sub-folder of the models -> its stage. The position of a name is also the stage's number in every random key, so
# new names go to the end.
STAGES = {
    "clip": "clip",
    "prior_diffusion": "prior_diffusion",
    "prior_ar": "prior_ar",
    "decoder": "decoder",
    "upsampler_1": "upsampler",
    "upsampler_2": "upsampler",
    "upsampler_1_last": "upsampler",
    "clip_noised": "clip",
}
# Upsamplers that take no place in the cascade, but the last steps of another (`sampling.last_steps`): it -> they.
LAST = {"upsampler_1": "upsampler_1_last"}
# The CLIP of noised images, which may guide the decoder; the others know nothing of it.
NOISED = "clip_noised"
# Options of sampling that configs leave out, as they then are.
_UNWRITTEN = {"skip_noisiest": 0}


@dataclasses.dataclass(frozen=True)
class Part:
    """One trained network, ready to be asked.

    Attributes:
      name: a key of STAGES.
      workdir: of the run that trained it.
      stage, config: what it is; `config.sampling` with the caller's overrides.
      params, statistics: weights (the moving average by default) and what was measured of the data.
      step: training steps that they have seen.
    """

    name: str
    workdir: str
    stage: base.Stage
    config: ConfigDict
    params: Any
    statistics: Any
    step: int


def missing(name: str, models: str) -> str:
    """Returns the sentence that says a part is not there, with the command that trains it."""
    folder = epath.Path(models or "runs/mine")
    variant = "_noised" if name == NOISED else f"_{name.split('_')[1]}" if STAGES[name] == "upsampler" else ""
    config = f"configs/{STAGES[name]}.py:tiny{variant}"
    command = f"python -m unclip_jax.train --config={config} --workdir={folder / name}"
    if STAGES[name] not in ("clip", "upsampler"):
        command += f" --config.frozen.clip={folder / 'clip'}"
    return f"{models or 'the model'} holds no trained {name}; train it: {command}"


def folders(models: str | Mapping[str, str]) -> dict[str, str]:
    """Returns part -> workdir, of parts that have a checkpoint (or that are named one by one)."""
    if not isinstance(models, str):
        for name in models:
            if name not in STAGES:
                raise InputError(f"there is no part {name!r}; {nearest(name, STAGES)}")
        return dict(models)
    root = checkpoint.absolute(models)
    if not root.is_dir():
        raise InputError(f"there is no folder {models!r}; it should hold trained {', '.join(STAGES)}")
    found = {name: str(root / name) for name in STAGES if checkpoint.steps_of(root / name / checkpoint.FOLDER)}
    if not found:
        raise InputError(f"{models!r} holds no trained part; it should have some of the folders {', '.join(STAGES)}")
    return found


def read(
    name: str,
    folder: str,
    mesh: jax.sharding.Mesh | None,
    *,
    weights: str,
    sampling: Mapping[str, Any],
    step: int | None = None,
) -> Part:
    """Reads one part's newest whole checkpoint, or that of a step.

    Of CLIP it is always the moving average, which the others were trained on. Without a mesh its weights are NumPy
    arrays, each in memory once.
    """

    def abstract(config: ConfigDict) -> tuple[Any, Any]:
        if config.stage != STAGES[name]:
            raise InputError(f"{folder} holds a {config.stage}, where a {STAGES[name]} is wanted as {name}")
        stage = base.create(config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        trees = jax.eval_shape(stage.init, key), jax.eval_shape(stage.init_frozen, key).get("statistics", {})
        params, statistics = (_placed(tree, config, mesh) for tree in trees)
        return params, statistics

    ema = weights == "ema" or name == "clip"
    params, statistics, config, step = checkpoint.load(folder, abstract, ema=ema, step=step)
    config = with_sampling(config, sampling, name=name)
    check_variance(config, statistics, name=name, folder=folder, step=step)
    _LOG.info("%s: step %d of %s", name, step, folder)
    return Part(name, folder, base.create(config), config, params, statistics, step)


def _placed(boxed: Any, config: ConfigDict, mesh: jax.sharding.Mesh | None) -> Any:
    if mesh is None:  # arrays that take no memory
        return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), nn.meta.unbox(boxed))
    where = sharding.shardings(boxed, config.sharding, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), where)


def with_sampling(config: ConfigDict, sampling: Mapping[str, Any], *, name: str) -> ConfigDict:
    """Returns the config with values of `config.sampling` replaced.

    Raises:
      InputError: the stage has no such key, or the value is of another type or out of range.
    """
    plain = config.to_dict()
    for key, value in sampling.items():
        known = plain.get("sampling", {})
        known = {**_UNWRITTEN, **known} if known else known
        if key not in known:
            hint = nearest(key, known) if known else "it has no options for sampling"
            raise InputError(f"{name} has no option sampling.{key}; {hint}")
        kind = type(known[key])
        try:
            plain["sampling"][key] = kind(value)
        except ValueError as error:
            raise InputError(f"{name}: sampling.{key}={value!r} is not of type {kind.__name__}") from error
    return configs.check(ConfigDict(plain).lock())


def check_variance(config: ConfigDict, statistics: Any, *, name: str, folder: str, step: int) -> None:
    """Raises InputError where sampling needs the variance of a network's predictions and nobody has measured it."""
    if config.get("sampling", {}).get("method") == "analytic" and not np.any(statistics["x_start_variance"]):
        raise InputError(
            f"{name}: sampling.method='analytic' needs the variance of its predictions, which is not measured at step "
            f"{step} of {folder}; measure it: python -m unclip_jax.statistics --workdir={folder}"
        )


def check_clip(parts: Mapping[str, Part], *, fingerprint: str = "") -> None:
    """All stages must describe, and where one can still look, have been trained on, the CLIP that is here.

    `fingerprint` is that of its weights, where they are not in memory.
    """
    # A decoder of captions alone has none, whatever its config says of one.
    readers = {name: part for name, part in parts.items() if hasattr(part.stage, "clip")}
    if "clip" not in parts:
        needing = [name for name, part in readers.items() if part.config.frozen.clip]
        if needing:
            raise InputError(f"{needing[0]} needs the CLIP it was trained on, {parts[needing[0]].config.frozen.clip}")
        return
    clip = parts["clip"]
    for name, part in readers.items():
        wrong = base.clip_differences(there=part.config.clip, here=clip.config.model)
        if wrong:
            raise InputError(f"{name} was trained on another CLIP than {clip.workdir}: {'; '.join(wrong)}")
        _check_weights(part, clip, fingerprint)


def _check_weights(part: Part, clip: Part, fingerprint: str) -> None:
    """Compares CLIP's weights with those that the part's run recorded of the CLIP it read."""
    theirs = checkpoint.trained_on(part.workdir, part.step).get("frozen.clip")
    if theirs not in (None, fingerprint or digests.fingerprint(clip.params)):
        raise InputError(
            f"{part.name} was trained on the CLIP that was in {part.config.frozen.clip}, whose weights are not those "
            f"in {clip.workdir}; give that one as clip, or train {part.name} on this one"
        )


def raw_embeddings(part: Part) -> bool:
    """Whether a part works on embeddings as CLIP's heads return them, not on those of length 1."""
    return part.config.get("embedding", {}).get("norm", "unit") == "raw"


def check_units(parts: Mapping[str, Part]) -> None:
    """Priors must make embeddings of the length that the decoder was trained on."""
    decoder = parts.get("decoder")
    if decoder is None or not decoder.config.model.embed_dim:
        return
    for name, part in parts.items():
        if STAGES[name].startswith("prior_") and raw_embeddings(part) != raw_embeddings(decoder):
            lengths = ["as CLIP returns them" if raw_embeddings(p) else "of length 1" for p in (part, decoder)]
            raise InputError(
                f"{name} ({part.workdir}) makes embeddings {lengths[0]}, the decoder ({decoder.workdir}) knows those "
                f"{lengths[1]}; train both with the same config.embedding.norm"
            )


def frozen_of(part: Part, there: Collection[str]) -> dict[str, str]:
    """Returns the networks that a part's functions read beside its own: the stage's name of each -> the part it is.

    Raises:
      InputError: another network takes the last steps of this one, and is not among the parts that are there.
    """
    if STAGES[part.name] == "clip":
        return {}
    frozen = {"clip": "clip"} if "clip" in there else {}
    if hasattr(part.stage, "noised"):  # a decoder that is guided, `stages.clip_guidance`
        frozen[NOISED] = NOISED
    last_steps = part.config.get("sampling", {}).get("last_steps", 0)
    if last_steps:
        last = LAST.get(part.name, "")
        if last not in there:
            raise InputError(
                f"another network takes the last {last_steps} steps of {part.name} ({part.workdir}), and "
                f"{last or 'such a part'} is not there; set sampling.last_steps to 0 to do without it"
            )
        frozen["last"] = last
    return frozen


def check_sizes(parts: Mapping[str, Part]) -> None:
    """Each upsampler must take what the part before it makes."""
    cascade = [name for name in parts if STAGES[name] in ("decoder", "upsampler") and name not in LAST.values()]
    for before, name in zip(cascade, cascade[1:], strict=False):
        stages: list[Any] = [parts[before].stage, parts[name].stage]
        if stages[0].side != stages[1].low_res_side:
            raise InputError(
                f"{name} ({parts[name].workdir}) takes images of {stages[1].low_res_side} pixels, {before} "
                f"({parts[before].workdir}) makes {stages[0].side}; train one for the other, or leave {name} out"
            )
    if "decoder" in parts and "clip" in parts:
        stage: Any = parts["decoder"].stage
        width = parts["clip"].config.model.embed_dim
        if stage.embed_dim and stage.embed_dim != width:
            raise InputError(f"the decoder takes embeddings of {stage.embed_dim} numbers, CLIP makes {width}")
