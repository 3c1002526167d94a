"""`EventSource` against a hub on a real server, through whatever can go wrong.

Between them stands a server that passes the answers on, and breaks them as a row of the
table says. Each event comes once and in order, without a reset.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from syncstream import Hub
from syncstream.client import EventSource
from tests.support.live import LiveServer, unique_key
from tests.support.raw_server import RawServer, Request, answer

pytestmark = [pytest.mark.timeout(60), pytest.mark.matrix]

FAST = (0.005, 0.02)
COUNT = 200


@pytest.fixture(scope="module")
def hub_url(tmp_path_factory: Any) -> str:
    return f"local:{tmp_path_factory.mktemp('hub') / 'log'}"


@pytest.fixture(scope="module")
def hub(hub_url: str) -> Iterator[Hub]:
    with closing(Hub(hub_url)) as hub:
        yield hub


@pytest.fixture(scope="module")
def server(hub_url: str) -> Iterator[LiveServer]:
    with LiveServer(
        "gunicorn-gthread",
        "tests.apps.broker_app:wrapped",
        *("--threads", "40"),
        env={"HUB_URL": hub_url},
        ready="GET /state",
    ) as server:
        yield server


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Way:
    """Passes a server's answers on, and breaks each in a way of its own.

    Args:
        port: The server's.
        fate: Called with a request's number; returns bytes to answer with, or how to
            pass the server's answer on: so many bytes of it (``None`` for all), so many
            seconds, and what is done with the client's socket then.
    """

    def __init__(self, port: int, fate: Callable[[int], Any]) -> None:
        self._port = port
        self._fate = fate

    def __call__(self, request: Request, sock: socket.socket) -> None:
        fate = self._fate(request.number)
        if isinstance(fate, bytes):
            sock.sendall(fate)
            return
        size, seconds, end = fate
        with socket.create_connection(("127.0.0.1", self._port), 10) as upstream:
            lines = [f"{name}: {value}" for name, value in request.headers.items()]
            head = [f"{request.method} {request.path} HTTP/1.1", *lines, "", ""]
            upstream.sendall("\r\n".join(head).encode("latin-1"))
            self._pass_on(upstream, sock, size, time.monotonic() + seconds)
        end(sock)

    def _pass_on(self, upstream: Any, sock: Any, size: Any, deadline: float) -> None:
        left = 1 << 60 if size is None else size
        while left and (remaining := deadline - time.monotonic()) > 0:
            upstream.settimeout(remaining)
            try:
                data = upstream.recv(min(left, 65536))
            except TimeoutError:
                return
            if not data:
                return
            sock.sendall(data)
            left -= len(data)


def wait_for_end(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.recv(1)


LONG = 1000.0  # seconds: no limit
dice = random.Random(5)
CUTS = [dice.randrange(1, 1500) for _ in range(400)]
FATES: dict[str, Callable[[int], Any]] = {
    "nothing": lambda number: (None, LONG, socket.socket.close),
    "ends at any byte": lambda number: (CUTS[number], LONG, socket.socket.close),
    "resets at any byte": lambda number: (CUTS[-number], LONG, reset),
    "stalls at any byte": lambda number: (
        (CUTS[number], LONG, wait_for_end)
        if number < 4
        else (None, LONG, socket.socket.close)
    ),
    "a storm of 500": lambda number: (
        (600, LONG, reset) if number % 8 == 0 else answer(500 + number % 5)
    ),
    "no answer at all": lambda number: (1000, LONG, reset) if number % 3 == 0 else b"",
    "cut now and then": lambda number: (None, 0.05, socket.socket.close),
}


class Publisher(threading.Thread):
    """Publishes numbers, with pauses, while a test reads."""

    def __init__(self, hub: Hub, channel: str, at: dict[int, Callable[[], Any]]):
        super().__init__(daemon=True)
        self._hub, self._channel, self._at = hub, channel, at

    def run(self) -> None:
        for number in range(COUNT):
            self._hub.publish(self._channel, number)
            self._at.get(number, lambda: None)()
            if number % 10 == 9:
                time.sleep(0.01)


def read_all(url: str, publisher: Publisher, **options: Any) -> list[Any]:
    """Return the events' data and names up to the last one, and a moment more."""
    seen: list[Any] = []
    with EventSource(url, backoff=FAST, **options) as source:
        publisher.start()
        for event in source:
            seen.append(event.data if event.event is None else event)
            if event.data == str(COUNT - 1):
                break
    publisher.join()
    return seen


@pytest.mark.parametrize("fate", FATES)
def test_no_event_is_lost_or_doubled(hub, server, fate):
    """Whatever the way does."""
    channel = unique_key()
    with RawServer(Way(server.port, FATES[fate])) as way:
        url = f"{way.url}sse/{channel}?after=start"
        publisher = Publisher(hub, channel, {})
        seen = read_all(url, publisher, read_timeout=0.3 if "stalls" in fate else 10)
        assert (len(way.requests) == 1) == (fate == "nothing")
    assert seen == [str(number) for number in range(COUNT)]


def test_restarts_of_the_server(hub, server):
    """They lose nothing."""

    def restart() -> None:
        server.stop()
        server.start(server.port)

    channel = unique_key()
    publisher = Publisher(hub, channel, {COUNT // 2: restart})
    url = f"{server.url}/sse/{channel}?after=start"
    errors: list[Any] = []
    seen = read_all(url, publisher, on_error=errors.append)
    assert seen == [str(number) for number in range(COUNT)]
    assert errors


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_redirects_to_another_host(status, method):
    """As fetch does: the id goes along, a body with 307 and 308, no authorization.

    (HTML standard §9.2.3: the request is fetched, with its redirects, each time anew.)
    """
    body = b"data: a\nid: 1\n\n"
    with RawServer([answer(body=body), answer(204, kind="")]) as other:
        place = other.url.replace("127.0.0.1", "localhost") + "there"
        with RawServer([answer(status, kind="", Location=place)]) as first:
            options = {"data": b"body", "method": "POST"} if method == "POST" else {}
            headers = {"Authorization": "Bearer secret", "X-A": "1"}
            with EventSource(
                first.url, backoff=FAST, headers=headers, **options
            ) as source:
                assert [(event.data, event.id) for event in source] == [("a", "1")]
    keeps = method == "GET" or status in (307, 308)
    for request in other.requests:
        assert request.path == "/there"
        assert request.method == (method if keeps else "GET")
        assert request.body == (b"body" if method == "POST" and keeps else b"")
        assert request.headers["accept"] == "text/event-stream"
        assert request.headers["x-a"] == "1"
        assert "authorization" not in request.headers
    for requests in (first.requests, other.requests):
        ids = [request.headers.get("last-event-id") for request in requests]
        assert ids == [None, "1"]
