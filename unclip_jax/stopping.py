"""How a program stops when it is told to, by SIGTERM or Ctrl-C: at a point that all hosts agree on, or at once.

    stopping = Stopping()                      # first of all, in the main thread
    for step in …:
        …
        if stopping.poll():                    # by every host, equally often
            save()
            return programs.REQUEUE

A thread hears the signals, for Python's own handlers wait for the main thread, which may be compiling for minutes. On
several hosts the one that hears it tells the others; each says how often it has polled, and all stop at the poll after
the farthest of them. Where the main thread does not come by for `GRACE_SECONDS` and nothing would be lost (see
`disposable`), the process ends with 42 without it; on several hosts, if that is so on all of them.
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from unclip_jax import hosts, programs

_LOG = logging.getLogger(__name__)
GRACE_SECONDS = 4.0
_LOOK_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAVE, _LEAVE = "save", "leave"


@runtime_checkable
class Polled(Protocol):
    """What loops ask: a `Stopping`, or in tests something that says what it likes."""

    def poll(self) -> bool:
        """Whether to stop."""


class Stopped(Exception):
    """Raised by `Stopping.check` where all hosts stop: what is above saves and ends with programs.REQUEUE."""


class Stopping:
    """Whether to stop. The newest one of a process hears its signals; it must be made in the main thread."""

    def __init__(self, *, disposable: Callable[[], bool] = lambda: True):
        """Takes over SIGTERM and SIGINT.

        Args:
          disposable: whether ending the process now, at any point, would lose nothing; may be set anew at any time.
        """
        self.disposable = disposable
        self._lock = threading.Lock()
        self._polls = 0
        self._asked = threading.Event()
        self._stop_at = 0
        self._stop_at_known = threading.Event()
        self._vote = ""
        self._agreed = threading.Event()  # that there is something to save
        _Bell.rings_for(self)
        hosts.when_joined(lambda: hosts.watch("stop", self._stop))

    @property
    def asked(self) -> bool:
        """Whether this run was asked to stop; of several hosts not all may know it yet."""
        return self._asked.is_set()

    def poll(self) -> bool:
        """Whether to stop here. Several hosts must poll equally often, and all get True at the same poll."""
        with self._lock:
            self._polls += 1
            if not self._asked.is_set():
                return False
        self._stop_at_known.wait()
        if self._polls < self._stop_at:
            return False
        self._say(_SAVE)
        self._agreed.wait()
        return True

    def check(self) -> None:
        """Polls, and raises Stopped."""
        if self.poll():
            raise Stopped

    def now(self) -> None:
        """Ends a process that works alone and has nothing to save; for loops that are not the same on all hosts."""
        if hosts.count() == 1 and self.poll():
            _LOG.info("stopped before there was anything to save; run the same command to begin again")
            raise SystemExit(programs.REQUEUE)

    def heard(self, number: int) -> None:
        """Called by a thread, for each signal."""
        name = signal.Signals(number).name
        if hosts.count() > 1:
            hosts.tell("stop", f"process {hosts.index()} was sent {name}")
        elif not self.asked:
            threading.Thread(target=self._stop, args=(name,), name="stopping", daemon=True).start()
        elif number == signal.SIGINT:  # a second Ctrl-C does not wait; platforms may well send SIGTERM twice
            hosts.leave(programs.REQUEUE)

    def _stop(self, why: str) -> None:
        """Comes to terms with the other hosts; runs in a thread of its own."""
        _LOG.info("stopping: %s", why)
        with self._lock:
            self._asked.set()
            polls = self._polls
        self._stop_at = max(hosts.gather("polls", polls)) + (hosts.count() > 1)
        self._stop_at_known.set()
        began = time.monotonic()
        while not self._vote:
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() - began > GRACE_SECONDS and self.disposable():
                self._say(_LEAVE)
        if set(hosts.gather("vote", self._vote)) == {_LEAVE}:
            _LOG.info("stopped while there was nothing to save; run the same command to go on")
            hosts.leave(programs.REQUEUE)
        self._agreed.set()

    def _say(self, vote: str) -> None:
        with self._lock:
            self._vote = self._vote or vote


def _nothing(number: int, frame: object) -> None:
    """What Python does at a signal, for the thread does it all."""


class _Bell:
    """What Python rings when a signal comes, whatever the main thread is doing; made once for a process."""

    _sockets: tuple[socket.socket, socket.socket] | None = None
    _stopping: Stopping | None = None

    @classmethod
    def rings_for(cls, stopping: Stopping) -> None:
        """Has this object hear the signals from now on."""
        cls._stopping = stopping
        if cls._sockets is None:
            cls._sockets = socket.socketpair()
            cls._sockets[1].setblocking(False)
            threading.Thread(target=cls._listen, args=(cls._sockets[0],), name="signals", daemon=True).start()
        for number in _SIGNALS:
            signal.signal(number, _nothing)  # or Python would not ring
        signal.set_wakeup_fd(cls._sockets[1].fileno(), warn_on_full_buffer=False)

    @classmethod
    def _listen(cls, hearing: socket.socket) -> None:
        while number := hearing.recv(1):
            # Whoever has put another handler in place wants to hear of it alone.
            if number[0] in _SIGNALS and cls._stopping and signal.getsignal(number[0]) is _nothing:
                cls._stopping.heard(number[0])
