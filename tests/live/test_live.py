"""The promises of a stream, on every server: one test a promise.

The table of docs/servers.md is made from this file.
"""

import pytest

from tests.live.promises import LEFT, assert_cut, assert_gated, end_of
from tests.support.live import GUNICORN, TABLE, UNMARKED, LiveServer, unique_key
from tests.support.waits import await_true

EVENT = "text/event-stream; charset=utf-8"
# At a yield, or (under gevent) wherever the generator waits; in its own thread.


@pytest.fixture(scope="module", params=TABLE)
def server(request):
    """Each server in turn, with the bare application."""
    with LiveServer(request.param, "tests.apps.bare:app") as server:
        yield server


@pytest.fixture(scope="module", params=TABLE)
def wrapped(request):
    """Each server in turn, with the middleware around the application."""
    with LiveServer(request.param, "tests.apps.bare:wrapped") as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_events_leave_one_at_a_time(server, key, version):
    """Head and a comment leave before the first event, then each event alone."""
    client = assert_gated(server, "/sse/gated", key, version)
    assert client.headers["content-type"] == EVENT
    assert client.headers["cache-control"] == "no-cache, no-transform"
    assert client.headers["x-accel-buffering"] == "no"
    assert "content-length" not in client.headers


def test_handwritten_generators_get_the_same(wrapped, key):
    """The middleware flushes, streams and closes a generator that is not ours."""
    client = assert_gated(wrapped, "/handwritten/gated", key)
    assert client.headers["cache-control"] == "no-cache, no-transform"


def test_lazy_applications_get_the_same(wrapped, key, record_property):
    """So does an application that calls start_response in its first step."""
    # uWSGI's write is not known to be its own: the opening waits for the first event.
    early = wrapped.kind != "uwsgi"
    record_property("cell", "yes" if early else "after the first event")
    with wrapped.get(f"/lazy/gated?key={key}") as client:
        if not early:
            wrapped.control.open(key)
        assert client.block() == b": ok\n\n"
        for n in range(3):
            if early or n:
                wrapped.control.open(key)
            assert client.block() == f"data: {n}\n\n".encode()
        assert "connection" not in client.headers or (
            client.headers["connection"] in ("close", "keep-alive")
        )
    assert end_of(wrapped, key) in LEFT


def test_ours_under_the_middleware_is_one_stream(wrapped, key):
    """A response of ours under the middleware has one opening, and one close."""
    assert_gated(wrapped, "/sse/gated", key)
    assert wrapped.control.pending(f"{key}-ended") == []


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        ("/sse/three", EVENT, b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"),
        ("/ndjson/three", "application/x-ndjson", b"0\n1\n2\n"),
        ("/raw/three", "text/plain; charset=utf-8", b"012"),
    ],
)
def test_a_finished_stream_is_whole(
    server, key, version, path, content_type, body, record_property
):
    """A source that ends gives a whole response, its end marked where chunked."""
    with server.get(f"{path}?key={key}", version=version) as client:
        assert client.rest() == body
        assert client.headers["content-type"] == content_type
        marked = version == "1.1" and server.kind not in UNMARKED
        assert client.is_whole or not marked
        record_property("cell", "yes" if client.is_whole else "by closing")
    assert server.control.next(f"{key}-ended") == ["finished", True]


@pytest.mark.parametrize("path", ["/ndjson/gated", "/raw/gated"])
def test_chunks_leave_one_at_a_time(server, key, path):
    """Lines and raw chunks leave each alone, too."""
    end = b"\n" if "ndjson" in path else b""
    with server.get(f"{path}?key={key}") as client:
        for n in range(3):
            server.control.open(key)
            assert client.chunk() == f"{n}".encode() + end
    assert end_of(server, key) in LEFT


@pytest.mark.parametrize(
    ("method", "path"), [("HEAD", "/sse"), ("GET", "/refused"), ("HEAD", "/ndjson")]
)
def test_without_a_body_the_source_never_starts(server, key, method, path):
    """HEAD and 204 are answered at once; the source is closed, not started."""
    with server.connect() as client:
        client.request(method, f"{path}/gated?key={key}")
        client.read_head()
        assert client.status == (204 if path == "/refused" else 200)
    server.control.open(key)
    with server.get("/health") as client:
        client.read_head()
    assert server.control.pending(f"{key}-started") == []


def test_middleware_answers_head(wrapped, key):
    """HEAD on a hand-written generator does not start it either."""
    with wrapped.connect() as client:
        client.request("HEAD", f"/handwritten/gated?key={key}")
        client.read_head()
        assert client.status == 200
    assert wrapped.control.pending(f"{key}-started") == []


def test_a_client_that_comes_back_after_the_end_gets_204(server, key):
    """Who presents the reserved id is told to stay away, and the source rests."""
    headers = {
        "Accept": "text/event-stream",
        "Cache-Control": "no-cache",
    }
    with server.get(f"/sse/three?key={key}", headers=headers) as client:
        assert client.rest().endswith(b"data: 2\n\nid: syncstream-end\n\n")
    server.control.next(f"{key}-started")
    headers["Last-Event-ID"] = "syncstream-end"
    with server.get(f"/sse/three?key={key}", headers=headers) as client:
        client.read_head()
        assert client.status == 204
    assert server.control.pending(f"{key}-started") == []


def test_a_client_that_leaves_closes_the_generator(server, key):
    """At its next yield the generator is closed; its finally runs once, right there."""
    before = server.tracebacks()
    with server.get(f"/sse/ticking?key={key}") as client:
        assert client.block() == b": ok\n\n"
        assert client.block() == b"data: 0\n\n"
        pid = server.control.next(f"{key}-started")
    assert server.control.next(f"{key}-ended") in LEFT
    with server.get(f"/sse/three?key={key}") as client:
        client.rest()
    assert server.control.next(f"{key}-started") == pid
    assert server.control.next(f"{key}-ended") == ["finished", True]
    assert server.control.pending(f"{key}-ended") == []
    assert server.tracebacks() == before, server.log()


ERRORS = ["GeneratorExit", "SystemExit", "KeyboardInterrupt", "RuntimeError"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("path", ["/sse", "/ndjson", "/raw"])
def test_an_error_truncates(server, key, path, error, version, record_property):
    """Nothing of the source's leaves next(): one log line, no foreign bytes."""
    before = server.tracebacks()
    body = assert_cut(server, f"{path}/raise-{error}", key, version, record_property)
    pid = server.control.next(f"{key}-started")
    assert server.control.next(f"{key}-ended") == [error, True]
    if path == "/sse":
        assert body == b": ok\n\ndata: 0\n\n"
    else:
        assert body == (b"0\n" if path == "/ndjson" else b"0")
    # The worker lives, and has logged the error once and nothing else.
    with server.get(f"/sse/three?key={key}") as client:
        client.rest()
    assert server.control.next(f"{key}-started") == pid
    await_true(lambda: server.tracebacks() > before)
    assert server.tracebacks() == before + 1, server.log()
    log = server.log()
    path = f"{path}/raise-{error}"
    # Ctrl-C goes on in a sync worker's main thread, and is told by gunicorn.
    is_ours = (error, server.kind) != ("KeyboardInterrupt", "gunicorn-sync")
    if is_ours:
        assert log.count(f"the source of GET '{path}' failed") == log.count(f"'{path}'")


def test_what_on_error_says_ends_the_stream_in_order(server, key):
    """The event is the sign: browsers would lose it in a cut behind it."""
    path = f"/error/raise-RuntimeError?key={key}"
    with server.get(path) as client:
        assert client.rest() == b': ok\n\ndata: 0\n\ndata: {"error":"MARK"}\n\n'
        assert client.is_whole or server.kind in UNMARKED
    assert server.control.next(f"{key}-ended") == ["RuntimeError", True]
    server.await_log("the source of GET '/error/raise-RuntimeError' failed")


PLAIN = b"500 Internal Server Error\n"


def assert_answered(server, key, path, body=PLAIN, version="1.1"):
    """Get what fails before its first byte: a whole 500, logged once."""
    before, served = server.tracebacks(), server.log().count(f"'{path}' failed")
    with server.get(f"{path}?key={key}", version=version) as client:
        assert client.rest() == body
        assert client.status == 500
        assert client.is_whole
        assert client.headers["content-length"] == str(len(body))
        lines = path == "/told/broken"
        kind = "application/x-ndjson" if lines else "text/plain; charset=utf-8"
        assert client.headers["content-type"] == kind
        assert client.headers["cache-control"] == "no-store"
    assert server.control.next(f"{key}-ended") == ["RuntimeError", True]
    await_true(lambda: server.tracebacks() > before)
    assert server.tracebacks() == before + 1, server.log()
    assert server.log().count(f"'{path}' failed") == served + 1
    return client


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/ndjson/broken", PLAIN),
        ("/raw/broken", PLAIN),
        ("/sized/broken", PLAIN),
        ("/told/broken", b'{"error":"MARK"}\n'),
    ],
)
def test_an_error_before_the_first_chunk_is_a_500(server, key, path, body, version):
    """Where nothing has been sent, the head that has not left says so."""
    assert_answered(server, key, path, body, version)
    server.control.next(f"{key}-started")
    with server.get(f"/ndjson/three?key={key}") as client:
        assert client.rest() == b"0\n1\n2\n"


@pytest.mark.parametrize("path", ["/lines/broken", "/lazy-lines/broken"])
def test_handwritten_lines_that_fail_first_are_a_500(wrapped, key, path):
    """The middleware does so for generators that are not ours."""
    client = assert_answered(wrapped, key, path)
    assert client.headers["x-other"] == "kept"


def test_ours_that_fail_first_are_a_500_under_the_middleware(wrapped, key):
    """Its start_response is called again by ours."""
    assert_answered(wrapped, key, "/ndjson/broken")


@pytest.mark.parametrize("kind", ["werkzeug", "gunicorn-gthread", "gunicorn-gevent"])
def test_a_debugger_above_swallows_no_cut(kind, key):
    """Werkzeug's debugger, of `flask run --debug`, has nothing to catch or log."""
    with LiveServer(kind, "tests.apps.bare:debugged") as server:
        body = assert_cut(server, "/sse/raise-RuntimeError", key, "1.1")
        assert body == b": ok\n\ndata: 0\n\n"
        with server.get(f"/sse/ticking?key={key}") as client:
            client.block(), client.block()
        assert server.control.next(f"{key}-ended") == ["RuntimeError", True]
        assert server.control.next(f"{key}-ended") in LEFT
        assert server.tracebacks() == 1, server.log()


def test_an_error_truncates_handwritten_streams(wrapped, key):
    """The middleware cuts a hand-written generator that fails."""
    body = assert_cut(wrapped, "/handwritten/raise-RuntimeError", key, "1.1")
    assert body == b": ok\n\ndata: 0\n\n"
    body = assert_cut(wrapped, "/lazy/raise-RuntimeError", key, "1.1")
    assert body == b": ok\n\ndata: 0\n\n"


@pytest.mark.parametrize("kind", GUNICORN)
def test_next_request_on_the_connection_is_unharmed(kind, key):
    """After a finished stream a keep-alive connection serves the next request."""
    with (
        LiveServer(kind, "tests.apps.bare:app") as server,
        server.get(f"/sse/three?key={key}") as client,
    ):
        client.rest()
        if kind == "gunicorn-sync":  # it always closes
            assert client.headers["connection"] == "close"
            return
        client.body = None
        client.request("GET", "/health")
        assert client.rest() == b"ok"
