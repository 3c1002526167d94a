"""`Pool`: the connections of one process that publish and read."""

from __future__ import annotations

import _queue
import _thread
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import BrokerError, Unavailable
from ...runtime.clock import time
from ...runtime.sockets import native
from ..health import Health
from .connection import Connection, Lost, Refused
from .schema import Schema

__all__ = ["Pool"]

IDLE = 30.0  # seconds after which an unused connection is closed
FRESH = 1.0  # seconds after its use for which a connection is trusted without a test


class Pool:
    """Connections, lent to native threads; each to one thread at a time.

    Args:
        dsn: The connection string, as from `parse_url`.
        schema: The schema, which is checked, or installed, before a connection is lent.
        health: Records whether connections can be made.
        connections: The maximum of lent connections.

    Attributes:
        identity: The schema's identity, unique among databases; ``""`` until `check`.
    """

    def __init__(
        self, dsn: str, schema: Schema, health: Health, connections: int
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._health = health
        self._connections = connections
        self._lock = native(_thread, "allocate_lock")()
        self._idle: list[Connection] = []  # the most recently used one last
        # The C class: gevent patches the name in `queue` only.
        self._permits: _queue.SimpleQueue[None] = _queue.SimpleQueue()
        for _ in range(connections):
            self._permits.put(None)
        self._is_installed = False
        self._is_closed = False
        self.identity = ""

    @property
    def busy(self) -> str:
        return (
            f"all {self._connections} connections were busy until the time-out: raise"
            " PostgreSQLBroker(connections=…)"
        )

    @contextmanager
    def lent(self, deadline: float) -> Iterator[Connection]:
        """Lend a connection; it is kept unless the block fails.

        Raises:
            Unavailable: All are busy, or the server cannot be used.
        """
        try:
            self._permits.get(True, max(0.0, deadline - time.monotonic()))
        except _queue.Empty:
            raise Unavailable(self.busy) from None
        try:
            connection = self._ready(deadline)
            is_sound = False
            try:
                yield connection
                is_sound = True
            finally:
                if is_sound and connection.is_idle():
                    self._keep(connection)
                else:
                    connection.close()
                    self._is_installed = False  # the schema may be gone: check again
        finally:
            self._permits.put(None)

    def check(self, deadline: float, *, anew: bool = False) -> None:
        """Check that the schema is installed, and learn its identity.

        Args:
            deadline: The end of the wait, `time.monotonic`.
            anew: Check again even if it was installed before.
        """
        if anew:
            self._is_installed = False
        if not self._is_installed:
            with self.lent(deadline):
                pass

    def probe(self, sql: str, deadline: float, stop: int) -> None:
        """Run a statement as a new borrower would; record nothing if that fails.

        The connection is its own, so that a stop can interrupt it.

        Args:
            sql: The statement.
            deadline: The end of the attempt, `time.monotonic`.
            stop: As for `Connection.open`.

        Raises:
            Lost, Refused, Unavailable: The server cannot be used.
        """
        connection = Connection.open(self._dsn, deadline, stop=stop)
        try:
            self._schema.ensure(connection, deadline)
            connection.run(sql, (), deadline=deadline)
        finally:
            connection.close()

    def _ready(self, deadline: float) -> Connection:
        try:
            connection = self._living(deadline)
            if connection is None:
                connection = Connection.open(self._dsn, deadline)
            if not self._is_installed:
                try:
                    self.identity = self._schema.ensure(connection, deadline)
                except BaseException:
                    connection.close()
                    raise
                self._is_installed = True
        except (Lost, Refused) as error:
            reason = f"the server cannot be used: {error}"
            self._health.fails("connect", reason)
            raise Unavailable(reason) from error
        except BrokerError as error:
            self._health.fails("connect", str(error))
            raise
        return connection

    def _living(self, deadline: float) -> Connection | None:
        """Return a connection that was kept and still lives."""
        while (connection := self._take()) is not None:
            if connection.is_readable():  # without a request: the server has ended it
                connection.close()
                continue
            now = time.monotonic()
            if now - connection.used < FRESH:
                return connection
            # It may have died silently: a test does no harm, a lost publish would.
            try:
                connection.run("", deadline=now + (deadline - now) / 2)
            except (Lost, Refused):
                connection.close()
                self.release(0)  # as old as this one
                break
            return connection
        return None

    def _take(self) -> Connection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _keep(self, connection: Connection) -> None:
        """Keep a connection for its next use, or close it if the pool is closed."""
        connection.used = time.monotonic()
        with self._lock:
            self._idle.append(connection)
            is_closed = self._is_closed
        self.release(0 if is_closed else None)

    def release(self, seconds: float | None = None) -> None:
        """Close the connections unused for this many seconds; `IDLE` by default."""
        since = time.monotonic() - (IDLE if seconds is None else seconds)
        while True:
            with self._lock:
                if not self._idle or self._idle[0].used > since:
                    return
                connection = self._idle.pop(0)
            connection.close()

    def close(self) -> None:
        """Close the idle connections; lent ones are closed when they come back."""
        with self._lock:
            self._is_closed = True
        self.release(0)
