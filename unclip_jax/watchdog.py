"""Ends a run that hangs: a stuck loader or a lost network keeps every host waiting, and nothing else would notice.

Heartbeats between hosts come from threads of their own, so they go on while the main thread is stuck. Each host has a
watchdog that wants to be fed after every step. The first that is not fed in time writes the stacks of all threads to
stderr and to `failures/<process>.txt` of the run's folder and tells the other hosts, which do the same; all end with 1.
"""

import faulthandler
import math
import sys
import threading
import time

from unclip_jax import hosts

# Should this process's threads be stuck together (one that holds Python's lock), faulthandler's own needs no lock.
_LATER_SECONDS = 15.0


class Watchdog:
    """Wants `feed` called again and again; not armed before the first call, for a compilation may take its time."""

    def __init__(self, seconds: float):
        """Args: how long it waits; 0 turns it off."""
        self._seconds = seconds
        self._deadline = math.inf
        self._doing = ""
        self._fed = threading.Condition()
        self._thread: threading.Thread | None = None

    def feed(self, doing: str, *, times: float = 1.0) -> None:
        """Puts the deadline off.

        Args:
          doing: what is done until the next call, such as "step 7".
          times: the usual time that this may take.
        """
        if not self._seconds:
            return
        with self._fed:
            self._doing, allowed = doing, self._seconds * times
            sooner = time.monotonic() + allowed < self._deadline
            self._deadline = time.monotonic() + allowed
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
            if sooner:
                self._fed.notify()
        faulthandler.dump_traceback_later(allowed + _LATER_SECONDS, exit=True)

    def rest(self) -> None:
        """Lets it sleep until it is fed again."""
        with self._fed:
            self._deadline = math.inf
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with self._fed:
            while (left := self._deadline - time.monotonic()) > 0:
                self._fed.wait(min(left, _LATER_SECONDS))
            doing = self._doing
        stacks = hosts.stacks()
        said = f"hangs: {doing} did not end in time (config.log.watchdog_seconds)"
        print(f"[{hosts.index()}] {said}\n{stacks}", file=sys.stderr, flush=True)
        hosts.fail(said, stacks)
