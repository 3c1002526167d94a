"""Asynchronous sources, and views that send, on every server, in Flask and Django."""

import itertools
import re
import signal
import time
from contextlib import ExitStack

import pytest

from tests.live.promises import assert_cut, assert_gated
from tests.support.live import EVENT_SOURCE, GUNICORN, LiveServer, unique_key
from tests.support.waits import await_true

KINDS = (*GUNICORN, "werkzeug", "waitress", "uwsgi")
FRAMEWORKS = ("flask", "django")
LEFT = ("CancelledError", "GeneratorExit")  # at an await, at a yield
# Of plain views that send: how, and in the thread where it has begun. Unless the end is
# seen before, the server closes the response because its write fails.
SEND_LEFT = (["ClientDisconnected", True], ["GeneratorExit", True])
PUSHED = ("pushed", "async-pushed")
THREE = ("sse/async-three", "pushed/three", "async-pushed/three")
STOPPED = {
    "/sse/async-waiting": "CancelledError",
    "/async-pushed/waiting": "CancelledError",
    "/pushed/waiting": ["GeneratorExit", True],
}


@pytest.fixture(
    scope="module",
    params=itertools.product(KINDS, FRAMEWORKS),
    ids="-".join,
)
def server(request):
    kind, framework = request.param
    with LiveServer(kind, f"tests.apps.{framework}_app:app") as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("way", ["sse", "async-decorated"])
def test_events_leave_one_at_a_time(server, key, way, version):
    """The opening first, then each event alone; a client that leaves ends it."""
    assert_gated(server, f"/{way}/async-gated", key, version, left=LEFT)
    assert server.control.next(f"{key}-left") == "left"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("way", PUSHED)
def test_pushed_events_leave_one_at_a_time(server, key, way, version):
    """The same for views that send."""
    left = SEND_LEFT if way == "pushed" else LEFT
    assert_gated(server, f"/{way}/gated", key, version, left=left)
    assert server.control.pending(f"{key}-ended") == []


@pytest.mark.parametrize("way", ["sse", "ndjson"])
def test_a_leave_cancels_what_it_awaits(server, key, way):
    """At once; ``finally`` and ``async with`` run to their ends, once."""
    with server.get(f"/{way}/async-waiting?key={key}") as client:
        assert client.chunk()
        server.control.next(f"{key}-waiting")
    left = time.monotonic()
    assert server.control.next(f"{key}-ended") == "CancelledError"
    assert time.monotonic() - left < 5  # benchmarks/leave.py has the figures
    assert server.control.next(f"{key}-left") == "left"
    assert server.control.pending(f"{key}-ended") == []
    assert server.tracebacks() == 0, server.log()


def test_a_leave_ends_a_view_that_sends(server, key):
    """At once, in all that can be woken; ``finally`` runs to its end, once."""
    paths = ["async-pushed/waiting", "pushed/waiting", "pushed/waiting-stream"]
    if server.kind == "gunicorn-gevent":
        paths += [f"pushed/waiting-{what}" for what in ("time", "queue", "socket")]
    for path in paths:
        with server.get(f"/{path}?key={key}") as client:
            assert client.chunk()
            server.control.next(f"{key}-waiting")
            if path.startswith("async"):  # it holds no thread: sync workers have one
                with server.get("/health") as other:
                    assert other.rest() == b"ok"
        left = time.monotonic()
        how = server.control.next(f"{key}-ended")
        assert time.monotonic() - left < 5, path
        if path.startswith("async"):
            assert how == "CancelledError"
            assert server.control.next(f"{key}-left") == "left"
        else:
            assert how == ["ClientDisconnected", True], path
        assert server.control.pending(f"{key}-ended") == []
    assert server.tracebacks() == 0, server.log()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("way", THREE)
def test_it_finishes(server, key, way, version):
    """The response is whole, and an EventSource is told to stay away."""
    path = f"/{way}?key={key}"
    with server.get(path, headers=EVENT_SOURCE, version=version) as client:
        body = client.rest()
    end = b"id: syncstream-end\n\n"
    assert body == b": ok\ndata: 0\n\ndata: 1\n\ndata: 2\n\n" + end
    assert client.is_whole or server.kind == "uwsgi" or version == "1.0"
    assert server.control.next(f"{key}-ended") in ("finished", ["finished", True])


@pytest.mark.parametrize("way", THREE)
def test_head_starts_nothing(server, key, way):
    """It has the head of the GET, and no source is begun."""
    with server.connect() as client:
        client.request("HEAD", f"/{way}?key={key}")
        client.read_head()
        assert client.status == 200
        assert client.headers["content-type"].startswith("text/event-stream")
    assert server.control.pending(f"{key}-started") == []


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    "way", ["sse/async-failing", "pushed/failing", "async-pushed/failing"]
)
def test_an_error_truncates(server, key, way, version):
    """It is logged once, and no client takes the response for a whole one."""
    before = len(server.log())
    body = assert_cut(server, f"/{way}", key, version)
    assert body == b": ok\n\ndata: 0\n\n"
    how = server.control.next(f"{key}-ended")
    assert how in ("RuntimeError", ["RuntimeError", True])
    await_true(lambda: "RuntimeError: MARK" in server.log()[before:], server.log)
    assert server.log()[before:].count("RuntimeError: MARK") == 1


def test_what_an_upstreams_client_needs_works(server, key):
    """A host's address, a thread, a connection; under gevent as well."""
    with server.get(f"/ndjson/async-looking-up?key={key}") as client:
        assert client.rest() == b'"found"\n"a thread"\n"an answer"\n'


@pytest.mark.parametrize(
    ("kind", "paths"),
    [(kind, [*STOPPED]) for kind in KINDS if kind != "gunicorn-sync"]
    # It has one thread.
    + [("gunicorn-sync", [path]) for path in STOPPED],
)
def test_a_graceful_stop_ends_them(kind, paths, key):
    """An EventSource's: it comes back to the next server. uWSGI kills its threads."""
    number = signal.SIGINT if kind in ("werkzeug", "waitress") else signal.SIGTERM
    with LiveServer(kind, "tests.apps.flask_app:app") as server, ExitStack() as stack:
        clients = {}
        for path in paths:
            client = server.get(f"{path}?key={key}{path}", headers=EVENT_SOURCE)
            clients[path] = stack.enter_context(client)
            assert client.block() + client.block() == b": ok\ndata: 0\n\n"
            server.control.next(f"{key}{path}-waiting")
        server.signal_one(number)
        for path, client in clients.items():
            last = client.rest()
            if kind == "uwsgi":
                assert last == b""
                continue
            assert re.fullmatch(rb"retry: \d+\n\n", last)
            assert server.control.next(f"{key}{path}-ended") == STOPPED[path]
        if kind != "uwsgi":
            await_true(lambda: not server.is_running(), server.log)
