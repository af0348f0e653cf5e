"""The Gaussian diffusion process: forward noising, parameterisations, the learned range of variances, losses.

A process is a sequence of noise levels. Training uses all of them; a sampler uses a subset (`respaced`), which is a
process of its own whose betas follow from consecutive alpha-bars (Nichol & Dhariwal 2021, section 4). Everywhere `t`
is int [b] and counts this process's own levels from the cleanest, 0; `timesteps[t]` is what the network is given.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unclip_jax.arrays import Timesteps
from unclip_jax.diffusion import schedules
from unclip_jax.errors import InputError, nearest

Prediction = Literal["eps", "x_start", "v"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Precision = Literal["float64", "float32"]

# Half the distance between neighbouring 8-bit pixel values in [-1, 1].
_HALF_BIN = 1 / 255
# Least probability of a pixel's bin: bounds the t = 0 term at 40 bits, and stops its gradient beyond.
_LEAST_PROBABILITY = 1e-12

AnyData = Float[Array, "b *rest"]
# What the network returned: twice the channels of the data for a learned range.
ModelOutput = Float[Array, "b ..."]


class Moments(NamedTuple):
    """A Gaussian over x at the next cleaner level: both shaped as x."""

    mean: AnyData
    log_variance: AnyData


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GaussianDiffusion:
    """A diffusion process and how its network speaks of it. Hashed by identity, so it can be closed over under jit.

    Attributes:
      alpha_bars: [levels], descending from nearly 1: the share of signal variance at each level.
      betas: [levels], the variance added from the next cleaner level to each.
      timesteps: int32 [levels], ascending: the original timestep of each level, as the network is given it.
      num_timesteps: length of the original process.
      prediction: what the network predicts: "eps", "x_start", or "v" (Salimans & Ho 2022).
      variance: "learned_range" (the network's second half of channels interpolates between beta~ and beta),
        "fixed_small" (beta~) or "fixed_large" (beta).
      clip_x_start: range that samplers clip the predicted x_start to, or None.
    """

    alpha_bars: Float[np.ndarray, "levels"]
    betas: Float[np.ndarray, "levels"]
    timesteps: Int[np.ndarray, "levels"]
    num_timesteps: int
    prediction: Prediction
    variance: Variance
    clip_x_start: tuple[float, float] | None

    @classmethod
    def create(
        cls,
        *,
        schedule: str = "cosine",
        num_timesteps: int = 1000,
        prediction: str = "eps",
        variance: str = "learned_range",
        clip_x_start: tuple[int | float, int | float] | None = (-1.0, 1.0),
        tables: str = "float64",
    ) -> "GaussianDiffusion":
        """Builds the full process that a network is trained on.

        Args:
          tables: what everything that depends on the noise level alone is computed in: "float64", or "float32", which
            is how diffusers' UnCLIPScheduler has it. That one's rounding is seen at the cleanest levels: its weight of
            x_start at the last step is 0.9995, not 1.

        Raises:
          InputError: for an unknown schedule, prediction, variance or kind of tables, an impossible length or an empty
            clip range.
        """
        choices = {"prediction": Prediction, "variance": Variance, "tables": Precision}
        for (what, known), name in zip(choices.items(), (prediction, variance, tables), strict=True):
            if name not in get_args(known):
                raise InputError(f"unknown diffusion {what} {name!r}: {nearest(name, get_args(known))}")
        if clip_x_start is not None:
            lo, hi = clip_x_start
            if not lo < hi:
                raise InputError(f"clip_x_start is ({lo:g}, {hi:g}), but its first number must be below its second")
            clip_x_start = (float(lo), float(hi))
        betas = schedules.betas(schedule, num_timesteps).astype(tables)
        return cls(
            alpha_bars=np.cumprod(1 - betas, dtype=np.float64).astype(tables),
            betas=betas,
            timesteps=np.arange(num_timesteps, dtype=np.int32),
            num_timesteps=num_timesteps,
            prediction=cast(Prediction, prediction),
            variance=cast(Variance, variance),
            clip_x_start=clip_x_start,
        )

    def respaced(self, timesteps: int | str | Int[np.ndarray, "n"]) -> "GaussianDiffusion":
        """Returns the process restricted to some of its timesteps.

        Args:
          timesteps: a spec of `schedules.sampling_timesteps`, or original timesteps themselves, descending.

        Raises:
          InputError: if the spec cannot be met, or the given timesteps are not strictly descending within the process.
        """
        if isinstance(timesteps, int | str):
            timesteps = schedules.sampling_timesteps(self.num_timesteps, timesteps)
        ascending = np.asarray(timesteps, np.int32)[::-1]
        levels = np.searchsorted(self.timesteps, ascending)
        if len(ascending) == 0 or np.any(np.diff(ascending) <= 0) or not np.isin(ascending, self.timesteps).all():
            raise InputError(
                f"sampling timesteps {np.asarray(timesteps).tolist()} must descend strictly and belong to this process "
                f"of {len(self.timesteps)} timesteps up to {int(self.timesteps[-1])}"
            )
        alpha_bars = self.alpha_bars[levels]
        # Neighbours here that are neighbours there too keep their beta: a difference of two numbers near 1 is inexact.
        betas = np.where(np.diff(levels, prepend=-1) == 1, self.betas[levels], 1 - alpha_bars / _before(alpha_bars))
        return dataclasses.replace(self, alpha_bars=alpha_bars, betas=betas, timesteps=ascending)

    # Tables [levels], in the precision of alpha_bars.

    @functools.cached_property
    def alpha_bars_before(self) -> np.ndarray:
        """Alpha-bar of the next cleaner level; 1, no noise at all, before the first."""
        return _before(self.alpha_bars)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Beta~, Ho et al. 2020, equation 7. Zero at t = 0."""
        return self.betas * (1 - self.alpha_bars_before) / (1 - self.alpha_bars)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Log beta~, with t = 0, where it would be -inf, clipped to that of t = 1 (Nichol & Dhariwal 2021)."""
        if len(self.betas) == 1:
            return np.log(self.betas)
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @functools.cached_property
    def posterior_x_start_weight(self) -> np.ndarray:
        return self.betas * np.sqrt(self.alpha_bars_before) / (1 - self.alpha_bars)

    @functools.cached_property
    def posterior_x_t_weight(self) -> np.ndarray:
        return np.sqrt(1 - self.betas) * (1 - self.alpha_bars_before) / (1 - self.alpha_bars)

    # The forward process.

    def q_sample(self, *, x_start: AnyData, t: Timesteps, eps: AnyData) -> AnyData:
        """Noises x_start to level t: sqrt(alpha_bar) x_start + sqrt(1 - alpha_bar) eps."""
        signal, noise = self._signal_and_noise(t, x_start)
        return signal * x_start + noise * eps

    def q_posterior(self, *, x_start: AnyData, x_t: AnyData, t: Timesteps) -> Moments:
        """The Gaussian q(x_{t-1} | x_t, x_start), Ho et al. 2020, equations 6 and 7."""
        mean = (
            gather(self.posterior_x_start_weight, t, x_t) * x_start + gather(self.posterior_x_t_weight, t, x_t) * x_t
        )
        return Moments(mean, jnp.broadcast_to(gather(self.posterior_log_variance, t, x_t), x_t.shape))

    def _signal_and_noise(self, t: Timesteps, like: AnyData) -> tuple[Array, Array]:
        return gather(np.sqrt(self.alpha_bars), t, like), gather(np.sqrt(1 - self.alpha_bars), t, like)

    # What the network's output says.

    def split_output(self, model_output: ModelOutput) -> tuple[AnyData, AnyData | None]:
        """Splits the last axis into prediction and variance channels, float32; None where the variance is fixed."""
        model_output = model_output.astype(jnp.float32)
        if self.variance != "learned_range":
            return model_output, None
        predicted, v_range = jnp.split(model_output, 2, axis=-1)
        return predicted, v_range

    def predict_x_start(self, predicted: AnyData, *, x_t: AnyData, t: Timesteps) -> AnyData:
        """Converts the prediction channels to x_start, unclipped."""
        signal, noise = self._signal_and_noise(t, x_t)
        if self.prediction == "x_start":
            return predicted
        if self.prediction == "v":
            return signal * x_t - noise * predicted
        return (x_t - noise * predicted) / signal

    def predict_eps(self, predicted: AnyData, *, x_t: AnyData, t: Timesteps) -> AnyData:
        """Converts the prediction channels to eps."""
        signal, noise = self._signal_and_noise(t, x_t)
        if self.prediction == "eps":
            return predicted
        if self.prediction == "v":
            return noise * x_t + signal * predicted
        return (x_t - signal * predicted) / noise

    def eps_from_x_start(self, x_start: AnyData, *, x_t: AnyData, t: Timesteps) -> AnyData:
        """The eps that x_t holds if its x_start is this one."""
        signal, noise = self._signal_and_noise(t, x_t)
        return (x_t - signal * x_start) / noise

    def target(self, *, x_start: AnyData, t: Timesteps, eps: AnyData) -> AnyData:
        """What the prediction channels should be."""
        signal, noise = self._signal_and_noise(t, x_start)
        if self.prediction == "x_start":
            return x_start
        if self.prediction == "v":
            return signal * eps - noise * x_start
        return eps

    def log_variance(self, v_range: AnyData | None, *, t: Timesteps, like: AnyData) -> AnyData:
        """Log of the reverse step's variance, shaped as `like`.

        Learned: frac log beta + (1 - frac) log beta~, frac = (v + 1) / 2, v unbounded (Nichol & Dhariwal 2021,
        equation 15). Fixed: log beta~ or log beta, the latter with beta~_1 at t = 0.
        """
        small = gather(self.posterior_log_variance, t, like)
        if self.variance == "fixed_small":
            return jnp.broadcast_to(small, like.shape)
        if self.variance == "fixed_large":
            large = np.log(np.append(np.exp(self.posterior_log_variance[:1]), self.betas[1:]))
            return jnp.broadcast_to(gather(large, t, like), like.shape)
        assert v_range is not None
        large = gather(np.log(self.betas), t, like)
        return small + (v_range + 1) / 2 * (large - small)

    def p_mean_variance(self, model_output: ModelOutput, *, x_t: AnyData, t: Timesteps) -> Moments:
        """The reverse step p(x_{t-1} | x_t) that the network's raw output describes, x_start not clipped."""
        predicted, v_range = self.split_output(model_output)
        x_start = self.predict_x_start(predicted, x_t=x_t, t=t)
        mean = self.q_posterior(x_start=x_start, x_t=x_t, t=t).mean
        return Moments(mean, self.log_variance(v_range, t=t, like=x_t))

    # Training.

    def training_loss(
        self, model_output: ModelOutput, *, x_start: AnyData, x_t: AnyData, t: Timesteps, eps: AnyData
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, "b"]]]:
        """The loss of each example, float32, and its parts.

        Fixed variance: the mean squared error of the predicted quantity, {"mse"}. Learned range: the hybrid
        mse + vb * num_timesteps / 1000 (Nichol & Dhariwal 2021, equation 16, lambda = 0.001), {"mse", "vb"}, where
        vb is the variational bound's term in bits per dimension and teaches the variance channels only. Its t = 0
        term takes x_start for 8-bit pixels in [-1, 1].

        Args:
          model_output: what the network returned for (x_t, t): [b, ..., c], or [b, ..., 2c] for a learned range.
          x_start: clean data [b, ..., c].
          x_t: `q_sample` of x_start, t and eps.
          t: level of each example.
          eps: the noise in x_t.
        """
        predicted, v_range = self.split_output(model_output)
        mse = _mean_of_example(jnp.square(self.target(x_start=x_start, t=t, eps=eps) - predicted))
        if v_range is None:
            return mse, {"mse": mse}
        # Through the mean this term is noisy and would swamp the MSE, so it reaches the variance channels alone.
        frozen = jnp.concatenate([jax.lax.stop_gradient(predicted), v_range], axis=-1)
        vb = self.variational_bound(frozen, x_start=x_start, x_t=x_t, t=t)
        return mse + vb * (self.num_timesteps / 1000), {"mse": mse, "vb": vb}

    def variational_bound(
        self, model_output: ModelOutput, *, x_start: AnyData, x_t: AnyData, t: Timesteps
    ) -> Float[Array, "b"]:
        """One term of the bound, bits per dimension: KL(q || p), or the pixels' NLL at t = 0 (Ho et al. 2020)."""
        q = self.q_posterior(x_start=x_start, x_t=x_t, t=t)
        p = self.p_mean_variance(model_output, x_t=x_t, t=t)
        divergence = 0.5 * (
            p.log_variance
            - q.log_variance
            - 1
            + jnp.exp(q.log_variance - p.log_variance)
            + jnp.square(q.mean - p.mean) * jnp.exp(-p.log_variance)
        )
        likelihood = _pixel_log_likelihood(x_start, p)
        nats = jnp.where(t == 0, -_mean_of_example(likelihood), _mean_of_example(divergence))
        return nats / math.log(2)


def _before(alpha_bars: np.ndarray) -> np.ndarray:
    return np.append(alpha_bars.dtype.type(1), alpha_bars[:-1])


def gather(table: np.ndarray, t: Timesteps, like: AnyData) -> Array:
    """Looks up a table at t [b] and returns float32 [b, 1, ...] that broadcasts against `like`."""
    return jnp.asarray(table, jnp.float32)[t].reshape(t.shape + (1,) * (like.ndim - 1))


def _mean_of_example(values: AnyData) -> Float[Array, "b"]:
    return values.mean(axis=tuple(range(1, values.ndim)))


def _pixel_log_likelihood(x_start: AnyData, p: Moments) -> AnyData:
    """Log of the probability that p gives the 8-bit bin of each pixel (Ho et al. 2020, equation 13), in nats."""
    distance = x_start - p.mean
    # Mirrored into the lower tail, where a difference of distribution functions keeps its digits.
    mirrored = jnp.where(distance > 0, -1.0, 1.0)
    inverse_std = jnp.exp(-0.5 * p.log_variance)
    upper = jax.scipy.special.ndtr((mirrored * distance + _HALF_BIN) * inverse_std)
    lower = jax.scipy.special.ndtr((mirrored * distance - _HALF_BIN) * inverse_std)
    inside = upper - lower
    # The outermost bins reach to infinity.
    darkest = jax.scipy.special.ndtr((distance + _HALF_BIN) * inverse_std)
    brightest = jax.scipy.special.ndtr(-(distance - _HALF_BIN) * inverse_std)
    probability = jnp.where(x_start < -0.999, darkest, jnp.where(x_start > 0.999, brightest, inside))
    return jnp.log(jnp.maximum(probability, _LEAST_PROBABILITY))
