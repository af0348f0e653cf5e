"""What a stage is, the table of stages, and the few pieces that several of them use.

A stage is a handful of pure functions of `(params, frozen, batch, rng)`. The loop, the mesh, the optimizer, the
checkpoint, the planner and the evaluation job call these and do not know which stage they run.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from unclip_jax.arrays import Embeddings, ExampleKeys, Tokens, from_uint8
from unclip_jax.diffusion import samplers
from unclip_jax.errors import InputError, nearest
from unclip_jax.models.clip import CLIP

Network = TypeVar("Network", bound=nn.Module)
Params = Any
Batch = Mapping[str, jax.Array]
# A metric is a scalar, or (sum, count) where the mean over several steps must be weighted.
Metrics = dict[str, Any]
Predict = Callable[[Params, Any, Batch, jax.Array], Any]

# One line a stage: its name -> the module and class that make it.
TABLE = {
    "clip": ("unclip_jax.stages.clip", "CLIPStage"),
    "prior_ar": ("unclip_jax.stages.prior_ar", "ARPriorStage"),
    "prior_diffusion": ("unclip_jax.stages.prior_diffusion", "DiffusionPriorStage"),
    "decoder": ("unclip_jax.stages.decoder", "DecoderStage"),
    "upsampler": ("unclip_jax.stages.upsampler", "UpsamplerStage"),
}


@runtime_checkable
class OverData(Protocol):
    """Sums over the training data, the same bits on every host and for any number of hosts."""

    def __call__(
        self,
        compute: Callable[[Any, Batch], tuple[jax.Array, ...]],
        measure: Callable[..., Any],
        *,
        limit: int | None = None,
    ) -> Any:
        """The sum of what `measure` returns, over all data or about its first `limit` examples.

        Args:
          compute: fn(frozen, batch) -> arrays with examples along the first axis; compiled, called once per batch.
          measure: fn(*arrays) -> a tree of NumPy float64 or int64 arrays, of any number of examples, 0 included.
          limit: examples, rounded up to whole batches.
        """


@runtime_checkable
class Stage(Protocol):
    """The contract between a stage and everything that drives it.

    Attributes:
      splits_batch: whether the loss of a batch is the mean over its parts, so that gradients can be accumulated.
      vocab_size: of the token fields in its batches (0 if there are none).
    """

    splits_batch: bool
    vocab_size: int

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one global batch of the training data."""

    def predict_specs(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """What each of `predict_fns` reads of a batch; what more it may read, its stage says.

        They run CLIP, also where the training data holds its embeddings: evaluation data does not.
        """

    def init(self, rng: Key[Array, ""]) -> Params:
        """Weights, boxed with logical axis names."""

    def init_frozen(self, rng: Key[Array, ""]) -> dict[str, Any]:
        """What the loss needs and never changes: other networks by name, and "statistics" measured of the data."""

    def fit_statistics(self, over_data: OverData) -> tuple[dict[str, Any], dict[str, float]]:
        """Measures of the data, before the first step, what `frozen["statistics"]` should hold, by name.

        Returns:
          Arrays for the names that are measured, {} where there are none; and numbers that tell how it went.
        """

    def loss(
        self, params: Params, frozen: Any, batch: Batch, rng: Key[Array, ""], *, train: bool
    ) -> tuple[Float[Array, ""], Metrics]:
        """Scalar float32 loss, and metrics. With `train` False nothing is dropped out."""

    def predict_fns(self) -> dict[str, Predict]:
        """Named functions of (params, frozen, batch, rng) that evaluators and samplers call."""


@runtime_checkable
class MeasuresVariance(Protocol):
    """What a stage has besides, if the variance of its reverse steps can be measured (Bao et al. 2022).

    The result stands in `frozen["statistics"]["x_start_variance"]`, float32 [T]; zeros mean that nobody measured it.
    """

    def x_start_errors(
        self, params: Params, frozen: Any, batch: Batch, rng: Key[Array, ""]
    ) -> tuple[Float[Array, "T b"], Float[Array, "b"]]:
        """The mean square over dimensions of x_start less its prediction, at every original timestep, and of x_start.

        The batch is as `batch_spec` says; nothing is dropped.
        """


def create(config: ConfigDict) -> Stage:
    """Returns the stage that `config.stage` names.

    Raises:
      InputError: there is no such stage, or its config does not make a network.
    """
    if config.stage not in TABLE:
        raise InputError(f"config.stage={config.stage!r} is not a stage; {nearest(config.stage, TABLE)}")
    module, name = TABLE[config.stage]
    return getattr(importlib.import_module(module), name)(config)


def compute_dtype(config: ConfigDict) -> jnp.dtype:
    """Returns the dtype of matrix products: "auto" is bfloat16 on TPU and GPU, float32 on CPU."""
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if config.dtype not in known:
        raise InputError(f"config.dtype={config.dtype!r} is unknown; {nearest(config.dtype, [*known, 'auto'])}")
    return jnp.dtype(known[config.dtype])


def network(make: type[Network], fields: Mapping[str, Any] | ConfigDict, dtype: jnp.dtype, *, where: str) -> Network:
    """Returns `make(**fields, dtype=dtype)`; a field that the network does not have is an InputError."""
    known = getattr(make, "__dataclass_fields__", {})
    plain = fields.to_dict() if isinstance(fields, ConfigDict) else dict(fields)
    for field in plain:
        if field not in known:
            raise InputError(f"{where}.{field} is not a field of {make.__name__}; {nearest(field, known)}")
    return make(**plain, dtype=dtype)


def clip_network(config: ConfigDict) -> CLIP:
    """Returns the frozen CLIP that `config.clip` describes. It runs in float32: it is the data of the other stages."""
    if config.clip.get("noised"):
        raise InputError(
            "config.clip.noised: a CLIP of noised images guides decoders; stages embed by one of clean images"
        )
    return network(CLIP, config.clip, jnp.dtype(jnp.float32), where="config.clip")


def clip_differences(there: Mapping[str, Any] | ConfigDict, here: Mapping[str, Any] | ConfigDict) -> list[str]:
    """Says in which fields two sections describe different CLIPs; a field that one leaves out has its default there.

    `remat` may differ: it changes what training keeps in memory, and nothing that is computed.
    """
    apart = []
    for field in _clip_fields():
        default = None if field.default is dataclasses.MISSING else field.default
        value, wanted = there.get(field.name, default), here.get(field.name, default)
        if value != wanted:
            apart.append(f"{field.name}={value!r} there, {wanted!r} here")
    return apart


def clip_fields(clip: CLIP) -> dict[str, Any]:
    """Returns the fields of a CLIP on which what it computes depends, defaults included."""
    return {field.name: getattr(clip, field.name) for field in _clip_fields()}


def _clip_fields() -> list[Any]:
    return [field for field in dataclasses.fields(CLIP) if field.name not in ("remat", "dtype", "parent", "name")]


def pixels(batch_size: int, side: int) -> jax.ShapeDtypeStruct:
    """Spec of a field of square RGB images, uint8 [0, 255]."""
    return jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8)


def token_ids(batch_size: int, length: int) -> jax.ShapeDtypeStruct:
    """Spec of a field of captions as token ids."""
    return jax.ShapeDtypeStruct((batch_size, length), jnp.int32)


def vectors(batch_size: int, width: int) -> jax.ShapeDtypeStruct:
    """Spec of a field of embeddings."""
    return jax.ShapeDtypeStruct((batch_size, width), jnp.float32)


def ids(batch_size: int) -> jax.ShapeDtypeStruct:
    """Spec of the field that numbers examples."""
    return jax.ShapeDtypeStruct((batch_size,), jnp.uint32)


def normalize(z: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Scales embeddings to length 1, in float32."""
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), -1, keepdims=True), 1e-12))


def embed_images(clip: CLIP, params: Params, images: UInt8[Array, "b h w 3"], *, unit: bool = True) -> Embeddings:
    """Returns z_i: CLIP's embeddings of uint8 images, float32, without gradient; of length 1, or as they are."""
    cleanest = (jnp.zeros(images.shape[:1], jnp.int32),) if clip.noised else ()
    z_i: Any = clip.apply(params, from_uint8(images), *cleanest, method="encode_image")
    return jax.lax.stop_gradient(normalize(z_i) if unit else z_i.astype(jnp.float32))


def embed_tokens(clip: CLIP, params: Params, tokens: Tokens, *, unit: bool = True) -> Embeddings:
    """Returns z_t: CLIP's embeddings of captions, float32, without gradient; of length 1, or as they are."""
    z_t: Any = clip.apply(params, tokens, method="encode_text")
    return jax.lax.stop_gradient(normalize(z_t) if unit else z_t.astype(jnp.float32))


def precomputed(config: ConfigDict) -> bool:
    """Whether the training data holds CLIP's embeddings, so that no CLIP runs on it (`config.data.embeddings`)."""
    return bool(config.get("data", {}).get("embeddings"))


def with_embeddings(
    spec: dict[str, jax.ShapeDtypeStruct], width: int, *, texts: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the spec of batches that hold CLIP's outputs, `width` numbers each, in place of what CLIP reads.

    `z_i` stands in for `clip_image` and, with `texts`, `z_t` for `clip_tokens`; as CLIP's heads return them.
    """
    names = {"clip_image": "z_i", **({"clip_tokens": "z_t"} if texts else {})}
    return {names.get(name, name): vectors(x.shape[0], width) if name in names else x for name, x in spec.items()}


def image_embeddings(clip: CLIP, frozen: Any, batch: Batch, *, unit: bool = True) -> Embeddings:
    """Returns z_i of a batch's images: out of its field `z_i`, or where it has none, by running CLIP on them."""
    if "z_i" in batch:
        return normalize(batch["z_i"]) if unit else batch["z_i"]
    return embed_images(clip, frozen["clip"], batch["clip_image"], unit=unit)


def text_embeddings(clip: CLIP, frozen: Any, batch: Batch, *, unit: bool = True) -> Embeddings:
    """Returns z_t of a batch's captions: out of its field `z_t`, or where it has none, by running CLIP on them."""
    if "z_t" in batch:
        return normalize(batch["z_t"]) if unit else batch["z_t"]
    return embed_tokens(clip, frozen["clip"], batch["clip_tokens"], unit=unit)


def negative(clip: CLIP, params: Params, batch: Batch) -> tuple[Tokens, Embeddings] | None:
    """Returns what a prior's null branch reads of a negative prompt, its tokens and its z_t; None where there is none.

    They come in the optional fields `negative_tokens`, for the prior, and `negative_clip_tokens`, for CLIP.
    """
    if "negative_tokens" not in batch:
        return None
    return batch["negative_tokens"], embed_tokens(clip, params, batch["negative_clip_tokens"])


def example_keys(rng: Key[Array, ""], batch: Batch) -> ExampleKeys:
    """One key per example, from its `id`: an image is the same whatever batch it is made in."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, batch["id"])


def noise(rng: Key[Array, ""], batch: Batch) -> samplers.NoiseSource:
    """What an example's noise is drawn from, a key; or the noise itself, where the batch holds it.

    It comes in the optional fields `x_T` [b, ...] and `noise` [b, steps, ...], shaped as what is sampled. With `x_T`
    alone, the steps' noise is drawn.
    """
    if "x_T" not in batch:
        return example_keys(rng, batch)
    drawn = "noise" not in batch and "id" in batch
    return samplers.GivenNoise(batch["x_T"], batch.get("noise"), example_keys(rng, batch) if drawn else None)


def drop(rng: Key[Array, ""], rate: float, batch_size: int) -> Bool[Array, "b"]:
    """True with probability `rate`, independently for each example."""
    return jax.random.bernoulli(rng, rate, (batch_size,))


def draw_timesteps(rng: Key[Array, ""], num_timesteps: int, batch_size: int) -> Int[Array, "b"]:
    """Timesteps uniform over the process (the sampler of the hybrid loss, Nichol & Dhariwal 2021)."""
    return jax.random.randint(rng, (batch_size,), 0, num_timesteps)


def by_quartile(loss: Float[Array, "b"], t: Int[Array, "b"], num_timesteps: int) -> Metrics:
    """The loss of each quarter of the process, least noisy first, as weighted metrics `loss_q0` … `loss_q3`."""
    quartile = 4 * t // num_timesteps
    member = (quartile[None] == jnp.arange(4)[:, None]).astype(jnp.float32)
    sums, counts = member @ loss, member.sum(-1)
    return {f"loss_q{i}": (sums[i], counts[i]) for i in range(4)}
