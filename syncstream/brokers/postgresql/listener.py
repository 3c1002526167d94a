"""The thread that listens for new events and reports them to the hub."""

from __future__ import annotations

import _thread
import logging
import os
import select

from ...errors import Unavailable
from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiting import say
from ..health import Health
from ..ids import spell_id
from ..log import Entry
from ..tail import Mark, Tail, jitter
from ..watched import Watched
from .connection import (
    READ_TIMEOUT,
    Connection,
    Lost,
    Refused,
    array,
    number_of,
    wait_for,
)
from .pool import Pool
from .schema import Schema

__all__ = ["Listener"]

log = logging.getLogger("syncstream.brokers.postgresql")
HEARTBEAT = 2.0  # seconds between two looks of the listener, notified or not
TAIL = 500  # rows that the listener reads at once
_MAX_NAMES = 500  # that it asks for by name; beyond that it reads all


class Listener:
    """The thread of a process that hears what is new, and its connection.

    Args:
        dsn: Where to, as from `parse_url`.
        schema: Is ensured there.
        health: Is told whether it listens.
        watched: What is told.
        pool: Closes what nobody has used for long, now and then.
        stop: A descriptor, its own from now on: it ends when that can be read.
        is_home: It is where the pool's connections lead to.
        is_late: Somebody counts on being told what has come before it listens.
    """

    def __init__(
        self,
        dsn: str,
        schema: Schema,
        health: Health,
        watched: Watched,
        pool: Pool,
        stop: int,
        *,
        is_home: bool,
        is_late: bool,
    ) -> None:
        # Who drops a broker without a close ends this, too: it is not kept.
        self._dsn = dsn
        self._schema = schema
        self._health = health
        self._watched = watched
        self._pool = pool
        self._stop = stop
        self._is_home = is_home
        self._is_late = is_late
        self._place: tuple[int, int] | None = None  # seq and nonce of what was told
        self._seen = 0  # up to this seq all was told, or that it was deleted
        self._file = 0  # in which that is
        # When the look began that found no more, for `Health.works`: what is found
        # by a later one was stored since then.
        self._complete = 0
        self._has_warned = False
        self._decided = Mark()  # it listens, or its first attempt to has failed
        self._tail = Tail(f"schema {schema.name}", health, log)

    def start(self) -> None:
        native(_thread, "start_new_thread")(self._tail.run, (self,))

    def await_decided(self, deadline: float) -> None:
        """Wait until it listens; what it is late for is read anew."""
        if not self._decided.wait(deadline):
            self._is_late = True

    def await_end(self, deadline: float) -> bool:
        return self._tail.await_end(deadline)

    # Its thread.

    def listen(self) -> None:
        try:
            deadline = time.monotonic() + READ_TIMEOUT
            connection = Connection.open(self._dsn, deadline, stop=self._stop)
            try:
                self._schema.ensure(connection, deadline)
                connection.run(f"LISTEN {self._schema.name}", deadline=deadline)
                self._find_place(connection)
                self._tell(connection)
                self._decided.set()
                self._follow(connection)
            finally:
                connection.close()
        except (Lost, Refused) as error:
            raise Unavailable(str(error)) from error

    def lose(self) -> None:
        self._is_late = self._is_late or self._place is None

    def rest(self, seconds: float) -> None:
        self._decided.set()
        wait_for(self._stop, 0, seconds, self._stop)

    def leave(self) -> None:
        os.close(self._stop)
        self._decided.set()

    def _find_place(self, connection: Connection) -> None:
        """Go on where we were; if that is not known any more, have all read anew."""
        sql = (
            f"SELECT u.deleted, e.seq, e.nonce, EXISTS (SELECT FROM {self._schema.name}"
            ".event p WHERE p.seq = $1 AND p.nonce = $2)"
            f" FROM {self._schema.name}.upkeep u LEFT JOIN (SELECT v.seq, v.nonce"
            f" FROM {self._schema.name}.event v ORDER BY v.seq DESC LIMIT 1) e ON true"
        )
        words = (None, None) if self._place is None else self._place
        began = self._health.moment()
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
        sink = self._health.sink
        if was_late and sink is not None:
            sink.resync(None)

    def _follow(self, connection: Connection) -> None:
        unheard = 0  # times in a row
        while True:
            # Before it looks: what comes from now on is another notification.
            is_heard = connection.hear()
            while True:
                found = self._tell(connection)
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
            self._pool.release()
            # All of one moment would look at one moment, ever after.
            pause = jitter(0.8, 1.2) * HEARTBEAT
            connection.wait(select.POLLIN, time.monotonic() + pause, is_needed=False)

    def _tell(self, connection: Connection) -> bool:
        """Tell all that is new; return whether there was something."""
        health = self._health
        sql = f"SELECT * FROM {self._schema.name}.tail($1, $2, $3, $4)"
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
                if channel in self._watched:
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
                    self._tail.serves(since=began)
                    if self._is_home:
                        health.works("connect", "read", since=began)
                    if found:  # somebody could publish
                        health.works("publish", since=self._complete)
                    self._complete = began
                    return found

    def _names(self, is_utf8: bool) -> tuple[str, str]:
        """Return, as SQL arrays, the names and the prefixes of what is wanted."""
        watched = self._watched
        names, patterns = [*watched.names], [*watched.patterns]
        # One name that another encoding has not, and the server would tell nothing.
        is_sendable = is_utf8 or all(name.isascii() for name in (*names, *patterns))
        if len(names) > _MAX_NAMES or not is_sendable:
            return "{}", '{""}'
        prefixes = [pattern[:-2] if len(pattern) > 1 else "" for pattern in patterns]
        return array(names), array(prefixes)
