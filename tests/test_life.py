"""The life of a stream on every server: hang-up, keepalive, time-outs, ends.

Done by real clients on real servers; the table *servers × guarantees* of the README
is made from this file, too.
"""

import socket
import socketserver
import struct
import threading
import time

import pytest

from live import SERVERS, TIMEOUT, LiveServer, await_true, unique_key
from syncstream.protocol.sse import Decoder

GEVENT = ("gunicorn-gevent", "pywsgi")
LEAVES = ("FIN", "RST", "bytes, FIN")
WAITS = ("sleep", "queue", "event", "condition", "linked")


@pytest.fixture(scope="module", params=SERVERS)
def server(request):
    """Each server in turn."""
    with LiveServer(request.param, "apps.life:app") as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


@pytest.fixture(scope="module")
def upstream():
    """A server that sends one line, and then nothing."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.wfile.write(b"8\r\nwaiting\n\r\n")
            self.rfile.read()  # until the other side has gone

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def leave(client, how):
    """Leave as clients do; return when."""
    if how == "RST":
        linger = struct.pack("ii", 1, 0)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    elif how == "bytes, FIN":
        client.send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    now = time.monotonic()
    client.socket.close()
    return now


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("wait", [*WAITS, "time.sleep"])
def test_a_client_that_leaves_ends_a_wait(server, wait, how, key, upstream):
    """At once, in the generator's own thread or greenlet, `finally` and all."""
    if wait == "time.sleep" and server.kind not in GEVENT:
        return  # a thread cannot be interrupted there: see the README
    with server.get(f"/sse/{wait}?key={key}&upstream={upstream}") as client:
        assert client.block() == b": ok\n\n"
        assert client.block() == b"data: waiting\n\n"
        if wait != "linked":
            server.control.next(f"{key}-waiting")
        left = leave(client, how)
        at, error, same = server.control.next(f"{key}-ended")
    assert same
    if wait != "linked":
        assert error == "ClientDisconnected"
    assert at - left < 5  # benchmarks/leave.py has the figures
    assert server.tracebacks() == 0


def test_a_generator_that_swallows_its_end_is_closed(server, key):
    """What it yields then is dropped; it does not go on."""
    with server.get(f"/sse/stubborn?key={key}") as client:
        assert client.block() + client.block() == b": ok\n\ndata: waiting\n\n"
        server.control.next(f"{key}-started")
        leave(client, "FIN")
        _, error, same = server.control.next(f"{key}-ended")
    assert same
    assert error == "GeneratorExit"  # at the yield in its except
    assert server.control.pending(f"{key}-went-on") == []


def keepalives(client, seconds):
    """Return when keepalives came in so many seconds, from the first byte on."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if client.block() == b": keepalive\n\n":
            times.append(time.monotonic())
    return times


@pytest.mark.parametrize("app", ["app", "wrapped"])
@pytest.mark.parametrize("kind", SERVERS)
def test_silence_is_broken(kind, app, key, record_property):
    """A keepalive every 0.2 s while the generator blocks in a plain time.sleep."""
    if kind == "uwsgi":
        record_property("cell", "between yields")
        return
    with (
        LiveServer(kind, f"apps.life:{app}") as server,
        server.get(f"/sse/busy?key={key}&keepalive=0.2") as client,
    ):
        assert client.block() + client.block() == b": ok\n\ndata: waiting\n\n"
        blocks = []
        while not blocks or blocks[-1] != b"data: woken\n\n":
            blocks.append(client.block())
    assert set(blocks[:-1]) == {b": keepalive\n\n"}
    assert 3 <= len(blocks[:-1]) <= 6


@pytest.mark.parametrize("path", ["/sse/pieces", "/hand/pieces"])
@pytest.mark.parametrize("kind", SERVERS)
def test_keepalives_corrupt_no_event(kind, path, key):
    """1,000 events, two thirds of them in pieces, among keepalives every ms."""
    app = "wrapped" if path == "/hand/pieces" else "app"
    with (
        LiveServer(kind, f"apps.life:{app}", env={"KEEPALIVE": "0.001"}) as server,
        server.get(f"{path}?key={key}&n=1000&keepalive=0.001&end=reconnect") as client,
    ):
        body = client.rest()
        assert client.is_whole or kind == "uwsgi"  # it never marks an end
        assert server.tracebacks() == 0
    decoder = Decoder()
    events = decoder.feed(body)
    decoder.close()
    assert [(event.id, event.data) for event in events] == [
        (str(n), f"event {n}") for n in range(1000)
    ]
    comments = body.count(b": keepalive\n\n")
    assert comments == 0 if kind == "uwsgi" else comments > 20
