"""Brokers store events and announce them: the contract, and the schemes of URLs.

An open set: to add a broker, add a file here and a line to `SCHEMES`. A broker appends
events, reads a range of them, and announces new ones. It knows no clients.
Announcements may be late, duplicated or lost: the hub detects this from the chain of
ids (see `log`) and reads the missing events. `syncstream.testing.check_broker` tests a
broker.
"""

from __future__ import annotations

import errno
import re
import select
import socket
from collections.abc import Callable
from typing import Any

from .contract import Broker, Sink
from .log import Entry, Page
from .names import is_pattern, matches, patterns_of

__all__ = [
    "Broker",
    "Entry",
    "Page",
    "Sink",
    "is_pattern",
    "matches",
    "open_broker",
    "patterns_of",
    "shown",
]


def shown(url: str) -> str:
    """Return the part of a URL that errors, logs and terminals may show: its scheme.

    Every other part may contain the password: a missing slash or a bad ``%`` moves it
    into the path or the port. Text without a scheme is not shown at all. Code that
    parses a URL raises ``from None``, because tracebacks print chained errors, which
    quote the URL.

    Args:
        url: Any text.

    Returns:
        ``postgresql:``, or ``a url without a scheme``.
    """
    scheme, colon, rest = url.partition(":")
    is_url = rest.startswith("//") and _SCHEME.fullmatch(scheme)
    # Without slashes it may be "user:password@host".
    if colon and (scheme.lower() in SCHEMES or is_url):
        return f"{scheme}:"
    return "a url without a scheme"


_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,31}")  # RFC 3986, section 3.1


def _memory(url: str, options: dict[str, Any]) -> Broker:
    from .memory import MemoryBroker

    if url != "memory:":
        raise ValueError("url must be just memory:, without a name or options")
    return MemoryBroker(**options)


def _require_unix(url: str) -> None:
    # local: locks its file with fcntl and announces events by Unix sockets; threads of
    # postgresql: wait for a pipe and a socket with poll.
    if not (hasattr(select, "poll") and hasattr(socket, "AF_UNIX")):
        raise OSError(
            errno.ENOSYS, f"{url} needs a Unix system: use redis: or memory: instead"
        )


def _local(url: str, options: dict[str, Any]) -> Broker:
    _require_unix("local:")
    if "?" in url or "#" in url:
        raise ValueError(
            "url must be local:, local:NAME or local:/PATH, without ? and #, as it has"
            " no options"
        )
    from .local.broker import LocalBroker

    return LocalBroker(url, **options)


def _postgresql(url: str, options: dict[str, Any]) -> Broker:
    _require_unix("postgresql:")
    from .postgresql.broker import PostgreSQLBroker

    return PostgreSQLBroker(url, **options)


def _redis(url: str, options: dict[str, Any]) -> Broker:
    from .redis.broker import RedisBroker

    return RedisBroker(url, **options)


SCHEMES: dict[str, Callable[[str, dict[str, Any]], Broker]] = {
    "memory": _memory,
    "local": _local,
    "postgres": _postgresql,
    "postgresql": _postgresql,
    "redis": _redis,
    "rediss": _redis,
    "redis+sentinel": _redis,
    "rediss+sentinel": _redis,
    "unix": _redis,
    "valkey": _redis,
    "valkeys": _redis,
}


def open_broker(
    url: str, *, capacity: int = 1000, max_age: float | None = 3600.0
) -> Broker:
    """Return the broker that a URL names.

    Args:
        url: ``memory:`` for this process; ``local:``, ``local:NAME`` or
            ``local:/PATH`` for the processes of this machine, see `local.LocalBroker`;
            ``postgresql://USER@HOST/DATABASE`` for all processes that connect to that
            database, see `postgresql.PostgreSQLBroker`; ``redis://HOST`` and its
            variants for many machines, see `redis.RedisBroker`.
        capacity: The maximum of kept events of each channel.
        max_age: Seconds for which events are kept; ``None`` for no limit.

    Raises:
        TypeError, ValueError: The URL or an option is wrong.
        ImportError: The broker needs a package that is not installed.
        OSError: The broker does not work on this system (``local:`` and
            ``postgresql:`` on Windows).
    """
    scheme = url.partition(":")[0].strip().lower() if ":" in url else ""
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}:" for name in SCHEMES)
        raise ValueError(f"url must begin with one of {known}, got {shown(url)}")
    return SCHEMES[scheme](url, {"capacity": capacity, "max_age": max_age})
