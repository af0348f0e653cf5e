"""Samplers as StableHLO that any later JAX of the next six months runs, without this package (`jax.export`).

An export holds one file for each function, one set of weights for each part, and a manifest that says which function
reads what. A function takes (weights, fields, seed): role -> name -> array; field -> array with any number of examples;
uint32. It holds code for TPUs, CUDA GPUs and CPUs.
"""

import dataclasses
import datetime
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from unclip_jax import parts as parts_lib
from unclip_jax import sharding
from unclip_jax.artifacts import components
from unclip_jax.artifacts.components import Component
from unclip_jax.artifacts.folders import Folder
from unclip_jax.errors import InputError, nearest
from unclip_jax.parts import STAGES

PLATFORMS = ("tpu", "cuda", "cpu")
# JAX promises that what one version exports later ones run for at least six months (docs.jax.dev, "Exporting and
# serializing staged-out computations", compatibility guarantees).
LIFETIME = datetime.timedelta(days=180)
# Stage -> its predict functions that an export offers, where it has them.
FUNCTIONS = {
    "clip": ("z_t", "z_i", "raw_z_t", "raw_z_i"),
    "prior_diffusion": ("sample_z_i",),
    "prior_ar": ("sample_z_i",),
    "decoder": ("sample", "pixels"),
    "upsampler": ("sample",),
}
PRIORS = {"diffusion": "prior_diffusion", "ar": "prior_ar", "none": "clip", "dropped": ""}
# Files of an export -> modules here that they are copies of: what runs it, which imports none of this package.
_CONSUMER = {
    "run.py": "artifacts/consumer.py", "bpe.py": "artifacts/bpe.py", "png.py": "artifacts/png.py",
    "tensors.py": "artifacts/tensors.py", "captions.py": "data/captions.py",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of an export, before it is traced.

    Attributes:
      part, name: of the predict function.
      weights: role -> part whose weights are meant: "own", and the frozen networks.
      fields: field -> shape and dtype for one example.
    """

    part: str
    name: str
    weights: dict[str, str]
    fields: dict[str, jax.ShapeDtypeStruct]

    @property
    def label(self) -> str:
        return f"{self.part}.{self.name}"


def functions(found: Mapping[str, Component], steps: Sequence[Mapping[str, Any]] = ()) -> list[Function]:
    """Returns the functions of these parts that an export offers, to be chained by these steps (see `chain`).

    Raises:
      InputError: a function reads a frozen network that is not among the parts.
    """
    made = []
    exact = {step["function"] for step in steps if step["reads"].get("low_res") == "decoder"}
    exact = exact if any(step["function"] == "decoder.pixels" for step in steps) else set()
    raw = _raw(found)
    for part, one in found.items():
        specs = one.stage.predict_specs(1)
        weights = {"own": part, **components.roles(one, found)}
        for name in (name for name in FUNCTIONS[STAGES[part]] if name in specs):
            if part == "clip" and name.startswith("raw_") != raw:
                continue
            fields = dict(specs[name])
            if f"{part}.{name}" in exact:  # what the decoder hands on is not rounded
                fields["low_res"] = jax.ShapeDtypeStruct(fields["low_res"].shape, jnp.float32)
            made.append(Function(part, name, weights, fields))
    return made


def chain(found: Mapping[str, Component], *, prior: str = "") -> list[dict[str, Any]]:
    """Returns the steps from prompts to the last image: function, what each of its fields reads, and what it makes.

    A field reads the tokens of the prompts, as many as the number says, or what an earlier step made by its name; "id"
    numbers the prompts. [] where there is no decoder.

    Args:
      found: the parts.
      prior: a key of PRIORS; by default what there is, a diffusion prior first.

    Raises:
      InputError: no such prior.
    """
    if prior and prior not in PRIORS:
        raise InputError(f"--prior={prior} is unknown; {nearest(prior, PRIORS)}")
    if "decoder" not in found:
        return []
    decoder = found["decoder"].stage
    wanted = PRIORS[prior or _default_prior(found)] if decoder.embed_dim else ""
    if wanted and wanted not in found:
        raise InputError(f"--prior={prior} needs the part {wanted}, which is not in the folder")
    names = {"clip": "raw_z_t" if _raw(found) else "z_t", "prior_diffusion": "sample_z_i", "prior_ar": "sample_z_i"}
    cascade = [name for name in found if name == "decoder" or STAGES[name] == "upsampler"]
    cascade = [name for name in cascade if name not in parts_lib.LAST.values()]
    names["decoder"] = "sample" if decoder.rounds or cascade == ["decoder"] else "pixels"
    steps: list[dict[str, Any]] = []
    for part in [*([wanted] if wanted else []), *cascade]:
        name = names.get(part, "sample")
        sources = {"z_i": "z_i", "low_res": steps[-1]["makes"] if steps else "", "id": "id"}
        fields = found[part].stage.predict_specs(1)[name]
        if not wanted:
            fields = {field: x for field, x in fields.items() if field != "z_i"}
        reads = {field: sources.get(field) or int(x.shape[1]) for field, x in fields.items()}
        steps.append({"function": f"{part}.{name}", "reads": reads, "makes": part if part in cascade else "z_i"})
    return steps


def _raw(found: Mapping[str, Component]) -> bool:
    """Whether the parts know CLIP's embeddings as its heads return them."""
    return any(parts_lib.raw_embeddings(components.as_part(one)) for one in found.values())


def _default_prior(found: Mapping[str, Component]) -> str:
    if found["decoder"].stage.condition == "text":
        return "none"
    known = [name for name in ("diffusion", "ar") if PRIORS[name] in found]
    if not known:
        raise InputError("there is no prior that makes what the decoder reads; train one, or use --prior=none")
    return known[0]


def export(function: Function, found: Mapping[str, Component], abstract: Mapping[str, Any]) -> jax.export.Exported:
    """Traces a function for PLATFORMS and any number of examples.

    Args:
      function: what to trace.
      found: the parts.
      abstract: part -> name -> shape and dtype of its weights, as they are stored.
    """
    predict = found[function.part].stage.predict_fns()[function.name]
    number = list(STAGES).index(function.part)

    def call(weights, fields, seed):
        trees = {role: components.unflattened(_computed(flat)) for role, flat in weights.items()}
        params, statistics = trees.pop("own")
        frozen = {role: tree for role, (tree, _) in trees.items()}
        # As `predictor.Predictor` derives a part's key, so that the images are the same.
        rng = jax.random.fold_in(jax.random.key(seed), number)
        return predict(params, {**frozen, "statistics": statistics}, fields, rng)

    (batch,) = jax.export.symbolic_shape("b")
    fields = {name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for name, x in function.fields.items()}
    weights = {role: abstract[part] for role, part in function.weights.items()}
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    with sharding.on(components.mesh(), found[function.part].config.sharding):
        return jax.export.export(jax.jit(call), platforms=PLATFORMS)(weights, fields, seed)


def _computed(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Weights in float32, as networks hold them, however they are stored."""
    floating = {name for name, x in flat.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {name: x.astype(jnp.float32) if name in floating else x for name, x in flat.items()}


def write(
    folder: Folder,
    found: Mapping[str, Component],
    abstract: Mapping[str, Any],
    *,
    prior: str = "",
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes the functions and what runs them; returns what the manifest says of them.

    Args:
      folder: that of the export.
      found: the parts.
      abstract: part -> name -> shape and dtype of its weights, as they were written.
      prior: see `chain`.
      poll: called before each function.
    """
    steps = chain(found, prior=prior)
    described = {}
    for function in functions(found, steps):
        poll()
        exported = export(function, found, abstract)
        file = f"{function.label}.stablehlo"
        with folder.file(file) as put:
            put(bytes(exported.serialize()))
        described[function.label] = {
            "file": file,
            "weights": function.weights,
            "inputs": {name: _described(x) for name, x in function.fields.items()},
            "output": _described(exported.out_avals[0]),
            "platforms": list(exported.platforms),
            "calling_convention_version": exported.calling_convention_version,
        }
    package = importlib.resources.files("unclip_jax")
    for name, source in _CONSUMER.items():
        folder.text(name, (package / source).read_text(encoding="utf-8"))
    return {"functions": described, "chain": steps}


def _described(x: Any) -> dict[str, Any]:
    return {"dtype": np.dtype(x.dtype).name, "shape": ["b", *(int(n) for n in x.shape[1:])]}
