"""What the diffusion stages share: the process from a config, and one training loss."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from unclip_jax.arrays import ExampleKeys
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.gaussian import GaussianDiffusion
from unclip_jax.errors import InputError, nearest
from unclip_jax.models.clip import CLIP
from unclip_jax.stages import base

# How predictions of x_start may be kept in range, `samplers.thresholded`.
THRESHOLDS = ("static", "dynamic", "none")


def process(config: ConfigDict) -> GaussianDiffusion:
    """Returns the diffusion process of `config.diffusion`; `clip_x_start` c clips predictions to [-c, c]."""
    bound = config.clip_x_start
    return GaussianDiffusion.create(
        schedule=config.schedule,
        num_timesteps=config.num_timesteps,
        prediction=config.prediction,
        variance=config.variance,
        clip_x_start=None if bound is None else (-bound, bound),
        tables=config.get("tables", "float64"),
    )


def sampler(
    diffusion: GaussianDiffusion,
    sampling: ConfigDict,
    *,
    thresholds: Sequence[str] = THRESHOLDS,
    measures_variance: bool = False,
) -> "functools.partial[Array]":
    """Returns `samplers.sample` as `config.sampling` sets it: a function of (denoise_fn, x_T, keys).

    For a stage whose variance is measured it takes `x_start_variance` besides.

    Raises:
      InputError: an unknown method, timesteps that the process does not have, an eta outside [0, 1], a threshold that
        is not one of `thresholds`, or "analytic" where `measures_variance` is False.
    """
    chosen = {"method": sampling.method, "timesteps": levels(diffusion, sampling), "eta": sampling.eta}
    if sampling.method == "analytic" and not measures_variance:
        others = sorted(set(samplers.METHODS) - {"analytic"})
        raise InputError(
            "config.sampling.method='analytic' is for the diffusion prior, of which the variances can be measured; "
            f"this stage has {', '.join(others)}"
        )
    samplers.check(diffusion, **chosen, x_start_variance=jnp.zeros((diffusion.num_timesteps,)))
    threshold = sampling.get("threshold", "static")
    if threshold not in thresholds:
        raise InputError(
            f"config.sampling.threshold={threshold!r} is not one of this stage; {nearest(threshold, thresholds)}"
        )
    diffusion, process_x_start = samplers.thresholded(
        diffusion, threshold, quantile=sampling.get("quantile", samplers.QUANTILE)
    )
    return functools.partial(samplers.sample, diffusion, process_x_start=process_x_start, **chosen)


def inverter(diffusion: GaussianDiffusion, sampling: ConfigDict) -> "functools.partial[Array]":
    """Returns `samplers.ddim_invert` over the timesteps of `config.sampling`: a function of (denoise_fn, x_start)."""
    return functools.partial(samplers.ddim_invert, diffusion, timesteps=levels(diffusion, sampling))


def levels(diffusion: GaussianDiffusion, sampling: ConfigDict) -> int | str | Int[np.ndarray, "n"]:
    """Returns the timesteps that `config.sampling` visits, without as many of the noisiest as `skip_noisiest` says.

    Raises:
      InputError: no timestep would be left.
    """
    skipped = sampling.get("skip_noisiest", 0)
    if not skipped:
        return timesteps(sampling)
    visited = diffusion.respaced(timesteps(sampling)).timesteps[::-1]
    if skipped >= len(visited):
        raise InputError(f"config.sampling.skip_noisiest={skipped}, but there are {len(visited)} steps in all")
    return visited[skipped:]


def timesteps(sampling: ConfigDict) -> int | str:
    """Returns how many steps `config.sampling` asks for, or a named subset such as "fast27"."""
    return int(sampling.timesteps) if sampling.timesteps.isdigit() else sampling.timesteps


def loss(
    diffusion: GaussianDiffusion,
    denoise: Callable[[Array, Array], Array],
    x_start: Float[Array, "b *rest"],
    rng: Key[Array, ""],
) -> tuple[Float[Array, ""], base.Metrics]:
    """The mean loss of `denoise(x_t, t)` at uniform timesteps, with its parts and its quartiles over t."""
    t_rng, eps_rng = jax.random.split(rng)
    t = base.draw_timesteps(t_rng, diffusion.num_timesteps, x_start.shape[0])
    eps = jax.random.normal(eps_rng, x_start.shape, jnp.float32)
    x_t = diffusion.q_sample(x_start=x_start, t=t, eps=eps)
    per_example, parts = diffusion.training_loss(denoise(x_t, t), x_start=x_start, x_t=x_t, t=t, eps=eps)
    metrics: base.Metrics = {name: value.mean() for name, value in parts.items()}
    metrics |= base.by_quartile(parts["mse"], t, diffusion.num_timesteps)
    return per_example.mean(), metrics


def x_start_errors(
    diffusion: GaussianDiffusion,
    denoise: Callable[[Array, Array], Array],
    x_start: Float[Array, "b *rest"],
    keys: ExampleKeys,
) -> Float[Array, "T b"]:
    """What is not known of x_start at each original timestep: the mean square, over dimensions, of x_start less what
    `denoise(x_t, t)` says of it, clipped as in sampling.

    Its expectation is the cov_x0 of Analytic-DPM (Bao et al. 2022, theorem 1, written for x_start). An example's noise
    depends on its key and the timestep only.
    """

    def at(nothing: None, number: Array) -> tuple[None, Array]:
        t = jnp.full((x_start.shape[0],), number, jnp.int32)
        eps = samplers.draw_noise(keys, x_start.shape[1:], step=number)
        x_t = diffusion.q_sample(x_start=x_start, t=t, eps=eps)
        predicted, _ = diffusion.split_output(denoise(x_t, t))
        guess = diffusion.predict_x_start(predicted, x_t=x_t, t=t)
        if diffusion.clip_x_start is not None:
            guess = jnp.clip(guess, *diffusion.clip_x_start)
        return nothing, jnp.square(x_start - guess).mean(axis=tuple(range(1, x_start.ndim)))

    _, errors = jax.lax.scan(at, None, jnp.arange(diffusion.num_timesteps, dtype=jnp.int32))
    return errors


def init_clip(clip: CLIP, rng: Key[Array, ""]) -> base.Params:
    """Returns weights of a frozen CLIP, boxed with logical axis names."""
    images = jnp.zeros((1, clip.image_size, clip.image_size, 3))
    params = clip.init(rng, images, jnp.zeros((1, clip.context_length), jnp.int32), method="read_all")
    assert isinstance(nn.meta.unbox(params), dict)
    return params
