"""What stores events and tells of them: the contract, and where URLs lead.

An open set: one more broker is one more file here, and its line in `SCHEMES`. A
broker appends, reads a range, and tells what is new. It knows no clients, and what
it tells may come late, twice or not at all: the chain (see `syncstream.log`) shows
it, and the hub reads what is missing. `syncstream.testing.check_broker` proves one.
"""

from __future__ import annotations

import errno
import re
import select
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

from ..log import Entry, Page

__all__ = [
    "Broker",
    "Sink",
    "is_pattern",
    "matches",
    "open_broker",
    "patterns_of",
    "shown",
]


class Sink(Protocol):
    """Who is told: the hub. It may be called from any thread, and does not block."""

    def deliver(self, channel: str, entry: Entry) -> None:
        """Take an entry; those of a channel come in their order."""

    def resync(self, channels: Iterable[str] | None) -> None:
        """Read these channels (``None``: all that are watched): some may be lost."""

    def state(self, is_up: bool, reason: str) -> None:
        """Take note that the broker can be reached, or cannot."""

    def deny(self, name: str, reason: str) -> None:
        """End those who subscribe to this name: the engine refuses to tell of it.

        Args:
            name: A channel, or a pattern, as it was given to `Broker.watch`.
            reason: For the log.
        """


class Broker(Protocol):
    """Six methods. They may be called from any thread, and block.

    One may have a seventh, ``newest(channel, count)``, which returns two ids: the one
    before so many of a channel's newest events, or before all that are kept, if they
    are fewer (without any the head's), and the head's. It raises as `read` does.
    Without it all that is kept is read for ``after=20``.

    Attributes:
        scope: Who shares it: this "process", this "machine", or a "cluster".
    """

    @property
    def scope(self) -> Literal["process", "machine", "cluster"]: ...

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """Store events, channel and payload each, in this order; return their ids.

        Returns when the engine has acknowledged them.

        Args:
            items: As `hub.Hub` makes them.
            connection: A database's, in whose transaction to store them; then the
                ids are ``None``.

        Raises:
            Unavailable: Nothing was stored.
            Uncertain: They may have been stored.
            PayloadTooLarge: One is larger than the broker takes; nothing was stored.
        """

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """Read what follows an id.

        Args:
            channel: Its name.
            after: An id, of any provenance; "0" for the oldest that is kept;
                ``None`` for the head alone.
            limit: So many entries at most.

        Returns:
            If the id is known, what follows it, and ``complete``; else all that is
            kept, from the oldest on. After one that is kept, but whose next was
            removed, it is what follows, and not ``complete``. It may be less than
            there is, but not nothing: a page should end with the entry by which its
            payloads have `log.JOIN` bytes, for nobody takes more of it than that.

        Raises:
            Unavailable: The engine does not answer.
            Denied: It refuses this name.
        """

    def attach(self, sink: Sink) -> None:
        """Begin to tell what is new; once a process."""

    def watch(self, channel: str) -> None:
        """Tell of a channel, or of all that match a pattern.

        Returns when what is stored from now on will be told.

        Raises:
            Unavailable: The engine does not answer.
            Denied: It refuses this name; `Sink.deny` may say so later, too.
        """

    def unwatch(self, channel: str) -> None:
        """Tell of it no more."""

    def close(self, timeout: float = 5.0) -> None:
        """Stop, and leave no thread, descriptor or file behind."""


def is_pattern(name: str) -> bool:
    """Tell a pattern from a channel: its last level is ``*`` or ``#``."""
    return name.rpartition(":")[2] in ("*", "#")


def matches(pattern: str, channel: str) -> bool:
    """Tell whether a pattern matches a channel.

    ``chat:*`` matches one level more (``chat:7``), ``logs:#`` any number of levels,
    none included (``logs``, ``logs:a``, ``logs:a:b``); ``*`` and ``#`` alone likewise.
    """
    prefix, _, last = pattern.rpartition(":")
    if last == "#":
        return not prefix or channel == prefix or channel.startswith(f"{prefix}:")
    parent, _, _ = channel.rpartition(":")
    return parent == prefix


def patterns_of(channel: str) -> Iterator[str]:
    """Return the patterns that match a channel, as many as it has levels and two."""
    yield "#"
    place = channel.find(":")
    while place >= 0:
        yield f"{channel[:place]}:#"
        place = channel.find(":", place + 1)
    yield f"{channel}:#"
    parent, _, _ = channel.rpartition(":")
    yield f"{parent}:*" if parent else "*"


def check_bounds(capacity: int, max_age: float | None) -> None:
    """Check what a broker is to keep of each channel.

    Raises:
        ValueError: Engines cannot count so, or would keep nothing.
    """
    if not isinstance(capacity, int) or not 1 <= capacity <= MOST_KEPT:
        raise ValueError(f"capacity must be 1 to {MOST_KEPT}, got {capacity!r}")
    if max_age is not None and not 0 < max_age <= LONGEST_KEPT:  # NaN is not, either
        raise ValueError(
            f"max_age must be above 0, and {LONGEST_KEPT:.0f} seconds at most, or None"
            f" for no limit, got {max_age!r}"
        )


MOST_KEPT = 1_000_000_000  # events of a channel: what any engine can count
LONGEST_KEPT = 1e9  # seconds, thirty years


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
    from .local import LocalBroker

    return LocalBroker(url, **options)


def _postgresql(url: str, options: dict[str, Any]) -> Broker:
    _require_unix("postgresql:")
    from .postgresql import PostgreSQLBroker

    return PostgreSQLBroker(url, **options)


def _redis(url: str, options: dict[str, Any]) -> Broker:
    from .redis import RedisBroker

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
