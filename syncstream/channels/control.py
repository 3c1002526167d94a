"""Kicks, passed between the processes of a hub.

Kicks are events of a channel of the hub's own, which the broker stores like any other,
under a name that no application can use. A process watches the channel while it has
subscriptions that a kick could name. An announcement only makes it read on from its
last position, so that no kick is missed while the listener was down. If some kicks
cannot be read any more, the process kicks all subscriptions that they could have named;
their clients reconnect through their view, which decides anew.

An engine may deny access to this channel (an ACL of Redis). The process keeps its
subscriptions, because most applications kick nobody. But it logs an error, `Hub.kick`
raises there, and the engine is asked again. Once it allows the channel, the
subscriptions that missed kicks could have named are kicked.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from ..brokers.contract import Broker
from ..brokers.log import Entry, Page
from ..errors import BrokerError, Denied, Unavailable
from ..protocol.sse import Decoder, Event
from ..runtime.clock import time
from ..runtime.sockets import native
from ..runtime.waiting import say
from ..runtime.watch import Watch, elsewhere, watch
from .chain import is_whole

__all__ = ["CONTROL", "Control", "Kick", "decoded"]

log = logging.getLogger("syncstream.control")

CONTROL = "syncstream control"  # with a space: no application and no pattern has it
READ = 500  # entries read from the broker at once
RETRY = 1.0  # seconds until a broker that did not answer is asked again
ASK_AGAIN = 5.0  # seconds until an engine that refuses the channel is asked again

# Workers of a version without kicks deliver it to nobody, even through "#".
_FOR_NOBODY = b'\0{"only": []}\n'


class Kick:
    """The subscriptions to end: those that match both attributes.

    Attributes:
        who: The JSON of their ``who`` in normal form; ``None`` for any.
        tags: Tags of which they have at least one; ``None`` for any.
    """

    __slots__ = ("tags", "who")

    def __init__(self, who: str | None, tags: Sequence[str] | None) -> None:
        self.who = who
        self.tags = tags

    def encoded(self, origin: str) -> bytes:
        fields = {"who": self.who, "tags": self.tags, "origin": origin}
        return _FOR_NOBODY + Event(json.dumps(fields), event="kick").encode()


class Kicker(Protocol):
    """The hub's part that this module uses."""

    @property
    def broker(self) -> Broker: ...

    def end(self, kick: Kick) -> int: ...

    def end_nameable(self, but: object = None) -> int: ...

    def deny(self, name: str, reason: str) -> None: ...

    def say_unreadable(self, name: str, error: BrokerError) -> None: ...


class Control:
    """One process's end of a hub's control channel.

    Args:
        hub: The hub, which is referenced weakly.

    Attributes:
        is_reading: Whether new kicks are being read, or about to be.
        refusal: The engine's reason for denying access to the channel; ``None`` if it
            allows access.
    """

    def __init__(self, hub: Kicker) -> None:
        self._hub = weakref.ref(hub)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the parent's state, in a forked child."""
        self._lock = native(_thread, "RLock")()
        self._origin = os.urandom(8).hex()
        self._count = 0  # subscriptions that a kick may name
        self._last: str | None = None  # the last id read; ``None``: not listening
        self._is_news = self.is_reading = False
        self._watch: Watch | None = None
        self.refusal: str | None = None

    def tell(self, kick: Kick) -> None:
        """Publish a kick to the other processes.

        Raises:
            Denied: It was published, but the engine denies access to the channel to
                this process, and so to others with the same rights.
            BrokerError: It was not published, or may not have been.
        """
        hub = self._hub()
        if hub is None or hub.broker.scope == "process":
            return
        hub.broker.publish([(CONTROL, kick.encoded(self._origin))])
        if self.refusal is not None and self._count:
            self._listen(hub)  # it may be allowed by now
            if self.refusal is not None:
                raise Denied(f"kicks cannot be received: {self.refusal}")

    def enter(self, newcomer: object) -> None:
        """Count one more subscription; the first one begins to listen.

        Args:
            newcomer: The subscription.

        Raises:
            BrokerError: The broker does not answer.
        """
        hub = self._hub()
        with self._lock:
            self._count += 1
            is_heard = self._last is not None and self.refusal is None
        if hub is not None and hub.broker.scope != "process" and not is_heard:
            self._listen(hub, newcomer)

    def _listen(self, hub: Kicker, newcomer: object = None) -> None:
        """Have the broker announce kicks; if the engine denies that, remember it.

        Args:
            newcomer: A subscription that has just come and cannot have missed a kick.

        Raises:
            BrokerError: The broker does not answer.
        """
        try:
            hub.broker.watch(CONTROL)
            head = hub.broker.read(CONTROL, None).head
        except Denied as error:
            hub.deny(CONTROL, str(error))
            return
        except Unavailable as error:
            hub.say_unreadable(CONTROL, error)
            raise
        watcher = watch()
        with self._lock:
            # With an old position all kicks since then are read, and none is missed.
            was_deaf = self.refusal is not None and self._last is None
            self.refusal = None
            if self._last is None and self._count:
                self._last, self._watch = head, watcher
        if was_deaf and (count := hub.end_nameable(but=newcomer)):
            text = (
                "kicks are received again; %d streams that a missed kick could have"
                " named are ended, and their clients reconnect"
            )
            say(log, logging.WARNING, text, count)
        self.look()

    def refuse(self, reason: str) -> None:
        """Remember that the engine denies access, and ask again until it allows it.

        From any thread, without waiting.
        """
        with self._lock:
            was_refused, self.refusal = self.refusal is not None, reason
            watcher = self._watch
        if not was_refused:
            watcher = watcher or watch()
            again = partial(_listen_again, weakref.ref(self), watcher)
            watcher.call_at(time.monotonic() + ASK_AGAIN, again)

    def listen_again(self, watcher: Watch) -> float | None:
        """Ask the engine again; return the time to do so next. Called by a watch."""
        with self._lock:
            if not self._count:
                self.refusal = None
            if self.refusal is None:
                return None
        elsewhere(watcher, self._ask_again)
        return time.monotonic() + ASK_AGAIN

    def _ask_again(self) -> None:
        hub = self._hub()
        if hub is not None:
            with suppress(Unavailable):  # the next try comes in ASK_AGAIN seconds
                self._listen(hub)

    def leave(self) -> None:
        """Count one subscription less; the last one ends the listening."""
        hub = self._hub()
        with self._lock:
            self._count -= 1
            if self._count or hub is None or hub.broker.scope == "process":
                return
            self._last = None
        broker = hub.broker
        try:
            broker.unwatch(CONTROL)
        except BrokerError as error:  # unneeded announcements do no harm
            text = "%r could not be unwatched, which costs a little traffic: %s"
            say(log, logging.WARNING, text, CONTROL, error)
        with self._lock:
            is_back = self._count > 0
        if not is_back:
            return
        try:  # a subscription came meanwhile; its watch was before this unwatch
            self._listen(hub)
        except Exception as error:  # that subscription relies on kicks
            count = hub.end_nameable()
            text = (
                "kicks cannot be received, so the %d streams that a kick could name are"
                " ended, and their clients reconnect: %s"
            )
            say(log, logging.ERROR, text, count, error)
            self.look()

    def look(self) -> None:
        """Read new kicks soon; from any thread, without waiting."""
        with self._lock:
            self._is_news = True
            if self.is_reading or self._last is None or self._watch is None:
                return
            self.is_reading = True
            watcher = self._watch
        try:
            elsewhere(watcher, self._read)
        except BaseException:
            self.is_reading = False
            raise

    def _read(self) -> None:
        while True:
            hub = self._hub()
            with self._lock:
                last, watcher = self._last, self._watch
                if hub is None or last is None or not self._is_news:
                    self.is_reading = False
                    return
                self._is_news = False
            try:
                page = hub.broker.read(CONTROL, last, READ)
                if last == page.head:  # nothing is new, even if the engine forgot it
                    page = Page((), True, last)
            except BaseException as error:
                with self._lock:
                    self.is_reading = False
                if isinstance(error, Denied):
                    hub.deny(CONTROL, str(error))
                    return
                if isinstance(error, Unavailable):
                    hub.say_unreadable(CONTROL, error)
                else:
                    text = "kicks cannot be read: trying again in %.0f s"
                    say(log, logging.ERROR, text, RETRY, error=error)
                if watcher is not None:
                    again = partial(_look, weakref.ref(self))
                    watcher.call_at(time.monotonic() + RETRY, again)
                return
            with self._lock:
                if self._last != last:  # all left meanwhile, and others came
                    self._is_news = True
                    continue
                self._last = page.entries[-1].id if page.entries else page.head
                self._is_news = self._is_news or bool(page.entries)
            try:
                self._apply(hub, last, page)
            except Exception as error:
                text = "a kick failed: some of its streams may go on"
                say(log, logging.ERROR, text, error=error)

    def _apply(self, hub: Kicker, last: str, page: Page) -> None:
        kicks = [*map(decoded, page.entries)]
        if is_whole(page, last) and None not in kicks:
            others = [kick for kick in kicks if kick and kick[1] != self._origin]
            attempt(partial(hub.end, kick) for kick, _ in others)
            return
        count = hub.end_nameable()
        text = (
            "kicks are missing: the broker dropped them before this process read them;"
            " %d streams that they could have named are ended, and their clients"
            " reconnect"
        )
        say(log, logging.WARNING, text, count)


def _listen_again(reference: weakref.ref[Control], watcher: Watch) -> float | None:
    control = reference()
    return None if control is None else control.listen_again(watcher)


def _look(reference: weakref.ref[Control]) -> None:
    control = reference()
    if control is not None:
        control.look()


def decoded(entry: Entry) -> tuple[Kick, str] | None:
    """Return a kick and its origin, ``None`` if the entry is not a kick."""
    try:
        (event,) = Decoder(max_line=None, max_event=None).feed(entry.wire)
        fields: Any = json.loads(str(event.data))
        who, tags, origin = fields["who"], fields["tags"], str(fields["origin"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not (who is None or isinstance(who, str)):
        return None
    if not (tags is None or isinstance(tags, list)):
        return None
    return Kick(who, None if tags is None else [*map(str, tags)]), origin


def attempt(calls: Iterable[Callable[[], object]]) -> None:
    """Call all of them; then raise the first exception that one has raised."""
    failure: BaseException | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
