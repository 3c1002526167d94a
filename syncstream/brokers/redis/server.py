"""One Redis server: connections, access rights, Sentinels."""

from __future__ import annotations

import _thread
import gc
import hashlib
import re
import secrets
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from ...errors import Denied, Unavailable, Uncertain
from ...runtime.clock import time
from ...runtime.sockets import native
from ..health import Health
from .scripts import PUBLISH, READ, Script

__all__ = [
    "OF_NAME",
    "RIGHTS",
    "Server",
    "is_at_home",
    "is_patched",
    "main_hub",
    "options_of",
    "seconds_of",
    "socket_of",
]

TIMEOUT = 2.0  # seconds for a request, unless the URL has ``publish_timeout``
CONNECTIONS = 32  # of one process to one server, unless the URL has ``max_connections``
FRESH = 3.0  # seconds after its use for which a connection is trusted without a PING
IDLE = 30.0  # seconds after which an unused connection is closed
# A vanished peer is probed after 30 s and abandoned 30 s later.
_ALIVE = {
    getattr(socket, name): seconds
    for name, seconds in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
    )
    if hasattr(socket, name)
}
_GLOB = re.compile(rb"([\\?*\[\]])")
# Errors of ACLs (Redis 6.2 to 8): about one key or channel, and all of them.
OF_NAME = re.compile(r"access (a|(at least )?one of the) (key|channel)|to the channel")
_OF_RIGHTS = re.compile(
    r"(?i)no permission|NOPERM|The user executing the script can't|ACL failure"
)
RIGHTS = "docs/brokers.md lists the rights that a user needs"


def seconds_of(name: str, query: dict[str, str]) -> float:
    text = query.pop(name, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{name} must be seconds above 0")
    return seconds


def options_of(scheme: str) -> set[str]:
    """Return the options that a URL may have: ours and redis-py's."""
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


class Server:
    """One server, as one process uses it: names, and connections for requests.

    It uses redis-py's connections, not its clients: a client repeats unanswered
    commands, ten times by default, which would store an event twice (measured, 8.1).

    Attributes:
        name: For errors, and for the choice of a channel's server among several: with
            another spelling of the address, channels live on other servers.
        turns: Permits for requests: the maximum at once.
    """

    def __init__(self, url: str, timeout: float, prefix: str, health: Health) -> None:
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
        self.marks = f"{prefix}empty".encode()  # the key of empty channels' marks
        # Keys belong to a database, but Pub/Sub spans the whole server.
        self._topic = f"{prefix}{database}:{{" if database else self._key
        self._topic_bytes = self._topic.encode()
        self._name = self.name.encode()
        self._health = health
        self._idle: deque[_Idle] = deque()  # the most recently used one last
        self._home: Any = None  # the gevent hub in which those wait
        self._is_closed = False
        self.turns = threading.BoundedSemaphore(most)
        self._class(**self._options)

    def weight(self, channel: str) -> bytes:
        """Return this server's weight for a channel (rendezvous hashing)."""
        text = self._name + b"\0" + channel.encode()
        return hashlib.blake2b(text, digest_size=8).digest()

    def key(self, channel: str) -> bytes:
        return f"{self._key}{channel}}}".encode()

    def topic(self, channel: str) -> bytes:
        """Return the Pub/Sub channel of a channel."""
        return f"{self._topic}{channel}}}".encode()

    def glob(self, pattern: str) -> bytes:
        """Return a pattern's glob, which is unique to it, and may match more."""
        prefix, _, last = pattern.rpartition(":")
        text = _GLOB.sub(rb"\\\1", f"{self._topic}{prefix}".encode())
        if last == "*":
            return text + (b":*}" if prefix else b"*}")
        return text + (b"[:}]*" if prefix else b"?*}")

    def channel(self, topic: bytes) -> str:
        """Return the channel of a topic, ``""`` for a foreign topic."""
        if not topic.startswith(self._topic_bytes) or not topic.endswith(b"}"):
            return ""
        return topic[len(self._topic_bytes) : -1].decode(errors="replace")

    def own(self) -> bytes:
        """Return the name of a new Pub/Sub channel for this process only."""
        return f"{self._topic[:-1]}ctl:{secrets.randbits(64):x}".encode()

    # Health.

    def moment(self) -> int:
        return self._health.moment()

    def fails(self, way: str, reason: str) -> None:
        """Record that a way has failed, see `Health.fails`.

        Args:
            way: "listen"; "connect" for requests; "publish", "read" and "heads" for
                commands that the server denies for all channels.
            reason: The cause, for the log.
        """
        self._health.fails(way, reason, server=self.name)

    def works(self, *ways: str, since: int) -> None:
        self._health.works(*ways, since=since, server=self.name)

    # Requests.

    def publish(self, calls: Sequence[tuple[bytes, ...]], deadline: float) -> list[str]:
        """Run the script for each call; return the ids."""
        began = self._health.moment()
        try:
            replies = self._run_script(PUBLISH, calls, deadline)
        except Uncertain as error:
            self.fails("connect", str(error))
            raise
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if not refused:
            self.works("publish", since=began)
            return [id.decode() for id in replies]
        refusal = self._refusal("publish", refused[0])
        if len(refused) < len(replies) or str(refused[0]).startswith("STORED"):
            raise Uncertain(str(refusal))
        raise refusal

    def _refusal(self, way: str, reply: Exception) -> Unavailable:
        """Return the error to raise; record a failure if it concerns all channels."""
        reason = f"{self.name} denies it: {reply}"
        if _OF_RIGHTS.search(str(reply)):
            reason = f"{reason}; {RIGHTS}"
            # A user without the right to publish may still subscribe: not a failure.
            if way == "publish" or OF_NAME.search(str(reply)):
                return Denied(reason)
        if "WRONGTYPE" not in str(reply):
            self.fails(way, reason)
        return Unavailable(reason)

    def read(
        self, call: tuple[bytes, ...], deadline: float, script: Script = READ
    ) -> Any:
        """Run a script that reads, and again if the connection is lost meanwhile."""
        for is_last in (False, True):
            began = self._health.moment()
            try:
                (reply,) = self._run_script(script, [call], deadline)
            except Uncertain as error:
                if is_last or time.monotonic() >= deadline:
                    self.fails("connect", str(error))
                    raise Unavailable(str(error)) from error
                continue
            if isinstance(reply, Exception):
                raise self._refusal("read", reply)
            self.works("read", since=began)
            return reply
        raise AssertionError

    def _run_script(
        self, script: Script, calls: Sequence[tuple[bytes, ...]], deadline: float
    ) -> list[Any]:
        """Run a script for each call, in order; return the replies, errors included."""
        named = [(b"EVALSHA", script.sha, b"2", *call) for call in calls]
        in_full = (b"EVAL", script.text, b"2", *calls[0])
        if len(calls) > 1:
            # The first call loads the script. Otherwise some calls could fail without
            # it, and later ones succeed after another client has loaded it.
            return self._ask([in_full, *named[1:]], deadline)
        replies = self._ask(named, deadline)
        if isinstance(replies[0], NoScriptError):
            return self._ask([in_full], deadline)
        return replies

    def _ask(self, commands: list[Any], deadline: float) -> list[Any]:
        """Send commands; return their replies, errors included.

        Raises:
            Unavailable: They were not sent.
            Uncertain: They were sent, but a reply is missing.
        """
        # Only at home: gevent hubs cannot wait for each other, and other hubs have few
        # greenlets that use Redis.
        is_home = is_at_home()
        began = self._health.moment()
        left = max(0.0, deadline - time.monotonic())
        if is_home and not self.turns.acquire(timeout=left):
            raise Unavailable(
                f"all connections to {self.name} are in use: raise max_connections"
            )
        try:
            try:
                connection = self.take(deadline)
            except Unavailable as error:
                self.fails("connect", str(error))
                raise
            try:
                self._send(connection, commands, deadline)
                replies = [self._reply(connection, deadline) for _ in commands]
            except BaseException:
                connection.disconnect()
                raise
            self.works("connect", since=began)
            if any("read only" in str(r) for r in replies if isinstance(r, Exception)):
                # The server is a replica now: its name may lead to the new master.
                connection.disconnect()
                if is_at_home():
                    self.forget_idle()
            else:
                self.give_back(connection)
            return replies
        finally:
            if is_home:
                self.turns.release()

    def give_back(self, connection: Any) -> None:
        # A connection made just before a deadline has a short time-out: drop it.
        if not is_at_home() or connection.socket_timeout < self._timeout / 4:
            connection.disconnect()
            return
        self._home = sys.modules["gevent"].get_hub() if is_patched() else None
        self._idle.append(_Idle(connection, time.monotonic()))
        self.forget_idle(0 if self._is_closed else IDLE)

    def take(self, deadline: float) -> Any:
        """Return a connection that is known to be alive."""
        while self._idle and is_at_home():
            self.forget_idle(IDLE)
            try:
                idle = self._idle.pop()
            except IndexError:  # another thread took it, or it was too old
                break
            if _is_living(idle, deadline):
                return idle.connection
            idle.connection.disconnect()
            # The others are as old, and there is no time to test each.
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
            # Two waits: to connect, and for the answer to the first commands.
            left = max(0.001, deadline - time.monotonic()) / 2
            connection = self._class(**options)
            # Not as options: redis-py 5.0 ignores one of them for Unix sockets.
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
            # For sending only: redis-py sets it anew for each wait for an answer.
            socket_of(connection).settimeout(max(0.001, deadline - time.monotonic()))
            connection.send_packed_command(packed, check_health=False)
        except (RedisError, OSError) as error:
            reason = f"the connection to {self.name} was lost: {error}"
            # The server ignores a single command that was not sent completely.
            kind = Unavailable if len(commands) == 1 else Uncertain
            raise kind(reason) from error

    def _reply(self, connection: Any, deadline: float) -> Any:
        try:
            left = max(0.0, deadline - time.monotonic())
            if not connection.can_read(timeout=left):
                raise Uncertain(f"no answer from {self.name}")
            # Keep the connection after LOADING: more replies may follow.
            return connection.read_response(disconnect_on_error=False)
        except (ResponseError, BusyLoadingError, AuthenticationError) as error:
            # Without the traceback, which would keep all callers' frames.
            return error.with_traceback(None)
        except (RedisError, OSError) as error:
            raise Uncertain(f"no answer from {self.name}: {error}") from error

    def forget_idle(self, seconds: float = 0) -> None:
        """Close the connections that have not been used for this many seconds.

        With 0 even those just used, which may lead to a server that is gone.
        """
        since = time.monotonic() - seconds
        while self._idle:
            try:
                idle = self._idle.popleft()
            except IndexError:  # another thread took it
                return
            if idle.since > since:
                self._idle.appendleft(idle)
                return
            idle.connection.disconnect()

    def close(self) -> None:
        """Close the idle connections; from any thread."""
        self._is_closed = True
        if is_at_home():
            self.forget_idle()
        elif self._home is not None and self._home.loop is not None:
            self._home.loop.run_callback_threadsafe(self.forget_idle)


class _Idle(NamedTuple):
    """A connection that is not in use.

    Attributes:
        since: The `time.monotonic` of its last use.
    """

    connection: Any
    since: float


def socket_of(connection: Any) -> Any:
    """Return a connection's socket, for which redis-py has no public name."""
    return connection._sock


def is_patched() -> bool:
    """Tell whether sockets are gevent's, each of which belongs to one hub."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def is_at_home() -> bool:
    """Tell whether this thread may use and close the kept connections.

    Under gevent they belong to the main thread. (Asking for the thread's hub would
    create one.)
    """
    here = native(_thread, "get_ident")()
    return not is_patched() or here == sys.modules["gevent.hub"].MAIN_THREAD_IDENT


def main_hub() -> Any:
    """Return the main thread's hub from another thread; gevent has no function for it.

    Raises:
        RuntimeError: The main thread has no hub yet.
    """
    for one in gc.get_objects():  # as `gevent.util.GreenletTree` looks for greenlets
        if issubclass(type(one), sys.modules["gevent"].hub.Hub) and one.main_hub:
            return one
    raise RuntimeError(
        "the main thread has no gevent hub, in which the listener must run: publish or"
        " subscribe in the main thread first"
    )


def _is_living(idle: _Idle, deadline: float) -> bool:
    """Tell whether a connection can be trusted with an event."""
    connection = idle.connection
    try:
        # A connection that the server has closed is readable, too.
        if connection.can_read(timeout=0):
            return False
        now = time.monotonic()
        if now - idle.since < FRESH:
            return True
        # A firewall may have forgotten it silently; a lost PING does no harm. Half of
        # the time is left for a new connection.
        packed = connection.pack_commands([(b"PING",)])
        connection.send_packed_command(packed, check_health=False)
        if not connection.can_read(timeout=max(0.0, deadline - now) / 2):
            return False
        # Without closing it after LOADING.
        connection.read_response(disconnect_on_error=False)
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
    # By default redis-py before 6 accepts the certificate of any host, and 6 fails to
    # connect if certificates are not checked.
    if url.startswith("rediss:"):
        is_checked = given.get("ssl_cert_reqs") != "none"
        given.setdefault("ssl_check_hostname", is_checked)
    return given


class _Service:
    """A service whose master the Sentinels name.

    Args:
        name: The service's name, as the Sentinels know it.
        addresses: The host and port of each Sentinel.
        options: The options of connections to them.
    """

    def __init__(
        self, name: str, addresses: list[tuple[str, int]], options: dict[str, Any]
    ) -> None:
        self._name = name
        self._addresses = addresses
        self._options = options

    def master(self, deadline: float) -> tuple[str, int]:
        """Return the master's host and port from the first Sentinel that answers.

        Each call opens its own connections: until the next call a firewall could have
        forgotten them, and that call may come from another gevent hub.

        Raises:
            RedisError: No Sentinel has named it.
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
                # Its message quotes the connection, in redis-py 6 and 7 with password.
                continue
            except (RedisError, OSError):
                if place == len(known) - 1:
                    raise
            else:
                # Ask the one that has answered first from now on.
                rest = [other for other in known if other != address]
                self._addresses = [address, *rest]
                return found
            finally:
                for client in sentinel.sentinels:
                    client.close()
        raise RedisError(f"no Sentinel knows a master of the service {self._name!r}")


def _of_sentinel(
    url: str, options: dict[str, Any]
) -> tuple[dict[str, Any], str, _Service]:
    """Return the options of connections to the master, a name, and the service.

    redis-py has no URLs for Sentinels.
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
