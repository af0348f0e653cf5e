"""Steps whose loss or gradient is not finite: they change nothing, are counted, and too many in a row end the run."""

import collections
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.errors import InputError

_LOG = logging.getLogger(__name__)


class Guard:
    """Watches, one step behind so that the device never waits, for losses and gradients that are not finite."""

    def __init__(self, limit: int):
        """Args: how many such steps in a row end the run."""
        self._limit = limit
        self._pending: collections.deque[tuple[int, Mapping[str, Any], Any]] = collections.deque()
        self._bad: list[tuple[int, list[int]]] = []
        self.last_step_good = True

    def watch(self, step: int, report: Mapping[str, Any], ids: np.ndarray | None) -> None:
        """Takes a step's report and its examples' ids, and looks at those of the step before."""
        self._pending.append((step, report, ids))
        if len(self._pending) > 1:
            self._check(*self._pending.popleft())

    def drain(self) -> None:
        """Looks at all that it was given, as must be done before a save."""
        while self._pending:
            self._check(*self._pending.popleft())

    def _check(self, step: int, report: Mapping[str, Any], ids: np.ndarray | None) -> None:
        streak = int(report["streak"])
        self.last_step_good = streak == 0
        if not streak:
            self._bad.clear()
            return
        names = [] if ids is None else [int(i) for i in ids]
        self._bad.append((step, names))
        _LOG.warning(
            "step %d skipped: loss %g, gradient norm %g", step, float(report["loss"]), float(report["grad_norm"])
        )
        if streak >= self._limit:
            first, examples = self._bad[0]
            raise InputError(
                f"{streak} steps in a row had a loss or gradient that is not finite, from step {first} (examples "
                f"{examples[:16]}{' …' if len(examples) > 16 else ''}); the last checkpoint is from before them"
            )
