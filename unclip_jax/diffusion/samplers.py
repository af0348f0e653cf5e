"""Samplers: each is one pure step, and one scan drives them all.

N timesteps are N network calls, and the last ends at zero noise. A new sampler is a function of a `Step` that returns
x at the next cleaner level, and its name in `METHODS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unclip_jax.arrays import ExampleKeys, Timesteps
from unclip_jax.diffusion.gaussian import AnyData, GaussianDiffusion, ModelOutput, Variance, gather
from unclip_jax.diffusion.schedules import log_snr_half
from unclip_jax.errors import InputError, nearest

Denoiser = Callable[[AnyData, Timesteps], ModelOutput]
XStartProcessor = Callable[[AnyData, Timesteps], AnyData]
# Of (x_t, original timesteps): the gradient by x_t of the log-probability of what is wanted, times any scale.
Guide = Callable[[AnyData, Timesteps], AnyData]

# Of |x_start| in dynamic thresholding, where a config names no other.
QUANTILE = 0.995

# Where in an example's stream of noise x_T stands: far past any step.
_INITIAL = 2**31 - 1


class GivenNoise(NamedTuple):
    """Noise that is given, in place of keys to draw it from: what another implementation drew.

    Attributes:
      x_T: where sampling starts.
      steps: standard normal, one after another as the steps use them; what stands after a sampler's last is not read.
        None where steps draw none, or draw theirs from the keys.
      keys: one per example, for steps whose noise is not given.
    """

    x_T: Float[Array, "b *rest"]
    steps: Float[Array, "b n *rest"] | None = None
    keys: ExampleKeys | None = None


NoiseSource = ExampleKeys | GivenNoise


def draw_noise(keys: NoiseSource, shape: tuple[int, ...], *, step: int | Int[Array, ""]) -> AnyData:
    """Standard normal float32 [b, *shape] of one step; an example's noise depends on its own key and the step only.

    Raises:
      InputError: noise that is given has another shape, or none is given of steps.
    """
    if isinstance(keys, GivenNoise):
        if keys.steps is None and keys.keys is not None:
            return draw_noise(keys.keys, shape, step=step)
        if keys.steps is None or keys.steps.shape[2:] != shape:
            found = "none" if keys.steps is None else keys.steps.shape[2:]
            raise InputError(f"each step of this sampler adds noise of shape {shape}; given is {found}")
        return keys.steps[:, step]
    folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(folded)


def initial_noise(keys: NoiseSource, shape: tuple[int, ...]) -> AnyData:
    """Draws x_T [b, *shape] from the same keys that `sample` takes; no step of `sample` draws this noise again.

    Raises:
      InputError: noise that is given has another shape.
    """
    if isinstance(keys, GivenNoise):
        if keys.x_T.shape[1:] != shape:
            raise InputError(f"sampling starts from noise of shape {shape}; given is {keys.x_T.shape[1:]}")
        return keys.x_T
    return draw_noise(keys, shape, step=_INITIAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """All that a sampler may use to go from level t to the next cleaner one.

    Attributes:
      diffusion: the process restricted to the sampled timesteps.
      x_t: current x.
      t: int [b], its level in `diffusion`.
      x_start: predicted, processed and clipped.
      eps: the noise that agrees with x_t and x_start.
      v_range: variance channels of a learned range, else None.
      previous_x_start: x_start of the step before (zeros at the first).
      gradient: what ancestral steps add to their mean, times its variance; None where nothing guides, and for the
        other methods, which have it in x_start and eps.
      noise: draws this step's standard normal noise.
      eta: DDIM's share of fresh noise.
      x_start_variance: float32 [T] over the original timesteps, or None.
    """

    diffusion: GaussianDiffusion
    x_t: AnyData
    t: Timesteps
    x_start: AnyData
    eps: AnyData
    v_range: AnyData | None
    previous_x_start: AnyData
    gradient: AnyData | None
    noise: Callable[[], AnyData]
    eta: int | float
    x_start_variance: Float[Array, "T"] | None

    def lookup(self, table: np.ndarray) -> Array:
        return gather(table, self.t, self.x_t)

    def not_last(self) -> Array:
        """1.0, or 0.0 at the last step, after which there is no noise."""
        return self.lookup(np.arange(len(self.diffusion.alpha_bars)) > 0)

    def ancestral(self, deviation: Float[Array, "b ..."]) -> AnyData:
        """Draws the reverse step with this standard deviation. Guidance moves its mean (GLIDE, section 2.4)."""
        mean = self.diffusion.q_posterior(x_start=self.x_start, x_t=self.x_t, t=self.t).mean
        if self.gradient is not None:
            mean = mean + jnp.square(deviation) * self.gradient
        return mean + self.not_last() * deviation * self.noise()


def _ddpm(step: Step, *, variance: Variance | None = None) -> AnyData:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the process's own choice of variance, or a fixed one."""
    process = step.diffusion if variance is None else dataclasses.replace(step.diffusion, variance=variance)
    return step.ancestral(jnp.exp(0.5 * process.log_variance(step.v_range, t=step.t, like=step.x_t)))


def _analytic(step: Step) -> AnyData:
    """Ancestral sampling with the optimal variance (Bao et al. 2022, theorem 1): the posterior's own, plus what is
    not known of x_start."""
    process = step.diffusion
    assert step.x_start_variance is not None
    unknown = step.x_start_variance[jnp.asarray(process.timesteps)[step.t]]
    unknown = jnp.maximum(unknown, 0).reshape(step.t.shape + (1,) * (step.x_t.ndim - 1))
    variance = step.lookup(process.posterior_variance) + step.lookup(process.posterior_x_start_weight**2) * unknown
    return step.ancestral(jnp.sqrt(variance))


def _ddim(step: Step) -> AnyData:
    """DDIM (Song et al. 2021, equations 12 and 16); eta = 0 is deterministic, eta = 1 ancestral with beta~."""
    process = step.diffusion
    after = process.alpha_bars_before
    variance = step.eta**2 * process.posterior_variance
    x = step.lookup(np.sqrt(after)) * step.x_start + step.lookup(np.sqrt(1 - after - variance)) * step.eps
    return x if step.eta == 0 else x + step.lookup(np.sqrt(variance)) * step.noise()


def _dpmpp_2m(step: Step) -> AnyData:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); its first and last steps are of first order."""
    process = step.diffusion
    signal, noise = np.sqrt(process.alpha_bars), np.sqrt(1 - process.alpha_bars)
    signal_after, noise_after = np.sqrt(process.alpha_bars_before), np.sqrt(1 - process.alpha_bars_before)
    # h = lambda(after) - lambda(t); the weight of the slope is h / (2 h_previous).
    slope = np.zeros_like(signal)
    time = log_snr_half(process.alpha_bars)
    if len(slope) > 2:
        slope[1:-1] = (time[:-2] - time[1:-1]) / (2 * (time[1:-1] - time[2:]))
    x_start = step.x_start + step.lookup(slope) * (step.x_start - step.previous_x_start)
    return step.lookup(noise_after / noise) * step.x_t + (
        step.lookup(signal_after - signal * noise_after / noise) * x_start
    )


METHODS: dict[str, Callable[[Step], AnyData]] = {
    "ddpm": _ddpm,
    "ddpm_small": functools.partial(_ddpm, variance="fixed_small"),
    "ddpm_large": functools.partial(_ddpm, variance="fixed_large"),
    "analytic": _analytic,
    "ddim": _ddim,
    "dpmpp_2m": _dpmpp_2m,
}
# Those that guidance reaches through `Step.ancestral`.
_ANCESTRAL = ("ddpm", "ddpm_small", "ddpm_large", "analytic")


def sample(
    diffusion: GaussianDiffusion,
    denoise_fn: Denoiser,
    x_T: AnyData,
    keys: NoiseSource,
    *,
    method: str = "ddpm",
    timesteps: int | str | Int[np.ndarray, "n"],
    eta: int | float = 0.0,
    process_x_start: XStartProcessor | None = None,
    guide: Guide | None = None,
    x_start_variance: Float[Array, "T"] | None = None,
) -> AnyData:
    """Samples x_0, float32, shaped as x_T, with one network call per timestep.

    Args:
      diffusion: the full process the network was trained on.
      denoise_fn: fn(x_t, t) -> the network's raw output, with t the original timestep, int32 [b].
      x_T: noise at the first of the timesteps; see `initial_noise`.
      keys: one key per example; an example's sample does not depend on the batch it is in. Or the noise itself.
      method: a key of METHODS: "ddpm" (with the variance the process was trained with), "ddpm_small" and "ddpm_large"
        (with beta~ or beta, whatever it was trained with), "analytic", "ddim" or "dpmpp_2m".
      timesteps: a spec of `schedules.sampling_timesteps`, or original timesteps, descending.
      eta: DDIM's share of fresh noise, in [0, 1].
      process_x_start: fn(x_start, t) -> x_start, applied to every prediction before it is clipped to
        `diffusion.clip_x_start`: dynamic thresholding, or pasting a known region.
      guide: fn(x_t, t) -> the scaled gradient of a log-probability, such as a noised CLIP's similarity. Ancestral steps
        add it to their mean, times the variance (Dhariwal & Nichol 2021, algorithm 1); for the others it joins the
        score (algorithm 2), here before x_start is clipped: where there is hardly any signal, what it adds is large.
      x_start_variance: for "analytic": E |x_start - prediction|^2 per dimension at each original timestep, [T].

    Raises:
      InputError: for an unknown method, timesteps the process does not have, an eta outside [0, 1], "analytic"
        without variances, or given noise of too few steps.
    """
    process = check(diffusion, method=method, timesteps=timesteps, eta=eta, x_start_variance=x_start_variance)
    count, batch, shape = len(process.timesteps), x_T.shape[0], x_T.shape[1:]
    if isinstance(keys, GivenNoise) and keys.steps is not None and keys.steps.shape[1] < count - 1:
        raise InputError(f"{count} steps add noise {count - 1} times; given is that of {keys.steps.shape[1]}")
    x_T = x_T.astype(jnp.float32)

    def advance(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        x_t, previous_x_start = carry
        t = jnp.full((batch,), count - 1 - number, jnp.int32)
        gradient = None if guide is None else guide(x_t, jnp.asarray(process.timesteps, jnp.int32)[t])
        joins = None if method in _ANCESTRAL else gradient
        x_start, eps, v_range = _predict(process, denoise_fn, x_t, t, process_x_start, joins)
        step = Step(
            diffusion=process,
            x_t=x_t,
            t=t,
            x_start=x_start,
            eps=eps,
            v_range=v_range,
            previous_x_start=previous_x_start,
            gradient=gradient if joins is None else None,
            noise=lambda: draw_noise(keys, shape, step=number),
            eta=eta,
            x_start_variance=x_start_variance,
        )
        return (METHODS[method](step), x_start), None

    (x_0, _), _ = jax.lax.scan(advance, (x_T, jnp.zeros_like(x_T)), jnp.arange(count, dtype=jnp.int32))
    return x_0


def ddim_invert(
    diffusion: GaussianDiffusion,
    denoise_fn: Denoiser,
    x_start: AnyData,
    *,
    timesteps: int | str | Int[np.ndarray, "n"],
) -> AnyData:
    """Finds the x_T from which DDIM (eta 0, the same timesteps) makes x_start (Dhariwal & Nichol 2021, appendix F).

    One network call per timestep. Each step uses the noise predicted where it starts, so the error falls as 1/N.
    Predictions are not clipped. To leave out the noisiest step, which adds artifacts, give both this function and
    `sample` the timesteps without their first.

    Returns:
      x at the level of the first (noisiest) of the timesteps, float32, shaped as x_start.
    """
    process = diffusion.respaced(timesteps)
    count, batch = len(process.timesteps), x_start.shape[0]
    signal = jnp.asarray(np.sqrt(process.alpha_bars), jnp.float32)
    noise = jnp.asarray(np.sqrt(1 - process.alpha_bars), jnp.float32)

    def advance(x: Array, number: Array) -> tuple[Array, None]:
        # The clean image has no timestep of its own: its noise is read at the cleanest one.
        t = jnp.full((batch,), jnp.maximum(number - 1, 0), jnp.int32)
        predicted, _ = process.split_output(denoise_fn(x, jnp.asarray(process.timesteps)[t]))
        eps = process.predict_eps(predicted, x_t=x, t=t)
        signal_from = jnp.where(number == 0, 1.0, signal[t[0]])
        noise_from = jnp.where(number == 0, 0.0, noise[t[0]])
        clean = (x - noise_from * eps) / signal_from
        return signal[number] * clean + noise[number] * eps, None

    x_T, _ = jax.lax.scan(advance, x_start.astype(jnp.float32), jnp.arange(count, dtype=jnp.int32))
    return x_T


def thresholded(
    diffusion: GaussianDiffusion, threshold: str, *, quantile: int | float = QUANTILE
) -> tuple[GaussianDiffusion, XStartProcessor | None]:
    """Returns the process and the `process_x_start` that keep predictions of x_start in range in one of three ways.

    Args:
      diffusion: a process.
      threshold: "static" clips to the process's own `clip_x_start`; "dynamic" brings each example into that range by
        `dynamic_threshold`; "none" leaves predictions as they are.
      quantile: of "dynamic".

    Raises:
      InputError: an unknown way, a quantile outside (0, 1], or "dynamic" for a process without a range around zero.
    """
    if threshold == "static":
        return diffusion, None
    if threshold == "none":
        return dataclasses.replace(diffusion, clip_x_start=None), None
    if threshold != "dynamic":
        raise InputError(f"unknown threshold {threshold!r}: {nearest(threshold, ('static', 'dynamic', 'none'))}")
    low, high = diffusion.clip_x_start or (0.0, 0.0)
    if high <= 0 or low != -high:
        raise InputError(
            f"the threshold 'dynamic' brings predictions into a range [-c, c], but the process's clip_x_start is "
            f"{diffusion.clip_x_start}: give it one, or use the threshold 'none'"
        )
    return diffusion, dynamic_threshold(quantile, bound=high)


def dynamic_threshold(quantile: int | float = QUANTILE, *, bound: int | float = 1.0) -> XStartProcessor:
    """Returns a processor that scales each example so that this quantile of |x_start|, if above `bound`, becomes it
    (Saharia et al. 2022, section 2.3).

    Raises:
      InputError: for a quantile outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise InputError(f"the quantile of dynamic thresholding is {quantile:g}, but must be in (0, 1]")

    def process(x_start: AnyData, t: Timesteps) -> AnyData:
        del t
        axes = tuple(range(1, x_start.ndim))
        limit = jnp.maximum(jnp.quantile(jnp.abs(x_start), quantile, axis=axes, keepdims=True), bound)
        return jnp.clip(x_start, -limit, limit) * (bound / limit)

    return process


def _predict(
    process: GaussianDiffusion,
    denoise_fn: Denoiser,
    x_t: Array,
    t: Array,
    process_x_start: XStartProcessor | None,
    gradient: Array | None,
) -> tuple[Array, Array, Array | None]:
    """Calls the network once; x_start, and an eps that agrees with it even where it was guided or clipped."""
    timesteps = jnp.asarray(process.timesteps, jnp.int32)[t]
    predicted, v_range = process.split_output(denoise_fn(x_t, timesteps))
    x_start = process.predict_x_start(predicted, x_t=x_t, t=t)
    if gradient is not None:
        x_start = x_start + gather((1 - process.alpha_bars) / np.sqrt(process.alpha_bars), t, x_t) * gradient
    if process_x_start is not None:
        x_start = process_x_start(x_start, timesteps)
    if process.clip_x_start is not None:
        x_start = jnp.clip(x_start, *process.clip_x_start)
    if gradient is None and process_x_start is None and process.clip_x_start is None:
        return x_start, process.predict_eps(predicted, x_t=x_t, t=t), v_range
    return x_start, process.eps_from_x_start(x_start, x_t=x_t, t=t), v_range


def check(
    diffusion: GaussianDiffusion,
    *,
    method: str,
    timesteps: int | str | Int[np.ndarray, "n"],
    eta: int | float,
    x_start_variance: Float[Array, "T"] | None = None,
) -> GaussianDiffusion:
    """Returns the process at the sampled timesteps; raises what `sample` would, before there is anything to sample."""
    if method not in METHODS:
        raise InputError(f"unknown sampling method {method!r}: {nearest(method, METHODS)}")
    if not 0 <= eta <= 1:
        raise InputError(f"DDIM's eta is {eta:g}, but must be in [0, 1]")
    if eta and method != "ddim":
        raise InputError(f"eta is {eta:g}, but the sampling method {method!r} has none: use eta 0 or the method 'ddim'")
    if method == "analytic" and x_start_variance is None:
        raise InputError("the sampling method 'analytic' needs x_start_variance, one number per original timestep")
    if x_start_variance is not None and x_start_variance.shape != (diffusion.num_timesteps,):
        raise InputError(
            f"x_start_variance has shape {x_start_variance.shape}, but must hold one number for each of the process's "
            f"{diffusion.num_timesteps} timesteps"
        )
    return diffusion.respaced(timesteps)
