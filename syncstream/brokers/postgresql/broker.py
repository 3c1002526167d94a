"""`PostgreSQLBroker`: the methods that a hub calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Literal, TypeVar

from psycopg import pq

from ...errors import Denied, PayloadTooLarge, Unavailable, Uncertain
from ...runtime.clock import time
from ...runtime.waiting import LONGEST
from ..contract import Sink, check_bounds
from ..health import Health
from ..ids import parse_id, spell_id
from ..log import Entry, Page
from ..process import PerProcess
from ..watched import Watched
from .connection import (
    DENIED,
    READ_TIMEOUT,
    Lost,
    Refused,
    array,
    number_of,
    parse_url,
    spell_number,
    sqlstate_of,
)
from .listener import Listener
from .process import Process
from .schema import HOW_TO, MISSING, Schema

__all__ = ["PostgreSQLBroker"]

log = logging.getLogger("syncstream.brokers.postgresql")

T = TypeVar("T")
_MAX_BATCH = 64 << 20  # bytes published at once; hexadecimal doubles them


class PostgreSQLBroker:
    """Events in a PostgreSQL database.

    Args:
        dsn: A ``postgresql://`` URL or ``key=value`` words, as libpq takes them;
            ``""`` for libpq's environment variables (``PGHOST`` …).
        capacity: The maximum of kept events of each channel. Use the same ``capacity``
            and ``max_age`` in all processes that share a schema.
        max_age: Seconds for which events are kept; ``None`` for no limit. Channels that
            were idle for twice that time, and for a day, are forgotten.
        listen_dsn: The server's own address to listen at, if ``dsn`` leads to a pooler
            that shares connections (PgBouncer with ``pool_mode = transaction``).
        schema: The schema that contains the tables.
        create: Install the schema if it is missing, or of an older release.
        publish_timeout: The maximum of seconds for `publish`, besides a DNS look-up,
            which has the time-outs of the system.
        connections: The maximum of connections that publish and read in each process,
            in addition to the listening one.

    Raises:
        TypeError, ValueError: An argument has a wrong type or value.
    """

    scope: Literal["cluster"] = "cluster"

    def __init__(
        self,
        dsn: str = "",
        capacity: int = 1000,
        max_age: float | None = 3600.0,
        *,
        listen_dsn: str | None = None,
        schema: str = "syncstream",
        create: bool = True,
        publish_timeout: float = 2.0,
        connections: int = 4,
    ) -> None:
        self._schema = Schema(schema, create)
        check_bounds(capacity, max_age)
        if not publish_timeout > 0:
            raise ValueError(
                f"publish_timeout must be above 0, got {publish_timeout!r}"
            )
        if not isinstance(connections, int) or connections < 1:
            raise ValueError(f"connections must be 1 or more, got {connections!r}")
        self._dsn = parse_url(dsn)
        self._listen_dsn = self._dsn if listen_dsn is None else parse_url(listen_dsn)
        self._capacity = capacity
        self._max_age = max_age
        self._publish_timeout = min(publish_timeout, LONGEST)
        self._connections = connections
        self.health = Health(log)
        self.watched = Watched()
        # Connections opened before a fork are not touched after it.
        self._parts: PerProcess[PostgreSQLBroker, Process] = PerProcess(
            self, Process.drop
        )
        # "open"; "closing": no listener begins any more; "closed": nothing is done.
        self._state: Literal["open", "closing", "closed"] = "open"

    # This process's part.

    def _here(self) -> Process:
        here = self._parts.get()
        if here is None:
            new = Process(
                self._dsn,
                self._schema,
                self.health,
                self._connections,
                is_heir=bool(self.watched),
            )
            here = self._parts.begin(new)
        if here.is_heir:
            self._listener(here)
        return here

    def _listener(self, here: Process) -> Listener | None:
        """Return this process's listener, ``None`` if the broker is closed."""
        if self._state != "open":
            return None
        return here.listen(self._listen_dsn, self.watched)

    def _call(self, here: Process, function: Callable[[], T], deadline: float) -> T:
        """Make a call that may block."""
        if self._state == "closed":
            raise Unavailable("the broker is closed")
        return here.call(function, deadline)

    # Publishing.

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """See `syncstream.brokers.Broker.publish`.

        Args:
            items: The channel and the payload of each event.
            connection: A connection of Django, psycopg or psycopg2. The events are
                stored if its transaction commits. The driver's own errors are raised,
                because they end that transaction. A transaction that is not READ
                COMMITTED may fail at its commit if others have published to the
                channel since it began, as for any row that others have changed.

        Raises:
            TypeError: The connection is none of these, or is asynchronous.
            ValueError: The connection leads to another database than the broker's, or
                triggers are disabled in it.
            Denied: The role may not publish, or not to this channel.
        """
        size = sum(len(payload) for _, payload in items)
        if size > _MAX_BATCH:
            raise PayloadTooLarge(
                f"events must have {_MAX_BATCH} bytes at most, all together, got {size}"
            )
        if not items:
            return []
        here = self._here()
        deadline = time.monotonic() + self._publish_timeout
        if connection is not None:
            self._check_connection(connection)
            self._call(here, partial(here.pool.check, deadline), deadline)
            if not self._enlist(items, connection, here.pool.identity):
                # The broker's own database may have changed: a failover, a restore.
                was = here.pool.identity
                self._call(
                    here, partial(here.pool.check, deadline, anew=True), deadline
                )
                is_same = was == here.pool.identity
                if is_same or not self._enlist(items, connection, here.pool.identity):
                    raise ValueError(
                        "connection must lead to the hub's own database, and not have"
                        " session_replication_role = replica: nothing was stored"
                    )
            return [None] * len(items)
        return self._call(here, partial(self._publish, here, items, deadline), deadline)

    def _publish(
        self, here: Process, items: Sequence[tuple[str, bytes]], deadline: float
    ) -> list[str | None]:
        began = self.health.moment()
        with here.pool.lent(deadline) as connection:
            left = deadline - time.monotonic()
            if left < self._publish_timeout / 4:
                # Better than an answer that comes too late.
                raise Unavailable(
                    "publish_timeout was almost over before the events could be sent"
                )
            sql = self._publish_sql(items, left)
            results: Sequence[Any]
            try:
                results = connection.run(sql, deadline=deadline)
            except Refused as error:
                if error.sqlstate in (DENIED, *_UNNAMEABLE):
                    raise Denied(f"not published: {error}") from error
                way = "connect" if error.is_fatal else "publish"
                self.health.fails(way, f"not published: {error}")
                # A stopping server may report its end after the commit.
                kind = Uncertain if error.is_fatal else Unavailable
                raise kind(f"not published: {error}") from error
            except Lost as error:
                results = error.results
                if not any(r.command_status == b"COMMIT" for r in results):
                    self.health.fails("connect", f"no answer: {error}")
                    raise Uncertain(f"no answer: {error}") from error
            self.health.works("connect", "publish", since=began)
        (found,) = (r for r in results if r.status == pq.ExecStatus.TUPLES_OK)
        return [found.get_value(row, 0).decode() for row in range(found.ntuples)]

    def _publish_sql(self, items: Sequence[tuple[str, bytes]], seconds: float) -> str:
        # One message for everything: a process that stalls or dies while sending holds
        # no lock. Hexadecimal digits need no quoting, whatever the server's settings.
        channels = ",".join(
            f"convert_from(decode('{name.encode().hex()}','hex'),'UTF8')"
            for name, _ in items
        )
        data = ",".join(f"decode('{payload.hex()}','hex')" for _, payload in items)
        # The server's limit is shorter than ours, so that it reports the time-out.
        limit = max(1, int(seconds * 700))
        return (
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
            f"SET LOCAL statement_timeout = {limit};"
            f"SELECT {self._schema.name}.publish(ARRAY[{channels}],ARRAY[{data}],"
            f"{self._capacity},{spell_number(self._max_age)});COMMIT"
        )

    def _check_connection(self, connection: Any) -> None:
        if not callable(getattr(connection, "cursor", None)):
            raise TypeError(
                "connection must be one of Django, psycopg or psycopg2, got"
                f" {type(connection)!r}"
            )
        vendor = getattr(connection, "vendor", "postgresql")  # Django's have one
        if vendor != "postgresql":
            raise ValueError(
                f"connection must lead to a PostgreSQL database, got {vendor!r}"
            )

    def _enlist(
        self, items: Sequence[tuple[str, bytes]], connection: Any, identity: str
    ) -> bool:
        """Store events in a transaction.

        Returns:
            ``False`` if it is in another database, or its triggers are disabled.
        """
        cursor = connection.cursor()
        if iscoroutinefunction(cursor.execute):  # without await it would do nothing
            raise TypeError(f"connection must not be async, got {type(connection)!r}")
        try:
            # One statement: it stores all or nothing, even outside of a transaction,
            # and nothing in another database. Hexadecimal digits suit any driver.
            cursor.execute(
                f"INSERT INTO {self._schema.name}.outbox"
                " (channel, data, capacity, max_age)"
                " SELECT new.channel, decode(new.data, 'hex'), %s::bigint,"
                " %s::double precision FROM unnest(%s::text[], %s::text[])"
                " WITH ORDINALITY AS new (channel, data, place)"
                f" WHERE {self._schema.name}.identity() = %s"
                # Without triggers the events would stay in the outbox.
                " AND current_setting('session_replication_role') <> 'replica'"
                " ORDER BY place RETURNING 1",
                [
                    *(self._capacity, self._max_age),
                    array([channel for channel, _ in items]),
                    array([payload.hex() for _, payload in items]),
                    identity,
                ],
            )
            # Not `rowcount`: a pipeline of psycopg does not know it yet.
            return bool(cursor.fetchall())
        except Exception as error:
            if sqlstate_of(error) in MISSING:
                raise Unavailable(
                    "the database of this connection has no schema"
                    f" {self._schema.name!r}; is it the hub's database? {HOW_TO}"
                ) from error
            raise
        finally:
            cursor.close()

    # Reading.

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """See `syncstream.brokers.Broker.read`; pages of long events are shorter."""
        here = self._here()
        deadline = time.monotonic() + READ_TIMEOUT
        read = partial(self._read, here, channel, after, limit, deadline)
        return self._call(here, read, deadline)

    def _read(
        self,
        here: Process,
        channel: str,
        after: str | None,
        limit: int,
        deadline: float,
    ) -> Page:
        off, nonce = parse_id(after or "") or (-1, 0)
        place = None if after is None else off
        words = (channel, place, nonce, limit, self._capacity, self._max_age)
        sql = f"SELECT * FROM {self._schema.name}.read($1, $2, $3, $4, $5, $6)"
        result = self._ask(here, sql, words, deadline)
        now = time.monotonic()
        entries = []
        head = spell_id(*(number_of(result, 0, column) for column in (0, 1)))
        for row in range(1, result.ntuples):
            number, nonce, prev = (
                number_of(result, row, column) for column in range(3)
            )
            payload = result.get_value(row, 3) or b""
            ids = spell_id(number, nonce), spell_id(number - 1, prev)
            entries.append(Entry(*ids, payload, now))
        first = entries[0].prev if entries else head
        return Page(entries, after is None or after == first, head)

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Return the id before the newest events of a channel, and its head's.

        Args:
            channel: Its name.
            count: Of so many of them, or all that are kept. None of them is read.

        Raises:
            Unavailable: As from `read`.
        """
        here = self._here()
        deadline = time.monotonic() + READ_TIMEOUT
        newest = partial(self._newest, here, channel, count, deadline)
        return self._call(here, newest, deadline)

    def _newest(
        self, here: Process, channel: str, count: int, deadline: float
    ) -> tuple[str, str]:
        sql = (
            # The function gives the head alone; it refuses where rows may be hidden.
            "SELECT h.r_off, h.r_nonce, e.off - 1, e.prev"
            f" FROM {self._schema.name}.read($1, -1, 0, 0, $3::bigint, $4) h"
            f" LEFT JOIN LATERAL (SELECT v.off, v.prev FROM {self._schema.name}.event v"
            " WHERE v.channel = $1 AND v.off > h.r_off - $3::bigint"
            " AND v.ts > coalesce(clock_timestamp()"
            " - $4::double precision * interval '1 second', '-infinity')"
            " ORDER BY v.off DESC LIMIT $2::bigint) e ON true ORDER BY e.off LIMIT 1"
        )
        words = (channel, count, self._capacity, self._max_age)
        result = self._ask(here, sql, words, deadline)
        head = spell_id(*(number_of(result, 0, column) for column in (0, 1)))
        if result.get_value(0, 2) is None:
            return head, head
        return spell_id(*(number_of(result, 0, column) for column in (2, 3))), head

    def _ask(
        self, here: Process, sql: str, words: Sequence[object], deadline: float
    ) -> Any:
        """Return the answer to a statement that changes nothing."""
        for attempt in (1, 2):
            began = self.health.moment()
            try:
                with here.pool.lent(deadline) as connection:
                    (result,) = connection.run(sql, words, deadline=deadline)
                break
            except (Refused, Lost) as error:
                if isinstance(error, Refused) and error.sqlstate in _UNNAMEABLE:
                    raise Denied(f"not read: {error}") from error
                # The connection broke: trying again does no harm.
                if attempt == 2 or time.monotonic() >= deadline:
                    is_refused = isinstance(error, Refused) and not error.is_fatal
                    way = "read" if is_refused else "connect"
                    self.health.fails(way, f"not read: {error}")
                    raise Unavailable(f"not read: {error}") from error
        self.health.works("connect", "read", since=began)
        return result

    # Announcing.

    def attach(self, sink: Sink) -> None:
        self.health.sink = sink

    def watch(self, channel: str) -> None:
        """See `syncstream.brokers.Broker.watch`.

        It also returns while the server cannot be reached: when the server is back, all
        channels are read.
        """
        here = self._here()
        self.watched.add(channel)
        try:
            listener = self._listener(here)
        except Unavailable:
            self.unwatch(channel)
            raise
        # Without a listener the broker is closed, and the following read raises it.
        if listener is not None:
            listener.await_decided(time.monotonic() + READ_TIMEOUT)

    def unwatch(self, channel: str) -> None:
        self.watched.discard(channel)

    def close(self, timeout: float = 5.0) -> None:
        if self._state == "closed":
            return
        self._state = "closing"
        here = self._parts.get()
        if here is not None:
            here.close(timeout)
        self._state = "closed"


_UNNAMEABLE = "22P05", "22021"  # the database's encoding lacks such characters
