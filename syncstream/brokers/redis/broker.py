"""`RedisBroker`: its URL, and the methods that a hub calls."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from redis.exceptions import RedisError

from ...errors import Unavailable, Uncertain
from ...runtime.clock import time
from .. import shown
from ..contract import Sink, check_bounds, refuse_connection
from ..health import Health
from ..log import START, Entry, Page
from ..process import PerProcess
from .process import Process
from .scripts import ID, NEWEST
from .server import Server, options_of, seconds_of

__all__ = ["RedisBroker"]

log = logging.getLogger("syncstream.brokers.redis")
_MIN_TTL = 300.0  # seconds: the minimum life of a key, several rounds of `Beats`
# Seconds: the life of an empty channel's key, as earlier versions made it, without
# `max_age`.
_EMPTY_TTL = 86400.0


class RedisBroker:
    """Events on a Redis or Valkey server, or on several, with each channel on one.

    Args:
        url: ``redis://[[user]:password@]host[:port][/database]``, several hosts with
            commas between them; ``rediss:`` for TLS; ``unix:///path?db=0``;
            ``redis+sentinel://host[:port],…/service[/database]``, and
            ``rediss+sentinel:``. ``valkey:`` and ``valkeys:`` are other names. Its
            query takes redis-py's options (``ssl_ca_certs=…``), and ``prefix``
            ("ss:") and ``publish_timeout`` (2 seconds).
        capacity: The maximum of kept events of each channel.
        max_age: Seconds for which events are kept; ``None`` for no limit.

    Raises:
        TypeError, ValueError: The URL or an argument is wrong.
    """

    scope: Literal["cluster"] = "cluster"

    def __init__(
        self, url: str, capacity: int = 1000, max_age: float | None = 3600.0
    ) -> None:
        check_bounds(capacity, max_age)
        parts, query = _parse(url)
        self._prefix = query.pop("prefix", "ss:")
        self.health = Health(log)
        self._timeout = seconds_of("publish_timeout", query)
        if not re.fullmatch("[1-9][0-9]{0,5}", query.get("max_connections", "1")):
            raise ValueError("max_connections must be a number above 0")
        if not re.fullmatch("[0-9]{0,5}", query.get("db", "")):
            raise ValueError("db must be the number of a database")
        self._urls = _split(parts, query)
        try:
            self._servers()  # to raise errors of the URL here
        except (ValueError, TypeError, RedisError):
            # These errors quote the URL, and a traceback would show them.
            names = ", ".join(sorted(query)) or "none"
            raise ValueError(
                f"url has an option whose value cannot be used, one of {names}"
            ) from None
        self._capacity = b"%d" % capacity
        self._age = b"" if max_age is None else b"%d" % round(max_age * 1000)
        ttl = _EMPTY_TTL if max_age is None else max(max_age, _MIN_TTL)
        self._ttl = b"%d" % round(ttl * 1000)
        self._is_closed = False
        self._parts = PerProcess(self, Process.let_go, RedisBroker._leave_to_parent)
        self._inherited: dict[str, None] = {}  # the names that its parents watched

    def _servers(self) -> list[Server]:
        return [
            Server(url, self._timeout, self._prefix, self.health) for url in self._urls
        ]

    @property
    def process(self) -> Process | None:
        """This process's part, if it has begun."""
        return self._parts.get()

    def _process(self) -> Process:
        """Return this process's part.

        Raises:
            Unavailable: The broker is closed, or too many files are open.
        """
        here = self._parts.get()
        if here is None:
            try:
                servers = self._servers()
            except OSError as error:  # redis-py reads a file; too many are open
                raise Unavailable(f"redis: cannot begin: {error}") from error
            here = self._parts.begin(Process(self, servers))
        if self._is_closed:
            here.close(0)
            raise Unavailable("the broker is closed")
        return here

    def _leave_to_parent(self, parents: Process | None) -> None:
        if parents is not None:
            # Added: the parent may not have asked for all that it has inherited itself.
            self._inherited.update(dict.fromkeys(parents.abandon()))

    # Publishing and reading.

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        refuse_connection("redis", connection)
        deadline = time.monotonic() + self._timeout
        here = self._process()
        groups: dict[Server, list[int]] = {}
        for place, (channel, _) in enumerate(items):
            groups.setdefault(here.server(channel), []).append(place)
        ids: list[str | None] = [None] * len(items)
        for number, (server, places) in enumerate(groups.items()):
            calls = [self._call(server, *items[place]) for place in places]
            try:
                stored = server.publish(calls, deadline)
            except Unavailable as error:
                if not number:
                    raise
                raise Uncertain(f"some of the events were stored: {error}") from error
            for place, id in zip(places, stored, strict=True):
                ids[place] = id
        return ids

    def _call(self, server: Server, channel: str, payload: bytes) -> tuple[bytes, ...]:
        return (
            *(server.key(channel), server.marks, server.topic(channel), payload),
            _nonce(),
            *(self._capacity, self._age, self._ttl),
        )

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        here = self._listening()
        server = here.server(channel)
        asked = "" if after is None else after if ID.fullmatch(after) else START
        head, complete, *fields = server.read(
            (
                *(server.key(channel), server.marks, asked.encode()),
                *(b"%d" % limit, _nonce(), self._age),
            ),
            time.monotonic() + self._timeout,
        )
        now = time.monotonic()
        triples = zip(fields[::3], fields[1::3], fields[2::3], strict=True)
        # A foreign entry names no predecessor of the chain, which shows it.
        entries = [
            Entry(id.decode(), prev.decode(errors="replace"), data, now)
            for id, prev, data in triples
        ]
        return Page(entries, bool(complete), head.decode(errors="replace"))

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Return the id before a channel's newest events, and the head's id.

        The server sends no events for it.

        Args:
            channel: The channel's name.
            count: The number of newest events; all kept ones if there are fewer.

        Raises:
            Unavailable: As from `read`.
        """
        server = self._listening().server(channel)
        before, head = server.read(
            (
                *(server.key(channel), server.marks, b"%d" % count),
                *(_nonce(), self._age),
            ),
            time.monotonic() + self._timeout,
            NEWEST,
        )
        return before.decode(errors="replace"), head.decode(errors="replace")

    # Announcing.

    def attach(self, sink: Sink) -> None:
        self.health.sink = sink

    @property
    def ttl(self) -> bytes:
        """Milliseconds that a key lives after its last use."""
        return self._ttl

    @property
    def timeout(self) -> float:
        """The maximum of seconds for a request."""
        return self._timeout

    def watch(self, channel: str) -> None:
        try:
            self._listening().watch(channel, self._timeout)
        except Unavailable:
            # Of one that is closed, the following read raises it.
            if not self._is_closed:
                raise

    def unwatch(self, channel: str) -> None:
        self._inherited.pop(channel, None)
        with suppress(Unavailable):
            self._process().unwatch(channel)

    def _listening(self) -> Process:
        here = self._process()
        # The hub, copied by the fork, relies on these names being watched. Each thread
        # watches them all before it goes on, whichever of them is the first.
        for name in tuple(self._inherited):
            here.watch(name, 0)
            self._inherited.pop(name, None)
        return here

    def close(self, timeout: float = 5.0) -> None:
        self._is_closed = True
        here = self._parts.get()
        if here is not None:
            here.close(timeout)


def _nonce() -> bytes:
    # Not from `random`: an application that seeds it would get the same ids again.
    return b"%d" % secrets.randbits(48)


def _parse(url: str) -> tuple[SplitResult, dict[str, str]]:
    """Return the parts of a URL, and its options.

    Errors do not quote the URL: an unescaped "/", "?" or "#" in a password moves the
    password into any part.

    Raises:
        ValueError: The URL is wrong.
    """
    try:
        url.encode()  # otherwise the login fails with an error that shows the URL
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        hosts = parts.netloc.rpartition("@")[2].split(",")
        names = [urlsplit(f"//{host}") for host in hosts if host]
        for name in names:
            (name.hostname or "").encode("idna")  # as the DNS lookup does
        # Reading `port` parses it.
        is_sound = all(name.port != 0 for name in names) and not parts.fragment
    except ValueError:
        is_sound = False
    if is_sound and parts.scheme == "unix":
        is_sound = bool(parts.path) and hosts == [""]
    elif is_sound and parts.scheme.endswith("+sentinel"):
        if not parts.path.strip("/"):
            raise ValueError("url must name the service: redis+sentinel://host/service")
        is_sound = bool(re.fullmatch("/[^/@]+(/[0-9]*)?", parts.path))
    elif is_sound:
        is_sound = bool(re.fullmatch("(/[0-9]*)?", parts.path))
    if not is_sound:
        raise ValueError(
            "url must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], unix:///PATH"
            " or redis+sentinel://HOST/SERVICE, with %40 for @, %2F for /, %3F for ?"
            f" and %23 for # in a password, got {shown(url)}"
        )
    known = options_of(parts.scheme)
    if not known.issuperset(query):
        # With an "@" after it, a "?" may be part of a password: do not quote that.
        others = sorted(query.keys() - known) if "@" not in parts.query else []
        text = f", got {', '.join(map(repr, others))}" if others else ""
        raise ValueError(
            f"url may have the options {', '.join(sorted(known))} only{text}"
        )
    return parts, query


def _split(parts: SplitResult, query: dict[str, str]) -> list[str]:
    """Return the URL of each server, as redis-py takes them."""
    scheme = parts.scheme.replace("valkey", "redis")
    rest = f"{parts.path}?{urlencode(query)}"
    if scheme == "unix" or scheme.endswith("+sentinel"):
        return [f"{scheme}://{parts.netloc}{rest}"]
    user, at, hosts = parts.netloc.rpartition("@")
    return [f"{scheme}://{user}{at}{host}{rest}" for host in hosts.split(",")]
