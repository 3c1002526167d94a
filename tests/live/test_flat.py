"""What clients make up takes no memory for longer than they are there."""

import ast
import itertools
import socket

import pytest

from tests.support.live import Client, LiveServer
from tests.support.waits import TIMEOUT, await_true

WARM, MORE, ROUNDS = 400, 600, 6


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """gunicorn on a Unix socket, where SERVER_NAME is what the client says."""
    path = tmp_path_factory.mktemp("flat") / "socket"
    bind = ("-b", f"unix:{path}")
    with LiveServer("gunicorn-gthread", "tests.apps.flat_app:wrapped", *bind) as server:
        server.path = str(path)
        yield server


def come(server, n):
    """Be a client like no other: all that it sends is its own."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    sock.connect(server.path)
    kind = ("sub", "gen", "hand")[n % 3]
    target = f"/{kind}/path-{n}?channel=channel-{n}&query{n}={n}"
    with Client(sock) as client:
        headers = {"Last-Event-ID": f"{n:x}-{n:x}", "Host": f"host-{n}:{n}"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        client.send(f"GET {target} HTTP/1.1\r\n{lines}\r\n")
        assert b": ok" in client.block()
        # A channel's events are kept on purpose: there are none.
        assert kind == "sub" or client.block()


def entries(server):
    """Return how many entries there are, when the streams have ended."""

    def look():
        with server.get("/entries", headers={"Connection": "close"}) as client:
            return ast.literal_eval(client.rest().decode())

    await_true(lambda: look()[1] == 0)
    return min(look()[0] for _ in range(3))


def test_hosts_paths_channels_ids_and_queries(server):
    """After some hundred clients, each of its own kind, hundreds more add nothing.

    An entry kept for each client of one kind is MORE / 3 a round. What is bounded, like
    the threads that are started when many clients come at once, grows in some rounds
    only.
    """
    numbers = itertools.count()
    for n in itertools.islice(numbers, WARM):
        come(server, n)
    before, grown = entries(server), []
    for _ in range(ROUNDS):
        for n in itertools.islice(numbers, MORE):
            come(server, n)
        grown.append(entries(server) - before)
        if grown[-1] / len(grown) < MORE / 4:
            return
    pytest.fail(f"grown to {grown}")
