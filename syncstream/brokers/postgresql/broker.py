"""`PostgreSQLBroker`: the methods that a hub calls."""

from __future__ import annotations

import _queue
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Literal, TypeVar

from psycopg import pq

from ...errors import BrokerError, Denied, PayloadTooLarge, Unavailable, Uncertain
from ...runtime import waiting
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
    Connection,
    Lost,
    Refused,
    array,
    number_of,
    parse_url,
    spell_number,
    sqlstate_of,
)
from .listener import Listener
from .process import Own, Stopper, living
from .schema import check_schema, install_sql

__all__ = ["PostgreSQLBroker"]

log = logging.getLogger("syncstream.brokers.postgresql")

T = TypeVar("T")
_MAX_BATCH = 64 << 20  # bytes published at once: they are sent as twice as many


class PostgreSQLBroker:
    """Events in a PostgreSQL database.

    Args:
        dsn: A ``postgresql://`` URL or ``key=value`` words, as libpq takes them;
            ``""`` for what its environment variables (``PGHOST`` …) say.
        capacity: So many events of each channel are kept. It and ``max_age`` should
            be the same wherever the same schema is used.
        max_age: Events are kept for so many seconds; ``None`` for no limit. Channels
            that are idle for two times that, and a day, are forgotten.
        listen_dsn: Where to listen, if ``dsn`` leads to a pooler that shares
            connections (PgBouncer with ``pool_mode = transaction``): the server itself.
        schema: Where its tables are.
        create: Install the schema when it is missing, or of an older release.
        publish_timeout: Seconds that `publish` takes at most.
        connections: So many at most publish and read, in each process, beside the one
            that listens.
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
        install_sql(schema)  # checks its name
        check_bounds(capacity, max_age)
        if not publish_timeout > 0:
            raise ValueError(f"publish_timeout must be above 0, got {publish_timeout}")
        if not isinstance(connections, int) or connections < 1:
            raise ValueError(f"connections must be 1 or more, got {connections!r}")
        self._dsn = parse_url(dsn)
        self._listen_dsn = self._dsn if listen_dsn is None else parse_url(listen_dsn)
        self._capacity = capacity
        self._max_age = max_age
        self._schema = schema
        self._create = create
        self._publish_timeout = min(publish_timeout, LONGEST)
        self._connections = connections
        self.health = Health(log)
        self.watched = Watched()
        # Nothing that was open before a fork is touched after it.
        self._parts: PerProcess[PostgreSQLBroker, Own] = PerProcess(self, Own.drop)
        self._is_closing = False  # nobody begins to listen any more
        self._is_closed = False

    # What a process has.

    def _own(self) -> Own:
        own = self._parts.get()
        if own is None:
            own = self._parts.begin(Own(self._connections))
            if self.watched:
                # Those of the process that forked: what came since was not told.
                self._listener(own, is_late=True)
        return own

    def _listener(self, own: Own, is_late: bool = False) -> Listener | None:
        """Return who listens in this process; ``None``: the broker is closed."""
        with own.lock:
            if own.listener is None and not self._is_closing:
                stop, stopper = os.pipe()
                own.stopper = Stopper(stopper)
                own.listener = Listener(self, stop, is_late)
            return own.listener

    def _call(self, own: Own, function: Callable[[], T], deadline: float) -> T:
        """Call what may block: in this thread, or for a greenlet in another one."""
        if self._is_closed:
            raise Unavailable("the broker is closed")
        hub = waiting.gevent_hub()
        if hub is None:
            return function()
        threads, places = own.threads(hub)
        if not places.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Unavailable(self._busy)
        try:
            value, error = threads.apply(_outcome, (function,))
        finally:
            places.release()
        if error is not None:
            raise error
        result: T = value
        return result

    @property
    def _busy(self) -> str:
        return f"all {self._connections} connections were busy for all of its time"

    # To publish.

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """See `syncstream.brokers.Broker.publish`.

        Args:
            items: Channel and payload of each.
            connection: Django's, psycopg's or psycopg2's: they are stored when its
                transaction commits, and only then. Its driver's errors are raised as
                they are: they end that transaction. One that is not READ COMMITTED may
                fail at its commit, as it does for any row that others have changed:
                what others have published to the channel since it began.

        Raises:
            ValueError: The connection is to another database than the broker's, or no
                triggers fire in it.
            Denied: The role may not publish, or not to this channel.
        """
        size = sum(len(payload) for _, payload in items)
        if size > _MAX_BATCH:
            raise PayloadTooLarge(
                f"events must have {_MAX_BATCH} bytes together at most, got {size}"
            )
        if not items:
            return []
        own = self._own()
        deadline = time.monotonic() + self._publish_timeout
        if connection is not None:
            self._check_connection(connection)
            self._call(own, partial(self._check_installed, own, deadline), deadline)
            if not self._enlist(items, connection, own.identity):
                # Unless the broker's own is another one by now: a failover, a restore.
                was, own.is_installed = own.identity, False
                self._call(own, partial(self._check_installed, own, deadline), deadline)
                is_same = was == own.identity
                if is_same or not self._enlist(items, connection, own.identity):
                    raise ValueError(
                        "connection must be one to the hub's database, and not with"
                        " session_replication_role = replica: nothing was stored"
                    )
            return [None] * len(items)
        return self._call(own, partial(self._publish, own, items, deadline), deadline)

    def _publish(
        self, own: Own, items: Sequence[tuple[str, bytes]], deadline: float
    ) -> list[str | None]:
        began = self.health.moment()
        with self._lent(own, deadline) as connection:
            left = deadline - time.monotonic()
            if left < self._publish_timeout / 4:
                # Rather this than an answer that comes too late.
                raise Unavailable("the time was over before it could be sent")
            sql = self._publish_sql(items, left)
            results: Sequence[Any]
            try:
                results = connection.run(sql, deadline=deadline)
            except Refused as error:
                if error.sqlstate in (DENIED, *_UNNAMEABLE):
                    raise Denied(f"not published: {error}") from error
                way = "connect" if error.is_fatal else "publish"
                self.health.fails(way, f"not published: {error}")
                # A server that stops may say so after the commit; others roll back.
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
        # One message for all of it: who stalls or dies in the middle of sending holds
        # no lock. Hexadecimal digits need no quoting, whatever the server's settings.
        channels = ",".join(
            f"convert_from(decode('{name.encode().hex()}','hex'),'UTF8')"
            for name, _ in items
        )
        data = ",".join(f"decode('{payload.hex()}','hex')" for _, payload in items)
        # Its own limit is the shorter one: it answers "not done" rather than nothing.
        limit = max(1, int(seconds * 700))
        return (
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
            f"SET LOCAL statement_timeout = {limit};"
            f"SELECT {self._schema}.publish(ARRAY[{channels}],ARRAY[{data}],"
            f"{self._capacity},{spell_number(self._max_age)});COMMIT"
        )

    def _check_connection(self, connection: Any) -> None:
        if not callable(getattr(connection, "cursor", None)):
            raise TypeError(
                "connection must be Django's, psycopg's or psycopg2's, got"
                f" {type(connection)!r}"
            )
        vendor = getattr(connection, "vendor", "postgresql")  # Django's have one
        if vendor != "postgresql":
            raise ValueError(f"connection must be to a PostgreSQL, got {vendor!r}")

    def _enlist(
        self, items: Sequence[tuple[str, bytes]], connection: Any, identity: str
    ) -> bool:
        """Store events in a transaction; ``False``: it is another database's."""
        cursor = connection.cursor()
        if iscoroutinefunction(cursor.execute):  # it would do nothing, unawaited
            raise TypeError(f"connection must not be async, got {type(connection)!r}")
        try:
            # One statement: all or nothing of it, outside of a transaction too, and
            # nothing in another database. Hexadecimal digits suit any driver.
            cursor.execute(
                f"INSERT INTO {self._schema}.outbox (channel, data, capacity, max_age)"
                " SELECT new.channel, decode(new.data, 'hex'), %s::bigint,"
                " %s::double precision FROM unnest(%s::text[], %s::text[])"
                " WITH ORDINALITY AS new (channel, data, place)"
                f" WHERE {self._schema}.identity() = %s"
                # Or nothing would take it out of there.
                " AND current_setting('session_replication_role') <> 'replica'"
                " ORDER BY place RETURNING 1",
                [
                    *(self._capacity, self._max_age),
                    array([channel for channel, _ in items]),
                    array([payload.hex() for _, payload in items]),
                    identity,
                ],
            )
            # A pipeline of psycopg knows no count yet.
            return bool(cursor.fetchall())
        except Exception as error:
            if sqlstate_of(error) in _MISSING:
                raise Unavailable(
                    f"the database of this connection has no schema {self._schema!r}:"
                    f" is it the one of the hub? {_HOW_TO}"
                ) from error
            raise
        finally:
            cursor.close()

    # To read.

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """See `syncstream.brokers.Broker.read`; of long entries it returns fewer."""
        own = self._own()
        deadline = time.monotonic() + READ_TIMEOUT
        read = partial(self._read, own, channel, after, limit, deadline)
        return self._call(own, read, deadline)

    def _read(
        self, own: Own, channel: str, after: str | None, limit: int, deadline: float
    ) -> Page:
        off, nonce = parse_id(after or "") or (-1, 0)
        place = None if after is None else off
        words = (channel, place, nonce, limit, self._capacity, self._max_age)
        sql = f"SELECT * FROM {self._schema}.read($1, $2, $3, $4, $5, $6)"
        result = self._ask(own, sql, words, deadline)
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
        own = self._own()
        deadline = time.monotonic() + READ_TIMEOUT
        newest = partial(self._newest, own, channel, count, deadline)
        return self._call(own, newest, deadline)

    def _newest(
        self, own: Own, channel: str, count: int, deadline: float
    ) -> tuple[str, str]:
        sql = (
            # The function gives the head alone; it refuses where rows may be hidden.
            "SELECT h.r_off, h.r_nonce, e.off - 1, e.prev"
            f" FROM {self._schema}.read($1, -1, 0, 0, $3::bigint, $4) h"
            f" LEFT JOIN LATERAL (SELECT v.off, v.prev FROM {self._schema}.event v"
            " WHERE v.channel = $1 AND v.off > h.r_off - $3::bigint"
            " AND v.ts > coalesce(clock_timestamp()"
            " - $4::double precision * interval '1 second', '-infinity')"
            " ORDER BY v.off DESC LIMIT $2::bigint) e ON true ORDER BY e.off LIMIT 1"
        )
        words = (channel, count, self._capacity, self._max_age)
        result = self._ask(own, sql, words, deadline)
        head = spell_id(*(number_of(result, 0, column) for column in (0, 1)))
        if result.get_value(0, 2) is None:
            return head, head
        return spell_id(*(number_of(result, 0, column) for column in (2, 3))), head

    def _ask(self, own: Own, sql: str, words: Sequence[object], deadline: float) -> Any:
        """Return the answer to a statement that changes nothing."""
        for attempt in (1, 2):
            began = self.health.moment()
            try:
                with self._lent(own, deadline) as connection:
                    (result,) = connection.run(sql, words, deadline=deadline)
                break
            except (Refused, Lost) as error:
                if isinstance(error, Refused) and error.sqlstate in _UNNAMEABLE:
                    raise Denied(f"not read: {error}") from error
                # A connection that broke: nothing is lost by another try.
                if attempt == 2 or time.monotonic() >= deadline:
                    is_refused = isinstance(error, Refused) and not error.is_fatal
                    way = "read" if is_refused else "connect"
                    self.health.fails(way, f"not read: {error}")
                    raise Unavailable(f"not read: {error}") from error
        self.health.works("connect", "read", since=began)
        return result

    # To tell.

    def attach(self, sink: Sink) -> None:
        self.health.sink = sink

    def watch(self, channel: str) -> None:
        """See `syncstream.brokers.Broker.watch`.

        While the server cannot be reached it returns, too: when it is back, all is
        read that may have come.
        """
        own = self._own()
        self.watched.add(channel)
        listener = self._listener(own)
        # Without one the broker is closed: the read that follows says so.
        if listener is not None and not listener.is_decided:
            deadline = time.monotonic() + READ_TIMEOUT
            self._call(own, listener.await_decided, deadline)

    def unwatch(self, channel: str) -> None:
        self.watched.discard(channel)

    def close(self, timeout: float = 5.0) -> None:
        self._is_closing = True
        own = self._parts.get()
        if own is None or self._is_closed:
            self._is_closed = True
            return
        with own.lock:
            listener, own.listener = own.listener, None
            stopper, own.stopper = own.stopper, None
        if listener is not None and stopper is not None:
            stopper.stop()
            with suppress(Unavailable):  # all are busy: it ends by itself
                deadline = time.monotonic() + timeout
                self._call(own, partial(listener.await_end, timeout), deadline)
        self._is_closed = True
        own.close()

    # Connections that publish and read.

    @contextmanager
    def _lent(self, own: Own, deadline: float) -> Iterator[Connection]:
        """Lend a connection; it is kept if nothing went wrong with it."""
        try:
            own.permits.get(True, max(0.0, deadline - time.monotonic()))
        except _queue.Empty:
            raise Unavailable(self._busy) from None
        try:
            connection = self._ready(own, deadline)
            is_sound = False
            try:
                yield connection
                is_sound = True
            finally:
                if is_sound and connection.is_idle() and not self._is_closed:
                    own.keep(connection)
                else:
                    connection.close()
                    own.is_installed = False  # or is it gone?
        finally:
            own.permits.put(None)

    def _ready(self, own: Own, deadline: float) -> Connection:
        try:
            connection = living(own, deadline)
            if connection is None:
                connection = Connection.open(self._dsn, deadline)
            if not own.is_installed:
                try:
                    own.identity = self._ensure(connection, deadline)
                except BaseException:
                    connection.close()
                    raise
                own.is_installed = True
        except (Lost, Refused) as error:
            reason = f"the server cannot be used: {error}"
            self.health.fails("connect", reason)
            raise Unavailable(reason) from error
        except BrokerError as error:
            self.health.fails("connect", str(error))
            raise
        return connection

    def _check_installed(self, own: Own, deadline: float) -> None:
        if not own.is_installed:
            with self._lent(own, deadline):
                pass

    def _ensure(self, connection: Connection, deadline: float) -> str:
        """Install the schema if it is missing or old; check it; return its identity."""
        try:
            return check_schema(connection, self._schema, deadline)
        except Refused as error:
            if error.sqlstate not in _MISSING:
                raise
            missing = error
        sql = f"SELECT to_regclass('{self._schema}.state') IS NOT NULL"
        (result,) = connection.run(sql, (), deadline=deadline)
        is_old = result.get_value(0, 0) == b"\1"
        what = (
            f"the schema {self._schema!r} in the database is of an older release"
            if is_old
            else f"there is no schema {self._schema!r} in the database"
        )
        if not self._create:
            raise Unavailable(f"{what}. {_HOW_TO}") from missing
        try:
            connection.run(install_sql(self._schema), deadline=deadline)
        except Refused as error:
            if error.sqlstate != DENIED:
                raise
            may = "renew" if is_old else "create"
            raise Unavailable(
                f"{what}, and this role may not {may} it: {error}. {_HOW_TO}"
            ) from error
        return check_schema(connection, self._schema, deadline)


_MISSING = ("42P01", "3F000", "42883")  # no such table, schema, function
_UNNAMEABLE = "22P05", "22021"  # the database's encoding has no such characters
_HOW_TO = (
    'Let a role that may install it: "python -m syncstream.brokers.postgresql URL", or'
    ' in Django "syncstream" in INSTALLED_APPS and "manage.py migrate"'
)


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    # gevent prints the traceback of what a thread raises.
    try:
        return function(), None
    except BaseException as error:
        return None, error
