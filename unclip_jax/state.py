"""The state of a training run: everything a checkpoint holds and a step changes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# Statistics of weights, not of data: true of the step that they are saved with, and of no other. Zeros are none.
OF_WEIGHTS = ("x_start_variance",)


@flax.struct.dataclass
class TrainState:
    """One step's state; a pytree. Like any pytree it may hold shapes or shardings in place of its arrays.

    Attributes:
      step: int32 scalar, steps begun, skipped ones included; also the index of the next batch.
      params: weights, float32.
      ema: their moving average, sharded alike.
      opt_state: the optimizer's state.
      statistics: what the stage measured of its data before the first step, and what a command measured of these
        very weights ({} where there is nothing to measure).
      skipped: int32 scalar, steps that changed nothing because their loss or gradient was not finite.
      streak: int32 scalar, how many of those came last, without a good step since.
    """

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    statistics: Any
    skipped: Any
    streak: Any

    @classmethod
    def create(cls, params: Any, opt_state: Any, statistics: Any) -> "TrainState":
        """A state at step 0 whose moving average is the weights themselves."""
        zero = jnp.zeros((), jnp.int32)
        ema = jax.tree.map(jnp.copy, params)
        return cls(
            step=zero, params=params, ema=ema, opt_state=opt_state, statistics=statistics, skipped=zero, streak=zero
        )

    def last_good(self) -> "TrainState":
        """This state before the `streak` of bad steps that it ends with: they changed nothing but the counters."""
        step, skipped = self.step - self.streak, self.skipped - self.streak
        return dataclasses.replace(self, step=step, skipped=skipped, streak=jnp.zeros_like(self.streak))


def of_data(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statistics that were measured before the first step."""
    return {name: value for name, value in statistics.items() if name not in OF_WEIGHTS}


def forget_weights(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statistics for other weights: those of the data, and zeros for the rest."""
    return {name: jnp.zeros_like(value) if name in OF_WEIGHTS else value for name, value in statistics.items()}
