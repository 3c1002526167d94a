"""`Outcome`: why a stream has ended, and what its source and its end are told.

**Ending has four verbs.** Each cause of an end goes through all of them, in this order;
whoever comes second finds the verb done.

=========  ==========================================================================
decide     `Outcome.decide`. By whoever learns of an end: the body from its source, the
           monitor, `Stream.stop`, the server's close. In any thread or greenlet, and in
           a signal's handler. Sets the reason, if there is none: nothing else.
wake       `Monitor.wake`. By whoever has decided outside of the source, in any thread;
           it acts in the watch. Gets the source out of the wait, the linked read or,
           under gevent, whatever else it is in.
close      `Closing.close_source` and, when the last words are said, `Closing.settle`.
           By the body, or by the server's close where the body does not run: in the
           thread or greenlet that iterates, and there alone. Closes the iterator, the
           source and what was linked, runs the callbacks, gives the place back, counts.
forget     `Monitor.forget`. By the server's close, or when the stream is dropped: the
           server is done with the connection. Takes it out of the watch and of the
           process's open streams.
=========  ==========================================================================
"""

from __future__ import annotations

from collections import deque

from ..errors import ClientDisconnected
from ..runtime.clock import time
from .links import Link

__all__ = ["GONE", "Once", "Outcome"]

GONE = frozenset(("disconnected", "send_timeout"))
"""The reasons of a client that is not there any more."""


class Once(dict[str, tuple[str]]):
    """A word that is set once, whichever threads set one at once; then it is true."""

    __slots__ = ()

    def set(self, word: str) -> bool:
        """Set it; tell whether this is the first time."""
        token = (word,)
        return self.setdefault("", token) is token

    @property
    def word(self) -> str | None:
        """The first that was set, ``None`` before."""
        token = self.get("")
        return None if token is None else token[0]


class Outcome:
    """Why a stream has ended: what all who have to do with its end share.

    Attributes:
        ended: True from the end on; what every step looks at.
        at: When it ended, `time.monotonic`.
        is_closing: Its source has been told, or is being closed: not to be interrupted.
        links: What the source may be blocked in.
    """

    __slots__ = ("at", "ended", "is_closing", "links")

    def __init__(self) -> None:
        self.ended = Once()
        self.at = 0.0
        self.is_closing = False
        self.links: deque[Link] = deque()

    def decide(self, reason: str) -> bool:
        """Set the reason; tell whether it is the first one, which stays."""
        is_first = self.ended.set(reason)
        if is_first:
            self.at = time.monotonic()
        return is_first

    @property
    def reason(self) -> str | None:
        """Why it has ended, one word; ``None`` while it lives."""
        return self.ended.word

    @property
    def is_gone(self) -> bool:
        """Whether it ended because its client is not there any more."""
        return self.reason in GONE

    def error(self) -> GeneratorExit:
        """Return what tells the source of it."""
        if self.is_gone:
            return ClientDisconnected("the client has gone")
        return GeneratorExit(f"the stream has ended: {self.reason}")
