"""Heads: which have a body, which headers are sent, and what a refused one says."""

import re

import flask
import pytest
from werkzeug.datastructures import Headers
from werkzeug.test import Client, create_environ, run_wsgi_app

from syncstream import NDJSONResponse, SSEResponse, StreamMiddleware, StreamResponse
from syncstream.runtime.process import stats
from syncstream.servers.connection import Connection
from syncstream.streams.contract import Life
from syncstream.wsgi.headers import ends_line, has_body, merge_headers

EVENTS = [("Content-Type", "text/event-stream")]
ASK = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (100, False),
        (199, False),
        (200, True),
        (203, True),
        (204, False),
        (205, False),
        (206, True),
        (303, True),
        (304, False),
        (305, True),
        (500, True),
    ],
)
def test_which_status_has_a_body(status, expected):
    """RFC 9110 §6.4.1; no answer to HEAD has one."""
    for method in ("GET", "POST", "HEAD"):
        connection = Connection(create_environ(method=method))
        assert has_body(connection, status) is (expected and method != "HEAD")


@pytest.mark.parametrize("make", [SSEResponse, NDJSONResponse, StreamResponse])
@pytest.mark.parametrize(
    ("status", "has_type"),
    [(200, True), (203, True), (204, False), (205, True), (206, True)],
)
def test_no_content_has_no_type(make, status, has_type):
    """And is of no length; all others say what they are."""
    answer = Client(make(["a"], status)).get("/")
    assert ("Content-Type" in answer.headers) is has_type
    assert "Content-Length" not in answer.headers


@pytest.mark.parametrize("status", [200, 599, "200 OK", "404 Gone Fishing", "503"])
def test_statuses_that_are(status):
    """From 200 to 599, by number or line."""
    answer = Client(SSEResponse([], status)).get("/")
    assert answer.status.startswith(str(status))


@pytest.mark.parametrize("status", [199, 600, "199 No", "600 No", "200 O\nK", "200\0"])
def test_statuses_that_are_none(status):
    """The value is named."""
    message = re.escape(
        f"status must be an HTTP status from 200 to 599, got {status!r}"
    )
    with pytest.raises(ValueError, match=message):
        SSEResponse([], status)


DEFAULTS = {"A": "1", "B": "2"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [("A", "1"), ("B", "2")]),
        ({}, [("A", "1"), ("B", "2")]),
        ({"a": "3"}, [("B", "2"), ("a", "3")]),
        ({"a": None}, [("B", "2")]),
        ({"C": 5, "D": None}, [("A", "1"), ("B", "2"), ("C", "5")]),
        ([("C", "3"), ("C", "4")], [("A", "1"), ("B", "2"), ("C", "3"), ("C", "4")]),
        (
            Headers([("b", "3"), ("b", "4")]),
            [("A", "1"), ("b", "3"), ("b", "4")],
        ),
        ({"Connection": "close", "TE": "x", "C": ""}, [*DEFAULTS.items(), ("C", "")]),
        ({"C": "é"}, [*DEFAULTS.items(), ("C", "é")]),
    ],
    ids=str,
)
def test_headers_are_merged(given, expected):
    """The user's win, in their order, behind ours; None removes one."""
    assert merge_headers(DEFAULTS, given) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([("a", "b", "c")], TypeError, "a mapping or pairs of name and value"),
        ([["a", "b"]], TypeError, "a mapping or pairs of name and value"),
        (["ab"], TypeError, "a mapping or pairs of name and value, got 'ab'"),
        ([("a",)], TypeError, "a mapping or pairs of name and value"),
        ({"": "a"}, ValueError, "HTTP tokens as names"),
        ({"a b": "a"}, ValueError, "HTTP tokens as names (RFC 9110 §5.6.2), got 'a b'"),
        ({"a\n": "a"}, ValueError, "HTTP tokens as names"),
        ({b"a": "a"}, ValueError, "HTTP tokens as names"),
        ({"a": 1.5}, TypeError, "values of str, int or None, got ('a', 1.5)"),
        ({"a": "b\rc"}, ValueError, "must not contain CR, LF or NUL"),
        ({"a": "b\nc"}, ValueError, "must not contain CR, LF or NUL"),
        ({"a": "b\0"}, ValueError, "must not contain CR, LF or NUL"),
        ({"a": "€"}, ValueError, "values in Latin-1 (PEP 3333), got ('a', '€')"),
    ],
    ids=repr,
)
def test_headers_that_cannot_be_sent(given, error, message):
    """Each is named, where it is given."""
    with pytest.raises(error, match=re.escape(message)):
        merge_headers({}, given)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [(b"", True), (b"1\n", True), (b"1", False), (b"1\r", False), (b"\n1", False)],
)
def test_where_a_line_may_begin(tail, expected):
    """At the beginning, and behind a line end."""
    assert ends_line(tail) is expected


def other_response(made):
    """Return an application that sends a response of another's, around ours."""

    def app(environ, start_response):
        response = made()
        start_response("200 OK", list(response.headers))
        return (chunk for chunk in response.response)

    return StreamMiddleware(app)


def test_a_stream_within_another_response_is_that_requests(caplog):
    """It opens, ends and is counted as if it had been returned itself."""
    app = other_response(lambda: SSEResponse(["a"]))
    answer = Client(app).get("/", headers=ASK)
    assert answer.data == b": ok\ndata: a\n\nid: syncstream-end\n\n"
    assert caplog.text == ""  # it has a connection
    ask = {**ASK, "Last-Event-ID": "syncstream-end"}
    answer = Client(app).get("/", headers=ask)
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Content-Type" not in answer.headers


def test_the_last_stream_of_its_format_is_sent():
    """One of lines made on the way is not, nor one that has ended."""

    def app(environ, start_response):
        made = SSEResponse(["sent"], end="reconnect")
        closed, lines = SSEResponse(["closed"]), NDJSONResponse([1])
        closed.close()
        start_response("200 OK", EVENTS)
        body = list(made.response)
        lines.close()
        return body

    answer = Client(StreamMiddleware(app)).get("/", headers=ASK)
    assert answer.data == b": ok\ndata: sent\n\n"


@pytest.mark.usefixtures("own_record")
@pytest.mark.parametrize(
    ("headers", "status"),
    [(ASK, 200), ({}, 503), ({"Accept": "text/event-stream"}, 503)],
    ids=["browser", "plain", "fetch"],
)
def test_what_a_refused_client_gets(headers, status):
    """A time to come back at: two to six seconds; and nothing of the application's."""
    ended = []

    class Body:
        def __iter__(self):
            return iter([b"data: a\n\n"])

        def close(self):
            ended.append(1)

    def app(environ, start_response):
        write = start_response("200 OK", [*EVENTS, ("X-A", "1")])
        write(b"lost")
        return Body()

    managed = StreamMiddleware(app, max_streams=1)
    place = managed.capacity.admit({}, lambda: None)
    waits = set()
    for _ in range(30):
        answer = Client(managed).get("/", headers=headers)
        assert answer.status_code == status
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Length"] == str(len(answer.data))
        assert "X-A" not in answer.headers
        assert not answer.data.count(b"lost")
        if status == 200:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            [milliseconds] = re.fullmatch(rb"retry: (\d+)\n\n", answer.data).groups()
            waits.add(int(milliseconds) / 1000)
        else:
            assert answer.data == b"too many streams, please retry later\n"
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            waits.add(int(answer.headers["Retry-After"]))
    assert 2 <= min(waits) <= max(waits) <= 6
    assert len(waits) > 1  # they do not all come back together
    assert len(ended) == 30
    assert stats()["ended"]["refused"]["streams"] == 30
    place.release()
    assert Client(managed).get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("status", ["abc", "", None, "20"])
def test_a_malformed_status_is_the_servers_to_refuse(status):
    """It is passed on as it is."""
    seen = []

    def app(environ, start_response):
        start_response(status, EVENTS)
        return [b"data: a\n\n"]

    def start_response(status, headers, exc_info=None):
        seen.append(status)
        raise AssertionError("bad status")

    with pytest.raises(AssertionError, match="bad status"):
        StreamMiddleware(app)(create_environ(), start_response)
    assert seen == [status]


@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Type", "text/event-stream"), ("Content-Length", "9")],
        [("Content-Type", "text/plain")],
        [("X-Type", "text/event-stream")],
        [],
    ],
    ids=["length", "text", "other", "none"],
)
def test_what_is_no_stream(headers):
    """The body is the very object."""
    body = [b"data: a\n\n"]

    def app(environ, start_response):
        start_response("200 OK", headers)
        return body

    given, _, sent = run_wsgi_app(StreamMiddleware(app), create_environ())
    assert StreamMiddleware(app)(create_environ(), lambda *_: None) is body
    assert list(given) == body
    assert list(sent) == headers


@pytest.mark.parametrize("name", ["x-ndjson", "ndjson", "jsonl", "x-jsonlines"])
def test_all_names_of_lines(name):
    """Each is a stream: its parameters and case do not matter."""

    def app(environ, start_response):
        start_response("200 OK", [("content-type", f"Application/{name} ; q=1")])
        return [b"1\n"]

    answer = Client(StreamMiddleware(app)).get("/")
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.data == b"1\n"


def test_a_session_that_was_not_written_to_is_not_warned_of(caplog):
    """Neither is a request without one, nor what is no session."""
    app = flask.Flask("test")
    app.secret_key = "test"

    @app.route("/")
    def view():
        flask.session["a"] = 1
        return SSEResponse(["a"])

    assert app.test_client().get("/").data
    assert "flask.session" not in caplog.text


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SSEResponse([]), (15.0, 30.0, None, None)),
        (lambda: NDJSONResponse([]), (None, 30.0, None, None)),
        (lambda: StreamResponse([]), (None, 30.0, None, None)),
        (lambda: StreamMiddleware(print), (15.0, 30.0, None, None)),
        (
            lambda: SSEResponse(
                [], keepalive=1, send_timeout=2, max_duration=3, drain=4
            ),
            (1, 2, 3, 4),
        ),
        (
            lambda: NDJSONResponse([], send_timeout=2, max_duration=3, drain=4),
            (None, 2, 3, 4),
        ),
        (
            lambda: StreamResponse([], send_timeout=2, max_duration=3, drain=4),
            (None, 2, 3, 4),
        ),
        (
            lambda: StreamMiddleware(
                print, keepalive=1, send_timeout=2, max_duration=3, drain=4
            ),
            (1, 2, 3, 4),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
)
def test_the_durations_of_a_stream(monkeypatch, make, expected):
    """Those that the documentation says, unless others are given."""
    given = []
    for name in ("responses", "middleware"):
        monkeypatch.setattr(
            f"syncstream.wsgi.{name}.life_of",
            lambda *durations: given.append(durations) or Life(*durations),
        )
    make()
    assert given == [expected]
