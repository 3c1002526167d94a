"""What the processes of a hub tell each other: whom to kick.

A channel of the hub's own, stored by the broker like any other, under a name that no
application can use. A process watches it while somebody is there whom a kick could
name. What is told live is only a sign to read on, from the place of before: so nothing
is missed while the listener was down. If some of it cannot be read any more, all whom
it could have named are kicked, and come back through their view, which decides anew.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

from .brokers import Broker
from .clock import time
from .errors import BrokerError, Denied, Unavailable
from .log import Entry, Page
from .protocol.sse import Decoder, Event
from .sockets import native
from .waiting import say
from .watch import Watch, elsewhere, watch

__all__ = ["CONTROL", "Control", "Kick"]

log = logging.getLogger(__name__)

CONTROL = "syncstream control"  # a space: no application's, no pattern's
READ = 500  # entries that are read at once
RETRY = 1.0  # seconds until a broker that did not answer is asked again

# Workers of a version without this deliver it to nobody, though they have "#".
_FOR_NOBODY = b'\0{"only": []}\n'


class Kick:
    """Whom to end: all that is given holds for them.

    Attributes:
        who: The JSON of their ``who``, in one form; ``None`` for any.
        tags: They have one of these; ``None`` for any.
    """

    __slots__ = ("tags", "who")

    def __init__(self, who: str | None, tags: Sequence[str] | None) -> None:
        self.who = who
        self.tags = tags

    def encoded(self, origin: str) -> bytes:
        fields = {"who": self.who, "tags": self.tags, "origin": origin}
        return _FOR_NOBODY + Event(json.dumps(fields), event="kick").encode()


class Kicker(Protocol):
    """The hub, as far as this module needs to know."""

    broker: Broker

    def end(self, kick: Kick) -> int: ...

    def end_nameable(self) -> int: ...

    def deny(self, name: str, reason: str) -> None: ...


class Control:
    """One process's end of a hub's control channel.

    Args:
        hub: It is held weakly.
    """

    def __init__(self, hub: Kicker) -> None:
        self._hub = weakref.ref(hub)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what is a parent's, in a forked child."""
        self._lock = native(_thread, "RLock")()
        self._origin = os.urandom(8).hex()
        self._count = 0  # subscriptions that a kick may name
        self._last: str | None = None  # read up to here; `None`: nobody listens
        self._is_news = self._is_reading = False
        self._watch: Watch | None = None

    def tell(self, kick: Kick) -> None:
        """Tell the other processes.

        Raises:
            BrokerError: They are not told, or may not be.
        """
        hub = self._hub()
        if hub is not None and hub.broker.scope != "process":
            hub.broker.publish([(CONTROL, kick.encoded(self._origin))])

    def enter(self) -> None:
        """Listen for one more; the first fixes the place from which it is read.

        Raises:
            BrokerError: The broker does not answer.
        """
        hub = self._hub()
        with self._lock:
            self._count += 1
            if hub is None or hub.broker.scope == "process" or self._last is not None:
                return
        broker = hub.broker
        broker.watch(CONTROL)
        head = broker.read(CONTROL, None).head
        watcher = watch()
        with self._lock:
            if self._last is None and self._count:
                self._last, self._watch = head, watcher
        self.look()

    def leave(self) -> None:
        """Listen for one less."""
        hub = self._hub()
        with self._lock:
            self._count -= 1
            if self._count or hub is None or hub.broker.scope == "process":
                return
            self._last = None
        broker = hub.broker
        try:
            broker.unwatch(CONTROL)
        except BrokerError as error:  # it goes on to tell what nobody wants
            say(log, logging.WARNING, "kicks could not be unwatched: %s", error)
        with self._lock:
            is_back = self._count > 0
        if not is_back:
            return
        try:  # somebody has come in between, and had it watched before this
            broker.watch(CONTROL)
        except BrokerError as error:  # they believe that they are listened for
            count = hub.end_nameable()
            text = "kicks cannot be watched, and who could be kicked is, %d: %s"
            say(log, logging.ERROR, text, count, error)
        self.look()

    def look(self) -> None:
        """Read what there is, soon; from any thread, without waiting."""
        with self._lock:
            self._is_news = True
            if self._is_reading or self._last is None or self._watch is None:
                return
            self._is_reading = True
            watcher = self._watch
        try:
            elsewhere(watcher, self._read)
        except BaseException:
            self._is_reading = False
            raise

    def _read(self) -> None:
        while True:
            hub = self._hub()
            with self._lock:
                last, watcher = self._last, self._watch
                if hub is None or last is None or not self._is_news:
                    self._is_reading = False
                    return
                self._is_news = False
            try:
                page = hub.broker.read(CONTROL, last, READ)
            except BaseException as error:
                with self._lock:
                    self._is_reading = False
                if isinstance(error, Denied):  # it is read when the next one is told
                    hub.deny(CONTROL, str(error))
                    return
                if not isinstance(error, Unavailable):
                    say(log, logging.ERROR, "kicks cannot be read", error=error)
                if watcher is not None:
                    again = partial(_look, weakref.ref(self))
                    watcher.call_at(time.monotonic() + RETRY, again)
                return
            with self._lock:
                if self._last != last:  # all have left, and others have come
                    self._is_news = True
                    continue
                self._last = page.entries[-1].id if page.entries else page.head
                self._is_news = self._is_news or bool(page.entries)
            try:
                self._apply(hub, last, page)
            except Exception as error:
                say(log, logging.ERROR, "a kick failed", error=error)

    def _apply(self, hub: Kicker, last: str, page: Page) -> None:
        entries = page.entries
        is_whole = page.complete or (bool(entries) and entries[0].prev == last)
        for before, entry in pairwise(entries):
            is_whole = is_whole and entry.prev == before.id
        kicks = [*map(_decoded, entries)]
        if is_whole and None not in kicks:
            others = [kick for kick in kicks if kick and kick[1] != self._origin]
            attempt(partial(hub.end, kick) for kick, _ in others)
            return
        count = hub.end_nameable()
        text = "kicks are missing: all whom they may have named are kicked, %d"
        say(log, logging.WARNING, text, count)


def _look(reference: weakref.ref[Control]) -> None:
    control = reference()
    if control is not None:
        control.look()


def _decoded(entry: Entry) -> tuple[Kick, str] | None:
    """Return a kick and its origin; ``None`` for what is none."""
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
    """Call all of them; then raise what the first that failed has raised."""
    failure: BaseException | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
