"""What should have been an answer: raised, or returned, in a stream's generator."""

import logging
import re

import bottle
import falcon
import flask
import pytest
import werkzeug.exceptions
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpResponseForbidden
from rest_framework.exceptions import NotAuthenticated
from webob.exc import HTTPNotFound  # as Pyramid's are
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.test import Client, create_environ

from syncstream import NDJSONResponse, SSEResponse, StreamMiddleware, sse
from syncstream.runtime.process import process
from syncstream.streams.answers import checked_return, is_answer, status_of

ASK = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
ERRORS = [
    (werkzeug.exceptions.NotFound(), 404),
    (werkzeug.exceptions.BadRequestKeyError("key"), 400),
    (Http404("no"), 404),
    (PermissionDenied(), 403),
    (NotAuthenticated("no"), 401),
    (bottle.HTTPError(404, "no"), 404),
    (falcon.HTTPForbidden(), 403),
    (HTTPNotFound(), 404),
]


def get(app, headers=ASK):
    return Client(LintMiddleware(app)).get("/", headers=headers)


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.DEBUG, "syncstream")
    return lambda: [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_every_framework_s_errors_are_known(error, status):
    """By their types; their status is what they would be answered by."""
    assert is_answer(error)
    assert status_of(error) == status


@pytest.mark.parametrize(
    "value", [None, 0, "text", (1, 2, 3), ("text", 99), ("a", True, 2, 3), [], object()]
)
def test_other_return_values_are_none_of_ours(value):
    """A generator may return what its caller takes by ``yield from``."""
    assert checked_return(value) is None
    assert not is_answer(value)
    assert status_of(ValueError("x")) == status_of(werkzeug.exceptions.Gone) == 500


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("mode", "id"), [("stop", b"syncstream-end"), ("reconnect", b"syncstream-refused")]
)
@pytest.mark.parametrize(
    "error", [pair[0] for pair in ERRORS], ids=lambda error: type(error).__name__
)
def test_a_raised_answer_ends_for_good(error, mode, id, count, logged):
    """The browser is told to stay away, and does; the log names the cure."""
    runs = []

    @sse(end=mode)
    def view():
        runs.append(1)
        yield from range(count)
        raise error

    answer = get(view())
    assert answer.status_code == 200
    events = b"".join(b"data: %d\n\n" % n for n in range(count))
    assert answer.data == b": ok\n" + events + b"id: %b\n\n" % id
    [record] = logged()
    assert "the source of GET '/' failed" in record.message
    assert "Decide in a plain view" in record.message
    assert record.exc_info[1] is error
    back = get(view(), {**ASK, "Last-Event-ID": id.decode()})
    assert back.status_code == 204
    assert runs == [1]


RETURNED = [
    flask.redirect("/login"),
    HttpResponseForbidden(b"", content_type="text/plain"),
    bottle.HTTPResponse(status=403),
    ("no", 403),
]


def redirecting(value, count=0):
    yield from range(count)
    return value


@pytest.mark.parametrize(("count", "reason"), [(0, "refused"), (1, "error")])
@pytest.mark.parametrize("value", RETURNED, ids=lambda value: type(value).__name__)
def test_a_returned_answer_is_refused(value, count, reason, logged):
    """A TypeError in the log, and an end for good, not an empty stream."""
    response = SSEResponse(redirecting(value, count))
    answer = get(response)
    assert answer.data.endswith(b"id: syncstream-end\n\n")
    assert response.response.reason == reason
    [record] = logged()
    assert type(record.exc_info[1]).__mro__[1] is TypeError
    assert re.search("returned a [a-zA-Z]+ of status [34]0", str(record.exc_info[1]))
    assert "Decide in a plain view" in record.message


def test_flask_s_wrapper_drops_no_return_value(logged):
    """``@sse`` runs in stream_with_context, which returns nothing."""
    app = flask.Flask(__name__)
    app.add_url_rule(
        "/", view_func=sse(lambda: redirecting(flask.redirect(flask.request.url)))
    )
    assert get(app).data == b": ok\nid: syncstream-end\n\n"
    assert "returned a Response of status 302" in str(logged()[0].exc_info[1])


@pytest.mark.parametrize("wrap", [lambda app: app, StreamMiddleware])
def test_others_see_a_broken_stream(wrap, logged):
    """Who is no EventSource learns that it is not whole; so do handwritten ones."""

    def handwritten(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return redirecting(("no", 403))

    app = (
        wrap(handwritten)
        if wrap is StreamMiddleware
        else SSEResponse(redirecting(("no", 403)))
    )
    headers = ASK if wrap is StreamMiddleware else {}
    with pytest.raises((ConnectionResetError, TypeError)):
        _ = get(app, headers).data
    assert "Decide in a plain view" in logged()[0].message


class Server:
    """A server as PEP 3333 has it: a head may be replaced until a byte is out."""

    def __init__(self, app, sent=False):
        self.heads, self.sent = [], sent
        body = app(create_environ("/"), self.start_response)
        try:
            self.body = b"".join(body)
        finally:
            body.close()

    def start_response(self, status, headers, exc_info=None):
        if exc_info and self.sent:
            raise exc_info[1]
        self.heads.append((status, headers))
        return lambda data: None


@pytest.mark.parametrize(
    ("error", "status"), [*ERRORS, (ValueError("x"), 500), (SystemExit(3), 500)]
)
def test_lines_get_the_status_that_is_raised_first(error, status, logged):
    """Before its first line nothing is out, and abort(404) works."""

    def source():
        yield None
        raise error

    server = Server(NDJSONResponse(source(), headers={"ETag": "1", "X-Other": "kept"}))
    line, headers = server.heads[-1]
    assert line.startswith(f"{status} ")
    assert server.body == f"{line}\n".encode()
    assert ("X-Other", "kept") in headers
    assert "etag" not in {name.lower() for name, _ in headers}
    assert [r.exc_info[1] for r in logged()] == ([error] if status == 500 else [])


def test_an_error_keeps_the_headers_that_are_not_of_the_body(logged):
    """A Content-Security-Policy protects an error's page, too."""
    policy = [
        ("Content-Security-Policy", "default-src 'none'"),
        ("Content-Security-Policy-Report-Only", "default-src 'none'"),
    ]
    body = [
        *(("Content-Disposition", "attachment"), ("Content-Language", "en")),
        *(("Content-Range", "bytes 0-1/2"), ("Content-Digest", "sha-256=:0:")),
    ]
    response = NDJSONResponse(raising(ValueError("x")), headers=[*policy, *body])
    _, headers = Server(response).heads[-1]
    assert set(policy) <= set(headers)
    assert not set(body) & set(headers)


def test_lines_return_no_answer(logged):
    """Not even before the first: it is too late to make one of it."""
    server = Server(NDJSONResponse(redirecting(("no", 403))))
    assert server.heads[-1][0].startswith("500 ")
    assert "returned a tuple of status 403" in str(logged()[0].exc_info[1])


def test_a_head_that_is_out_stays(logged):
    """A middleware above may have sent it: then the error leaves, as any would."""
    with pytest.raises(ValueError, match="first"):
        Server(NDJSONResponse(raising(ValueError("first"))), sent=True)
    assert [record.exc_info[1].args for record in logged()] == [("first",)]


def raising(error):
    raise error
    yield


def test_an_exit_that_cannot_be_answered_leaves_as_an_error():
    """GeneratorExit that leaves next() would end a gthread worker."""
    with pytest.raises(RuntimeError, match="raised GeneratorExit") as caught:
        Server(NDJSONResponse(raising(GeneratorExit())), sent=True)
    assert isinstance(caught.value.__cause__, GeneratorExit)


@pytest.mark.parametrize("is_lazy", [False, True])
def test_no_place_is_kept_by_what_fails_first(is_lazy):
    """The 500 of a limited application gives its place back."""

    def lines(environ, start_response):
        start_response("200 OK", [("Content-Type", "application/x-ndjson")])
        return raising(ValueError("x"))

    def lazy(environ, start_response):
        yield from lines(environ, start_response)

    def ours(environ, start_response):
        return NDJSONResponse(raising(ValueError("x")))(environ, start_response)

    before = process().open_streams
    for app in (lazy,) if is_lazy else (lines, ours):
        limited = StreamMiddleware(app, max_streams=1)
        for _ in range(3):
            assert Server(limited).heads[-1][0].startswith("500 ")
            assert process().open_streams <= before  # others may have been collected


def test_what_encodes_a_body_keeps_its_head(logged):
    """The answer would be encoded, too, and its new head would not say so."""
    response = NDJSONResponse(raising(ValueError("x")))
    response.headers["Content-Encoding"] = "gzip"
    with pytest.raises(ValueError, match="x"):
        Server(response)
