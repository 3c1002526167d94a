"""The WSGI side: responses, headers, the middleware, and what frameworks do to them."""

import contextlib
import io
import re
import types
import zlib

import bottle
import falcon
import flask
import pytest
import webob
from django.core.handlers.wsgi import WSGIRequest
from werkzeug.datastructures import Headers
from werkzeug.test import Client, create_environ, run_wsgi_app
from werkzeug.wrappers import Response

from syncstream import (
    Hub,
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
    last_event_id,
    sse,
)
from syncstream.runtime.process import process
from tests.wsgi.asking import ASK, get


class Closing:
    """A source that knows whether it was started, and how often it was closed."""

    def __init__(self, items=("a",)):
        self.items = iter(items)
        self.started = False
        self.closed = 0

    def __iter__(self):
        self.started = True
        return self

    def __next__(self):
        return next(self.items)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("make", [SSEResponse, NDJSONResponse, StreamResponse])
@pytest.mark.parametrize("wrap", [lambda app: app, StreamMiddleware])
@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)]
)
def test_without_a_body_the_source_is_closed_unstarted(make, wrap, method, status):
    """HEAD, 204 and 304: closed exactly once, never started; callbacks run once."""
    source, ended = Closing(), []
    response = make(source, status)
    response.call_on_close(lambda: ended.append(True))
    # Not linted: for 204 it wants a Content-Length, which RFC 9110 §8.6 forbids.
    answer = Client(wrap(response)).open("/", method=method)
    assert answer.data == b""
    assert answer.status_code == status
    answer.close()
    assert (source.started, source.closed, ended) == (False, 1, [True])


def test_a_response_that_is_never_called_can_be_closed():
    """A response that was replaced closes its source when it is closed."""
    source, ended = Closing(), []
    with SSEResponse(source) as response:

        @response.call_on_close
        def end():
            ended.append("closed")

        assert ended == []
    assert source.closed == 1
    assert ended == ["closed"]


def compressing_hook(response):
    """Do as Flask-Compress does, after a request."""
    source = response.response
    response.response = (zlib.compress(chunk) for chunk in source)
    response.headers["Content-Encoding"] = "deflate"
    return response


@pytest.mark.parametrize("make", [SSEResponse, NDJSONResponse, StreamResponse])
def test_who_compresses_streams_is_warned_of(make, caplog):
    """Once, with the cure; not so who sends what is compressed already."""
    process().said.pop("compressed", None)
    with get(make(["a"], headers={"Content-Encoding": "br"})) as answer:
        assert answer.data
    assert "COMPRESS_STREAMS" not in caplog.text
    app = flask.Flask("test")
    app.after_request(compressing_hook)
    app.add_url_rule("/", view_func=lambda: make(["a"]))
    for _ in range(2):
        with app.test_client().get("/") as answer:
            assert answer.data
    assert caplog.text.count("COMPRESS_STREAMS = False") == 1


@pytest.mark.parametrize("wrap", [lambda app: app, StreamMiddleware])
def test_bare_wsgi(wrap):
    """A response is a WSGI application by itself."""
    source = Closing(["a", {"n": 1}])
    app = wrap(SSEResponse(source, retry=3000, headers={"X-A": "1"}))
    answer = get(app, headers=ASK)
    events = b'data: a\n\ndata: {"n":1}\n\nid: syncstream-end\n\n'
    assert answer.data == b": ok\nretry: 3000\n\n" + events
    assert dict(answer.headers) == {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache, no-transform",
        "X-Accel-Buffering": "no",
        "X-A": "1",
    }
    answer.close()
    assert source.closed == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Cache-Control": "no-store", "X-Accel-Buffering": None, "X-N": 5},
        [("cache-control", "no-store"), ("x-accel-buffering", None), ("x-n", "5")],
        Headers([("Cache-Control", "no-store"), ("X-N", "5")]),
    ],
)
def test_the_users_headers_win(headers):
    """They replace the defaults, None removes one."""
    response = SSEResponse([], headers=headers)
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-N"] == "5"
    if not isinstance(headers, Headers):
        assert "X-Accel-Buffering" not in response.headers


def test_a_repeated_header_is_kept():
    """Two cookies stay two."""
    headers = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
    response = SSEResponse([], headers=headers)
    assert response.headers.getlist("Set-Cookie") == ["a=1", "b=2"]


def test_hop_by_hop_headers_are_the_servers():
    """They are a 500 on waitress, wsgiref and Django's runserver: left out."""
    hop = {"Connection": "keep-alive", "Keep-Alive": "5", "Transfer-Encoding": "x"}
    response = SSEResponse([], headers=hop)
    response.headers["Connection"] = "keep-alive"  # a hook may say it, too
    for app in (response, StreamMiddleware(handwritten(hop.items()))):
        names = {name.lower() for name, _ in get(app).headers}
        assert not names & {"connection", "keep-alive", "transfer-encoding"}


def test_content_type_can_be_removed_and_chosen():
    """StreamResponse takes a content type; None removes any."""
    response = StreamResponse([b"x"], content_type="application/octet-stream")
    assert get(response).content_type == "application/octet-stream"
    assert "Content-Type" not in SSEResponse([], headers={"Content-Type": None}).headers


def test_a_download_may_have_a_length():
    """A Content-Length of the user's reaches the client."""
    answer = get(StreamResponse([b"abc", b"def"], headers={"Content-Length": "6"}))
    assert (answer.content_length, answer.data) == (6, b"abcdef")


@pytest.mark.parametrize("make", [SSEResponse, NDJSONResponse])
def test_events_and_lines_have_no_length(make):
    """A Content-Length of the user's would cut them."""
    response = make(["a", "b"], headers={"Content-Length": "3"})
    assert "Content-Length" not in get(response).headers


def test_a_response_answers_one_request():
    """The second gets an error, not an empty stream."""
    response = SSEResponse(["a"])
    assert get(response).data == b": ok\n\ndata: a\n\n"
    with pytest.raises(RuntimeError, match="answers one request"):
        get(response)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_second_request_leaves_the_first_its_stream(method):
    """It gets an error; the stream, which is the first one's, goes on."""
    response = SSEResponse(["a"])
    app = StreamMiddleware(response)
    chunks, *_ = run_wsgi_app(app, create_environ())
    assert next(chunks) == b": ok\n\n"
    with pytest.raises(RuntimeError, match="answers one request"):
        run_wsgi_app(app, create_environ(method=method))
    assert b"".join(chunks) == b"data: a\n\n"


def test_reading_the_data_does_not_run_an_endless_source():
    """Werkzeug would collect the body: here that is an error, not a hang."""
    response = SSEResponse(iter(lambda: "a", None))
    for read in (
        response.get_data,
        response.make_sequence,
        response.freeze,
        response.add_etag,
    ):
        with pytest.raises(RuntimeError, match="SSEResponse is a stream, which"):
            read()
    assert response.calculate_content_length() is None
    assert response.is_streamed


def test_data_that_a_hook_has_set_is_read():
    """A response that is no stream any more has its data, and an ETag."""
    response = SSEResponse(iter(lambda: "a", None))
    response.set_data(b"other")
    assert response.get_data() == b"other"
    response.freeze()
    assert response.get_etag()[0]
    response.close()


def test_force_type_keeps_our_promises():
    """Flask's make_response gives foreign responses its class: it becomes both."""
    app = flask.Flask(__name__)

    class AppResponse(flask.Response):
        pass

    app.response_class = AppResponse
    with app.test_request_context("/"):
        response = app.make_response((SSEResponse(["a"]), 201, {"X-A": "1"}))
        assert isinstance(response, AppResponse)
        assert isinstance(response, SSEResponse)
        assert response.status_code == 201
    forced = Response.force_type(SSEResponse(["a"]))
    assert isinstance(forced, SSEResponse)
    assert get(response).data == b": ok\n\ndata: a\n\n"


def test_a_body_that_a_hook_replaced_is_served():
    """What an after_request hook makes of the response goes out."""
    source = Closing()
    response = SSEResponse(source)
    response.set_data(b"replaced")
    with get(response) as answer:
        assert answer.data == b"replaced"
    assert source.closed == 1
    source = Closing()
    response = SSEResponse(source)
    response.response = (chunk.upper() for chunk in response.response)
    with get(response) as answer:
        assert answer.data == b": OK\n\nDATA: A\n\n"
    assert source.closed == 1


@pytest.mark.parametrize("middleware", [False, True])
def test_flask_context_in_the_generator(middleware):
    """`@sse` and stream_with_context: a generator reads the request."""
    app = flask.Flask(__name__)
    app.testing = True
    app.add_url_rule("/a", view_func=sse(view_of_request), endpoint="a")

    @app.get("/b")
    def b():
        return SSEResponse(flask.stream_with_context(view_of_request()))

    @app.get("/c")
    @sse(end="reconnect", retry=1000)
    def c():
        return flask.redirect("/elsewhere")

    if middleware:
        app.wsgi_app = StreamMiddleware(app.wsgi_app)
    client = app.test_client()
    assert client.get("/a?x=1").data == b": ok\n\ndata: 1\n\n"
    assert client.get("/b?x=2").data == b": ok\n\ndata: 2\n\n"
    assert client.get("/c").status_code == 302


def view_of_request():
    yield flask.request.args["x"]


def test_sse_refuses_what_is_no_view():
    """Where it is decorated, not when it is called."""
    with pytest.raises(TypeError, match="@sse takes a view function, got 'text'"):
        sse("text")


@pytest.mark.parametrize(
    ("environ", "id"),
    [
        ({}, None),
        ({"headers": {"Last-Event-ID": "5"}}, "5"),
        ({"headers": {"Last-Event-ID": ""}}, None),
        ({"headers": {"Last-Event-ID": " "}}, None),
        ({"headers": {"Last-Event-ID": ""}, "query_string": "lastEventId=7"}, "7"),
        ({"headers": {"Last-Event-ID": ""}, "query_string": "lastEventId="}, None),
        ({"query_string": "last_event_id=6"}, "6"),
        ({"query_string": "lastEventId=7"}, "7"),
        ({"query_string": "lastEventId="}, None),
        ({"query_string": "lastEventId=%20"}, None),
        ({"query_string": "last_event_id=+&lastEventId=7"}, "7"),
        ({"query_string": "last_event_id=&lastEventId=7"}, "7"),
        ({"query_string": "lastEventId=7&last_event_id="}, "7"),
        ({"query_string": "last_event_id=&last_event_id=6"}, "6"),
        ({"query_string": "last_event_id=%C3%A4%00%FF"}, "ä\0\ufffd"),
        ({"query_string": "a=1;last_event_id=6"}, None),
        ({"query_string": "x=1&last_event_id=6&last_event_id=7"}, "6"),
        (
            {"headers": {"Last-Event-ID": "h"}, "query_string": "last_event_id=q"},
            "h",
        ),
        ({"headers": {"Last-Event-ID": "x" * 10000}}, "x" * 10000),
    ],
)
def test_last_event_id(environ, id):
    """The header comes first, then the query; any text is taken."""
    assert last_event_id(create_environ(**environ)) == id


def django_request(environ):
    # It would ask the settings, which belong to a whole process, for its path.
    request = WSGIRequest.__new__(WSGIRequest)
    request.environ = request.META = environ
    return request


FRAMEWORKS = {
    "Flask": lambda environ: flask.Request(environ),
    "Django": django_request,
    "Django, ASGI": lambda environ: types.SimpleNamespace(META=environ),
    "Bottle": lambda environ: bottle.Request(environ),
    "Pyramid": lambda environ: webob.Request(environ),
    "Falcon": lambda environ: falcon.Request(environ),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_last_event_id_of_a_request(name):
    """It takes the request of a framework just as its environ."""
    make = FRAMEWORKS[name]
    environ = create_environ(headers={"Last-Event-ID": "5"})
    assert last_event_id(make(environ)) == last_event_id(environ) == "5"
    assert last_event_id(make(create_environ(query_string="lastEventId=7"))) == "7"
    assert last_event_id(make(create_environ())) is None


def test_last_event_id_of_flasks_proxy():
    """The request that Flask shows to its views."""
    app = flask.Flask("app")
    with app.test_request_context(headers={"Last-Event-ID": "5"}):
        assert last_event_id(flask.request) == "5"


@pytest.mark.parametrize("wrong", [None, "5", object(), flask.Flask])
def test_last_event_id_of_no_request(wrong):
    """Anything else is refused, and not taken for a first connection."""
    with pytest.raises(TypeError, match="request must be a request or a WSGI environ"):
        last_event_id(wrong)


@pytest.mark.parametrize(
    "options",
    [{"headers": {"Last-Event-ID": ""}}, {"query_string": "lastEventId="}],
    ids=["header", "query"],
)
def test_an_empty_last_event_id_is_a_first_connection(options):
    """A channel's subscriber gets no reset, and a stream sees None."""
    with contextlib.closing(Hub()) as hub:
        hub.publish_many("a", ["1", "2"])
        subscription = hub.subscribe("a", after=1)

        def source():
            assert current_stream().last_event_id is None
            yield from subscription.read(0)

        text = get(SSEResponse(source()), **options).data.decode()
    assert "reset" not in text
    assert "data: 2" in text
    assert "data: 1" not in text


def test_last_event_id_is_utf8():
    """Browsers send UTF-8, and WSGI shows it as Latin-1."""
    environ = {"HTTP_LAST_EVENT_ID": "zähler-→".encode().decode("latin-1")}
    assert last_event_id(environ) == "zähler-→"
    assert last_event_id({"HTTP_LAST_EVENT_ID": "\xff"}) == "\ufffd"


def test_the_end_id_is_not_a_users_id():
    """With end="reconnect" the reserved id means nothing to the generator."""
    seen = []

    def source():
        from syncstream import current_stream

        seen.append(current_stream().last_event_id)
        yield "a"

    headers = {**ASK, "Last-Event-ID": "syncstream-end"}
    assert get(SSEResponse(source()), headers=headers).status_code == 204
    answer = get(SSEResponse(source(), end="reconnect"), headers=headers)
    assert answer.data == b": ok\ndata: a\n\n"
    assert seen == [None]


@pytest.mark.parametrize(
    ("method", "headers", "told"),
    [
        ("GET", ASK, True),
        ("GET", {**ASK, "Cache-Control": "no-store"}, False),
        ("GET", {"Accept": "text/event-stream"}, False),
        ("GET", {**ASK, "Accept": "*/*"}, False),
        ("POST", ASK, False),
    ],
)
def test_only_an_event_source_is_told_to_stop(method, headers, told):
    """httpx-sse and curl never see the end block."""
    answer = get(SSEResponse(["a"]), method, headers=headers)
    assert answer.data.endswith(b"id: syncstream-end\n\n") is told


SSE = "text/event-stream"


@pytest.mark.parametrize(
    ("headers", "is_named"),
    [
        ({"Accept": SSE}, True),
        ({"Accept": "Text/Event-Stream"}, True),
        ({"Accept": f"{SSE};q=0.5, */*;q=0.1"}, True),
        ({"Accept": f"application/json, {SSE}"}, True),  # MCP's clients
        ({"Accept": f"application/json,{SSE} ; charset=utf-8"}, True),
        ({"Accept": f"{SSE};q=0, */*"}, False),
        ({"Accept": f"{SSE}; q=0.000"}, False),
        ({"Accept": "*/*"}, False),
        ({"Accept": "text/*"}, False),
        ({"Accept": "application/json, text/plain, */*"}, False),  # axios
        ({"Accept": f"{SSE}s, x/{SSE}"}, False),
        ({"Accept": ""}, False),
        ({}, False),
        ({"Accept": "application/json"}, False),
        ({"Accept": "application/json", "X-Stainless-Lang": "python"}, True),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: SSEResponse(["a", None, "b"], keepalive=1e-9, retry=1000),
        lambda: StreamMiddleware(
            handwritten(body=(b"data: a\n\n", b"", b"data: b\n\n")), keepalive=1e-9
        ),
        lambda: StreamMiddleware(
            lazy(body=(b"data: a\n\n", b"", b"data: b\n\n")), keepalive=1e-9
        ),
    ],
    ids=["response", "middleware", "lazy"],
)
def test_comments_are_lines_for_those_who_ask_for_events(make, headers, is_named):
    """A wildcard asks for anything; a q of 0 refuses. Nobody here gets a ``retry:``."""
    body = get(make(), headers=headers).data
    blank = b"" if is_named else b"\n"
    assert body.replace(b": ok\n" + blank, b"", 1) == b"".join(
        (b"data: a\n\n: keepalive\n", blank, b"data: b\n\n")
    )


def test_encoded_streams_get_nothing_added():
    """Under a Content-Encoding of the user's no comment and no end are written."""
    response = SSEResponse([b"\x1f\x8b"], headers={"Content-Encoding": "gzip"})
    assert get(response, headers=ASK).data == b"\x1f\x8b"
    app = handwritten([("Content-Encoding", "gzip")], [b"\x1f\x8b"])
    assert get(StreamMiddleware(app)).data == b"\x1f\x8b"


def handwritten(headers=(), body=(b"data: a\n\n",), content_type="text/event-stream"):
    """An application that knows nothing of us."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", content_type), *headers])
        return iter(body) if not callable(body) else body(environ)

    return app


def lazy(headers=(), body=(b"data: a\n\n",), content_type="text/event-stream"):
    """The same, calling start_response in its first step."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", content_type), *headers])
        yield from body

    return app


@pytest.mark.parametrize("app", [handwritten, lazy])
@pytest.mark.parametrize(
    ("content_type", "opening"),
    [
        ("text/event-stream", b": ok\n\n"),
        ("Text/Event-Stream; charset=utf-8", b": ok\n\n"),
        ("application/x-ndjson", b""),
        ("application/ndjson", b""),
        ("application/jsonl", b""),
        ("application/x-jsonlines; charset=utf-8", b""),
    ],
)
def test_the_middleware_finds_streams(app, content_type, opening):
    """By their media type, whenever start_response is called."""
    answer = get(
        StreamMiddleware(app(body=(b"a", b"", b"b"), content_type=content_type))
    )
    assert answer.data == opening + b"ab"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Cache-Control"] == "no-cache, no-transform"


@pytest.mark.parametrize("app", [handwritten, lazy])
@pytest.mark.parametrize(
    ("headers", "content_type"),
    [
        ([], "text/html"),
        ([("Content-Length", "1")], "text/event-stream"),
    ],
)
def test_the_middleware_leaves_others_alone(app, headers, content_type):
    """Bodies of a known length and other types pass as they are."""
    inner = app(headers, (b"a",), content_type)
    answer = get(StreamMiddleware(inner))
    assert answer.data == b"a"
    assert "X-Accel-Buffering" not in answer.headers


def test_the_middleware_keeps_the_users_headers():
    """What the application says about caching stays."""
    app = handwritten([("Cache-Control", "no-store")])
    assert get(StreamMiddleware(app)).headers["Cache-Control"] == "no-store"


def test_the_middleware_leaves_file_wrappers_alone():
    """The server must get the very object, to send the file by itself."""

    class Wrapper:
        def __init__(self, file):
            self.file = file

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"data: a\n\n"))

    environ = {**create_environ(), "wsgi.file_wrapper": Wrapper}
    body = StreamMiddleware(app)(environ, lambda status, headers, exc_info=None: None)
    assert isinstance(body, Wrapper)


def test_errors_before_the_head_reach_the_server():
    """A lazy application that fails before start_response gets the server's 500."""

    def app(environ, start_response):
        raise LookupError("early")
        yield

    with pytest.raises(LookupError, match="early"):
        run_wsgi_app(StreamMiddleware(app), create_environ())


def test_an_error_in_the_step_of_the_head_is_no_end(caplog):
    """A lazy application that fails before its first chunk has failed, not finished."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        raise LookupError("early")
        yield

    body, _, _ = run_wsgi_app(StreamMiddleware(app), create_environ())
    with pytest.raises(LookupError, match="early"):
        list(body)
    (record,) = caplog.records
    assert record.exc_info[1].args == ("early",)


@pytest.mark.parametrize("app", [handwritten, lazy])
def test_the_middleware_passes_exc_info(app):
    """A second start_response with exc_info replaces the first one's head."""
    calls = []

    def failing(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        try:
            raise LookupError("late")
        except LookupError:
            import sys

            start_response("500 Oops", [("Content-Type", "text/plain")], sys.exc_info())
        return [b"oops"]

    def start_response(status, headers, exc_info=None):
        calls.append((status, exc_info is not None))

    body = StreamMiddleware(failing)(create_environ(), start_response)
    assert list(body) == [b"oops"]
    assert calls == [("200 OK", False), ("500 Oops", True)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SSEResponse([b'{"a":1}', b'{"a":2}']),
        lambda: StreamMiddleware(handwritten(body=[b'{"a":1}'])),
        lambda: StreamMiddleware(lazy(body=[b'{"a":1}'])),
        lambda: SSEResponse([b"data: a\n\n", b"event: e\ndata:", b"b\n", b"\n"]),
        lambda: SSEResponse([b"\x1f\x8b"], headers={"Content-Encoding": "gzip"}),
        lambda: NDJSONResponse([b'{"a":1}']),
    ],
    ids=["response", "middleware", "lazy", "framed", "encoded", "lines"],
)
def test_bytes_that_fire_nothing_are_warned_of(make, request, caplog, own_record):
    """Bytes that no client takes for an event are passed, and told of once."""
    assert get(make(), headers=ASK).data
    is_told = request.node.callspec.id in ("response", "middleware", "lazy")
    assert [r.levelname for r in caplog.records] == ["WARNING"] * is_told
    for record in caplog.records:
        assert record.message.startswith("GET '/' yields bytes")
        assert "b'data: ...\\n\\n'" in record.message
        assert '{"a"' not in record.message  # never what is sent


def test_text_that_was_framed_by_hand_is_warned_of(caplog, own_record):
    """A recipe's `yield f"data: {x}\\n\\n"` sends "data:", too: told of once."""
    assert get(SSEResponse(["data: a\n\n"] * 2), headers=ASK).data
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("GET '/' yields text that is an event already")
    assert "Yield the data alone" in record.message


def test_the_middleware_twice_is_once():
    """Installing it twice changes nothing."""
    app = StreamMiddleware(StreamMiddleware(handwritten()))
    assert get(app).data == b": ok\n\ndata: a\n\n"


def test_the_middleware_knows_what_was_written():
    """After an application's own write() no comment falls into its event."""
    sent = []

    def app(environ, start_response):
        write = start_response("200 OK", [("Content-Type", "text/event-stream")])
        write(b"data: a\n")
        return [b"data: b\n\n"]

    def start_response(status, headers, exc_info=None):
        return sent.append

    body = StreamMiddleware(app)(create_environ(), start_response)
    assert b"".join(sent) + b"".join(body) == b"data: a\ndata: b\n\n"


def test_an_empty_write_is_no_beginning():
    """It may have sent the head: the stream's opening follows all the same."""
    sent = []

    def app(environ, start_response):
        write = start_response("200 OK", [("Content-Type", "text/event-stream")])
        write(b"")
        return [b"data: a\n\n"]

    def start_response(status, headers, exc_info=None):
        return sent.append

    body = StreamMiddleware(app)(create_environ(), start_response)
    assert b"".join(sent) + b"".join(body) == b": ok\n\ndata: a\n\n"


@pytest.mark.parametrize("mark", [b"\n\n", b"\r\n\r\n"])
def test_the_middleware_knows_what_was_written_in_pieces(mark):
    """An event whose end came byte by byte is whole: `retry:` may follow it."""
    sent = []

    def app(environ, start_response):
        write = start_response("200 OK", [("Content-Type", "text/event-stream")])
        write(b"data: a")
        for number in mark:
            write(bytes([number]))
        return broken()

    def broken():
        raise LookupError("broken")
        yield

    def start_response(status, headers, exc_info=None):
        return sent.append

    body = StreamMiddleware(app)(create_environ(headers=ASK), start_response)
    with pytest.raises((ConnectionResetError, LookupError)):
        sent.extend(body)
    assert re.fullmatch(b"data: a%b(retry: [0-9]+\n\n)" % mark, b"".join(sent))


def test_a_sub_request_does_not_use_up_the_middleware():
    """An application that runs another one for its own use is wrapped still."""

    def app(environ, start_response):
        body, _, _ = run_wsgi_app(SSEResponse(["inner"]), environ)
        inner = b"".join(body)
        body.close()
        assert inner == b": ok\n\ndata: inner\n\n"
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return [inner]

    answer = get(StreamMiddleware(app))
    assert answer.data == b": ok\n\n: ok\n\ndata: inner\n\n"
    assert answer.headers["X-Accel-Buffering"] == "no"


def test_a_wrapped_body_is_still_connected(caplog):
    """A hook that wraps the body changes nothing about the life of the stream."""

    def source():
        yield "a"
        raise RuntimeError("broken")

    response = SSEResponse(source())
    response.response = (chunk for chunk in response.response)
    body, _, _ = run_wsgi_app(StreamMiddleware(response), create_environ("/events"))
    with pytest.raises(RuntimeError, match="broken"):
        list(body)
    body.close()
    assert "the source of GET '/events' failed" in caplog.text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dumps": 5}, "dumps must be callable, got 5"),
        ({"status": 2.5}, "status must be int or str"),
        ({"status": True}, "status must be int or str"),
        ({"status": "abc"}, "status must be an HTTP status"),
        ({"status": 99999}, "status must be an HTTP status"),
        ({"status": 101}, "status must be an HTTP status"),
        ({"status": "200 OK\r\nX: y"}, "status must be an HTTP status"),
        ({"headers": "abc"}, "headers must be a mapping or pairs"),
        ({"headers": {"X\r\nY": "a"}}, "headers must have HTTP tokens as names"),
        ({"headers": {"X": "a\r\nY: b"}}, "headers must not contain CR"),
        ({"headers": {"X": b"a"}}, "headers must have values of str, int or None"),
        ({"headers": {5: "a"}}, "headers must have HTTP tokens as names"),
    ],
)
def test_bad_arguments_are_refused(options, error):
    """With a message that names the argument."""
    with pytest.raises((TypeError, ValueError), match=error):
        NDJSONResponse([], **options)


def test_bad_options_of_sse_are_refused_where_it_decorates():
    """Not in every request."""
    with pytest.raises(ValueError, match="end must be"):
        sse(end="never")
    with pytest.raises(TypeError, match="content_type must be str"):
        StreamResponse([], content_type=None)
    with pytest.raises(TypeError, match="callback must be callable"):
        SSEResponse([]).call_on_close(5)


def test_the_middleware_closes_once():
    """The application's iterable is closed exactly once, lazy or not."""
    for content_type in ("text/event-stream", "text/html"):
        source = Closing([b"a"])

        def app(environ, start_response, source=source, type=content_type):
            start_response("200 OK", [("Content-Type", type)])
            return source

        body, _, _ = run_wsgi_app(StreamMiddleware(app), create_environ())
        list(body)
        body.close()
        assert source.closed == 1


def test_str_chunks_under_the_middleware_are_the_applications_error(caplog):
    """PEP 3333 wants bytes: text is thrown at the generator that yields it."""
    body, _, _ = run_wsgi_app(
        StreamMiddleware(handwritten(body=["text"])), create_environ()
    )
    with pytest.raises(TypeError, match="a chunk must be"):
        list(body)
    assert "a chunk must be" in caplog.text


def test_the_middleware_wants_an_application():
    """Not the framework's name, or None."""
    for handover in (True, "auto", 0):
        with pytest.raises(ValueError, match="handover must be False or None"):
            StreamMiddleware(print, handover=handover)
    with pytest.raises(TypeError, match="app must be a WSGI application, got None"):
        StreamMiddleware(None)


def test_a_response_that_was_made_may_go_out_in_another():
    """Its chunks pass through that one, as those of a middleware for bodies do."""

    def app(environ, start_response):
        made = SSEResponse(["a"])
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return (chunk for chunk in made.response)

    response = Client(StreamMiddleware(app)).get("/")
    assert response.status_code == 200
    assert b"data: a\n\n" in response.data
