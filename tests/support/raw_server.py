"""A server of raw sockets, whose answers a test writes byte by byte: `RawServer`."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
)


@dataclass
class Request:
    """What a client has asked for.

    Attributes:
        number: 0 for the server's first request.
        earlier: So many requests came for the same path before.
        headers: By lower-case names.
    """

    number: int
    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    earlier: int = 0


def answer(
    status: int = 200, body: bytes = b"", kind: str = "text/event-stream", **more: str
) -> bytes:
    """Return a whole answer with a length, after which the connection is closed."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines.append("Connection: close")
    lines += [f"Content-Type: {kind}"] * bool(kind)
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class RawServer:
    """Answers each request by a function, which gets the request and the socket.

    A list of answers serves one request after the other, and the last one for all
    later ones; one that is bytes is sent, and the connection closed.

    Args:
        answers: The function, or the list.
        context: For TLS.

    Attributes:
        requests: All that were received.
        hung_up: Set once a client has left while an answer waited for that.
    """

    def __init__(
        self,
        answers: Callable[[Request, socket.socket], None] | list[bytes],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self.received = threading.Condition()
        self.hung_up = threading.Event()
        self._answers = answers
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self._socks: set[socket.socket] = set()
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http{'s' * bool(context)}://127.0.0.1:{self.port}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socks.add(sock)
        with suppress(OSError), sock:
            if self._context is not None:
                plain, sock = sock, self._context.wrap_socket(sock, server_side=True)
                self._socks.remove(plain)
                self._socks.add(sock)
            with sock, sock.makefile("rb") as file:
                request = self._read(file)
                if request is not None:
                    self._send(request, sock)
        self._socks.discard(sock)

    def _read(self, file) -> Request | None:
        first = file.readline().decode().split()
        if not first:
            return None
        request = Request(0, *first[:2])
        while line := file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            request.headers[name.lower()] = value.strip()
        request.body = file.read(int(request.headers.get("content-length", 0)))
        with self.received:
            request.number = len(self.requests)
            request.earlier = sum(r.path == request.path for r in self.requests)
            self.requests.append(request)
            self.received.notify_all()
        return request

    def _send(self, request: Request, sock: socket.socket) -> None:
        if callable(self._answers):
            self._answers(request, sock)
            return
        last = len(self._answers) - 1
        sock.sendall(self._answers[min(request.number, last)])

    def wait_for_hang_up(self, sock: socket.socket) -> None:
        """Say nothing until the client leaves."""
        with suppress(OSError):
            sock.recv(1)
        self.hung_up.set()

    def await_requests(self, count: int, timeout: float = 15) -> None:
        """Wait until so many requests have come."""
        with self.received:
            assert self.received.wait_for(
                lambda: len(self.requests) >= count, timeout
            ), f"{len(self.requests)} requests instead of {count}"

    def close(self) -> None:
        for sock in (self._listener, *self._socks):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def one_by_one(data: bytes) -> Iterable[bytes]:
    """Return each byte."""
    return (data[i : i + 1] for i in range(len(data)))
