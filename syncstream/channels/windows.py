"""A channel's newest events, shared by all its subscribers in this process."""

from __future__ import annotations

import logging

from ..brokers.log import Log
from ..runtime.clock import time
from ..runtime.waiter import Wakeable
from . import limits

__all__ = ["Channel"]

log = logging.getLogger("syncstream.hub")


class Channel:
    """A channel that has, or had a moment ago, subscribers."""

    __slots__ = (
        *("aside", "counted", "held", "idle_since", "is_doubtful", "is_watched"),
        *("limit", "log", "subscriptions", "tagged", "waiters"),
    )

    def __init__(self) -> None:
        # The head is unknown: the first entry says what it follows.
        self.log = Log("")
        self.counted = 0  # bytes of it that are in `Hub._size`
        # Fields of who came and went, until it is known after which event.
        self.held: tuple[bytes, ...] = ()
        self.subscriptions = 0
        self.is_watched = False  # by its name: the broker tells of it
        # Its head may be older than the channel's, or not known at all: the first to
        # come to its end asks the broker.
        self.is_doubtful = True
        self.limit = limits.READ  # what to ask the broker for: fewer, if they are large
        self.waiters: dict[Wakeable, None] = {}  # in the order in which they came
        self.tagged = -1  # the last position whose entry is not for everybody
        self.aside = -1  # the last one whose entry is set aside
        self.idle_since = time.monotonic()
