"""Requests that wait, and the one thread that draws them: full batches where enough wait, else one at a time.

Two batch sizes are all that is ever compiled. Nothing here knows HTTP or JAX; `Model` is what the thread calls.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import math
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

_LOG = logging.getLogger(__name__)
WAITING, DRAWING, DONE, FAILED, STOPPED = "waiting", "drawing", "done", "failed", "stopped"
# What is finished can be fetched for so long, and while all of it together is no larger.
KEPT_SECONDS, KEPT_BYTES = 600.0, 256_000_000
# Said to those who are refused while nothing is known yet of how long a batch takes.
_UNKNOWN_SECONDS = 5.0


@runtime_checkable
class Model(Protocol):
    """What draws: `steps` names what `draw` yields, the last of which are the images, a row for each prompt."""

    steps: tuple[str, ...]

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Any]: ...

    def png(self, pixels: Any, prompt: str, seed: int) -> bytes: ...


class Full(Exception):
    """As many wait as may; `seconds` from now there should be a place."""

    def __init__(self, seconds: int):
        self.seconds = seconds


class Closed(Exception):
    """The server is stopping and takes no more."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request. What changes is changed under the queue's lock.

    Attributes:
      prompt, seed: what is asked for, as it is drawn.
      id: by which it is found; nobody guesses it, so nobody reads another's prompt.
      state: WAITING, DRAWING, DONE, FAILED or STOPPED.
      step: how many steps are done.
      asked, begun, ended: times of `time.monotonic`, 0 while they have not come.
      png: the image, once it is done.
      error: a sentence, where there will be no image.
      told: whether whoever asked has the image or knows the error.
      finished: done when the state is one of the last three.
    """

    prompt: str
    seed: int
    id: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(15))
    state: str = WAITING
    step: int = 0
    asked: float = dataclasses.field(default_factory=time.monotonic)
    begun: float = 0.0
    ended: float = 0.0
    png: bytes = b""
    error: str = ""
    told: bool = False
    finished: concurrent.futures.Future[None] = dataclasses.field(default_factory=concurrent.futures.Future)


class Queue:
    """Takes requests from any thread; draws in a thread of its own once it is started."""

    def __init__(self, model: Model, *, batch: int, places: int):
        """Args: what draws; how many it draws at once; how many may wait beside those that are drawn."""
        self.model, self.batch, self.places = model, batch, places
        self._changed = threading.Condition()  # its lock is held for all that follows
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._drawing: list[Ticket] = []
        self._kept: dict[str, Ticket] = {}
        self._seconds: dict[int, float] = {}  # size of a batch -> what such a batch takes
        self._counts = {"drawn": 0, "failed": 0}
        self._ready = self._closed = self._ailing = False

    def start(self) -> None:
        """Draws once in each size, which compiles, and then begins with the requests; returns when it does."""
        for size in sorted({1, self.batch}):
            began = time.monotonic()
            for _ in self.model.draw([" "] * size, range(size)):
                pass
            _LOG.info("batches of %d: compiled in %.1f s", size, time.monotonic() - began)
        with self._changed:
            self._ready = True
        threading.Thread(target=self._work, name="drawing", daemon=True).start()

    def submit(self, prompt: str, seed: int, *, keep: bool = True) -> Ticket:
        """Adds a request at the end; with `keep` it can be found by its id.

        Raises:
          Full, Closed: it was not taken.
        """
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._waiting) >= self.places:
                raise Full(self._until_a_place())
            ticket = Ticket(prompt, seed)
            self._waiting.append(ticket)
            if keep:
                self._forget()
                self._kept[ticket.id] = ticket
            self._changed.notify_all()
            return ticket

    def find(self, id: str) -> Ticket | None:
        """Returns a request that was kept."""
        with self._changed:
            self._forget()
            return self._kept.get(id)

    def cancel(self, ticket: Ticket) -> bool:
        """Takes back a request that waits; False where it is too late."""
        with self._changed:
            if ticket.state != WAITING:
                return False
            self._waiting.remove(ticket)
            self._end(ticket, STOPPED, error="this request was taken back")
            return True

    def close(self) -> None:
        """Takes no more, and tells those who wait; what is being drawn is finished."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._end(self._waiting.popleft(), STOPPED, error="the server is stopping; ask again when it is back")
            self._changed.notify_all()

    def idle(self, seconds: float) -> bool:
        """Waits until nothing is drawn, at most so long; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._drawing, seconds)

    def abandon(self) -> None:
        """Tells those whose images are being drawn that nobody will wait for them."""
        with self._changed:
            for ticket in self._drawing:
                self._end(ticket, STOPPED, error="the server had to stop before this image was drawn")

    def untold(self) -> int:
        """How many of those who were kept have not fetched how it ended."""
        with self._changed:
            return sum(not ticket.told for ticket in self._kept.values())

    def view(self, ticket: Ticket) -> dict[str, Any]:
        """Returns what is to be said of a request, ready for JSON."""
        with self._changed:
            now = time.monotonic()
            found: dict[str, Any] = {
                "id": ticket.id, "prompt": ticket.prompt, "seed": ticket.seed, "state": ticket.state,
            }  # fmt: skip
            if ticket.state == WAITING:
                ahead = self._waiting.index(ticket)
                found |= {"position": ahead + 1, "starting": not self._ready, "left": self._left(ahead)}
            elif ticket.state == DRAWING:
                number = min(ticket.step, len(self.model.steps) - 1)
                step = {"number": number + 1, "of": len(self.model.steps), "part": self.model.steps[number]}
                found |= {"step": step, "left": self._left_of_batch()}
            elif ticket.state != DONE:
                found |= {"error": ticket.error}
            found["waited"] = round((ticket.begun or ticket.ended or now) - ticket.asked, 3)
            found["drawn"] = round((ticket.ended or now) - ticket.begun, 3) if ticket.begun else 0.0
            return found

    def health(self) -> dict[str, Any]:
        """Returns the state of the whole: starting, ready, failing (the last batch did) or stopping."""
        with self._changed:
            state = "ready" if self._ready else "starting"
            state = "stopping" if self._closed else "failing" if self._ailing else state
            waiting = {"waiting": len(self._waiting), "places": self.places, "drawing": len(self._drawing)}
            return {"state": state, **waiting, **self._counts}

    # The thread.

    def _work(self) -> None:
        while batch := self._next():
            self._draw(batch)

    def _next(self) -> list[Ticket]:
        """Waits for requests and takes as many as are drawn at once; [] at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            size = self.batch if len(self._waiting) >= self.batch else min(1, len(self._waiting))
            self._drawing = [self._waiting.popleft() for _ in range(size)]
            for ticket in self._drawing:
                ticket.state, ticket.begun = DRAWING, time.monotonic()
            return self._drawing

    def _draw(self, batch: list[Ticket]) -> None:
        began = time.monotonic()
        error, pngs = "", [b""] * len(batch)
        try:
            images: Any = ()
            for made in self.model.draw([one.prompt for one in batch], [one.seed for one in batch]):
                images = made
                with self._changed:
                    for ticket in batch:
                        ticket.step += 1
            rows = zip(batch, images, strict=True)
            pngs = [self.model.png(pixels, one.prompt, one.seed) for one, pixels in rows]
        except Exception as caught:  # whatever it is, those who wait are told, and the next may fare better
            _LOG.exception("a batch of %d could not be drawn", len(batch))
            error = f"drawing failed ({type(caught).__name__}); the server's log says why"
        seconds = time.monotonic() - began
        with self._changed:
            self._ailing = bool(error)
            self._counts["failed" if error else "drawn"] += len(batch)
            if not error:
                known = self._seconds.get(len(batch), seconds)
                self._seconds[len(batch)] = (known + seconds) / 2
            for ticket, png in zip(batch, pngs, strict=True):
                self._end(ticket, FAILED if error else DONE, error=error, png=png)
            self._drawing = []
            waiting = len(self._waiting)
            self._changed.notify_all()
        _LOG.info("drew %d in %.2f s, %d wait", len(batch), seconds, waiting)

    # The lock is held by whoever calls these.

    def _end(self, ticket: Ticket, state: str, *, error: str = "", png: bytes = b"") -> None:
        if ticket.finished.done():  # abandoned before
            return
        ticket.state, ticket.error, ticket.png, ticket.ended = state, error, png, time.monotonic()
        ticket.finished.set_result(None)

    def _forget(self) -> None:
        """Drops what ended long ago, and the oldest of what is too much together."""
        ended = sorted((one for one in self._kept.values() if one.ended), key=lambda one: one.ended)
        size = sum(len(one.png) for one in ended)
        for one in ended:
            if one.ended > time.monotonic() - KEPT_SECONDS and size <= KEPT_BYTES:
                break
            size -= len(one.png)
            del self._kept[one.id]

    def _typical(self, size: int) -> float | None:
        """Seconds of a batch; where none of the size was drawn yet, at most so many."""
        if size in self._seconds or not self._seconds:
            return self._seconds.get(size)
        [(other, seconds)] = self._seconds.items()
        return seconds * max(1.0, size / other)

    def _left_of_batch(self) -> float | None:
        if not self._drawing:
            return 0.0
        typical = self._typical(len(self._drawing))
        return None if typical is None else max(0.0, typical - (time.monotonic() - self._drawing[0].begun))

    def _left(self, ahead: int) -> float | None:
        """Seconds until a request is drawn that has so many before it; None while nothing is known."""
        now, full, single = self._left_of_batch(), self._typical(self.batch), self._typical(1)
        if now is None or full is None or single is None:
            return None
        together = len(self._waiting) // self.batch
        batches = min(ahead // self.batch + 1, together)
        return now + batches * full + max(0, ahead + 1 - together * self.batch) * single

    def _until_a_place(self) -> int:
        """Whole seconds, at least 1, until the next batch is taken from those that wait."""
        left = self._left_of_batch()
        return max(1, math.ceil(_UNKNOWN_SECONDS if left is None else left))
