"""The thread or greenlet that listens for new events and reports them to the hub."""

from __future__ import annotations

import _socket
import logging
import select
import sys
import threading
from contextlib import suppress
from typing import Any

from redis.exceptions import NoPermissionError, RedisError

from ...errors import BrokerError, Unavailable
from ...runtime.clock import time
from ...runtime.journal import report
from ...runtime.waiting import say, sleep
from ..health import Health
from ..log import Entry
from ..names import matches
from ..tail import Stopped, Tail
from .beats import KEYS, Beats, Compared
from .scripts import ID_BYTES
from .server import RIGHTS, Server, is_at_home, is_patched, main_hub, socket_of
from .watches import Command, Watch, Watches

__all__ = ["Listener"]

log = logging.getLogger("syncstream.brokers.redis")
_AT_ONCE = 64  # messages taken before others may run


class Listener:
    """The listener to one server in one process: a thread, or a greenlet under gevent.

    It listens on one connection, which nothing else uses; `Beats` show that the
    connection lives and that nothing was lost.

    Args:
        ttl: Milliseconds that a key lives after its last use.
        timeout: The maximum of seconds to connect.

    Raises:
        Unavailable: No sockets can be made.
    """

    def __init__(
        self, server: Server, health: Health, *, ttl: bytes, timeout: float
    ) -> None:
        self._server = server
        self._health = health
        self._timeout = timeout
        self._watches = Watches(server)
        self._beats = Beats(server, self._watches, ttl)
        self._own = self._beats.own
        self._tail = Tail(server.name, health, log, server=server.name)
        # Native: gevent's sockets would wait in the hub of the creating thread.
        try:
            self._waker, self._woken = _socket.socketpair()
        except OSError as error:  # too many are open
            raise Unavailable(f"redis: cannot listen: {error}") from error
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._is_woken = False
        self._is_closed = False
        self._connection: Any = None
        self._has_more = False
        self._told: tuple[bytes, bytes] | None = None
        # Channels that the sink must read: it is told after the next beat.
        self._lost: dict[str, None] = {}
        self._has_warned = False

    # From any thread.

    def start(self) -> None:
        """Begin, in a thread or greenlet.

        Raises:
            Unavailable: No thread can be started.
        """
        if not is_patched():
            run, name = self._tail.run, "syncstream-redis"
            thread = threading.Thread(target=run, args=(self,), name=name, daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                self._waker.close()
                self._woken.close()
                raise Unavailable(f"redis: cannot start a thread: {error}") from error
            return
        # No patched thread: it is a greenlet, which a forked child would inherit,
        # without the thread that ends it. Always in the main thread's hub: other hubs
        # run only while something waits in them.
        home = sys.modules["gevent"].get_hub() if is_at_home() else main_hub()
        spawn = sys.modules["gevent"].spawn
        home.loop.run_callback_threadsafe(spawn, self._tail.run, self)

    def abandon(self) -> None:
        """Leave the connection to the parent, in a forked child."""
        self._is_closed = True
        self._watches.abandon()

    def stop(self) -> None:
        self._is_closed = True
        self._wake()

    def join(self, deadline: float) -> None:
        if not self._tail.await_end(deadline):
            text = (
                "the listener of %s did not end in time: its connection may stay open"
            )
            report(log, logging.WARNING, text, self._server.name)

    def watched(self) -> list[str]:
        return self._watches.names()

    def watch(self, name: str, timeout: float) -> None:
        """Have a name announced; wait until it is, or for ``timeout`` seconds.

        Raises:
            Denied: The server denies access to it.
        """
        self._watches.watch(name, timeout, self._wake)

    def unwatch(self, name: str) -> None:
        self._watches.unwatch(name)
        self._wake()

    def _wake(self) -> None:
        # The listener clears this mark before it looks for changes: none is missed.
        if not self._is_woken:
            self._is_woken = True
            with suppress(OSError):  # it has been woken already, or is closed
                self._waker.send(b"\0")

    # Its thread.

    def listen(self) -> None:
        try:
            self._connect()
            while True:
                self._beats.go_on()
                left = 0.0 if self._has_more else self._beats.left()
                self._wait(left, [socket_of(self._connection), *self._beats.sockets])
                self._ask()
                self._take_some()
                compared = self._beats.take()
                if compared is not None:
                    self._heard(compared)
                if self._beats.are_late:
                    raise Unavailable(f"{self._server.name} is silent")
        except (RedisError, OSError) as error:
            raise Unavailable(str(error)) from error
        finally:
            self._disconnect()

    def _connect(self) -> None:
        self._connection = self._server.connect(time.monotonic() + self._timeout)
        self._send(self._watches.ask(b"SUBSCRIBE", (), [self._beats.own]))
        self._ask()
        self._beats.begin()
        self._has_more = False

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                connection.disconnect()
        finally:
            self._beats.close()

    def lose(self) -> None:
        self._watches.lose()
        self._server.forget_idle()

    def rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._wait(left, [])

    def leave(self) -> None:
        try:
            self._watches.lose()
        finally:
            self._server.close()
            self._waker.close()
            self._woken.close()

    def _wait(self, seconds: float, socks: list[Any]) -> None:
        """Wait until a socket is readable, a wake, or the time-out.

        Raises:
            Stopped: The listener has been told to end.
        """
        socks = [self._woken, *socks]
        if hasattr(select, "poll"):  # gevent's in a patched process
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
        if self._is_closed:
            raise Stopped

    def _ask(self) -> None:
        """Send the commands for changed watches."""
        for command in self._watches.commands():
            self._send(command)

    def _send(self, command: Command) -> None:
        self._connection.send_command(command.verb, *command.topics)

    def _take_some(self) -> None:
        connection = self._connection
        for _ in range(_AT_ONCE):
            if not connection.can_read(timeout=0):
                self._has_more = False
                return
            try:
                reply = connection.read_response(disconnect_on_error=False)
            except NoPermissionError as error:
                self._refused(str(error))
            else:
                self._take(reply)
        self._has_more = True
        sleep(0)

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", self._own, data]:
                self._beats.echo(data)
            case [b"message", bytes(topic), bytes(data)]:
                watch = self._watches.of_topic(topic)
                if watch is not None:
                    self._deliver(watch, watch.name, topic, data)
            case [b"pmessage", bytes(glob), bytes(topic), bytes(data)]:
                watch = self._watches.of_glob(glob)
                channel = self._server.channel(topic)
                if watch is not None and channel and matches(watch.name, channel):
                    self._deliver(None, channel, topic, data)
            case [
                b"subscribe" | b"unsubscribe" | b"psubscribe" | b"punsubscribe",
                *_,
            ] if not self._watches.is_answered:
                self._watches.acknowledged()

    def _refused(self, reason: str) -> None:
        """Handle a command that the server denies."""
        found = self._watches.refused()
        if found is None:
            raise BrokerError(f"{self._server.name} denies it: {reason}; {RIGHTS}")
        again, denied = found
        for command in again:
            self._send(command)
        for watch in denied:
            self._deny(watch, reason)

    def _deny(self, watch: Watch, reason: str) -> None:
        """Give a name up; tell its waiters and the sink."""
        reason = f"{self._server.name} denies it: {reason}; {RIGHTS}"
        sink = self._health.sink
        if self._watches.deny(watch, reason) and sink is not None:
            sink.deny(watch.name, reason)

    def _deliver(
        self, watch: Watch | None, channel: str, topic: bytes, data: bytes
    ) -> None:
        id, _, rest = data.partition(b" ")
        prev, space, payload = rest.partition(b" ")
        # A message arrives once for its channel, and once for each matching pattern.
        if space and self._told == (topic, id):
            return
        if not (space and ID_BYTES.fullmatch(id) and ID_BYTES.fullmatch(prev)):
            self._spoil(channel, "it is not an event")
            return
        self._told = topic, id
        entry = Entry(id.decode(), prev.decode(), payload, time.monotonic())
        if watch is not None:
            watch.last = entry.id
        sink = self._health.sink
        if sink is None:
            return
        try:
            sink.deliver(channel, entry)
        except Exception as error:
            self._spoil(channel, repr(error))
            return
        if not self._health.is_well:  # asked for every event
            # Another process could publish.
            self._server.works("publish", since=self._beats.fresh)

    def _spoil(self, channel: str, problem: str) -> None:
        """Drop a malformed message, and have its channel read after the next beat.

        Others may send such messages without limit, under any name that a pattern
        matches: so only some names are kept, and only the first message is logged.
        """
        if channel in self._watches or len(self._lost) < KEYS:
            self._lost[channel] = None
        if not self._has_warned:
            self._has_warned = True
            text = (
                "%s: a malformed message to %r was dropped and the channel is read"
                " instead; later ones are not logged: %s"
            )
            say(log, logging.WARNING, text, self._server.name, channel, problem)

    def _heard(self, compared: Compared) -> None:
        """Handle an arrived beat: report losses, denials and the server's health."""
        for watch, reason in compared.denied:
            self._deny(watch, reason)
        self._watches.found()
        self._tail.serves("connect", since=compared.since)
        if compared.refusal:
            reason = f"{self._server.name} denies heads: {compared.refusal}; {RIGHTS}"
            self._server.fails("heads", reason)
        elif compared.was_asked:
            self._server.works("heads", since=compared.since)
        self._lost.update(dict.fromkeys(compared.lost))
        sink = self._health.sink
        if self._lost and sink is not None:
            sink.resync([*self._lost])
        self._lost.clear()  # not if that has failed
