"""Brokers store events and announce them: the contract, and where URLs lead.

An open set: one more broker is one more file here, and its line in `SCHEMES`. A
broker appends, reads a range, and tells what is new. It knows no clients, and what
it tells may come late, twice or not at all: the chain (see `log`) shows it, and the hub
reads what is missing. `syncstream.testing.check_broker` proves one.
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
    """Return a URL as errors, logs and terminals may show it: its scheme alone.

    Passwords are found in every other part: a missing slash or a bad ``%`` moves them
    into the path or the port. What has no scheme is not shown at all. Whoever parses a
    URL raises ``from None``: a traceback prints chained errors, and those quote it.

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
        raise ValueError("url must be memory: alone: it has no name and no options")
    return MemoryBroker(**options)


def _require_unix(url: str) -> None:
    # Its file is locked by fcntl and told of by Unix sockets; PostgreSQL's threads wait
    # for a pipe and a socket by poll.
    if not (hasattr(select, "poll") and hasattr(socket, "AF_UNIX")):
        raise OSError(
            errno.ENOSYS, f"{url} needs a Unix system: use redis: or memory: here"
        )


def _local(url: str, options: dict[str, Any]) -> Broker:
    _require_unix("local:")
    if "?" in url or "#" in url:
        raise ValueError(
            "url must be local:, local:NAME or local:/PATH, without ? and #: it has no"
            " options"
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
        url: ``memory:``, this process; ``local:``, ``local:NAME`` or
            ``local:/PATH``, the processes of this machine, see `local.LocalBroker`;
            ``postgresql://USER@HOST/DATABASE``, who connects to that database, see
            `postgresql.PostgreSQLBroker`;
            ``redis:`` and its kin, many machines, see `redis.RedisBroker`.
        capacity: So many events of each channel are kept.
        max_age: Events are kept for so many seconds; ``None`` for no limit.

    Raises:
        ValueError: There is no such broker.
        OSError: It needs what this system has not (``local:`` and ``postgresql:`` on
            Windows).
    """
    scheme = url.partition(":")[0].strip().lower() if ":" in url else ""
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}:" for name in SCHEMES)
        raise ValueError(f"url must begin with one of {known}, got {shown(url)}")
    return SCHEMES[scheme](url, {"capacity": capacity, "max_age": max_age})
