"""``redis:``, the broker of many machines: Redis, or Valkey.

A channel is a stream, ``ss:{channel}``; one script appends to it and publishes what it
has appended, so that both have one order. Who resumes reads the stream; who is there
is told by Pub/Sub, over one connection a process, however many channels and clients.
What Pub/Sub loses with a connection is found by asking for the heads.

Ids are ``<milliseconds>-<number>``, the number random for the first of a millisecond:
a server that has lost its newest events, by a failover, say, makes no id a second time.
An empty channel has a head, too, without a key of its own: publishers keep marks in
one hash, ``ss:empty``, and change a channel's when they make its key. The first event
names the mark as its predecessor, and no mark comes a second time: who has it has
missed nothing, whatever has expired, or was evicted or flushed since. Reads write
nothing but the first mark of a prefix; where they may not, they do without.

What may be lost is what the server loses: see its ``appendfsync``, and ``WAIT``. Keys
that are evicted or flushed show as a reset. Redis 6.2, or any Valkey.
"""

from __future__ import annotations

import _socket
import _thread
import functools
import gc
import hashlib
import logging
import math
import os
import random
import re
import secrets
import select
import socket
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any, Literal, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ..clock import time
from ..errors import BrokerError, Denied, Unavailable, Uncertain
from ..journal import report
from ..log import START, Entry, Page
from ..sockets import native
from ..waiting import Turn, say, sleep
from . import Sink, check_bounds, is_pattern, matches, shown

try:
    import redis
except ImportError as error:
    raise ImportError(
        "redis: needs the package redis: pip install 'syncstream-wsgi[redis]'"
    ) from error
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

__all__ = ["RedisBroker"]

log = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds for a request, if the URL does not say
CONNECTIONS = 32  # for requests, of one process to one server; likewise
BEAT = 2.0  # seconds between two messages to oneself
DEAF = 5.0  # seconds without them, and the connection is given up
ROUND = 30.0  # seconds in which the heads of all channels are compared
BACKOFF = 0.05, 2.0  # seconds between attempts to connect: the first, the longest
FRESH = 3.0  # seconds for which a connection that was used is not asked if it lives
IDLE = 30.0  # seconds after which a connection that nobody has used is closed
_MIN_TTL = 300.0  # seconds that a key lives at least: several rounds
# Seconds that an empty channel's key does, without `max_age`; earlier versions made it.
_EMPTY_TTL = 86400.0
_AT_ONCE = 64  # messages until others may run
_KEYS = 100  # of one request for heads
_TOPICS = 500  # of one SUBSCRIBE
# A peer that is gone without a word: tried after 30 s, given up 30 s later.
_ALIVE = {
    getattr(socket, name): seconds
    for name, seconds in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
    )
    if hasattr(socket, name)
}
# What Redis takes, with room to count on. Ids come from outside.
_ID = re.compile(r"[0-9]{1,15}-[0-9]{1,16}")
_ID_BYTES = re.compile(_ID.pattern.encode())
_GLOB = re.compile(rb"([\\?*\[\]])")
# What ACLs of 6.2 to 8 say of one key or channel, and of all that they refuse.
_OF_NAME = re.compile(r"access (a|(at least )?one of the) (key|channel)|to the channel")
_OF_RIGHTS = re.compile(
    r"(?i)no permission|NOPERM|The user executing the script can't|ACL failure"
)
_RIGHTS = "docs/brokers.md has the rights that a user needs"


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


_COMMON = """
local function newest(key)
  if redis.call('EXISTS', key) == 1 then
    local info = redis.call('XINFO', 'STREAM', key)
    for place = 1, #info, 2 do
      if info[place] == 'last-generated-id' then return info[place + 1] end
    end
  end
  return false
end
local function field_of(key)
  return string.sub(redis.sha1hex(key), 1, 12)
end
local function mark(key, marks)
  local found = redis.call('HMGET', marks, field_of(key), 'epoch')
  return found[1] or found[2]
end
local function head_of(key, marks, nonce)
  local head = newest(key)
  if head then return head end
  local found = mark(key, marks)
  if not found then
    redis.pcall('HSET', marks, 'epoch', nonce)
    found = nonce
  end
  return '0-' .. found
end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function is_ours(id)
  local ms, number = string.match(id, '(%d+)-(%d+)')
  return #ms <= 15 and tonumber(number) < 4503599627370496  -- 2^52
end
local function next_id(last, nonce)
  local ms, number = now(), tonumber(nonce)
  if last then
    local last_ms, last_number = string.match(last, '(%d+)-(%d+)')
    if tonumber(last_ms) >= ms then
      ms = tonumber(last_ms)
      number = tonumber(last_number) + 1 + number % 1048576
    end
  end
  return string.format('%.0f-%.0f', ms, number), ms
end
"""

# What is refused, for want of memory, say, is refused at its first write; what fails
# after that, for want of rights, is stored.
_PUBLISH = _Script(
    _COMMON
    + """
local key, marks = KEYS[1], KEYS[2]
local topic, payload, nonce, capacity, age, ttl = unpack(ARGV)
local prev = newest(key)
-- After an id that is none of ours, and that has no room for another, it begins anew.
if prev and not is_ours(prev) then
  redis.call('UNLINK', key)
  prev = false
end
local id, ms = next_id(prev, nonce)
local found = redis.call('HMGET', marks, field_of(key), 'epoch')
-- A key that has no mark was made by an earlier version, or the marks were evicted:
-- what was the head before it must not be the head after it, either. Those have half
-- of the room: many channels that live have not all marks forgotten again and again.
if not prev or (not found[1] and redis.call('HLEN', marks) < 50000) then
  prev = prev or '0-' .. (found[1] or found[2] or nonce)
  local has_epoch = found[2]
  -- All is forgotten now and then: the empty channels' readers are reset.
  if redis.call('HLEN', marks) > 100000 then
    redis.call('UNLINK', marks)
    has_epoch = false
  end
  if not has_epoch then redis.call('HSET', marks, 'epoch', nonce) end
  local other = string.format('%.0f', tonumber(nonce) + 1)
  redis.call('HSET', marks, field_of(key), other)
end
redis.call('XADD', key, 'MAXLEN', capacity, id, 'p', prev, 'd', payload)
local is_told, problem = pcall(function()
  if age == '' then
    redis.call('PERSIST', key)
  else
    redis.call('XTRIM', key, 'MINID', '~', string.format('%.0f', ms - age))
    redis.call('PEXPIRE', key, ttl)
  end
  redis.call('PUBLISH', topic, id .. ' ' .. prev .. ' ' .. payload)
end)
if is_told then return id end
if type(problem) == 'table' then problem = problem.err end
return redis.error_reply('STORED, but: ' .. problem)
"""
)

# Returns the head, whether nothing is missing, then id, prev and payload of each. In
# pieces, because payloads may be large and nobody takes more than `log.JOIN` of them:
# hundreds of MiB would hold up the server for all.
_READ = _Script(
    _COMMON
    + """
local key, marks = KEYS[1], KEYS[2]
local after, limit, nonce, age = unpack(ARGV)
local head = head_of(key, marks, nonce)
if after == '' then return {head, 1} end
local oldest = 0
if age ~= '' then oldest = math.max(0, now() - age) end
local function read(start, prev)
  local found, size, left, step = {head, 0}, 0, tonumber(limit), 1
  while left > 0 and size < 131072 do
    step = math.min(2 * step, 16, left)
    local piece = redis.call('XRANGE', key, start, '+', 'COUNT', step)
    for place, entry in ipairs(piece) do
      local fields = entry[2]
      found[#found + 1] = entry[1]
      local payload = fields[4] or ''  -- there may be what is none of ours
      found[#found + 1] = fields[2]
      found[#found + 1] = payload
      size = size + #payload
    end
    left = left - #piece
    if #piece < step then break end
    start = '(' .. piece[#piece][1]
  end
  if (found[4] or head) == prev then found[2] = 1 end
  return found
end
local from_oldest = string.format('%.0f', oldest)
if after ~= '0' then
  local start = '(' .. after
  if tonumber(string.match(after, '%d+')) < oldest then start = from_oldest end
  local found = read(start, after)
  if found[2] == 1 then return found end
  -- What follows it is gone, it is not: the rest follows.
  if start ~= from_oldest and redis.call('XRANGE', key, after, after)[1] then
    return found
  end
end
return read(from_oldest, false)
"""
)

# Returns the id before the newest of a channel that are not too old, and its head.
_NEWEST = _Script(
    _COMMON
    + """
local key, marks = KEYS[1], KEYS[2]
local count, nonce, age = unpack(ARGV)
local head = head_of(key, marks, nonce)
local oldest, before, left, stop = '-', head, tonumber(count), '+'
if age ~= '' then oldest = string.format('%.0f', math.max(0, now() - age)) end
while left > 0 do
  local piece = redis.call('XREVRANGE', key, stop, oldest, 'COUNT', math.min(left, 100))
  if #piece == 0 then break end
  before = piece[#piece][2][2]
  stop = '(' .. piece[#piece][1]
  left = left - #piece
end
return {before, head}
"""
)

_HEADS = _Script(
    _COMMON
    + """
local heads, ttl, marks = {}, tonumber(ARGV[1]), table.remove(KEYS)
for place, key in ipairs(KEYS) do
  local is_stream, head = pcall(newest, key)
  local found = is_stream and not head and mark(key, marks)
  heads[place] = is_stream and head or found and '0-' .. found or ''
  local left = redis.call('PTTL', key)
  if left >= 0 and left < ttl * 0.9 then redis.call('PEXPIRE', key, ttl) end
end
return heads
"""
)


class RedisBroker:
    """Events on a Redis or Valkey server, or each channel's on one of several.

    Args:
        url: ``redis://[[user]:password@]host[:port][/database]``, several hosts with
            commas between them; ``rediss:`` for TLS; ``unix:///path?db=0``;
            ``redis+sentinel://host[:port],…/service[/database]``, and
            ``rediss+sentinel:``. ``valkey:`` and ``valkeys:`` are other names. Its
            query takes redis-py's options (``ssl_ca_certs=…``), and ``prefix``
            ("ss:") and ``publish_timeout`` (2 seconds).
        capacity: So many events of each channel are kept.
        max_age: Events are kept for so many seconds; ``None`` for no limit.

    Raises:
        ValueError: The URL is not such.
    """

    scope: Literal["cluster"] = "cluster"

    def __init__(
        self, url: str, capacity: int = 1000, max_age: float | None = 3600.0
    ) -> None:
        check_bounds(capacity, max_age)
        parts, query = _parse(url)
        self._prefix = query.pop("prefix", "ss:")
        self._timeout = _seconds("publish_timeout", query)
        if not re.fullmatch("[1-9][0-9]{0,5}", query.get("max_connections", "1")):
            raise ValueError("max_connections must be a number above 0")
        if not re.fullmatch("[0-9]{0,5}", query.get("db", "")):
            raise ValueError("db must be the number of a database")
        self._urls = _split(parts, query)
        try:
            self._servers()  # what is wrong with a URL is said in the caller's frame
        except (ValueError, TypeError, RedisError):
            # They quote it; a traceback would show them.
            names = ", ".join(sorted(query)) or "none"
            raise ValueError(
                f"url has an option whose value cannot be used, one of {names}"
            ) from None
        self._capacity = b"%d" % capacity
        self._age = b"" if max_age is None else b"%d" % round(max_age * 1000)
        ttl = _EMPTY_TTL if max_age is None else max(max_age, _MIN_TTL)
        self._ttl = b"%d" % round(ttl * 1000)
        self._sink: Sink | None = None
        self._is_closed = False
        # Connections, locks and threads are one process's; made at their first use,
        # when gevent has patched what it is going to.
        self._processes: dict[int, _Process] = {}
        self._inherited: list[str] = []  # what the parent watched
        self.is_up = True  # as the sink was told, here or in the parent of a fork
        _brokers.add(self)
        # Dropped without a close: what it has ends, too.
        weakref.finalize(self, _let_go, self._processes).atexit = False

    def _servers(self) -> list[_Server]:
        return [_Server(url, self._timeout, self._prefix) for url in self._urls]

    def _process(self) -> _Process:
        """Return what this process has; once closed that is ``Unavailable``."""
        pid = os.getpid()
        here = self._processes.get(pid)
        if here is None:
            if self._processes:  # a fork that Python was not told of
                self.leave_to_parent()
            # One for all threads, whichever asks first.
            here = self._processes.setdefault(pid, _Process(self, self._servers()))
        if self._is_closed:
            here.close(0)
            raise Unavailable("the broker is closed")
        return here

    def leave_to_parent(self) -> None:
        """Let go of all that the parent has; in a child that was forked."""
        for process in self._processes.values():
            self._inherited = process.abandon()
        self._processes.clear()

    # To publish and to read.

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        if connection is not None:
            raise ValueError("connection must be None: redis: has no such transactions")
        deadline = time.monotonic() + self._timeout
        here = self._process()
        groups: dict[_Server, list[int]] = {}
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

    def _call(self, server: _Server, channel: str, payload: bytes) -> tuple[bytes, ...]:
        return (
            *(server.key(channel), server.marks, server.topic(channel), payload),
            _nonce(),
            *(self._capacity, self._age, self._ttl),
        )

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        here = self._listening()
        server = here.server(channel)
        asked = "" if after is None else after if _ID.fullmatch(after) else START
        head, complete, *fields = server.read(
            (
                *(server.key(channel), server.marks, asked.encode()),
                *(b"%d" % limit, _nonce(), self._age),
            ),
            time.monotonic() + self._timeout,
        )
        now = time.monotonic()
        triples = zip(fields[::3], fields[1::3], fields[2::3], strict=True)
        # An entry that is not ours follows nothing: the chain shows it.
        entries = [
            Entry(id.decode(), prev.decode(errors="replace"), data, now)
            for id, prev, data in triples
        ]
        return Page(entries, bool(complete), head.decode(errors="replace"))

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Return the id before the newest events of a channel, and its head's.

        Args:
            channel: Its name.
            count: Of so many of them, or all that are kept. None of them is sent.

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
            _NEWEST,
        )
        return before.decode(errors="replace"), head.decode(errors="replace")

    # To tell.

    def attach(self, sink: Sink) -> None:
        self._sink = sink

    @property
    def sink(self) -> Sink | None:
        return self._sink

    @property
    def ttl(self) -> bytes:
        """How long a key lives from its last use on, milliseconds."""
        return self._ttl

    @property
    def timeout(self) -> float:
        """How long a request may take, seconds."""
        return self._timeout

    def watch(self, channel: str) -> None:
        try:
            self._listening().watch(channel, self._timeout)
        except Denied:
            raise
        except Unavailable:  # closed; the read that follows says so
            pass

    def unwatch(self, channel: str) -> None:
        with suppress(ValueError):
            self._inherited.remove(channel)
        with suppress(Unavailable):
            self._process().unwatch(channel)

    def _listening(self) -> _Process:
        here = self._process()
        # Who asks for them in this process, a hub, believes them to be watched.
        while self._inherited:
            here.watch(self._inherited.pop(), 0)
        return here

    def close(self, timeout: float = 5.0) -> None:
        self._is_closed = True
        here = self._processes.get(os.getpid())
        if here is not None:
            here.close(timeout)


_brokers: weakref.WeakSet[RedisBroker] = weakref.WeakSet()


def _forked() -> None:
    for broker in tuple(_brokers):
        broker.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _let_go(processes: dict[int, _Process]) -> None:
    here = processes.get(os.getpid())
    if here is not None:
        here.let_go()


def _nonce() -> bytes:
    # Not of `random`: an application that seeds it would have the same ids again.
    return b"%d" % secrets.randbits(48)


def _seconds(name: str, query: dict[str, str]) -> float:
    text = query.pop(name, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{name} must be seconds above 0")
    return seconds


def _parse(url: str) -> tuple[SplitResult, dict[str, str]]:
    """Return the parts of a URL, and its options.

    What is wrong with it is not quoted: a "/", "?" or "#" in a password that is not
    escaped moves it into any part.

    Raises:
        ValueError: It is not one of ours.
    """
    try:
        url.encode()  # else the login fails, by an error whose repr has all of it
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        hosts = parts.netloc.rpartition("@")[2].split(",")
        names = [urlsplit(f"//{host}") for host in hosts if host]
        for name in names:
            (name.hostname or "").encode("idna")  # as whoever looks it up does
        # The ports are parsed when they are asked for.
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
            "url must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], a unix: or"
            " a redis+sentinel: one, with %40 for @, %2F for /, %3F for ? and %23 for #"
            f" in a password, got {shown(url)}"
        )
    known = _options(parts.scheme)
    if not known.issuperset(query):
        # A "?" in a password would be quoted; "@" then follows it.
        others = sorted(query.keys() - known) if "@" not in parts.query else []
        text = f", got {', '.join(map(repr, others))}" if others else ""
        raise ValueError(f"url's options must be of {', '.join(sorted(known))}{text}")
    return parts, query


def _options(scheme: str) -> set[str]:
    """Return the options that a URL may have, ours and redis-py's."""
    known = {"prefix", "publish_timeout", "max_connections"}
    known |= {"db", "username", "password", "client_name"}
    if scheme != "unix":
        known.add("socket_keepalive")
    if scheme.startswith(("rediss", "valkeys")):
        known |= {
            name
            for name in signature(redis.SSLConnection.__init__).parameters
            if name.startswith("ssl_")
        }
    if scheme.endswith("+sentinel"):
        known |= {"sentinel_username", "sentinel_password"}
    return known


def _split(parts: SplitResult, query: dict[str, str]) -> list[str]:
    """Return the URL of each server, as redis-py takes them."""
    scheme = parts.scheme.replace("valkey", "redis")
    rest = f"{parts.path}?{urlencode(query)}"
    if scheme == "unix" or scheme.endswith("+sentinel"):
        return [f"{scheme}://{parts.netloc}{rest}"]
    user, at, hosts = parts.netloc.rpartition("@")
    return [f"{scheme}://{user}{at}{host}{rest}" for host in hosts.split(",")]


class _Process:
    """What one process has of a broker, which it does not keep."""

    def __init__(self, broker: RedisBroker, servers: list[_Server]) -> None:
        self._broker = weakref.ref(broker)
        self.ttl = broker.ttl
        self.timeout = broker.timeout
        self.servers = servers
        self._listeners: dict[_Server, _Listener] = {}
        # Native, here and in the listener: threads of several hubs meet in them.
        self._lock = native(_thread, "allocate_lock")()
        self._failing: set[tuple[_Server, str]] = set()
        self._judging = native(_thread, "RLock")()
        self._is_closed = False
        for server in servers:
            server.judge = functools.partial(self.judge, server)

    def server(self, channel: str) -> _Server:
        """Return the one that has a channel: for all processes the same."""
        if len(self.servers) == 1:
            return self.servers[0]
        return max(self.servers, key=lambda server: server.weight(channel))

    def watch(self, name: str, timeout: float) -> None:
        for server in self.servers if is_pattern(name) else [self.server(name)]:
            listener = self._listener(server)
            if listener is not None:
                listener.watch(name, timeout)

    def unwatch(self, name: str) -> None:
        for server in self.servers if is_pattern(name) else [self.server(name)]:
            listener = self._listeners.get(server)
            if listener is not None:
                listener.unwatch(name)

    def _listener(self, server: _Server) -> _Listener | None:
        """Return who listens to a server; ``None``: the broker is closed."""
        with self._lock:
            if self._is_closed:
                return None
            listener = self._listeners.get(server)
            if listener is None:
                listener = self._listeners[server] = _Listener(server, self)
                listener.start()
            return listener

    def abandon(self) -> list[str]:
        """Leave it to the parent; return what is watched."""
        names: dict[str, None] = {}
        for listener in self._listeners.values():
            listener.abandon()
            names.update(dict.fromkeys(listener.watched()))
        return list(names)

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener.stop()
        for listener in listeners:
            listener.join(max(0.0, deadline - time.monotonic()))
        for server in self.servers:
            server.close()

    def let_go(self) -> None:
        """Have it end, without waiting: nobody asks for anything any more.

        From any thread, in the middle of anything: no lock is taken.
        """
        self._is_closed = True
        listeners = [*self._listeners.values()]
        for listener in listeners:
            listener.stop()
        for server in self.servers:
            server.close()

    # What listeners tell.

    @property
    def sink(self) -> Sink | None:
        broker = self._broker()
        return None if broker is None else broker.sink

    def judge(self, server: _Server, way: str, reason: str = "") -> None:
        """Take note that something works, or by a reason does not; tell of a change.

        Args:
            way: "listen", "connect" for requests, "publish", "read" and "heads" for
                what a server refuses whatever the channel.
        """
        broker = self._broker()
        if broker is None or not (reason or self._failing or not broker.is_up):
            return
        with self._judging:
            change = self._failing.add if reason else self._failing.discard
            change((server, way))
            is_up = not self._failing
            if is_up == broker.is_up or broker.sink is None:
                return
            broker.is_up = is_up
            broker.sink.state(is_up, reason or f"connected to {server.name}")


class _Server:
    """One server, as one process uses it: names, and connections for requests.

    redis-py's connections, not its clients: these send again what was not answered,
    ten times by default, and an event would be stored twice (measured, 8.1).
    """

    def __init__(self, url: str, timeout: float, prefix: str) -> None:
        self._timeout = timeout
        options: dict[str, Any] = {}
        if not url.startswith("unix:"):
            options |= {"socket_keepalive": True, "socket_keepalive_options": _ALIVE}
        self._service: _Service | None = None
        if "+sentinel:" in url:
            given, self.name, self._service = _of_sentinel(url, options)
        else:
            given = _given(url, options)
            self.name = str(given.get("path") or _address(given))
        most = given.pop("max_connections", CONNECTIONS)
        self._class: Any = given.pop("connection_class", redis.Connection)
        self._options = {
            **given,
            "protocol": 2,
            "decode_responses": False,
            "retry": Retry(NoBackoff(), 0),
        }
        database = int(given.get("db", 0))
        self._key = f"{prefix}{{"
        self.marks = f"{prefix}empty".encode()  # the key of those of empty channels
        # Keys are a database's, but Pub/Sub is the whole server's.
        self._topic = f"{prefix}{database}:{{" if database else self._key
        self._topic_bytes = self._topic.encode()
        self._name = self.name.encode()
        # Told of what works, and what does not: see `_Process.judge`.
        self.judge: Callable[..., None] = lambda way, reason="": None
        self._idle: deque[_Idle] = deque()  # the one last that was used last
        self._home: Any = None  # the hub in which those wait
        self._is_closed = False
        self._free = threading.BoundedSemaphore(most)
        self._class(**self._options)

    def weight(self, channel: str) -> bytes:
        """Return by what a channel chooses among servers (rendezvous hashing)."""
        text = self._name + b"\0" + channel.encode()
        return hashlib.blake2b(text, digest_size=8).digest()

    def key(self, channel: str) -> bytes:
        return f"{self._key}{channel}}}".encode()

    def topic(self, channel: str) -> bytes:
        """Return the Pub/Sub channel of one of ours."""
        return f"{self._topic}{channel}}}".encode()

    def glob(self, pattern: str) -> bytes:
        """Return the glob for a pattern, another for each; it may match more."""
        prefix, _, last = pattern.rpartition(":")
        text = _GLOB.sub(rb"\\\1", f"{self._topic}{prefix}".encode())
        if last == "*":
            return text + (b":*}" if prefix else b"*}")
        return text + (b"[:}]*" if prefix else b"?*}")

    def channel(self, topic: bytes) -> str:
        """Return the channel of a topic; an empty one: it is none of ours."""
        if not topic.startswith(self._topic_bytes) or not topic.endswith(b"}"):
            return ""
        return topic[len(self._topic_bytes) : -1].decode(errors="replace")

    def own(self) -> bytes:
        """Return the name of a Pub/Sub channel that nobody else has."""
        return f"{self._topic[:-1]}ctl:{secrets.randbits(64):x}".encode()

    # Requests.

    def publish(self, calls: Sequence[tuple[bytes, ...]], deadline: float) -> list[str]:
        """Run the script for each; return the ids."""
        try:
            replies = self._run(_PUBLISH, calls, deadline)
        except Uncertain as error:
            self.judge("connect", str(error))
            raise
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if not refused:
            self.judge("publish")
            return [id.decode() for id in replies]
        refusal = self._refusal("publish", refused[0])
        if len(refused) < len(replies) or str(refused[0]).startswith("STORED"):
            raise Uncertain(str(refusal))
        raise refusal

    def _refusal(self, way: str, reply: Exception) -> Unavailable:
        """Return what to raise; what concerns more than one name is a failure."""
        reason = f"{self.name} has refused it: {reply}"
        if _OF_RIGHTS.search(str(reply)):
            reason = f"{reason}; {_RIGHTS}"
            # Who may not publish at all may well subscribe, and is not cut off.
            if way == "publish" or _OF_NAME.search(str(reply)):
                return Denied(reason)
        if "WRONGTYPE" not in str(reply):
            self.judge(way, reason)
        return Unavailable(reason)

    def read(
        self, call: tuple[bytes, ...], deadline: float, script: _Script = _READ
    ) -> Any:
        """Run a script that reads; once more if a connection is lost meanwhile."""
        for is_last in (False, True):
            try:
                (reply,) = self._run(script, [call], deadline)
            except Uncertain as error:
                if is_last or time.monotonic() >= deadline:
                    self.judge("connect", str(error))
                    raise Unavailable(str(error)) from error
                continue
            if isinstance(reply, Exception):
                raise self._refusal("read", reply)
            self.judge("read")
            return reply
        raise AssertionError

    def _run(
        self, script: _Script, calls: Sequence[tuple[bytes, ...]], deadline: float
    ) -> list[Any]:
        """Run a script for each call, in this order; return replies, and refusals."""
        named = [(b"EVALSHA", script.sha, b"2", *call) for call in calls]
        in_full = (b"EVAL", script.text, b"2", *calls[0])
        if len(calls) > 1:
            # The first teaches the script: else some may be refused, and later ones
            # stored when somebody else has done so.
            return self._ask([in_full, *named[1:]], deadline)
        replies = self._ask(named, deadline)
        if isinstance(replies[0], NoScriptError):
            return self._ask([in_full], deadline)
        return replies

    def _ask(self, commands: list[Any], deadline: float) -> list[Any]:
        """Send commands, and return their replies, refusals among them.

        Raises:
            Unavailable: They were not sent.
            Uncertain: They were sent, and a reply did not come.
        """
        # Nor do hubs wait for each other well: others have no more than threads.
        is_home = _is_home()
        left = max(0.0, deadline - time.monotonic())
        if is_home and not self._free.acquire(timeout=left):
            raise Unavailable(f"all connections to {self.name} are in use")
        try:
            try:
                connection = self.take(deadline)
            except Unavailable as error:
                self.judge("connect", str(error))
                raise
            try:
                self._send(connection, commands, deadline)
                replies = [self._reply(connection, deadline) for _ in commands]
            except BaseException:
                connection.disconnect()
                raise
            self.judge("connect")
            if any("read only" in str(r) for r in replies if isinstance(r, Exception)):
                # Its name may lead to another server by now, that is the master.
                connection.disconnect()
                if _is_home():
                    self.forget_idle()
            else:
                self.give_back(connection)
            return replies
        finally:
            if is_home:
                self._free.release()

    def give_back(self, connection: Any) -> None:
        # One that was made in a hurry has not much patience.
        if not _is_home() or connection.socket_timeout < self._timeout / 4:
            connection.disconnect()
            return
        self._home = sys.modules["gevent"].get_hub() if _is_patched() else None
        self._idle.append(_Idle(connection, time.monotonic()))
        self.forget_idle(0 if self._is_closed else IDLE)

    def take(self, deadline: float) -> Any:
        """Return a connection that is known to live."""
        while self._idle and _is_home():
            self.forget_idle(IDLE)
            try:
                idle = self._idle.pop()
            except IndexError:  # another thread was faster, or they were too old
                break
            if _is_living(idle, deadline):
                return idle.connection
            idle.connection.disconnect()
            # Others are as old, and there is no time to ask each.
            self.forget_idle(FRESH)
        return self.connect(deadline)

    def connect(self, deadline: float) -> Any:
        """Return a new connection."""
        connection = None
        try:
            options = self._options
            if self._service is not None:
                host, port = self._service.master(deadline)
                options = {**options, "host": host, "port": port}
            # It is two waits: to connect, and for the answer to what is sent first.
            left = max(0.001, deadline - time.monotonic()) / 2
            connection = self._class(**options)
            # No options: redis-py 5.0 forgets one, for Unix sockets.
            connection.socket_connect_timeout = connection.socket_timeout = left
            connection.connect()
            if time.monotonic() >= deadline:
                raise Unavailable(f"{self.name} took too long to connect to")
        except (RedisError, OSError) as error:
            if connection is not None:
                connection.disconnect()
            raise Unavailable(f"cannot connect to {self.name}: {error}") from error
        except BaseException:
            if connection is not None:
                connection.disconnect()
            raise
        return connection

    def _send(self, connection: Any, commands: list[Any], deadline: float) -> None:
        packed = connection.pack_commands(commands)
        try:
            # For sending alone: redis-py sets it again with each wait for an answer.
            connection._sock.settimeout(max(0.001, deadline - time.monotonic()))
            connection.send_packed_command(packed, check_health=False)
        except (RedisError, OSError) as error:
            reason = f"the connection to {self.name} was lost: {error}"
            # A command that was not sent to its end is none.
            kind = Unavailable if len(commands) == 1 else Uncertain
            raise kind(reason) from error

    def _reply(self, connection: Any, deadline: float) -> Any:
        try:
            left = max(0.0, deadline - time.monotonic())
            if not connection.can_read(timeout=left):
                raise Uncertain(f"no answer from {self.name}")
            # Not to be closed for LOADING: there may be more replies.
            return connection.read_response(disconnect_on_error=False)
        except (ResponseError, BusyLoadingError, AuthenticationError) as error:
            # Not the traceback: it keeps all that calls this.
            return error.with_traceback(None)
        except (RedisError, OSError) as error:
            raise Uncertain(f"no answer from {self.name}: {error}") from error

    def forget_idle(self, seconds: float = 0) -> None:
        """Close what nobody has used for so long.

        What has just been used, too, may lead to a server that is no more.
        """
        since = time.monotonic() - seconds
        while self._idle:
            try:
                idle = self._idle.popleft()
            except IndexError:  # another thread was faster
                return
            if idle.since > since:
                self._idle.appendleft(idle)
                return
            idle.connection.disconnect()

    def close(self) -> None:
        """Close what is not in use; from any thread."""
        self._is_closed = True
        if _is_home():
            self.forget_idle()
        elif self._home is not None and self._home.loop is not None:
            self._home.loop.run_callback_threadsafe(self.forget_idle)


class _Idle(NamedTuple):
    """A connection that is not in use.

    Attributes:
        since: When it was used last, seconds of `time.monotonic`.
    """

    connection: Any
    since: float


def _is_patched() -> bool:
    """Tell whether sockets are gevent's, each of which waits in one hub alone."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def _is_home() -> bool:
    """Tell whether connections that are kept may be used, and closed, here.

    Under gevent they are the main thread's. Not asked of a hub: a thread that has none
    would be given one.
    """
    here = native(_thread, "get_ident")()
    return not _is_patched() or here == sys.modules["gevent.hub"].MAIN_THREAD_IDENT


def _main_hub() -> Any:
    """Return the main thread's hub, in another thread; gevent gives it no name.

    Raises:
        RuntimeError: It has none.
    """
    for one in gc.get_objects():  # as `gevent.util.GreenletTree` looks for greenlets
        if issubclass(type(one), sys.modules["gevent"].hub.Hub) and one.main_hub:
            return one
    raise RuntimeError("the main thread has no gevent hub yet, which is to listen")


def _is_living(idle: _Idle, deadline: float) -> bool:
    """Tell whether a connection can be trusted with an event."""
    connection = idle.connection
    try:
        # What the server has closed is readable, too.
        if connection.can_read(timeout=0):
            return False
        now = time.monotonic()
        if now - idle.since < FRESH:
            return True
        # A firewall may have forgotten it without a word; a PING that is lost is no
        # harm. Half of the time is for the connection that replaces it.
        packed = connection.pack_commands([(b"PING",)])
        connection.send_packed_command(packed, check_health=False)
        if not connection.can_read(timeout=max(0.0, deadline - now) / 2):
            return False
        connection.read_response()
    except (ResponseError, BusyLoadingError):  # it has answered
        return True
    except (RedisError, OSError):
        return False
    return True


def _address(options: dict[str, Any]) -> str:
    host = options.get("host", "localhost")
    return f"{f'[{host}]' if ':' in host else host}:{options.get('port', 6379)}"


def _given(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a connection's options, ours and those of a URL that redis-py takes."""
    given = {**options, **parse_url(url)}
    # By default releases before 6 take any host's certificate; and 6 fails to connect
    # where no certificate is asked for.
    if url.startswith("rediss:"):
        is_checked = given.get("ssl_cert_reqs") != "none"
        given.setdefault("ssl_check_hostname", is_checked)
    return given


class _Service:
    """A service whose master Sentinels name.

    Args:
        name: As the Sentinels know it.
        addresses: Theirs, host and port of each.
        options: For connections to them.
    """

    def __init__(
        self, name: str, addresses: list[tuple[str, int]], options: dict[str, Any]
    ) -> None:
        self._name = name
        self._addresses = addresses
        self._options = options

    def master(self, deadline: float) -> tuple[str, int]:
        """Return the master's host and port, as the first Sentinel that answers says.

        Each call has its own connections: a firewall has forgotten them by the next
        one, and that may come from another hub.

        Raises:
            RedisError: None has named it.
        """
        known = self._addresses
        for place, address in enumerate(known):
            # Two waits each, and two for the master itself.
            left = max(0.001, deadline - time.monotonic())
            wait = left / 2 / (len(known) - place + 1)
            waits = {"socket_timeout": wait, "socket_connect_timeout": wait}
            sentinel = Sentinel([address], sentinel_kwargs={**self._options, **waits})
            try:
                found: tuple[str, int] = sentinel.discover_master(self._name)
            except MasterNotFoundError:
                # It quotes the connection, in redis-py 6 and 7 with its password.
                continue
            except (RedisError, OSError):
                if place == len(known) - 1:
                    raise
            else:
                # Who has answered is asked first from now on.
                rest = [other for other in known if other != address]
                self._addresses = [address, *rest]
                return found
            finally:
                for client in sentinel.sentinels:
                    client.close()
        raise RedisError("no Sentinel has its master")


def _of_sentinel(
    url: str, options: dict[str, Any]
) -> tuple[dict[str, Any], str, _Service]:
    """Return a connection's options, a name, and the service it leads to the master of.

    redis-py has no URL for it.
    """
    parts = urlsplit(url)
    is_tls = parts.scheme == "rediss+sentinel"
    user, at, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    one = parts._replace(
        scheme="rediss" if is_tls else "redis",
        netloc=f"{user}{at}localhost",
        path=f"/{database}",
    )
    given = _given(one.geturl(), options)
    del given["host"]
    theirs: dict[str, Any] = {**options, "retry": Retry(NoBackoff(), 0), "ssl": is_tls}
    for name in [*given]:
        if name.startswith("ssl_"):
            theirs[name] = given[name]
        elif name.startswith("sentinel_"):
            theirs[name.removeprefix("sentinel_")] = given.pop(name)
    nodes = [urlsplit(f"//{host}") for host in hosts.split(",")]
    addresses = [(node.hostname or "localhost", node.port or 26379) for node in nodes]
    name = unquote(service)
    return given, f"{name} ({hosts})", _Service(name, addresses, theirs)


class _Watch:
    """A channel or pattern that is watched, or was a moment ago.

    Attributes:
        topic: Its Pub/Sub channel, or glob.
        pending: So many acknowledgements are to come.
        is_asked: The server was asked to tell of it, later than not to.
        is_settled: It has said that it does.
        is_doubtful: Something may have been lost.
        is_apart: Its head is asked for by itself: the server has refused some.
        last: The id of what was told last, or was the head once; ``None``: neither.
        refusal: Why the server does not tell of it, if so.
        waiters: Are ended when it is settled, or refused.
    """

    __slots__ = (
        *("is_apart", "is_asked", "is_doubtful", "is_pattern", "is_settled"),
        *("is_wanted", "last", "name", "pending", "refusal", "topic", "waiters"),
    )

    def __init__(self, name: str, is_pattern: bool, topic: bytes) -> None:
        self.name = name
        self.is_pattern = is_pattern
        self.topic = topic
        self.pending = 0
        self.is_wanted = True
        self.is_asked = self.is_settled = self.is_doubtful = self.is_apart = False
        self.refusal = ""
        self.last: str | None = None
        self.waiters: list[Turn] = []


class _Asked:
    """A command that tells what is wanted, until it is acknowledged.

    Attributes:
        watches: Whose topics it names; none: it is our own.
        left: So many acknowledgements are to come.
    """

    __slots__ = ("left", "verb", "watches")

    def __init__(self, verb: bytes, watches: Sequence[_Watch]) -> None:
        self.verb = verb
        self.watches = watches
        self.left = max(1, len(watches))


class _Check(NamedTuple):
    """A name that is looked at with a beat, as it was when that was sent."""

    watch: _Watch
    last: str | None
    is_doubtful: bool


class _Listener:
    """Who is told by one server, in one process: a thread; a greenlet under gevent.

    It is told over one connection, which nobody else touches. Every `BEAT` seconds it
    sends a message to itself, by one of those that publish: what does not come back
    shows a connection that is dead, or leads elsewhere. With each it asks for some
    channels' heads. All that was told of before these were read has come when the
    message comes back: a head that is another one shows a loss.
    """

    def __init__(self, server: _Server, process: _Process) -> None:
        self._server = server
        self._process = process
        self._lock = native(_thread, "allocate_lock")()
        self._watches: dict[str, _Watch] = {}
        self._by_topic: dict[tuple[bool, bytes], _Watch] = {}
        self._changes: deque[_Watch] = deque()
        self._sent: deque[_Asked] = deque()  # they are answered in their order
        self._doubtful: list[_Watch] = []
        self._spoilt: dict[str, None] = {}  # channels that had what is no event
        self._has_warned = False
        self._round: deque[_Watch] = deque()  # whose heads are to be compared
        # gevent's sockets would wait in the hub of whoever makes this.
        self._waker, self._woken = _socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._is_woken = False
        self.is_closed = False
        self._is_down = False
        self._own = server.own()
        self._sub: Any = None
        self._beats: Any = None  # by which the beat that is out was sent
        self._sent_at: float | None = None  # when the beat that is out was
        self._next_beat = 0.0
        self._has_beaten = False
        self._token = b""
        self._answers: list[Any] = []
        self._checked: list[list[_Check]] = []  # a request for heads each
        self._replies: list[Any] | None = None  # to the beat; `None`: it has not come
        self._is_echoed = False  # the message of the beat has come
        self._told: tuple[bytes, bytes] | None = None
        self._has_more = False
        self._has_ended = False
        self._joining: list[Turn] = []  # who waits for that

    # From any thread.

    def start(self) -> None:
        if not _is_patched():
            threading.Thread(
                target=self._run, name="syncstream-redis", daemon=True
            ).start()
            return
        # No patched thread: a forked child has this greenlet, too, and does not know
        # the thread that would end there. In the main hub, whoever asks: others run
        # only while somebody waits in them.
        home = sys.modules["gevent"].get_hub() if _is_home() else _main_hub()
        home.loop.run_callback_threadsafe(sys.modules["gevent"].spawn, self._run)

    def abandon(self) -> None:
        """Leave it to the parent of a fork, all of whose threads are not here."""
        self.is_closed = True
        self._lock = native(_thread, "allocate_lock")()

    def stop(self) -> None:
        self.is_closed = True
        self._wake()

    def join(self, timeout: float) -> None:
        turn = Turn()
        self._joining.append(turn)
        # Looked at after that: it ends those who wait after it has said so.
        if self._has_ended or turn.wait(time.monotonic() + timeout) or not timeout:
            return
        text = "the listener of %s did not end"
        report(log, logging.WARNING, text, self._server.name)

    def watched(self) -> list[str]:
        return [watch.name for watch in self._watches.values() if watch.is_wanted]

    def watch(self, name: str, timeout: float) -> None:
        """Have it told of; wait until it is, at most so many seconds.

        What was not in time is looked at later, as after a loss.

        Raises:
            Denied: The server refuses it.
        """
        waiter = None
        with self._lock:
            watch = self._watches.get(name)
            if watch is None:
                watch = self._watches[name] = self._new_watch(name)
            watch.is_wanted = True
            if watch.is_settled:
                return
            if timeout and not self._is_down:
                waiter = Turn()
                watch.waiters.append(waiter)
            else:
                watch.is_doubtful = True
            self._changes.append(watch)
        self._wake()
        if waiter is None:
            return
        if waiter.wait(time.monotonic() + timeout):
            if watch.refusal:
                raise Denied(watch.refusal)
            return
        with self._lock:
            if waiter in watch.waiters:
                watch.waiters.remove(waiter)
                watch.is_doubtful = True

    def _new_watch(self, name: str) -> _Watch:
        if is_pattern(name):
            return _Watch(name, True, self._server.glob(name))
        return _Watch(name, False, self._server.topic(name))

    def unwatch(self, name: str) -> None:
        with self._lock:
            watch = self._watches.get(name)
            if watch is None:
                return
            watch.is_wanted = False
            self._changes.append(watch)
        self._wake()

    def _wake(self) -> None:
        # It clears the mark before it looks at what there is to do.
        if not self._is_woken:
            self._is_woken = True
            with suppress(OSError):  # it is awake, or closed
                self._waker.send(b"\0")

    # Its thread.

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._server.close()
            self._waker.close()
            self._woken.close()
            self._has_ended = True
            for turn in self._joining:
                turn.end()

    def _follow(self) -> None:
        first, longest = BACKOFF
        delay = first
        while not self.is_closed:
            reason = "closed"
            self._has_beaten = False
            try:
                self._connect()
                self._listen()
            except (RedisError, OSError, BrokerError) as error:
                reason = str(error)
            except Exception as error:
                reason = repr(error)
                text = "the listener of %s has failed"
                say(log, logging.ERROR, text, self._server.name, error=error)
            finally:
                self._try(self._disconnect)
            if not self.is_closed:
                self._try(functools.partial(self._lose, reason))
                delay = first if self._has_beaten else min(2 * delay, longest)
                self._wait(random.uniform(delay / 2, delay), [self._woken])
        self._lose("closed", is_told=False)

    def _connect(self) -> None:
        self._sub = self._server.connect(time.monotonic() + self._process.timeout)
        self._send(b"SUBSCRIBE", ())
        self._ask()
        self._sent_at = None
        self._next_beat = time.monotonic() + BEAT
        self._has_more = False

    def _try(self, step: Callable[[], object]) -> None:
        """Take a step between two connections: the next one comes without it, too."""
        try:
            step()
        except Exception as error:
            text = "the listener of %s could not let go"
            say(log, logging.ERROR, text, self._server.name, error=error)

    def _disconnect(self) -> None:
        connections, self._sub, self._beats = (self._sub, self._beats), None, None
        for connection in connections:
            if connection is not None:
                connection.disconnect()

    def _lose(self, reason: str, is_told: bool = True) -> None:
        """Take note that nothing is told any more."""
        with self._lock:
            self._is_down = True
            self._sent.clear()
            self._by_topic.clear()
            self._changes.clear()
            self._doubtful.clear()
            self._round.clear()
            for watch in [*self._watches.values()]:
                if not watch.is_wanted:
                    del self._watches[watch.name]
                    continue
                watch.pending = 0
                watch.is_asked = watch.is_settled = False
                watch.is_doubtful = True
                self._changes.append(watch)
                for waiter in watch.waiters:
                    waiter.end()
                watch.waiters = []
        self._server.forget_idle()
        if is_told:
            self._server.judge("listen", reason)

    def _listen(self) -> None:
        while True:
            now = time.monotonic()
            if self._sent_at is None and (
                now >= self._next_beat
                or (not self._sent and (self._doubtful or not self._has_beaten))
            ):
                self._beat(now)
            ends = self._next_beat if self._sent_at is None else self._deaf_at()
            left = 0.0 if self._has_more else max(0.0, ends - now)
            beats = [] if self._beats is None else [self._beats._sock]
            self._wait(left, [self._woken, self._sub._sock, *beats])
            if self.is_closed:
                return
            self._ask()
            self._take_some()
            self._take_replies()
            if self._is_echoed and self._replies is not None:
                self._heard(self._replies)
            if self._sent_at is not None and time.monotonic() > self._deaf_at():
                raise BrokerError(f"{self._server.name} is silent")

    def _deaf_at(self) -> float:
        assert self._sent_at is not None
        return self._sent_at + DEAF - BEAT

    def _wait(self, seconds: float, socks: list[Any]) -> None:
        """Wait until one of them can be read, or the time is over."""
        if hasattr(select, "poll"):  # gevent's, where that has patched it
            poll = select.poll()
            for sock in socks:
                poll.register(sock, select.POLLIN)
            poll.poll(seconds * 1000)
        else:
            select.select(socks, [], [], seconds)
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        self._is_woken = False

    def _ask(self) -> None:
        """Tell the server what is wanted now."""
        commands: list[tuple[bytes, list[_Watch]]] = []
        with self._lock:
            while self._changes:
                watch = self._changes.popleft()
                if watch.is_wanted == watch.is_asked:
                    if watch.is_asked and not watch.pending:
                        self._settle(watch)
                    self._forget(watch)
                    continue
                watch.is_asked = watch.is_wanted
                watch.is_settled = False
                watch.pending += 1
                self._by_topic[watch.is_pattern, watch.topic] = watch
                verb = b"SUBSCRIBE" if watch.is_wanted else b"UNSUBSCRIBE"
                verb = b"P" + verb if watch.is_pattern else verb
                if not commands or commands[-1][0] != verb:
                    commands.append((verb, []))
                commands[-1][1].append(watch)
        for verb, watches in commands:
            for start in range(0, len(watches), _TOPICS):
                self._send(verb, watches[start : start + _TOPICS])

    def _send(self, verb: bytes, watches: Sequence[_Watch]) -> None:
        self._sent.append(_Asked(verb, watches))
        topics = [watch.topic for watch in watches] or [self._own]
        self._sub.send_command(verb, *topics)

    def _settle(self, watch: _Watch) -> None:
        """Take note that what is stored from now on is told; under the lock."""
        if not watch.is_settled:
            watch.is_settled = True
            if watch.is_doubtful:
                self._doubtful.append(watch)
            else:
                watch.last = None
        for waiter in watch.waiters:
            waiter.end()
        watch.waiters = []

    def _forget(self, watch: _Watch) -> None:
        if not (watch.is_wanted or watch.is_asked or watch.pending):
            topic = watch.is_pattern, watch.topic
            if self._by_topic.get(topic) is watch:
                del self._by_topic[topic]
            if self._watches.get(watch.name) is watch:
                del self._watches[watch.name]

    def _take_some(self) -> None:
        sub = self._sub
        for _ in range(_AT_ONCE):
            if not sub.can_read(timeout=0):
                self._has_more = False
                return
            try:
                reply = sub.read_response(disconnect_on_error=False)
            except NoPermissionError as error:
                self._refused(str(error))
            else:
                self._take(reply)
        self._has_more = True
        sleep(0)

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", self._own, data]:
                self._is_echoed = self._is_echoed or data == self._token
            case [b"message", bytes(topic), bytes(data)]:
                watch = self._by_topic.get((False, topic))
                if watch is not None:
                    self._deliver(watch, watch.name, topic, data)
            case [b"pmessage", bytes(glob), bytes(topic), bytes(data)]:
                watch = self._by_topic.get((True, glob))
                channel = self._server.channel(topic)
                if watch is not None and channel and matches(watch.name, channel):
                    self._deliver(None, channel, topic, data)
            case [
                b"subscribe" | b"unsubscribe" | b"psubscribe" | b"punsubscribe",
                *_,
            ] if self._sent:
                self._acknowledged()

    def _acknowledged(self) -> None:
        asked = self._sent[0]
        asked.left -= 1
        if not asked.left:
            self._sent.popleft()
        if asked.watches:
            with self._lock:
                self._done(asked.watches[-1 - asked.left])

    def _done(self, watch: _Watch) -> None:
        """Take note that the server does what it was asked; under the lock."""
        watch.pending -= 1
        if watch.is_asked and not watch.pending:
            self._settle(watch)
        self._forget(watch)

    def _refused(self, reason: str) -> None:
        """Take note that a command is not allowed: all of it, for one of its names."""
        if not self._sent or not self._sent[0].watches:
            raise BrokerError(
                f"{self._server.name} has refused it: {reason}; {_RIGHTS}"
            )
        asked = self._sent.popleft()
        denied: list[_Watch] = []
        again: list[_Watch] = []
        with self._lock:
            for watch in asked.watches:
                if watch.pending > 1 or asked.verb.endswith(b"UNSUBSCRIBE"):
                    # Another command has the last word; or it may tell for ever.
                    self._done(watch)
                elif len(asked.watches) > 1:
                    again.append(watch)
                else:
                    denied.append(watch)
        half = len(again) // 2
        for some in (again[:half], again[half:]):
            if some:
                self._send(asked.verb, some)
        for watch in denied:
            self._deny(watch, reason)

    def _deny(self, watch: _Watch, reason: str) -> None:
        """Give a name up, and say so to those who wait for it, and to the sink."""
        reason = f"{self._server.name} does not allow it: {reason}; {_RIGHTS}"
        with self._lock:
            was_wanted, watch.is_wanted = watch.is_wanted, False
            watch.refusal = reason
            if self._watches.get(watch.name) is watch:
                del self._watches[watch.name]  # who asks again has the server asked
            if watch.is_settled:
                self._changes.append(watch)
            else:
                watch.pending, watch.is_asked = 0, False
                self._forget(watch)
            for waiter in watch.waiters:
                waiter.end()
            watch.waiters = []
        sink = self._process.sink
        if was_wanted and sink is not None:
            sink.deny(watch.name, reason)

    def _deliver(
        self, watch: _Watch | None, channel: str, topic: bytes, data: bytes
    ) -> None:
        id, _, rest = data.partition(b" ")
        prev, space, payload = rest.partition(b" ")
        # One message comes once for the channel, and once for each of its patterns.
        if space and self._told == (topic, id):
            return
        if not (space and _ID_BYTES.fullmatch(id) and _ID_BYTES.fullmatch(prev)):
            self._spoil(channel, "it is no event")
            return
        self._told = topic, id
        entry = Entry(id.decode(), prev.decode(), payload, time.monotonic())
        if watch is not None:
            watch.last = entry.id
        sink = self._process.sink
        if sink is None:
            return
        try:
            sink.deliver(channel, entry)
        except Exception as error:
            self._spoil(channel, repr(error))
        else:
            self._server.judge("publish")  # somebody can

    def _spoil(self, channel: str, problem: str) -> None:
        """Drop a message, and have its channel read anew, with the next beat.

        Anybody whom the server allows to may send such, as often as he likes, and
        under names without end that a pattern matches.
        """
        if channel in self._watches or len(self._spoilt) < _KEYS:
            self._spoilt[channel] = None
        if not self._has_warned:
            self._has_warned = True
            text = "a message of %s to %r is dropped, and more such may be: %s"
            say(log, logging.WARNING, text, self._server.name, channel, problem)

    # Beats.

    def _beat(self, now: float) -> None:
        """Ask for heads, then send a message to ourselves."""
        with self._lock:
            checks = self._to_check()
        named = [check for check in checks if not check.watch.is_pattern]
        apart = [[check] for check in named if check.watch.is_apart]
        named = [check for check in named if not check.watch.is_apart]
        self._checked = [
            [check for check in checks if check.watch.is_pattern],
            *(named[start : start + _KEYS] for start in range(0, len(named), _KEYS)),
            *apart,
        ]
        commands: list[tuple[bytes, ...]] = []
        for some in self._checked[1:]:
            keys = [self._server.key(check.watch.name) for check in some]
            keys.append(self._server.marks)
            number = b"%d" % len(keys)
            commands.append((b"EVAL", _HEADS.text, number, *keys, self._process.ttl))
        self._token = b"%x" % secrets.randbits(64)
        commands.append((b"PUBLISH", self._own, self._token))
        self._beats = self._server.take(now + DEAF)
        self._replies = None
        self._answers = []
        self._is_echoed = False
        packed = self._beats.pack_commands(commands)
        self._beats.send_packed_command(packed, check_health=False)
        self._sent_at = now
        self._next_beat = now + BEAT * random.uniform(0.9, 1.1)

    def _to_check(self) -> list[_Check]:
        """Return those whose heads are asked for now, under the lock."""
        due, self._doubtful = self._doubtful, []
        if not self._round:
            self._round.extend(self._watches.values())
        share = math.ceil(len(self._watches) * BEAT / ROUND)
        due += [self._round.popleft() for _ in range(min(share, len(self._round)))]
        settled = [watch for watch in dict.fromkeys(due) if watch.is_settled]
        checked = [_Check(watch, watch.last, watch.is_doubtful) for watch in settled]
        for watch in settled:
            watch.is_doubtful = False
        return checked

    def _take_replies(self) -> None:
        """Take the replies to a beat, as far as they have come."""
        beats = self._beats
        while beats is not None and self._replies is None and beats.can_read(timeout=0):
            try:
                reply = beats.read_response(disconnect_on_error=False)
            except ResponseError as error:
                reply = error
            self._answers.append(reply)
            # The message's own is the last; the patterns have none.
            if len(self._answers) < len(self._checked):
                continue
            if isinstance(reply, Exception):
                raise BrokerError(
                    f"{self._server.name} does not let us hear ourselves:"
                    f" {reply}; {_RIGHTS}"
                )
            self._replies = self._answers[:-1]

    def _heard(self, replies: list[Any]) -> None:
        """Compare the heads: all that was told of before has come."""
        self._server.give_back(self._beats)
        self._beats = None
        patterns, *named = self._checked
        # Nobody can say which channels it would have brought.
        lost = [check.watch.name for check in patterns if check.is_doubtful]
        refusals = []
        for checks, reply in zip(named, replies, strict=True):
            if isinstance(reply, list) and len(reply) == len(checks):
                for check, head in zip(checks, reply, strict=True):
                    check.watch.is_apart = False
                    lost += self._compared(check, head)
            elif not _OF_NAME.search(str(reply)):
                refusals.append(reply)
                for check in checks:
                    lost += self._compared(check, None)
            elif len(checks) > 1:
                self._look_again(checks)
            else:
                self._deny(checks[0].watch, str(reply))
        self._checked = []
        self._replies = None
        self._sent_at = None
        self._has_beaten = True
        self._is_down = False
        self._server.judge("connect")
        self._server.judge("listen")
        for reply in refusals[:1]:
            reason = f"{self._server.name} tells no heads: {reply}; {_RIGHTS}"
            self._server.judge("heads", reason)
        if named and not refusals:
            self._server.judge("heads")
        spoilt, self._spoilt = self._spoilt, {}
        lost = [*dict.fromkeys([*lost, *spoilt])]
        sink = self._process.sink
        if lost and sink is not None:
            sink.resync(lost)

    def _compared(self, check: _Check, reply: Any) -> list[str]:
        """Compare a head; return the name if something may be lost."""
        watch, last, is_doubtful = check
        head = reply.decode(errors="replace") if isinstance(reply, bytes) else None
        # What has come meanwhile names what it follows.
        if watch.last != last:
            return []
        watch.last = head
        if is_doubtful if last is None or head is None else head != last:
            return [watch.name]
        return []

    def _look_again(self, checks: list[_Check]) -> None:
        """Have each of them asked for by itself: the server has refused one."""
        with self._lock:
            for watch, _, is_doubtful in checks:
                watch.is_apart = True
                watch.is_doubtful = watch.is_doubtful or is_doubtful
                self._doubtful.append(watch)
