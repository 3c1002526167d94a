"""`HubSink`: the side of a hub that its broker calls."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from ..brokers.log import Entry, flaw
from .control import CONTROL
from .presence import PRESENCE
from .subscribers import Subscribers

__all__ = ["HubSink"]


class HubSink:
    """A `Sink` that passes announcements to a hub without keeping it alive.

    Announcements of the hub's own channels go to its subscribers, all others to its
    windows.
    """

    __slots__ = ("_subscribers",)

    def __init__(self, subscribers: Subscribers) -> None:
        self._subscribers = weakref.ref(subscribers)

    def deliver(self, channel: str, entry: Entry) -> None:
        subscribers = self._subscribers()
        if subscribers is None:
            return
        windows = subscribers.windows
        problem = flaw(entry)
        if problem is not None:
            windows.say_malformed(channel, problem)
            self.resync([channel])  # it may have replaced a valid one
        elif channel == CONTROL:  # also through the pattern "#"
            subscribers.control.look()
        elif channel == PRESENCE:
            windows.tell_presence(entry)
        else:
            windows.deliver(channel, entry)

    def resync(self, channels: Iterable[str] | None) -> None:
        subscribers = self._subscribers()
        if subscribers is None:
            return
        named = None if channels is None else list(channels)
        if named is None or CONTROL in named:
            subscribers.control.look()
        if named is not None:
            named = [name for name in named if name not in (CONTROL, PRESENCE)]
        subscribers.windows.resync(named)

    def state(self, is_up: bool, reason: str) -> None:
        subscribers = self._subscribers()
        if subscribers is not None:
            subscribers.windows.state(is_up, reason)

    def deny(self, name: str, reason: str) -> None:
        subscribers = self._subscribers()
        if subscribers is None:
            return
        if name in (CONTROL, PRESENCE):
            subscribers.deny(name, reason)
        else:
            subscribers.windows.deny(name, reason)
