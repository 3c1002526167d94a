"""The thread that listens for new events and reports them to the hub."""

from __future__ import annotations

import _thread
import logging
import os
import select
import weakref
from random import SystemRandom
from typing import TYPE_CHECKING

from ...errors import BrokerError
from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiting import say
from ..ids import spell_id
from ..log import Entry
from .connection import (
    READ_TIMEOUT,
    Connection,
    Lost,
    Refused,
    Stopped,
    array,
    number_of,
    wait_for,
)

if TYPE_CHECKING:
    from .broker import PostgreSQLBroker

__all__ = ["Listener"]

log = logging.getLogger("syncstream.brokers.postgresql")
HEARTBEAT = 2.0  # seconds between two looks of the listener, notified or not
BACKOFF = 0.05, 2.0  # seconds before it connects again: first, and at most
TAIL = 500  # rows that the listener reads at once
_MAX_NAMES = 500  # that it asks for by name; beyond that it reads all

# Neither the application's random numbers, which it may have seeded, nor those of the
# process that forked: workers of one seed would all look at the same moments.
_jitter = SystemRandom().uniform


class Listener:
    """The thread of a process that hears what is new, and its connection.

    Attributes:
        is_decided: It listens, or its first attempt to has failed.
    """

    def __init__(self, broker: PostgreSQLBroker, stop: int, is_late: bool) -> None:
        # Who drops a broker without a close ends this, too: it is not kept.
        self._reference = weakref.ref(broker)
        self._dsn = broker._listen_dsn
        self._schema = broker._schema
        # Somebody counts on being told what has come before it listens.
        self._is_late = is_late
        self._place: tuple[int, int] | None = None  # seq and nonce of what was told
        self._seen = 0  # up to this seq all was told, or that it was deleted
        self._file = 0  # in which that is
        # When the look began that found no more, for `Health.works`: what is found
        # by a later one was stored since then.
        self._complete = 0
        self._has_warned = False
        self.is_decided = False
        self._decided = native(_thread, "allocate_lock")()
        self._decided.acquire()
        self._ended = native(_thread, "allocate_lock")()
        self._ended.acquire()
        self._stop = stop
        native(_thread, "start_new_thread")(self._run, ())

    @property
    def _broker(self) -> PostgreSQLBroker:
        broker = self._reference()
        if broker is None:
            raise Stopped
        return broker

    def await_decided(self) -> None:
        if self._decided.acquire(True, READ_TIMEOUT):
            self._decided.release()
        else:
            self._is_late = True

    def await_end(self, timeout: float) -> None:
        self._ended.acquire(True, timeout)

    def _run(self) -> None:
        try:
            failures = 0
            while True:
                began = time.monotonic()
                try:
                    self._listen()
                except (Lost, Refused, BrokerError) as error:
                    self._fail(str(error))
                except Stopped:
                    raise
                except Exception as error:  # or it would be the end of all news
                    self._fail(repr(error))
                    text = "the listener has failed, and begins anew"
                    say(log, logging.ERROR, text, error=error)
                if time.monotonic() - began > 10 * BACKOFF[1]:
                    failures = 0
                self._decide()
                first, most = BACKOFF
                pause = min(most, first * 2 ** min(failures, 10))
                failures += 1
                wait_for(self._stop, 0, _jitter(pause / 2, pause), self._stop)
        except Stopped:
            pass
        finally:
            os.close(self._stop)
            self._decide()
            self._ended.release()

    def _decide(self) -> None:
        if not self.is_decided:
            self.is_decided = True
            self._decided.release()

    def _fail(self, reason: str) -> None:
        self._is_late = self._is_late or self._place is None
        self._broker.health.fails("listen", reason)

    def _listen(self) -> None:
        deadline = time.monotonic() + READ_TIMEOUT
        connection = Connection.open(self._dsn, deadline, stop=self._stop)
        try:
            self._broker._ensure(connection, deadline)
            connection.run(f"LISTEN {self._schema}", deadline=deadline)
            self._find_place(connection)
            self._tail(connection)
            self._decide()
            self._follow(connection)
        finally:
            connection.close()

    def _find_place(self, connection: Connection) -> None:
        """Go on where we were; if that is not known any more, have all read anew."""
        sql = (
            f"SELECT u.deleted, e.seq, e.nonce, EXISTS (SELECT FROM {self._schema}"
            ".event p WHERE p.seq = $1 AND p.nonce = $2)"
            f" FROM {self._schema}.upkeep u LEFT JOIN (SELECT v.seq, v.nonce"
            f" FROM {self._schema}.event v ORDER BY v.seq DESC LIMIT 1) e ON true"
        )
        words = (None, None) if self._place is None else self._place
        began = self._broker.health.moment()
        deadline = time.monotonic() + READ_TIMEOUT
        (result,) = connection.run(sql, words, deadline=deadline)
        if self._place is not None and result.get_value(0, 3) == b"\1":
            self._seen = self._place[0]
            return
        was_late, self._is_late = self._is_late or self._place is not None, False
        newest = 0, 0
        if result.get_value(0, 1) is not None:
            newest = number_of(result, 0, 1), number_of(result, 0, 2)
        self._place = newest
        self._complete = began
        self._seen = max(newest[0], number_of(result, 0, 0))
        sink = self._broker.health.sink
        if was_late and sink is not None:
            sink.resync(None)

    def _follow(self, connection: Connection) -> None:
        unheard = 0  # times in a row
        while True:
            # Before it looks: what comes from now on is another notification.
            is_heard = connection.hear()
            while True:
                found = self._tail(connection)
                if not connection.hear():  # while it looked
                    break
                is_heard = True
            if is_heard:
                unheard = 0
            elif found:
                unheard += 1
            if unheard == 3 and not self._has_warned:
                self._has_warned = True
                say(
                    log,
                    logging.WARNING,
                    "events come without notifications: listen_dsn must lead to the"
                    " server itself, not to a pooler that shares connections",
                )
            self._broker._own().release()
            # All of one moment would look at one moment, ever after.
            pause = _jitter(0.8, 1.2) * HEARTBEAT
            connection.wait(select.POLLIN, time.monotonic() + pause, is_needed=False)

    def _tail(self, connection: Connection) -> bool:
        """Tell all that is new; return whether there was something."""
        broker = self._broker
        health = broker.health
        sql = f"SELECT * FROM {self._schema}.tail($1, $2, $3, $4)"
        found = is_behind = False
        while True:
            assert self._place is not None
            words = (self._place[0], TAIL, *self._names(connection.is_utf8))
            began = health.moment()
            deadline = time.monotonic() + READ_TIMEOUT
            (result,) = connection.run(sql, words, deadline=deadline)
            now = time.monotonic()
            file = number_of(result, 0, 0)
            if file != self._file:
                # A seq of before means nothing in another one.
                if self._file:
                    self._find_place(connection)
                self._file = file
                continue
            # What was deleted meanwhile, and no newer event of its channel shows:
            # this process was frozen, or looks too seldom for its max_age.
            deleted = number_of(result, 0, 2)
            is_behind = is_behind or deleted > self._seen
            for row in range(1, result.ntuples):
                channel = result.get_value(row, 1).decode(errors="replace")
                number, nonce, prev = (
                    number_of(result, row, column) for column in (2, 3, 4)
                )
                if channel in broker.watched:
                    payload = result.get_value(row, 5)
                    if payload is None:
                        # Too much for one answer, or watched since it was asked for.
                        break
                    ids = spell_id(number, nonce), spell_id(number - 1, prev)
                    if health.sink is not None:
                        health.sink.deliver(channel, Entry(*ids, payload, now))
                self._place = number_of(result, row, 0), nonce
                found = True
            else:
                if result.ntuples <= TAIL:
                    self._seen = max(self._place[0], deleted)
                    if is_behind and health.sink is not None:
                        health.sink.resync(None)
                    health.works("listen", since=began)
                    if self._dsn == broker._dsn:
                        health.works("connect", "read", since=began)
                    if found:  # somebody could publish
                        health.works("publish", since=self._complete)
                    self._complete = began
                    return found

    def _names(self, is_utf8: bool) -> tuple[str, str]:
        """Return, as SQL arrays, the names and the prefixes of what is wanted."""
        watched = self._broker.watched
        names, patterns = [*watched.names], [*watched.patterns]
        # One name that another encoding has not, and the server would tell nothing.
        is_sendable = is_utf8 or all(name.isascii() for name in (*names, *patterns))
        if len(names) > _MAX_NAMES or not is_sendable:
            return "{}", '{""}'
        prefixes = [pattern[:-2] if len(pattern) > 1 else "" for pattern in patterns]
        return array(names), array(prefixes)
