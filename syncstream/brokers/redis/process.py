"""One process's part of a broker: its servers and their listeners."""

from __future__ import annotations

import _thread
from typing import TYPE_CHECKING

from ...runtime.clock import time
from ...runtime.sockets import native
from ..names import is_pattern
from .listener import Listener
from .server import Server

if TYPE_CHECKING:
    from .broker import RedisBroker

__all__ = ["Process"]


class Process:
    """One process's part of a broker; it keeps no reference to the broker."""

    def __init__(self, broker: RedisBroker, servers: list[Server]) -> None:
        self._health = broker.health
        self._ttl = broker.ttl
        self._timeout = broker.timeout
        self.servers = servers
        self._listeners: dict[Server, Listener] = {}
        # Native, here and in the listener: threads with different gevent hubs share it.
        self._lock = native(_thread, "allocate_lock")()
        self._is_closed = False

    def server(self, channel: str) -> Server:
        """Return the server of a channel, which is the same in all processes."""
        if len(self.servers) == 1:
            return self.servers[0]
        return max(self.servers, key=lambda server: server.weight(channel))

    def watch(self, name: str, timeout: float) -> None:
        """Have a name announced; wait until it is, or for ``timeout`` seconds.

        Raises:
            Unavailable: A listener cannot begin.
            Denied: A server denies access to it.
        """
        deadline = time.monotonic() + timeout
        for server in self.servers if is_pattern(name) else [self.server(name)]:
            listener = self._listener(server)
            if listener is not None:
                listener.watch(name, max(0.0, deadline - time.monotonic()))

    def unwatch(self, name: str) -> None:
        for server in self.servers if is_pattern(name) else [self.server(name)]:
            listener = self._listeners.get(server)
            if listener is not None:
                listener.unwatch(name)

    def _listener(self, server: Server) -> Listener | None:
        """Return the listener of a server, ``None`` if the broker is closed."""
        with self._lock:
            if self._is_closed:
                return None
            listener = self._listeners.get(server)
            if listener is None:
                listener = Listener(
                    server, self._health, ttl=self._ttl, timeout=self._timeout
                )
                listener.start()
                self._listeners[server] = listener
            return listener

    def abandon(self) -> list[str]:
        """Leave all connections to the parent; return the watched names."""
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
        for listener in listeners if timeout else ():
            listener.join(deadline)
        for server in self.servers:
            server.close()

    def let_go(self) -> None:
        """End the listeners without waiting, because the broker was dropped.

        From any thread, at any moment: it takes no lock.
        """
        self._is_closed = True
        listeners = [*self._listeners.values()]
        for listener in listeners:
            listener.stop()
        for server in self.servers:
            server.close()
