"""`Client`: a WSGI application's streams, served in this process."""

import queue
import subprocess
import sys
import threading
import time

import django.core.handlers.wsgi
import django.test
import pytest

from syncstream import StreamMiddleware
from syncstream.testing import EVENT_SOURCE, Client, reader
from tests import ROOT
from tests.support.waits import await_true
from tests.testing import apps


@pytest.fixture
def client():
    apps.ended = queue.Queue()
    return Client(apps.flask_app)


def data(found):
    return [event.data for event in found]


# The tests of the seed document ("Testing streaming handlers") in their sync form.


def test_sse_stream(client):
    with client.stream("GET", "/ticks") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")

        # Read first few events
        events = []
        for line in response.iter_lines():
            if line.startswith("data:"):
                events.append(line)
            if len(events) >= 3:
                break

        assert len(events) == 3


def test_sse_reconnection(client):
    """Test SSE reconnection with Last-Event-ID"""
    headers = {"Last-Event-ID": "5"}
    with client.stream("GET", "/from/0", headers=headers) as response:
        # Should resume from event ID 5
        assert response.status_code == 200
        assert response.events(1)[0].id == "6"


def test_streaming_response(client):
    with client.stream("GET", "/plain/ticks") as response:
        assert response.status_code == 200

        chunks = []
        for chunk in response.iter_bytes():
            chunks.append(chunk)
            if len(chunks) >= 5:
                break

        assert len(chunks) == 5
        assert all(len(chunk) > 0 for chunk in chunks)


# Applications.


class OfDjango:
    """A Django project's application."""

    def __call__(self, environ, start_response):
        apps.configure_django()
        with django.test.override_settings(ROOT_URLCONF=apps, MIDDLEWARE=[]):
            handler = django.core.handlers.wsgi.WSGIHandler()
            return handler(environ, start_response)


def bare(environ, start_response):
    """An application without a framework, which writes its first piece itself."""
    write = start_response("200 OK", [("Content-Type", "text/event-stream")])
    write(b": ok\n\n")
    return apps.framed(apps.SOURCES[environ["PATH_INFO"].strip("/")]())


@pytest.mark.parametrize(
    "app",
    [apps.flask_app, OfDjango(), bare, StreamMiddleware(bare)],
    ids=["flask", "django", "bare", "managed"],
)
def test_any_application(app):
    """Endless streams, streams that end and streams that fail."""
    apps.ended = queue.Queue()
    client = Client(app)
    with client.stream("GET", "/ticks") as stream:
        assert data(stream.events(3)) == ["0", "1", "2"]
    assert apps.ended.get_nowait()[0] == "GeneratorExit"
    with client.stream("GET", "/three") as stream:
        assert data(stream.events()) == ["a", "b", "c"]
    with (
        pytest.raises(LookupError, match="no such row"),
        client.stream("GET", "/failing") as stream,
    ):
        assert data(stream.events(2))


# The client leaves.


def test_leaving_a_source_that_waits(client):
    """It is told at once, as on a server; it has cleaned up when the call returns."""
    with client.stream("GET", "/told") as stream:
        stream.events(1)
        assert stream.reason is None
        stream.disconnect()
        how, thread = apps.ended.get_nowait()
        assert how == "ClientDisconnected"
        assert thread != threading.get_ident()
        assert stream.reason == "disconnected"
        stream.disconnect()
        with pytest.raises(ValueError, match="has been closed"):
            stream.events(1)


def test_leaving_at_the_end_of_the_block(client):
    """To leave the ``with`` is to leave, also with an event that was not read."""
    with client.stream("GET", "/told") as stream:
        pass
    assert apps.ended.get_nowait()[0] == "ClientDisconnected"
    assert stream.reason == "disconnected"


def test_a_source_that_does_not_notice(client, monkeypatch):
    """The test fails, and the message names the place; nothing hangs."""
    monkeypatch.setattr(f"{reader.__name__}.TIMEOUT", 0.1)
    monkeypatch.setattr("syncstream.testing.exchange.TIMEOUT", 0.1)
    stream = client.stream("GET", "/blocks")
    with pytest.raises(AssertionError, match=r"not ended within .*; its source is at"):
        stream.disconnect()


def test_a_client_that_reads_nothing(client):
    """The connection takes only so much, and then a source waits for its client."""
    with client.stream("GET", "/ticks") as stream:
        sizes = []

        def stands_still():
            sizes.append(stream._exchange.sent)
            time.sleep(0.05)
            return sizes[-3:] == sizes[-1:] * 3

        await_true(stands_still)
        assert 0 < sizes[-1] < 10_000_000
    assert stream.reason == "disconnected"


def test_keepalives(client):
    """They come while a source waits, as from a server."""
    with client.stream("GET", "/quiet") as stream:
        assert stream.lines(6) == [": ok", "", "data: first", "", ": keepalive", ""]


# Reconnecting.


def test_reconnecting(client):
    """The id of the last event that was read is kept, for the next request."""
    with client.stream("GET", "/from/1") as stream:
        assert data(stream.events(2)) == ["1", "2"]
    last = stream.last_event_id
    with client.stream("GET", "/from/1", last_event_id=last) as stream:
        assert data(stream.events()) == ["3", "4", "5"]


def test_an_id_beyond_ascii(client):
    """It is sent as a browser sends it: UTF-8."""
    with client.stream("GET", "/echoed-id", last_event_id="größer €") as response:
        assert response.bytes().decode() == "größer €"


def test_a_browser_that_is_told_to_stop(client):
    """With a browser's headers, a finished stream ends for good, with 204."""
    with client.stream("GET", "/three", headers=EVENT_SOURCE) as stream:
        assert data(stream.events()) == ["a", "b", "c"]
    assert stream.reason == "finished"
    last = stream.last_event_id
    with client.stream("GET", "/three", headers=EVENT_SOURCE, last_event_id=last) as s:
        assert s.status_code == 204
        assert s.bytes() == b""


def test_a_subscription(client):
    """It has begun when the response is there: it gets what is published then."""
    for n in range(50):
        with client.stream("GET", "/news") as stream:
            apps.hub.publish("news", n)
            assert data(stream.events(1)) == [str(n)]


# Requests and responses.


def test_requests(client):
    """Bodies and queries are sent; cookies are kept."""
    with client.stream("POST", "/login", json={"who": "ann"}) as response:
        assert response.status_code == 204
    with client.stream("GET", "/whoami", query_string={"q": "ä"}) as stream:
        assert data(stream.events()) == ["ann", "ä"]
    with client.stream("GET", "/whoami?q=2") as stream:
        assert data(stream.events()) == ["ann", "2"]
    with client.stream("HEAD", "/ticks") as response:
        assert response.status_code == 200
        assert response.bytes() == b""


def test_chunks(client):
    """A chunk is what was sent as one, of any size."""
    with client.stream("GET", "/raw") as stream:
        sizes = [len(chunk) for chunk in stream.chunks()]
    assert sizes == [1, 100_000, 3, 1_000_000]


def test_a_view_that_fails(client):
    """The framework answers it, and the message says so."""
    with client.stream("GET", "/broken") as response:
        assert response.status_code == 500
        with pytest.raises(AssertionError, match=r"/broken \(500 .*\) ended after 0"):
            response.events(1)


def test_an_application_that_fails():
    """What it raises is raised in the test."""

    def failing(environ, start_response):
        raise LookupError("no such application")

    def silent(environ, start_response):
        return []

    with pytest.raises(LookupError, match="no such application"):
        Client(failing).stream("GET", "/")
    with pytest.raises(AssertionError, match="has not called start_response"):
        Client(silent).stream("GET", "/")


def test_a_head_that_does_not_come(client):
    """The test fails after the time-out, and the message names the place."""
    with pytest.raises(AssertionError, match=r"no head within 0\.1 s; .* in slow"):
        client.stream("GET", "/slow", timeout=0.1)


def test_events_that_do_not_come(client):
    """As of a test client's response; the source is told that the client has left."""
    with client.stream("GET", "/told") as stream:
        stream.events(1)
        with pytest.raises(AssertionError, match=r"0 of 1 events .* in told"):
            stream.events(1, timeout=0.1)
    assert apps.ended.get_nowait()[0] == "ClientDisconnected"


def test_a_failure_that_nobody_has_read(client):
    """It fails the test at the end of its block, but hides no failure of the test."""
    with (
        pytest.raises(LookupError, match="no such file"),
        client.stream("GET", "/untidy") as stream,
    ):
        stream.events(1)
    with pytest.raises(ZeroDivisionError), client.stream("GET", "/untidy") as stream:
        _ = 1 / 0


def test_in_a_thread(client):
    """Another thread than the main one may read, too, with a time limit."""
    told = queue.Queue()

    def read():
        try:
            with client.stream("GET", "/told") as stream:
                stream.events(2, timeout=0.1)
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(10)
    assert isinstance(told.get(timeout=5), AssertionError)


GEVENT = """
import gevent.monkey; gevent.monkey.patch_all()
import pytest
from syncstream.testing import Client
from tests.testing import apps

client = Client(apps.flask_app)
for n in range(20):
    with client.stream("GET", "/news") as stream:
        apps.hub.publish("news", n)
        assert stream.events(1)[0].data == str(n)
with client.stream("GET", "/told") as stream:
    stream.events(1)
    with pytest.raises(AssertionError, match="0 of 1"):
        stream.events(1, timeout=0.1)
assert apps.ended.get_nowait()[0] == "ClientDisconnected"
assert stream.reason == "disconnected"
"""


def test_under_gevent():
    """Where gevent has patched threads, a request has a greenlet."""
    done = subprocess.run(
        [sys.executable, "-c", GEVENT], capture_output=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr.decode()


def test_wrong_arguments(client):
    """They are named."""
    with pytest.raises(TypeError, match="got None"):
        Client(None)
    with pytest.raises(ValueError, match=r"timeout must be .*got None"):
        client.stream("GET", "/three", timeout=None)
