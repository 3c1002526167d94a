"""The promises through each framework, on gunicorn's threads.

Each framework's application exists twice: as it is, and under the middleware.
"""

import pytest

from tests.live.promises import assert_cut, assert_gated
from tests.support.live import LiveServer, unique_key
from tests.support.waits import await_true

FRAMEWORKS = ("flask", "django", "bottle", "falcon", "pyramid")
DECORATED = ("flask", "django", "bottle")


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture(scope="module", params=["app", "wrapped"])
def server(request, framework):
    """A framework's application, without and with the middleware."""
    with LiveServer(
        "gunicorn-gthread", f"tests.apps.{framework}_app:{request.param}"
    ) as s:
        yield s


@pytest.fixture(scope="module")
def wrapped(framework):
    with LiveServer(
        "gunicorn-gthread", f"tests.apps.{framework}_app:wrapped"
    ) as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_events_leave_one_at_a_time(server, key, version):
    """Opening first, then each event alone; a client that leaves closes it."""
    client = assert_gated(server, "/sse/gated", key, version)
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert client.headers["cache-control"] == "no-cache, no-transform"
    assert client.headers["x-accel-buffering"] == "no"


def test_hooks_and_cookies_work(server, framework, key):
    """What the framework adds to a response is on the wire."""
    with server.get(f"/sse/three?key={key}") as client:
        body = client.rest()
    assert body == b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert client.is_whole
    assert client.headers["x-after"] == "after"
    assert "set-cookie" in client.headers
    assert server.control.next(f"{key}-ended") == ["finished", True]
    if framework in ("flask", "django"):
        assert server.control.next(f"{key}-closed") == "closed"
        assert server.control.pending(f"{key}-closed") == []


@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        ("/ndjson/three", "application/x-ndjson", b"0\n1\n2\n"),
        ("/raw/three", "text/plain; charset=utf-8", b"012"),
    ],
)
def test_other_streams(server, key, path, content_type, body):
    """NDJSON and raw streams arrive whole."""
    with server.get(f"{path}?key={key}") as client:
        assert client.rest() == body
    assert client.headers["content-type"] == content_type
    assert client.is_whole


def test_the_generator_finds_its_stream(server):
    """current_stream() is the stream of this response, in `@sse` views too."""
    with server.get("/stream") as client:
        assert client.rest() == b": ok\n\ndata: Stream/stream\n\n"


def test_decorated_views_stream(server, framework, key):
    """A generator view under @sse is an event stream."""
    if framework not in DECORATED:
        with server.get("/decorated/gated?key=") as client:
            client.read_head()
        assert client.status == 404
        return
    assert_gated(server, "/decorated/gated", key)


def test_a_browser_that_comes_back_gets_204(server, key):
    """The reserved id is answered with 204 through the framework."""
    headers = {
        "Accept": "text/event-stream",
        "Cache-Control": "no-cache",
        "Last-Event-ID": "syncstream-end",
    }
    with server.get(f"/sse/three?key={key}", headers=headers) as client:
        client.read_head()
        assert client.status == 204
        assert "content-type" not in client.headers
    assert server.control.pending(f"{key}-started") == []


def test_head_does_not_start_the_source(server, framework, key):
    """HEAD is answered at once, with the headers of GET."""
    with server.connect() as client:
        client.request("HEAD", f"/sse/gated?key={key}")
        client.read_head()
    if framework == "bottle" or client.status != 405:
        assert client.status == 200
        assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-length" not in client.headers
    assert server.control.pending(f"{key}-started") == []


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("error", ["GeneratorExit", "SystemExit", "RuntimeError"])
def test_an_error_truncates(server, key, error, version):
    """One log line with the traceback, no foreign bytes, the worker lives."""
    path = f"/sse/raise-{error}"
    line = f"the source of GET '{path}' failed"
    before = server.log().count(line)
    body = assert_cut(server, path, key, version)
    assert body == b": ok\n\ndata: 0\n\n"
    assert server.control.next(f"{key}-ended") == [error, True]
    pid = server.control.next(f"{key}-started")
    with server.get(f"/sse/three?key={key}") as client:
        client.rest()
    assert server.control.next(f"{key}-started") == pid
    await_true(lambda: server.log().count(line) > before)

    def each_has_its_traceback():
        log = server.log()  # the line is there before what follows it
        return log.count("Traceback") == log.count("the source of GET")

    await_true(each_has_its_traceback, server.log)
    assert server.log().count(line) == before + 1


def test_an_error_before_the_first_line_is_a_500(server, framework, key):
    """By start_response, by the server for what leaves next(), or by Bottle."""
    with server.get(f"/ndjson/broken?key={key}") as client:
        client.rest()
    assert client.status == 500
    assert client.is_whole
    assert server.control.next(f"{key}-ended") == ["RuntimeError", True]
    line = "the source of GET '/ndjson/broken' failed"
    await_true(lambda: server.log().count("MARK") >= 2, server.log)
    assert server.log().count(line) == 1
    # The error's own line of its one traceback, and the line that raised it.
    assert server.log().count('RuntimeError("MARK")') == 1, server.log()


def test_handwritten_views_get_the_life_of_a_stream(wrapped, framework, key):
    """The middleware serves generator views that know nothing of it.

    Bottle takes the first item before it calls start_response, so nothing can
    leave before that.
    """
    opened = 1 if framework == "bottle" else 0
    assert_gated(wrapped, "/handwritten/gated", key, opened=opened)
    body = assert_cut(wrapped, "/handwritten/raise-RuntimeError", key, "1.0")
    assert body == b": ok\n\ndata: 0\n\n"
