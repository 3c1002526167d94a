"""`events` and `lines` of responses that other libraries have opened."""

from __future__ import annotations

import http.client
import threading
import urllib.request
from contextlib import closing, contextmanager
from typing import Any

import django
import flask
import httpx
import pytest
import requests
import urllib3
import werkzeug.test
from django.conf import settings
from django.http import HttpResponse, StreamingHttpResponse

from syncstream import Event, NDJSONResponse, RemoteProtocolError, SSEResponse
from syncstream.client import events, lines
from tests.support.raw_server import HEAD, RawServer, answer

pytestmark = pytest.mark.timeout(30)

EVENTS = [Event("ä", id=1), Event("b\nc", event="x")]
WIRE = b"".join(bytes(event) for event in EVENTS)
SEEN = [("ä", None, "1"), ("b\nc", "x", "1")]


def seen(response: Any) -> list[tuple[Any, ...]]:
    return [(e.data, e.event, e.id) for e in events(response)]


@contextmanager
def by_requests(url):
    with requests.get(url, stream=True, timeout=10) as response:
        yield response


@contextmanager
def by_httpx(url):
    with httpx.stream("GET", url, trust_env=False) as response:
        yield response


@contextmanager
def by_urllib3(url):
    with urllib3.PoolManager() as pool:
        response = pool.request("GET", url, preload_content=False, retries=False)
        with closing(response):
            yield response


@contextmanager
def by_urllib(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        yield response


@contextmanager
def by_http_client(url):
    parts = urllib3.util.parse_url(url)
    with closing(http.client.HTTPConnection(parts.host, parts.port)) as connection:
        connection.request("GET", parts.request_uri)
        yield connection.getresponse()


LIBRARIES = [by_requests, by_httpx, by_urllib3, by_urllib, by_http_client]
BY = pytest.mark.parametrize("by", LIBRARIES, ids=lambda by: by.__name__)


@BY
@pytest.mark.parametrize("chunked", [False, True])
def test_each_event_comes_when_it_is_sent(by, chunked):
    """No library waits for the next."""
    going = threading.Semaphore(0)

    def serve(request, sock):
        head = HEAD[:-2] + b"Transfer-Encoding: chunked\r\n" * chunked + b"\r\n"
        sock.sendall(head)
        for event in EVENTS:
            wire = bytes(event)
            sock.sendall(b"%x\r\n%b\r\n" % (len(wire), wire) if chunked else wire)
            assert going.acquire(timeout=15)
        sock.sendall(b"0\r\n\r\n" * chunked)

    with RawServer(serve) as server, by(server.url) as response:
        found = []
        for event in events(response):
            found.append((event.data, event.event, event.id))
            going.release()
    assert found == SEEN


@BY
def test_lines_of_a_response(by):
    """Each line, ended by LF or CRLF, and the last one without an end."""
    body = "a\r\n\nä\u2028\rb\nlast".encode() + b"\xff"
    with RawServer([answer(body=body)]) as server, by(server.url) as response:
        assert list(lines(response)) == ["a", "", "ä\u2028\rb", "last\ufffd"]


def test_responses_that_have_been_read():
    """Their bodies are in memory."""
    with RawServer([answer(body=WIRE)]) as server:
        assert seen(requests.get(server.url, timeout=10)) == SEEN
        assert seen(httpx.get(server.url, trust_env=False)) == SEEN


def test_test_clients():
    """Of Werkzeug, Flask and Django."""
    app = flask.Flask(__name__)
    app.add_url_rule("/", "a", lambda: SSEResponse(iter(EVENTS), end="reconnect"))
    app.add_url_rule("/n", "b", lambda: NDJSONResponse([1, {"a": "b"}]))
    for client in (app.test_client(), werkzeug.test.Client(app)):
        with client.get("/") as response:
            assert seen(response) == SEEN
        with client.get("/n") as response:
            assert list(lines(response)) == ["1", '{"a":"b"}']


def test_django_responses():
    """Streaming ones, and those that are not."""
    if not settings.configured:
        settings.configure()
        django.setup()
    assert seen(StreamingHttpResponse([WIRE[:5], WIRE[5:]])) == SEEN
    assert seen(HttpResponse(WIRE)) == SEEN


def test_any_iterable_of_bytes():
    """Cut wherever it is; what is no bytes is refused."""
    assert seen([WIRE[:3], WIRE[3:9], WIRE[9:]]) == SEEN
    assert seen(memoryview(WIRE[i : i + 1]) for i in range(len(WIRE))) == SEEN
    assert list(lines([b"a\r", b"\nb", b"c\n"])) == ["a", "bc"]
    with pytest.raises(TypeError, match="must yield bytes, got 'text'"):
        seen(["text"])
    for wrong in (WIRE, "text", None, 1):
        with pytest.raises(TypeError, match="response must be"):
            events(wrong)
        with pytest.raises(TypeError, match="response must be"):
            lines(wrong)


def test_a_resumed_response():
    """It begins with the id in force."""
    (event,) = events([b"data: a\n\n"], last_event_id="7")
    assert event.id == "7"


def test_what_breaks_a_stream_is_raised():
    """The library's own error, or ours for a line that is too long."""
    cut = answer(body=WIRE).replace(b"Length: ", b"Length: 9")
    with RawServer([cut]) as server, by_requests(server.url) as response:
        found = events(response)
        assert [next(found).data, next(found).data] == ["ä", "b\nc"]
        with pytest.raises(urllib3.exceptions.ProtocolError):
            next(found)
    found = events([b"data: a\n\n:" + b"x" * (5 << 20)])
    assert next(found).data == "a"
    with pytest.raises(RemoteProtocolError):
        next(found)
