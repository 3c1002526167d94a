"""Who subscribes in this process: who comes, who goes, who is kicked."""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast

from ..brokers.contract import Broker
from ..errors import BrokerError, Denied
from ..protocol.sse import Event
from ..runtime.process import process
from ..runtime.waiting import say
from .control import CONTROL, Control, Kick, attempt
from .payloads import Payloads
from .presence import PRESENCE, encoded
from .windows import Channel, Reader, Windows

__all__ = ["Attendance", "Subscriber", "Subscribers"]

log = logging.getLogger("syncstream.hub")


class Subscriber(Reader, Protocol):
    """A subscription, as far as others need to know who it is."""

    who: Any
    tags: frozenset[str]
    announcement: str | None

    @property
    def is_nameable(self) -> bool: ...

    @property
    def is_closed(self) -> bool: ...

    def hears(self, channel: str) -> bool: ...

    def close(self, reason: str = "closed") -> None: ...

    def forget(self) -> None: ...


class Attendance:
    """What is done for a subscription that is present, and undone at its end.

    Attributes:
        watched: How many of its channels the broker tells of, the first ones.
        announced: Channels that were told that it has come.
        is_listed: Kicks are listened for, for its sake.
    """

    __slots__ = ("announced", "is_listed", "watched")

    def __init__(self) -> None:
        self.watched = 0
        self.announced: Sequence[str] = ()
        self.is_listed = False


class Subscribers:
    """The subscriptions of a hub in this process.

    Args:
        windows: The hub's.
        payloads: As the hub encodes.

    Attributes:
        windows: As given.
        payloads: As given.
        control: What tells the hub's processes of kicks.
    """

    def __init__(self, windows: Windows, payloads: Payloads) -> None:
        self.windows = windows
        self.payloads = payloads
        self.control = Control(self)
        # What was dropped, not closed. Maybe by a garbage collection, anywhere, under
        # any lock: to call the broker there is to wait for oneself.
        self._dropped: deque[tuple[Sequence[str], Attendance, str | None]] = deque()
        self._hears_presence = False
        _all.add(self)

    def begin_anew(self) -> None:
        """Forget, in a forked child, what is its parent's: who subscribes, and all
        that was told. Nobody here listens for it."""
        for subscription in self.all():
            subscription.forget()
        self.windows.begin_anew()
        self.control.begin_anew()
        self._dropped.clear()
        self._hears_presence = False

    def all(self) -> list[Subscriber]:
        """Return those that count as present."""
        found = [reference() for reference in list(self.windows.open.values())]
        return [cast(Subscriber, reader) for reader in found if reader is not None]

    # Who comes and goes.

    def enter(self, subscription: Subscriber) -> Attendance:
        """Count a subscription as present."""
        if self._dropped:
            self.clear()
        self.windows.enter(subscription)
        return Attendance()

    def watch(self, attendance: Attendance, name: str) -> Channel | None:
        """Have the broker tell of the next of a subscription's channels.

        Returns, Raises: As `Windows.watch`.
        """
        attendance.watched += 1
        return self.windows.watch(name)

    def leave(self, subscription: Subscriber, attendance: Attendance) -> None:
        """Count a subscription no more, and undo what was done for it."""
        self.windows.leave(subscription)
        self._undo(subscription.channels, attendance, subscription.announcement)

    def drop(self, subscription: Subscriber, attendance: Attendance) -> None:
        """Take note of one that is gone without a `close`; calls nobody."""
        self.windows.leave(subscription)
        dropped = subscription.channels, attendance, subscription.announcement
        self._dropped.append(dropped)

    def clear(self) -> None:
        """Do what is left to do for those that were dropped."""
        while self._dropped:
            try:
                dropped = self._dropped.popleft()
            except IndexError:  # another thread was faster
                return
            self._undo(*dropped)

    def _undo(
        self, channels: Sequence[str], attendance: Attendance, data: str | None
    ) -> None:
        for name in channels[: attendance.watched]:
            self.windows.unwatch(name)
        if attendance.is_listed:
            self.control.leave()
        self.announce(attendance.announced, data, "leave")

    def hear_presence(self) -> None:
        """Have the broker tell who comes and goes, from the first subscription on.

        Raises:
            Unavailable: The broker does not answer.
        """
        if self._hears_presence:
            return
        try:
            self.broker.watch(PRESENCE)
        except Denied as error:
            self.deny(PRESENCE, str(error))
        self._hears_presence = True

    def announce(self, channels: Iterable[str], data: str | None, name: str) -> None:
        """Tell channels who has come or gone."""
        for channel in channels:
            if self.windows.is_closed:
                return
            try:
                fields = Event(data, event=name).encode()
                self.broker.publish([(PRESENCE, encoded(channel, fields))])
                self.windows.published += 1
            except BrokerError as error:
                text = "%r could not be announced in %r: %s"
                say(log, logging.WARNING, text, name, channel, error)
            except Exception as error:  # the broker's own; others are not to end by it
                text = "%r could not be announced in %r"
                say(log, logging.ERROR, text, name, channel, error=error)

    def warn_of_processes(self) -> None:
        """Say, once, that other processes have channels of their own."""
        if self.broker.scope == "process":
            process().warn_once(
                log,
                "this hub's channels are those of one process, and the server runs"
                " several: what is published in one is not seen in the others. Use"
                ' Hub("local:") or Hub("redis://…"), or run one worker',
            )

    # Who is kicked: a `control.Kicker`.

    @property
    def broker(self) -> Broker:
        return self.windows.broker

    def end(self, kick: Kick) -> int:
        """End the subscriptions of this process that a kick names."""
        return self.end_where(partial(self._is_named, kick))

    def end_nameable(self, but: object = None) -> int:
        """End the subscriptions of this process that some kick may have named.

        Args:
            but: One that it cannot have named.
        """
        return self.end_where(lambda s: s.is_nameable and s is not but)

    def end_where(self, predicate: Callable[[Any], bool]) -> int:
        """End those a predicate holds for; one that fails keeps no other from it.

        Returns:
            How many were ended.
        """
        ended: list[Subscriber] = []

        def ask(subscription: Subscriber) -> None:
            if predicate(subscription):
                ended.append(subscription)
                subscription.close("kicked")

        attempt(partial(ask, s) for s in self.all() if not s.is_closed)
        return len(ended)

    def _is_named(self, kick: Kick, subscription: Subscriber) -> bool:
        if kick.tags is not None and subscription.tags.isdisjoint(kick.tags):
            return False
        if kick.who is None:
            return True
        try:
            return kick.who == self.payloads.name_of(subscription.who)
        except (TypeError, ValueError):  # it is no JSON: nobody can name it
            return False

    def deny(self, name: str, reason: str) -> None:
        """Take note that the engine refuses one of the hub's own channels."""
        text = "who comes and goes in other processes is not heard: %s"
        if name == CONTROL:
            self.control.refuse(reason)
            text = "kicks of other processes are not heard: %s"
        self.windows.said.once(name, logging.ERROR, text, reason)

    def say_unreadable(self, name: str, error: BrokerError) -> None:
        self.windows.say_unreadable(name, error)


_all: weakref.WeakSet[Subscribers] = weakref.WeakSet()  # for their children


def _forked() -> None:
    for subscribers in tuple(_all):
        subscribers.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
