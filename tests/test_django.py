"""Django: under ASGI a clear error, without a request a plain response."""

import asyncio
import datetime
import decimal
import io
import json
import types
import uuid
from contextvars import Context

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.http import JsonResponse, StreamingHttpResponse
from django.test import Client, RequestFactory, override_settings
from django.urls import path
from django.utils.functional import lazystr
from django.utils.timezone import get_fixed_timezone
from django.views.decorators.gzip import gzip_page

from syncstream import StreamMiddleware, current_stream
from syncstream.django import NDJSONResponse, SSEResponse, sse
from syncstream.runtime.process import process
from tests.apps import django_app


@pytest.fixture(scope="module", autouse=True)
def _django():
    """The application under test has configured Django."""
    assert callable(django_app.app)


@pytest.fixture
def client():
    return Client()


@pytest.fixture(autouse=True)
def _control(monkeypatch):
    """There is no test on the control line here."""
    monkeypatch.setattr("tests.apps.sources.note", lambda key, value: None)


def test_the_test_client_reads_a_stream(client):
    """Django's own test client gets the body, cookies and headers."""
    response = client.get("/decorated/three?key=k")
    assert b"".join(response.streaming_content) == (
        b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"
    )
    assert response["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response["X-After"] == "after"
    response.close()


def test_without_a_request(caplog):
    """A response for a RequestFactory's request streams, too, and says what it lacks.

    No request is invented for it.
    """
    process().said.clear()
    streams = []

    @sse
    def view(request):
        streams.append(current_stream())
        yield 0
        yield 1

    def answer():
        response = view(RequestFactory().get("/"))
        assert isinstance(response, SSEResponse)
        assert response.streaming
        assert b"".join(response).endswith(b"data: 1\n\n")
        assert not streams[0].has_connection
        assert b"".join(SSEResponse(["a"])) == b": ok\n\ndata: a\n\n"

    # An earlier test may have left its request unfinished in this thread's context.
    Context().run(answer)
    assert caplog.text.count("its request was not found") == 1


def test_asgi_is_a_clear_error(caplog):
    """Under ASGI the view fails, in words that say what to do."""
    sent = []

    async def request():
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/decorated/three",
            "query_string": b"key=k",
            "headers": [(b"host", b"localhost")],
        }
        asked = False

        async def receive():
            nonlocal asked
            if asked:
                await asyncio.sleep(10)
            asked = True
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        await ASGIHandler()(scope, receive, send)

    asyncio.run(request())
    assert sent[0]["status"] == 500
    assert (
        "syncstream streams under WSGI, but this request runs under ASGI" in caplog.text
    )


def test_asynchronous_iteration_is_a_clear_error():
    """The last resort: whoever iterates it asynchronously is told why not."""
    response = SSEResponse([])
    with pytest.raises(RuntimeError, match="under WSGI"):
        aiter(response)
    response.close()


def test_what_a_middleware_changes_is_heeded():
    """A status without a body stops the source; hop-by-hop headers stay inside."""
    source = iter(["a"])
    response = SSEResponse(source, headers=[("Link", "<a>"), ("Link", "<b>")])
    response["Connection"] = "keep-alive"
    response.status_code = 204
    assert b"".join(response) == b""
    assert list(source) == ["a"]
    headers = dict(response.items())
    assert headers["Link"] == "<a>, <b>"
    assert "Connection" not in headers


def test_a_view_may_use_the_test_client(client):
    """The request within does not take the outer one's place."""
    environ = {"REQUEST_METHOD": "HEAD"}
    request_started.send(sender=None, environ=environ)
    assert client.get("/health").content == b"ok"
    response = SSEResponse(["a"])
    assert b"".join(response) == b""
    request_finished.send(sender=None)


def served(view, *, headers=None, middleware=False, of_django=()):
    """Return status line, headers and body of a request, as a server asks for it."""
    environ = {**RequestFactory().get("/", headers=headers).environ}
    environ["wsgi.input"] = io.BytesIO()  # of no test client
    begun = []

    def start_response(status, headers, exc_info=None):
        begun[:] = status, dict(headers)
        return lambda data: None

    with override_settings(ROOT_URLCONF=urls(view), MIDDLEWARE=of_django):
        app = WSGIHandler()
        app = StreamMiddleware(app) if middleware else app
        app_iter = app(environ, start_response)
        body = b"".join(app_iter)
        if hasattr(app_iter, "close"):
            app_iter.close()
    return (*begun, body)


def urls(view):
    """Return a URL configuration of one view, and of one for requests within."""
    module = types.ModuleType("urls")
    inner = path("inner", lambda request: SSEResponse(ids()))
    module.urlpatterns = [path("", view), inner]
    return module


def ids():
    """Yield the id that the client has come back with."""
    yield str(current_stream().last_event_id)


EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
END = b"id: syncstream-end\n\n"


@pytest.mark.parametrize("middleware", [False, True])
def test_a_body_in_a_new_response_is_still_one_stream(middleware):
    """It has its Last-Event-ID, one opening, and an end that browsers obey."""

    def view(request):
        body = SSEResponse(ids()).streaming_content
        chunks = (chunk for chunk in body)
        return StreamingHttpResponse(chunks, content_type="text/event-stream")

    headers = {**EVENT_SOURCE, "Last-Event-ID": "7"}
    status, _, body = served(view, headers=headers, middleware=middleware)
    assert status == "200 OK"
    assert body == b": ok\ndata: 7\n\n" + END
    headers["Last-Event-ID"] = "syncstream-end"
    status, _, body = served(view, headers=headers, middleware=middleware)
    assert body == b""
    assert status == ("204 No Content" if middleware else "200 OK")


@pytest.mark.parametrize("middleware", [False, True])
def test_a_response_of_a_request_within_answers_the_outer_one(middleware):
    """The view returns what Django's test client has got: its client is the outer's."""
    headers = {**EVENT_SOURCE, "Last-Event-ID": "7"}
    view = lambda request: Client().get("/inner")  # noqa: E731
    _, _, body = served(view, headers=headers, middleware=middleware)
    assert body == b": ok\ndata: 7\n\n" + END


@pytest.mark.parametrize("middleware", [False, True])
def test_a_response_that_is_kept_answers_one_request(middleware):
    """For the next one it is an error, not an empty stream that looks whole."""
    kept = SSEResponse(ids())
    assert served(lambda request: kept, middleware=middleware)[0] == "200 OK"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="answers one request"):
            served(lambda request: kept, middleware=middleware)


@pytest.mark.parametrize("how", ["decorated", "middleware", "own", "none"])
def test_who_compresses_a_stream_is_told(how, caplog):
    """A decorator or a middleware holds back events; a view's own encoding does not."""
    process().said.clear()

    def view(request):
        own = {"Content-Encoding": "gzip"} if how == "own" else {}
        return SSEResponse([b"data: a\n\n"], headers=own)

    shown = gzip_page(view) if how == "decorated" else view
    middleware = ["django.middleware.gzip.GZipMiddleware"] * (how == "middleware")
    _, headers, _ = served(
        shown, headers={"Accept-Encoding": "gzip"}, of_django=middleware
    )
    assert headers.get("Content-Encoding") == (None if how == "none" else "gzip")
    said = caplog.text.count("holds back the events of streams")
    assert said == (how in ("decorated", "middleware"))


WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)


@pytest.mark.parametrize(
    "value",
    [
        WHEN,
        WHEN.replace(tzinfo=datetime.timezone.utc),
        WHEN.replace(tzinfo=get_fixed_timezone(90)),
        WHEN.replace(microsecond=0),
        WHEN.date(),
        WHEN.time(),
        datetime.timedelta(days=1, seconds=2, microseconds=3),
        -datetime.timedelta(seconds=1),
        decimal.Decimal("1.50"),
        uuid.UUID(int=7),
        lazystr("hello"),
    ],
    ids=repr,
)
def test_values_are_json_as_in_djangos_own_response(value):
    """The same text that JsonResponse sends, in events and in lines."""
    expected = json.loads(JsonResponse({"value": value}).content)
    line = b"".join(NDJSONResponse([{"value": value}]).streaming_content)
    assert json.loads(line) == expected
    event = b"".join(SSEResponse([{"value": value}]).streaming_content)
    assert json.loads(event.partition(b"data: ")[2]) == expected


def test_a_time_with_a_zone_is_refused_as_by_django():
    """JSON has no text for it: a clear error, at the yield."""
    value = WHEN.time().replace(tzinfo=datetime.timezone.utc)
    with pytest.raises(ValueError, match="can't represent timezone-aware times"):
        list(NDJSONResponse([value]).streaming_content)


def test_an_encoder_of_the_applications_is_used_alone():
    """``dumps=`` decides about times, too."""
    response = NDJSONResponse([WHEN], dumps=lambda value: f'"{value:%Y}"')
    assert b"".join(response.streaming_content) == b'"2026"\n'
