"""A period of time that all hosts see end at the same step."""

import time

from unclip_jax import hosts

# How often the clock is looked at in each period. A look is one message from process 0 to each of the others.
_LOOKS = 20


class Clock:
    """Rings every so many seconds of process 0's time."""

    def __init__(self, seconds: float):
        """Args: the period; 0 never rings."""
        self._seconds = seconds
        self._began = self._looked = time.monotonic()
        self._step = self._next = 0

    def rings(self, step: int) -> bool:
        """Whether the period is over; to be asked after every step, by all hosts.

        Process 0 says so at steps that it has named before, about every twentieth part of the period.
        """
        if not self._seconds or step < self._next:
            return False
        over, self._next = hosts.from_first("clock", lambda: self._look(step))
        if over:
            self.restart()
        return over

    def restart(self) -> None:
        """Begins a new period."""
        self._began = time.monotonic()

    def _look(self, step: int) -> tuple[bool, int]:
        now = time.monotonic()
        per_step = (now - self._looked) / max(step - self._step, 1)
        self._looked, self._step = now, step
        left = self._seconds - (now - self._began)
        wait = min(self._seconds / _LOOKS, left) if left > 0 else self._seconds / _LOOKS
        return left <= 0, step + max(1, int(wait / max(per_step, 1e-6)))
