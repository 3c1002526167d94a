"""Kicks, passed between the processes of a hub.

A channel of the hub's own, stored by the broker like any other, under a name that no
application can use. A process watches it while somebody is there whom a kick could
name. What is told live is only a sign to read on, from the place of before: so nothing
is missed while the listener was down. If some of it cannot be read any more, all whom
it could have named are kicked, and come back through their view, which decides anew.

An engine may refuse the channel to a process (an ACL of Redis). Its subscribers stay:
most applications kick nobody. But it is said, `Hub.kick` raises there, and the engine
is asked again; once it allows the channel, those who were there unheard are kicked.
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

__all__ = ["CONTROL", "Control", "Kick"]

log = logging.getLogger("syncstream.control")

CONTROL = "syncstream control"  # a space: no application's, no pattern's
READ = 500  # entries that are read at once
RETRY = 1.0  # seconds until a broker that did not answer is asked again
ASK_AGAIN = 5.0  # seconds until an engine that refuses the channel is asked again

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

    @property
    def broker(self) -> Broker: ...

    def end(self, kick: Kick) -> int: ...

    def end_nameable(self, but: object = None) -> int: ...

    def deny(self, name: str, reason: str) -> None: ...

    def say_unreadable(self, name: str, error: BrokerError) -> None: ...


class Control:
    """One process's end of a hub's control channel.

    Args:
        hub: It is held weakly.

    Attributes:
        is_reading: What there is to read is being read, or will be.
        refusal: Why the engine refuses the channel; ``None``: it allows it.
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
        self._is_news = self.is_reading = False
        self._watch: Watch | None = None
        self.refusal: str | None = None  # the engine's; `None`: it allows the channel

    def tell(self, kick: Kick) -> None:
        """Tell the other processes.

        Raises:
            Denied: They were told, but the engine does not let this one hear kicks,
                nor others that have the same rights.
            BrokerError: They are not told, or may not be.
        """
        hub = self._hub()
        if hub is None or hub.broker.scope == "process":
            return
        hub.broker.publish([(CONTROL, kick.encoded(self._origin))])
        if self.refusal is not None and self._count:
            self._listen(hub)  # it may be allowed by now
            if self.refusal is not None:
                raise Denied(f"kicks are not heard: {self.refusal}")

    def enter(self, newcomer: object) -> None:
        """Listen for one more; the first fixes the place from which it is read.

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
        """Have the broker tell of kicks, or take note that the engine refuses that.

        Args:
            newcomer: Comes just now, and has missed no kick.

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
            # From the old place on all is read: then nobody has missed anything.
            was_deaf = self.refusal is not None and self._last is None
            self.refusal = None
            if self._last is None and self._count:
                self._last, self._watch = head, watcher
        if was_deaf and (count := hub.end_nameable(but=newcomer)):
            text = "kicks are heard again: all whom they may have named are kicked, %d"
            say(log, logging.WARNING, text, count)
        self.look()

    def refuse(self, reason: str) -> None:
        """Take note that the engine refuses the channel; ask again, until it does not.

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
        """Ask an engine that has refused; return when to do so again. In a watch."""
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
            with suppress(Unavailable):  # it is asked again
                self._listen(hub)

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
            self._listen(hub)
        except Exception as error:  # they believe that they are listened for
            count = hub.end_nameable()
            text = "kicks cannot be watched, and who could be kicked is, %d: %s"
            say(log, logging.ERROR, text, count, error)
            self.look()

    def look(self) -> None:
        """Read what there is, soon; from any thread, without waiting."""
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
                if last == page.head:  # nothing follows it, known to the engine or not
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
        kicks = [*map(_decoded, page.entries)]
        if is_whole(page, last) and None not in kicks:
            others = [kick for kick in kicks if kick and kick[1] != self._origin]
            attempt(partial(hub.end, kick) for kick, _ in others)
            return
        count = hub.end_nameable()
        text = "kicks are missing: all whom they may have named are kicked, %d"
        say(log, logging.WARNING, text, count)


def _listen_again(reference: weakref.ref[Control], watcher: Watch) -> float | None:
    control = reference()
    return None if control is None else control.listen_again(watcher)


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
