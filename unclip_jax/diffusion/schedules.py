"""Noise schedules, and the subsets of their timesteps that samplers visit. Float64 NumPy throughout."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from unclip_jax.errors import InputError, nearest

# GLIDE's hand-tuned subset (appendix B.2): many steps where the image is nearly clean, few where it is nearly noise.
_FAST27_SECTIONS = (10, 10, 3, 2, 2)


def _linear(num_timesteps: int) -> np.ndarray:
    """Ho et al. 2020, section 4, rescaled so that any number of steps ends at about the same noise."""
    scale = 1000 / num_timesteps
    last = 0.02 * scale
    if last >= 1:
        raise InputError(
            f"the linear schedule over {num_timesteps} timesteps needs a beta of {last:g}, but a beta is below 1: "
            "use 21 timesteps or more, or the cosine schedule"
        )
    return np.linspace(1e-4 * scale, last, num_timesteps, dtype=np.float64)


def _cosine(num_timesteps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, equation 17, with s = 0.008 and betas capped at 0.999."""
    offset = 0.008
    time = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bars = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], 0.999)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"cosine": _cosine, "linear": _linear}


def betas(name: str, num_timesteps: int) -> Float[np.ndarray, "t"]:
    """Returns the variances beta_t in (0, 1) that the forward process adds, float64 [num_timesteps].

    Args:
      name: "cosine" (Nichol & Dhariwal 2021, equation 17) or "linear" (Ho et al. 2020, 1e-4 to 0.02 at 1000 steps).
      num_timesteps: length of the process, at least 1 (at least 21 for "linear").

    Raises:
      InputError: for an unknown schedule or an impossible length.
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown noise schedule {name!r}: {nearest(name, SCHEDULES)}")
    if num_timesteps < 1:
        raise InputError(f"a diffusion process has 1 timestep or more, not {num_timesteps}")
    return SCHEDULES[name](num_timesteps)


def sampling_timesteps(num_timesteps: int, spec: int | str) -> Int[np.ndarray, "n"]:
    """Returns the timesteps a sampler visits, in that order: descending int32, indices of the original process.

    Args:
      num_timesteps: length of the process that was trained.
      spec: one of
        an int N, or "N": N steps spread evenly from 0 to the last timestep, both included (N = 1 is the last one);
        "ddimN": N steps with one integer stride, from 0 (Song et al. 2021);
        "a,b,c": the process cut into equal sections from clean to noise, with a, b, c evenly spread steps in each
          (Nichol & Dhariwal 2021);
        "fast27": "10,10,3,2,2" with the noisiest timestep T-1 replaced by T-3 (GLIDE, appendix B.2).

    Raises:
      InputError: if the spec cannot be read, or asks for more steps than the process has.
    """
    if isinstance(spec, str):
        steps = _from_text(num_timesteps, spec)
    else:
        steps = _from_sections(num_timesteps, (spec,))
    return np.asarray(sorted(steps, reverse=True), np.int32)


def _from_text(num_timesteps: int, spec: str) -> list[int]:
    if spec == "fast27":
        steps = _from_sections(num_timesteps, _FAST27_SECTIONS)
        return [*(step for step in steps if step != num_timesteps - 1), num_timesteps - 3]
    if spec.startswith("ddim") and spec[4:].isdecimal():
        return _from_stride(num_timesteps, int(spec[4:]))
    words = [word.strip() for word in spec.split(",")]
    if all(word.isdecimal() for word in words):
        return _from_sections(num_timesteps, tuple(int(word) for word in words))
    raise InputError(
        f"unknown sampling steps {spec!r}: give a number (250), comma-separated counts of equal sections "
        "('10,10,3,2,2'), 'ddim50' for an integer stride, or 'fast27'"
    )


def _from_stride(num_timesteps: int, count: int) -> list[int]:
    _check_count(num_timesteps, count)
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps + 1)}
    close = min(possible, key=lambda other: (abs(other - count), other))
    raise InputError(
        f"no integer stride over {num_timesteps} timesteps gives {count} steps ('ddim{count}'): "
        f"'ddim{close}' is the nearest that does, or give the plain number {count}"
    )


def _from_sections(num_timesteps: int, counts: tuple[int, ...]) -> list[int]:
    """Spreads `counts[k]` steps over the k-th of equal sections; the first sections take the remainder."""
    _check_count(num_timesteps, sum(counts))
    size, remainder = divmod(num_timesteps, len(counts))
    steps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < remainder)
        if not 1 <= count <= length:
            raise InputError(
                f"section {section + 1} of {len(counts)} over {num_timesteps} timesteps has {length} of them, so its "
                f"count must be from 1 to {length}, not {count}"
            )
        if count == 1:
            # A lone step of the whole process starts from pure noise, so it must be the noisiest timestep.
            steps.append(start if len(counts) > 1 else num_timesteps - 1)
        else:
            # round() halves to even, which the published subsets rely on (99.5 becomes 100).
            steps += [start + round(k * (length - 1) / (count - 1)) for k in range(count)]
        start += length
    return steps


def _check_count(num_timesteps: int, count: int) -> None:
    if not 1 <= count <= num_timesteps:
        raise InputError(
            f"{count} sampling steps asked of a process of {num_timesteps} timesteps: "
            f"give a number from 1 to {num_timesteps}"
        )


def log_snr_half(alpha_bars: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
    """Returns lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), the time that DPM-Solver integrates over."""
    return 0.5 * (np.log(alpha_bars) - np.log1p(-alpha_bars))
