"""`Outcome`: why a stream has ended, and the things that its source may wait in.

**Ending has four verbs**, in this order. Each is done once: a second caller finds it
done. An end that the source itself brings about wakes nobody, and a client that was
handed over is closed by the loop.

=========  ==========================================================================
decide     `Outcome.decide`: sets the reason, unless there is one, and nothing else.
           Called by the body, the monitor, the departure, the waits, the server's close
           and methods of `Stream`, in any thread or greenlet, even in a signal handler.
wake       `Monitor.wake`: interrupts the source's wait or linked read; under gevent,
           any call. Called after a decision outside of the source, in any thread; it
           acts in the watch.
close      `Closing.close_source`, and after the last bytes `Closing.settle`: close the
           iterator, the source and the links, run the callbacks, release the place, and
           count. Called by the body, or by the server's close while the body does not
           run; only in the thread or greenlet that iterates.
forget     `Monitor.forget`: removes the stream from the watch and from the process's
           open streams. Called by the server's close, or when the stream is dropped:
           the server is done with the connection.
=========  ==========================================================================
"""

from __future__ import annotations

from collections import deque

from ..errors import ClientDisconnected
from ..runtime.clock import time
from .ends import GONE
from .interrupt import MOST_REMINDERS
from .links import Link

__all__ = ["Once", "Outcome"]


class Once(dict[str, tuple[str, float]]):
    """A word that is set once, even if several threads try; true once it is set.

    It is a dict because one's `setdefault` and truth are single steps in C: every step
    of a stream asks for the truth.
    """

    __slots__ = ()

    def set(self, word: str) -> bool:
        """Set it; tell whether this is the first time."""
        token = (word, time.monotonic())
        return self.setdefault("", token) is token

    @property
    def word(self) -> str | None:
        """The first that was set, ``None`` before."""
        token = self.get("")
        return None if token is None else token[0]

    @property
    def at(self) -> float:
        """When that was set, `time.monotonic`; 0 before."""
        token = self.get("")
        return 0.0 if token is None else token[1]


class Outcome:
    """Why a stream has ended: shared by its body, its monitor and its closing.

    Attributes:
        ended: True from the end on; every step checks it.
        is_closing: Whether the source knows of the end, or is being closed: it must not
            be interrupted any more.
        links: The objects that may block the source.
    """

    __slots__ = ("_reminders", "ended", "is_closing", "links")

    def __init__(self) -> None:
        self.ended = Once()
        self._reminders = 0
        self.is_closing = False
        self.links: deque[Link] = deque()

    def decide(self, reason: str) -> bool:
        """Set the reason; tell whether it is the first one, which stays."""
        return self.ended.set(reason)

    def remind(self) -> bool:
        """Count that the source is told again; ``False``: it was told often enough."""
        self._reminders += 1
        return self._reminders <= MOST_REMINDERS

    @property
    def at(self) -> float:
        """When it ended, `time.monotonic`; 0 while it lives."""
        return self.ended.at

    @property
    def reason(self) -> str | None:
        """Why it has ended, one word; ``None`` while it lives."""
        return self.ended.word

    @property
    def is_gone(self) -> bool:
        """Whether it ended because its client is not there any more."""
        return self.reason in GONE

    def error(self) -> GeneratorExit:
        """Return the exception that tells the source."""
        if self.is_gone:
            return ClientDisconnected("the client has gone")
        return GeneratorExit(f"the stream has ended: {self.reason}")
