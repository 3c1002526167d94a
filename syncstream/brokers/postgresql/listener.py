"""The thread that listens for new events and reports them to the hub."""

from __future__ import annotations

import logging
import math
import os
import select
from functools import partial

from ...errors import Unavailable
from ...runtime.clock import time
from ...runtime.waiting import say
from ..health import Health
from ..ids import spell_id
from ..log import Entry
from ..process import start_thread
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
HEARTBEAT = 2.0  # seconds between two looks without a notification
TAIL = 500  # rows read at once
# Seconds that the first attempt to read may hold up announcements; each that fails
# doubles them, up to READ_TIMEOUT: on a slow line connecting alone takes that long.
_TRY = 0.5
_MAX_NAMES = 500  # names in a request; with more, the data of all channels is read


class Listener:
    """The listening thread of a process, and its connection.

    Args:
        dsn: The connection string, as from `parse_url`.
        schema: The schema, which is checked, or installed, at each connect.
        health: Records whether the listener works.
        watched: The watched names.
        pool: The pool whose unused connections the listener closes from time to time,
            and by which it finds out whether failed reads are possible again.
        stop: A descriptor that the listener owns from now on: it ends once that is
            readable.
        is_late: Events that came before it listens must be announced, too.
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
        is_late: bool,
    ) -> None:
        # No reference to the broker: dropping the broker must end the listener.
        self._dsn = dsn
        self._schema = schema
        self._health = health
        self._watched = watched
        self._pool = pool
        self._stop = stop
        # Announcements may be lost: have the hub read all channels after the next look.
        self._is_behind = is_late
        self._place: tuple[int, int] | None = None  # seq and nonce of the last event
        self._seen = 0  # all events up to this seq were announced, or were deleted
        self._file = 0  # the table's file that these belong to
        # The `Health.moment` of the last look that found all events: later looks find
        # events that were stored since then.
        self._complete = 0
        self._has_warned = False
        self._tries_at = -math.inf  # `time.monotonic` of the next attempt to read
        self._patience = _TRY  # seconds for that attempt
        self._decided = Mark()  # set when it listens, or when its first attempt failed
        self._tail = Tail(f"schema {schema.name}", health, log)

    def start(self) -> None:
        """Begin, in a thread.

        Raises:
            Unavailable: No thread can be started.
        """
        try:
            start_thread("postgresql:", partial(self._tail.run, self))
        except BaseException:
            os.close(self._stop)
            raise

    def await_decided(self, deadline: float) -> None:
        """Wait until it listens; after a time-out it reads all channels later."""
        if not self._decided.wait(deadline):
            self._is_behind = True

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
        self._is_behind = self._is_behind or self._place is None

    def rest(self, seconds: float) -> None:
        self._decided.set()
        wait_for(self._stop, 0, seconds, self._stop)

    def leave(self) -> None:
        os.close(self._stop)
        self._decided.set()

    def _find_place(self, connection: Connection) -> None:
        """Go on from the last place; if it is gone, have the hub read all channels."""
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
        self._is_behind = self._is_behind or self._place is not None
        newest = 0, 0
        if result.get_value(0, 1) is not None:
            newest = number_of(result, 0, 1), number_of(result, 0, 2)
        self._place = newest
        self._complete = began
        self._seen = max(newest[0], number_of(result, 0, 0))
        self._catch_up()

    def _catch_up(self) -> None:
        """Have the hub read all channels if announcements may be lost."""
        if self._is_behind:
            sink = self._health.sink
            if sink is not None:
                sink.resync(None)
            self._is_behind = False  # not if that has failed

    def _follow(self, connection: Connection) -> None:
        unheard = 0  # looks in a row that found events without a notification
        while True:
            # Before looking: later events cause another notification.
            is_heard = connection.hear()
            while True:
                found = self._tell(connection)
                if not connection.hear():  # since the look began
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
                    "events arrive without notifications, so up to 2 s late: listen_dsn"
                    " must lead to the server itself, not to a pooler that shares"
                    " connections",
                )
            self._pool.release()
            self._try_to_read()
            # Jitter: listeners that began together must not look together for ever.
            pause = jitter(0.8, 1.2) * HEARTBEAT
            connection.wait(select.POLLIN, time.monotonic() + pause, is_needed=False)

    def _try_to_read(self) -> None:
        """If reading has failed, find out whether it is possible again.

        The listener's own look does not show that: its connection is open already, and
        its role may be allowed to execute ``tail``, but not ``read``.
        """
        health, now = self._health, time.monotonic()
        if not (health.is_failing("connect") or health.is_failing("read")):
            self._patience = _TRY
            return
        if now < self._tries_at:
            return
        sql = f"SELECT * FROM {self._schema.name}.read('', -1, 0, 0, 0, NULL)"
        began = health.moment()
        try:
            self._pool.probe(sql, now + self._patience, self._stop)
        except (Unavailable, Lost, Refused):  # still: that was noted when it began
            self._patience = min(2 * self._patience, READ_TIMEOUT)
        else:
            health.works("connect", "read", since=began)
        # As long again for announcements alone.
        end = time.monotonic()
        self._tries_at = end + max(HEARTBEAT, end - now)

    def _tell(self, connection: Connection) -> bool:
        """Announce all new events; return whether there were any."""
        health = self._health
        sql = f"SELECT * FROM {self._schema.name}.tail($1, $2, $3, $4)"
        found = False
        while True:
            assert self._place is not None
            words = (self._place[0], TAIL, *self._names(connection.is_utf8))
            began = health.moment()
            deadline = time.monotonic() + READ_TIMEOUT
            (result,) = connection.run(sql, words, deadline=deadline)
            now = time.monotonic()
            file = number_of(result, 0, 0)
            if file != self._file:
                # A seq of another file means nothing in this one.
                if self._file:
                    self._find_place(connection)
                self._file = file
                continue
            # Deletions of newest events, which no newer event shows: this process was
            # frozen, or looks too rarely for its max_age.
            deleted = number_of(result, 0, 2)
            self._is_behind = self._is_behind or deleted > self._seen
            for row in range(1, result.ntuples):
                channel = result.get_value(row, 1).decode(errors="replace")
                number, nonce, prev = (
                    number_of(result, row, column) for column in (2, 3, 4)
                )
                if channel in self._watched:
                    payload = result.get_value(row, 5)
                    if payload is None:
                        # Too large for this answer, or watched after the request.
                        break
                    ids = spell_id(number, nonce), spell_id(number - 1, prev)
                    if health.sink is not None:
                        health.sink.deliver(channel, Entry(*ids, payload, now))
                self._place = number_of(result, row, 0), nonce
                found = True
            else:
                if result.ntuples <= TAIL:
                    self._seen = max(self._place[0], deleted)
                    self._catch_up()
                    self._tail.serves(since=began)
                    if found:  # some process could publish
                        health.works("publish", since=self._complete)
                    self._complete = began
                    return found

    def _names(self, is_utf8: bool) -> tuple[str, str]:
        """Return the names and the prefixes of the watched channels, as SQL arrays.

        The empty prefix stands for all channels.
        """
        watched = self._watched
        names, patterns = [*watched.names], [*watched.patterns]
        # A single name that the encoding lacks would make the request fail.
        is_sendable = is_utf8 or all(name.isascii() for name in (*names, *patterns))
        if len(names) > _MAX_NAMES or not is_sendable:
            return "{}", '{""}'
        prefixes = [pattern[:-2] if len(pattern) > 1 else "" for pattern in patterns]
        return array(names), array(prefixes)
