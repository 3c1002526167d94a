"""A libpq connection with deadlines that works under gevent and without it."""

from __future__ import annotations

import os
import re
import select
import socket
from collections.abc import Sequence
from typing import Any

from psycopg import Error as DriverError
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ...runtime.clock import time
from ...runtime.sockets import native
from .. import shown
from ..tail import Stopped

__all__ = [
    "Connection",
    "DENIED",
    "Lost",
    "Refused",
    "array",
    "number_of",
    "parse_url",
    "spell_number",
    "sqlstate_of",
    "wait_for",
]

READ_TIMEOUT = 5.0  # seconds for a read, a connect, and each answer to the listener
_PORTS = re.compile(r"[0-9,]*")
DENIED = "42501"  # a right is missing, or a policy forbids it


class Refused(Exception):
    """The server has answered with an error.

    Attributes:
        sqlstate: The error's code.
        is_fatal: Whether the server has also ended the connection.
    """

    def __init__(self, message: str, sqlstate: str, is_fatal: bool) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.is_fatal = is_fatal


class Lost(Exception):
    """The connection is broken, or no answer came in time.

    Attributes:
        results: The results received before.
    """

    def __init__(self, message: str, results: Sequence[Any] = ()) -> None:
        super().__init__(" ".join(message.split()))  # libpq's errors have several lines
        self.results = results


class Connection:
    """A connection for one native thread at a time, with deadlines.

    Attributes:
        used: The `time.monotonic` of its last use.
    """

    def __init__(self, pgconn: Any, stop: int) -> None:
        self._pgconn = pgconn
        self._stop = stop
        self.used = time.monotonic()

    @classmethod
    def open(cls, dsn: str, deadline: float, *, stop: int = -1) -> Connection:
        """Connect.

        Args:
            dsn: As from `parse_url`.
            deadline: The end of the attempt, `time.monotonic`; a DNS look-up, which
                cannot be interrupted, may go beyond it.
            stop: A descriptor: once it is readable, all waits raise `Stopped`.

        Raises:
            Lost: No address could be connected to.
        """
        reasons = []
        addresses = _addresses(dsn)
        for place, words in enumerate(addresses):
            left = deadline - time.monotonic()
            limit = time.monotonic() + left / (len(addresses) - place)
            try:
                return cls._open(make_conninfo(dsn, **words), limit, stop)
            except (Lost, DriverError) as error:
                reasons.append(str(error))
        raise Lost("; ".join(dict.fromkeys(reasons)) or "no address")

    @classmethod
    def _open(cls, dsn: str, deadline: float, stop: int) -> Connection:
        pgconn = pq.PGconn.connect_start(dsn.encode())
        connection = cls(pgconn, stop)
        events = {
            pq.PollingStatus.READING: select.POLLIN,
            pq.PollingStatus.WRITING: select.POLLOUT,
        }
        try:
            while True:
                status = pq.PollingStatus(pgconn.connect_poll())
                if status == pq.PollingStatus.OK:
                    break
                if status not in events:
                    raise Lost(_message(pgconn))
                connection.wait(events[status], deadline)
            pgconn.nonblocking = 1
            if connection._encoding == b"SQL_ASCII":  # names may have any bytes
                connection.run("SET client_encoding = SQL_ASCII", deadline=deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def _encoding(self) -> bytes:
        found: bytes = self._pgconn.parameter_status(b"server_encoding") or b""
        return found

    @property
    def is_utf8(self) -> bool:
        """Whether the database can store every name."""
        return self._encoding in (b"UTF8", b"SQL_ASCII")

    def run(
        self, sql: str, words: Sequence[object] | None = None, *, deadline: float
    ) -> list[Any]:
        """Run SQL; return the server's results.

        Args:
            sql: Statements, or one statement with ``words``.
            words: The values for ``$1`` and so on; then the results are binary.
            deadline: The end of the wait, `time.monotonic`.

        Raises:
            Refused: The server has answered with an error.
            Lost: The connection broke, or the deadline passed; close the connection.
        """
        pgconn = self._pgconn
        results: list[Any] = []
        try:
            if words is None:
                pgconn.send_query(sql.encode())
            else:
                texts = [None if word is None else str(word).encode() for word in words]
                pgconn.send_query_params(sql.encode(), texts, result_format=1)
            while pgconn.flush():
                if self.wait(select.POLLIN | select.POLLOUT, deadline) & select.POLLIN:
                    pgconn.consume_input()
            while True:
                while pgconn.is_busy():
                    self.wait(select.POLLIN, deadline)
                    pgconn.consume_input()
                result = pgconn.get_result()
                if result is None:
                    break
                results.append(result)
        except DriverError as error:
            raise Lost(str(error), results) from error
        except Lost as error:
            error.results = results
            raise
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                self._refuse(result, results)
        return results

    def _refuse(self, result: Any, results: list[Any]) -> None:
        field = pq.DiagnosticField
        state = result.error_field(field.SQLSTATE)
        if not state:  # an error of libpq: the connection has ended
            raise Lost(result.error_message.decode(errors="replace"), results)
        message = result.error_field(field.MESSAGE_PRIMARY) or b""
        severity = result.error_field(field.SEVERITY_NONLOCALIZED)
        text = f"{message.decode(errors='replace')} ({state.decode()})"
        if state.decode() == DENIED:
            text += "; docs/brokers.md lists the rights that a role needs"
        raise Refused(
            text,
            state.decode(),
            severity in (b"FATAL", b"PANIC"),
        )

    def hear(self) -> bool:
        """Take the notifications received so far; return whether there were any."""
        try:
            self._pgconn.consume_input()
            found = False
            while self._pgconn.notifies() is not None:
                found = True
            return found
        except DriverError as error:
            raise Lost(str(error)) from error

    def wait(self, events: int, deadline: float, *, is_needed: bool = True) -> int:
        """Wait until the socket is readable or writable; return which.

        Args:
            events: Flags of ``select.poll``.
            deadline: The end of the wait, `time.monotonic`.
            is_needed: At the deadline, raise `Lost` instead of returning 0.
        """
        left = deadline - time.monotonic()
        found = wait_for(self._pgconn.socket, events, left, self._stop)
        if not found and is_needed:
            raise Lost("no answer in time")
        return found

    def is_readable(self) -> bool:
        try:
            return bool(wait_for(self._pgconn.socket, select.POLLIN, 0))
        except DriverError:
            return True

    def is_idle(self) -> bool:
        """Tell whether the connection works and is outside of a transaction."""
        status: bool = self._pgconn.transaction_status == pq.TransactionStatus.IDLE
        return status

    def close(self) -> None:
        self._pgconn.finish()


def wait_for(fd: int, events: int, seconds: float, stop: int = -1) -> int:
    """Wait natively, even in a process that gevent has patched; return ready flags.

    Raises:
        Stopped: The descriptor ``stop`` is readable.
    """
    poll = native(select, "poll")()
    poll.register(fd, events)
    if stop >= 0:
        poll.register(stop, select.POLLIN)
    found = dict(poll.poll(max(0.0, seconds) * 1000))
    if stop in found:
        raise Stopped
    # After POLLHUP and POLLERR, reading shows the error.
    return select.POLLIN | events if found.get(fd, 0) & ~events else found.get(fd, 0)


def parse_url(url: str) -> str:
    """Return a connection string for libpq, with our defaults added.

    Raises:
        ValueError: libpq does not accept the URL.
    """
    scheme, _, rest = url.partition(":")
    if scheme in ("postgresql", "postgres") and not rest.strip("/"):
        url = ""  # libpq's environment variables apply
    is_sound = True
    try:
        words = conninfo_to_dict(url)
    except (DriverError, UnicodeError):  # a UnicodeError shows the whole URL
        is_sound = False
    # libpq takes parts of a password with "@" or "/" for the host or port, and its
    # errors quote them: show neither the URL nor libpq's error.
    if (
        not is_sound
        or "@" in str(words.get("host", ""))
        or not _PORTS.fullmatch(str(words.get("port", "")))
    ):
        raise ValueError(
            "url must be postgresql://USER:PASSWORD@HOST/DATABASE or key=value words,"
            " as libpq takes them, with %40 for @ and %2F for / in a password, and only"
            " with options of libpq (PostgreSQLBroker takes its own as arguments), got"
            f" {shown(url)}"
        )
    ours = {
        "application_name": os.environ.get("PGAPPNAME", "syncstream"),
        # Notice a vanished peer after 60 s.
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
    }
    if pq.version() >= 120000:  # libpq's
        ours["tcp_user_timeout"] = "20000"  # milliseconds for unacknowledged bytes
    return make_conninfo("", **{**ours, **words, "client_encoding": "UTF8"})


def _addresses(dsn: str) -> list[dict[str, str]]:
    """Return the words to add to a connection string, for each address to try.

    libpq itself would look names up while it holds the GIL, and would wait for the
    first address that does not answer.
    """
    words: dict[str, Any] = conninfo_to_dict(dsn)
    hosts = str(words.get("host") or os.environ.get("PGHOST") or "")
    if not hosts or words.get("hostaddr") or os.environ.get("PGHOSTADDR"):
        return [{}]
    names = hosts.split(",")
    ports = str(words.get("port") or os.environ.get("PGPORT") or "5432").split(",")
    ports = ports * len(names) if len(ports) == 1 else ports
    found: list[dict[str, str]] = []
    reason: Exception | None = None
    for host, port in zip(names, ports, strict=False):
        if not host or host.startswith(("/", "@")):
            found.append({"host": host, "port": port})
            continue
        try:
            infos = native(socket, "getaddrinfo")(host, None, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: not a host name
            reason = error
            continue
        for address in dict.fromkeys(info[4][0] for info in infos):
            found.append({"host": host, "hostaddr": address, "port": port})
    if not found:
        raise Lost(f"the host {hosts!r} cannot be found: {reason}") from reason
    return found


def _message(pgconn: Any) -> str:
    message: bytes = pgconn.error_message
    return message.decode(errors="replace") or "unknown reason"


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the code of a driver's error, or of one that Django has wrapped."""
    while error is not None:
        for name in ("sqlstate", "pgcode"):  # psycopg's, psycopg2's
            code = getattr(error, name, None)
            if isinstance(code, str):
                return code
        error = error.__cause__
    return None


def number_of(result: Any, row: int, column: int) -> int:
    """Return a binary integer of a result."""
    return int.from_bytes(result.get_value(row, column), "big", signed=True)


def array(texts: Sequence[str]) -> str:
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return "{" + ",".join(f'"{text}"' for text in quoted) + "}"


def spell_number(number: float | None) -> str:
    return "NULL" if number is None else repr(float(number))
