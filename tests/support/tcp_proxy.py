"""A TCP proxy that can be cut, or go silent, between a client and a server: `Proxy`."""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress


class Proxy:
    """Passes bytes on to a port of this machine.

    Args:
        target: The port; it may be set to another one, for new connections.

    Attributes:
        is_silent: Nothing is passed on, either way: a black hole. New connections
            are accepted, as by a kernel that still runs.
        is_deaf: What servers answer is lost.
        is_refusing: New connections are reset.
        heard: So many bytes have come from clients.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.is_silent = self.is_deaf = self.is_refusing = False
        self.heard = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        self._peers: dict[socket.socket, socket.socket] = {}
        self._servers: set[socket.socket] = set()
        self._forgotten: set[socket.socket] = set()
        self._lock = threading.RLock()
        self._waker, self._woken = socket.socketpair()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> int:
        """Reset all connections; return how many there were."""
        with self._lock:
            count = len(self._servers)
            for sock in list(self._peers):
                self._drop(sock)
        self._wake()
        return count

    def forget(self) -> int:
        """Pass nothing on any more over the connections that there are, silently.

        Returns:
            How many there are.
        """
        with self._lock:
            count = len(self._servers - self._forgotten)
            self._forgotten |= set(self._peers)
        self._wake()
        return count

    def _drop(self, sock: socket.socket) -> None:
        for one in (sock, self._peers.pop(sock, None)):
            if one is not None:
                self._peers.pop(one, None)
                self._servers.discard(one)
                self._forgotten.discard(one)
                with suppress(OSError):
                    linger = struct.pack("ii", 1, 0)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                one.close()

    def _wake(self) -> None:
        with suppress(OSError):
            self._waker.send(b"\0")

    def _run(self) -> None:
        while not self._is_closed:
            with self._lock:
                socks = [] if self.is_silent else list(self._peers)
                socks = [sock for sock in socks if sock not in self._forgotten]
            try:
                ready, _, _ = select.select(
                    [self._listener, self._woken, *socks], [], [], 0.05
                )
            except (OSError, ValueError):  # one was cut meanwhile
                continue
            with self._lock:
                for sock in ready:
                    if sock is self._woken:
                        self._woken.recv(100)
                    elif sock is self._listener:
                        self._accept()
                    elif sock in self._peers and not self.is_silent:
                        self._pass_on(sock)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server: socket.socket | None = None
        if not self.is_refusing:
            with suppress(OSError):
                server = socket.create_connection(("127.0.0.1", self.target), 5)
        if server is None:
            self._peers[client] = client
            self._drop(client)
            return
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[client], self._peers[server] = server, client
        self._servers.add(server)

    def _pass_on(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(1 << 16)
            if data and sock in self._servers and self.is_deaf:
                return
            if data:
                self.heard += 0 if sock in self._servers else len(data)
                self._peers[sock].sendall(data)
                return
        except OSError:
            pass
        self._drop(sock)

    def close(self) -> None:
        self._is_closed = True
        self._wake()
        self._thread.join()
        self.cut()
        for sock in (self._listener, self._waker, self._woken):
            sock.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
