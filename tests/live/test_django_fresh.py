"""Django on a worker that has just begun: nothing of a stream may hang on a request
before it."""

import ast
import contextlib
import signal
import time

import pytest

from tests.support.live import LiveServer, unique_key
from tests.support.waits import await_true

KINDS = ("gunicorn-sync", "gunicorn-gthread", "gunicorn-gevent")
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


def serve(kind, app="app", graceful="30"):
    options = ("--graceful-timeout", graceful)
    target = f"tests.apps.fresh_django:{app}"
    return LiveServer(kind, target, *options, ready="GET /ready")


def stats(server):
    with server.get("/stats", headers={"Connection": "close"}) as client:
        return ast.literal_eval(client.rest().decode())


def await_ended(server, key):
    return server.control.next(f"{key}-ended")


@pytest.mark.parametrize("app", ["app", "wrapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_request_is_a_stream_whose_client_leaves(kind, app):
    """It is closed at once; the next ones, behind a middleware of Django's, too."""
    with serve(kind, app) as server:
        for query in ("", "&rewrap", "&anew"):
            key = unique_key()
            resumed = {"Last-Event-ID": "7"}
            with server.get(f"/wait?key={key}{query}", headers=resumed) as client:
                assert client.block() == b": ok\n\n"
                assert server.control.next(f"{key}-started") == "7"
                assert client.block() == b"data: waiting\n\n"
                assert client.block() == b": keepalive\n\n"
            assert await_ended(server, key) == "disconnected"
        assert server.tracebacks() == 0, server.log()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_request_is_a_stream_in_a_new_response(kind):
    """Nothing but the stack tells which request a middleware's response answers."""
    with serve(kind) as server:
        key = unique_key()
        resumed = {"Last-Event-ID": "7"}
        with server.get(f"/wait?key={key}&anew", headers=resumed) as client:
            assert client.block() == b": ok\n\n"
            assert server.control.next(f"{key}-started") == "7"
            assert client.block() == b"data: waiting\n\n"
            assert client.block() == b": keepalive\n\n"
        assert await_ended(server, key) == "disconnected"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_burst_of_first_streams_ends_with_its_server(kind):
    """Six of them, idle: SIGTERM ends all at once, in good order."""
    keys = [unique_key() for _ in range(6)]
    with serve(kind) as server, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(server.get(f"/wait?key={key}", headers=EVENT_SOURCE))
            for key in keys
        ]
        for client in clients:
            assert client.block() == b": ok\n"
            assert client.block() == b"data: waiting\n\n"
        began = time.monotonic()
        server.signal_one(signal.SIGTERM)
        assert [await_ended(server, key) for key in keys] == ["shutdown"] * 6
        assert time.monotonic() - began < 15  # of 30 s that it would wait
        assert all(client.rest().startswith(b"retry: ") for client in clients)


@pytest.mark.parametrize("app", ["app", "wrapped"])
def test_the_first_request_is_a_head(app):
    """Its source never starts; nor does that of a client told to stay away."""
    with serve("gunicorn-gthread", app) as server:
        key = unique_key()
        with server.connect() as client:
            client.request("HEAD", f"/wait?key={key}")
            client.read_head()
            assert client.status == 200
            assert client.headers["content-type"].startswith("text/event-stream")
        ended = {**EVENT_SOURCE, "Last-Event-ID": "syncstream-end"}
        with server.get(f"/wait?key={key}", headers=ended) as client:
            client.read_head()
            assert client.status == 204
            assert "content-type" not in client.headers
        assert stats(server)["open"] == 0
        assert server.control.pending(f"{key}-started") == []


def test_the_first_request_is_a_subscriber():
    """It leaves its thread; and the id that a client presents is seen."""
    with serve("gunicorn-gthread") as server:
        with server.get("/subscribe") as client:
            assert client.block() == b": ok\n\n"
            await_true(lambda: stats(server)["parked"] == 1)
        key = unique_key()
        with server.get(f"/wait?key={key}&last_event_id=7") as client:
            client.block(), client.block()
            assert server.control.next(f"{key}-started") == "7"


def test_the_first_request_reads_rows():
    """A connection that was there before the views were loses no open cursor."""
    with serve("gunicorn-gthread") as server, server.get("/rows?key=k") as client:
        numbers = [
            int(line[6:]) for line in client.rest().split(b"\n") if b"data" in line
        ]
        assert numbers == list(range(1, 301))
        assert server.tracebacks() == 0, server.log()
