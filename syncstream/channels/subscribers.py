"""A hub's subscriptions in this process: entering, leaving, announcing, kicking."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast

from ..brokers.contract import Broker
from ..brokers.names import is_pattern
from ..errors import BrokerError, Denied
from ..protocol.sse import Event
from ..runtime.living import Living
from ..runtime.process import process
from ..runtime.waiting import say
from .control import CONTROL, Control, Kick, attempt
from .payloads import Payloads
from .presence import PRESENCE, encoded
from .windows import Channel, Reader, Windows

__all__ = ["Attendance", "Subscriber", "Subscribers"]

log = logging.getLogger("syncstream.hub")


class Subscriber(Reader, Protocol):
    """A subscription, with the attributes by which it is announced and kicked."""

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
        announced: Channels that were told that it has come, and will be that it left;
            ``None`` once it has been undone.
        is_listed: Kicks are listened for, for its sake.
    """

    __slots__ = ("announced", "is_listed", "watched")

    def __init__(self) -> None:
        self.watched = 0
        self.announced: Sequence[str] | None = ()
        self.is_listed = False


class Subscribers:
    """The subscriptions of a hub in this process.

    Args:
        windows: The hub's windows.
        payloads: The hub's encoder.

    Attributes:
        windows, payloads: As given.
        control: The channel by which the hub's processes pass kicks.
    """

    def __init__(self, windows: Windows, payloads: Payloads) -> None:
        self.windows = windows
        self.payloads = payloads
        self.control = Control(self)
        # Subscriptions that were dropped without close(), perhaps by a garbage
        # collection under any lock: calling the broker there could deadlock.
        self._dropped: deque[tuple[Sequence[str], Attendance, str | None]] = deque()
        self._hears_presence = False
        _all.add(self)

    def begin_anew(self) -> None:
        """Forget the parent's subscriptions and windows, in a forked child."""
        for subscription in self.all():
            subscription.forget()
        self.windows.begin_anew()
        self.control.begin_anew()
        self._dropped.clear()
        self._hears_presence = False

    def all(self) -> list[Subscriber]:
        """Return the subscriptions that count as present."""
        found = [reference() for reference in list(self.windows.open.values())]
        return [cast(Subscriber, reader) for reader in found if reader is not None]

    # Entering and leaving.

    def enter(self, subscription: Subscriber) -> Attendance:
        """Count a subscription as present."""
        if self._dropped:
            self.clear()
        self.windows.enter(subscription)
        return Attendance()

    def watch(self, attendance: Attendance, name: str) -> Channel | None:
        """Have the broker announce the next one of a subscription's channels.

        Returns, Raises: As `Windows.watch`.
        """
        attendance.watched += 1
        return self.windows.watch(name)

    def join(self, subscription: Subscriber, attendance: Attendance) -> None:
        """Announce a subscription, and have its end announce the "leave"."""
        channels, data = _told_channels(subscription), subscription.announcement
        if not channels:
            return
        try:
            self.announce(channels, data, "join")
        finally:  # only now: the "leave" must not overtake the "join"
            with self.windows.lock:
                is_over = attendance.announced is None
                if not is_over:
                    attendance.announced = channels
            if is_over:
                self.announce(channels, data, "leave")

    def leave(self, subscription: Subscriber, attendance: Attendance) -> None:
        """Stop counting a subscription, and unwatch and announce for it."""
        rest = self.part(subscription, attendance)
        if rest is not None:
            rest()

    def part(
        self, subscription: Subscriber, attendance: Attendance
    ) -> Callable[[], None] | None:
        """Do as `leave`, without the broker: return its part, ``None`` for nothing."""
        self.windows.leave(subscription)
        return self._undo(subscription.channels, attendance, subscription.announcement)

    def drop(self, subscription: Subscriber, attendance: Attendance) -> None:
        """Remember a subscription that was dropped without `close`; call no broker."""
        self.windows.leave(subscription)
        dropped = subscription.channels, attendance, subscription.announcement
        self._dropped.append(dropped)

    def clear(self) -> None:
        """Clean up after the subscriptions that were dropped without `close`."""
        while self._dropped:
            try:
                dropped = self._dropped.popleft()
            except IndexError:  # another thread took it
                return
            rest = self._undo(*dropped)
            if rest is not None:
                rest()

    def _undo(
        self, channels: Sequence[str], attendance: Attendance, data: str | None
    ) -> Callable[[], None] | None:
        idle: list[str] = []
        for name in channels[: attendance.watched]:
            idle += self.windows.release(name)
        announced: Sequence[str] | None = ()
        if data is not None:
            with self.windows.lock:
                announced, attendance.announced = attendance.announced, None
        is_listed = attendance.is_listed
        if not (idle or is_listed or announced):
            return None
        return partial(self._tell, idle, announced or (), data, is_listed=is_listed)

    def _tell(
        self,
        idle: Sequence[str],
        announced: Sequence[str],
        data: str | None,
        *,
        is_listed: bool,
    ) -> None:
        self.windows.tell_idle(idle)
        if is_listed:
            self.control.leave()
        self.announce(announced, data, "leave")

    def hear_presence(self) -> None:
        """Have the broker announce joins and leaves; at the first subscription.

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
        """Publish a "join" or "leave" to channels; a failure is logged only."""
        for channel in channels:
            if self.windows.is_closed:
                return
            try:
                fields = Event(data, event=name).encode()
                self.broker.publish([(PRESENCE, encoded(channel, fields))])
                with self.windows.lock:
                    self.windows.published += 1
            except BrokerError as error:
                text = "a %s could not be announced in %r, so its list may be wrong: %s"
                say(log, logging.WARNING, text, name, channel, error)
            except Exception as error:  # a broker's fault must not affect the others
                text = "a %s could not be announced in %r, so its list may be wrong"
                say(log, logging.ERROR, text, name, channel, error=error)

    def warn_of_processes(self) -> None:
        """Warn once that other processes do not share this hub's channels."""
        if self.broker.scope == "process":
            process().warn_once(
                log,
                "this hub belongs to one process, but the server runs several: events"
                " published in one process do not reach the subscribers of the others."
                ' Use Hub("local:") or Hub("redis://…"), or run one worker',
            )

    # Kicking: the methods of a `control.Kicker`.

    @property
    def broker(self) -> Broker:
        return self.windows.broker

    def end(self, kick: Kick) -> int:
        """End the subscriptions of this process that a kick names."""
        return self.end_where(partial(self._is_named, kick))

    def end_nameable(self, but: object = None) -> int:
        """End the subscriptions of this process that some kick may have named.

        Args:
            but: A subscription that it cannot have named.
        """
        return self.end_where(lambda s: s.is_nameable and s is not but)

    def end_where(self, predicate: Callable[[Any], bool]) -> int:
        """End the subscriptions for which a predicate is true.

        If it raises for one, the others are asked all the same.

        Returns:
            The number of ended subscriptions.
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
        except (TypeError, ValueError):  # it is not JSON: no kick can name it
            return False

    def deny(self, name: str, reason: str) -> None:
        """Handle that the engine denies access to one of the hub's own channels."""
        text = "joins and leaves of other processes are not received: %s"
        if name == CONTROL:
            self.control.refuse(reason)
            text = "kicks of other processes are not received: %s"
        self.windows.said.once(name, logging.ERROR, text, reason)

    def say_unreadable(self, name: str, error: BrokerError) -> None:
        self.windows.say_unreadable(name, error)


def _told_channels(subscription: Subscriber) -> Sequence[str]:
    """Return the channels that get a subscription's "join" and "leave" events."""
    if subscription.announcement is None:
        return ()
    if not subscription.has_patterns:
        return subscription.channels
    return [name for name in subscription.channels if not is_pattern(name)]


_all: Living[Subscribers] = Living()  # cleared in forked children


def _forked() -> None:
    for subscribers in _all.all():
        subscribers.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
