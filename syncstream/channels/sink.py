"""What a broker holds of a hub."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from ..brokers.log import Entry, flaw
from .control import CONTROL
from .presence import PRESENCE
from .subscribers import Subscribers

__all__ = ["HubSink"]


class HubSink:
    """A `Sink` that tells a hub, and does not keep it alive.

    What is told of the hub's own channels goes to its subscribers, the rest to its
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
            self.resync([channel])  # it may have come in place of another
        elif channel == CONTROL:  # by its name, or by a pattern of all
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
