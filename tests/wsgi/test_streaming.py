"""``@streaming``: what a view may return, in each framework."""

import asyncio
import contextvars
import threading
import types
import warnings

import bottle
import falcon
import flask
import pytest
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import RequestFactory, override_settings
from django.urls import path
from werkzeug.test import Client

import syncstream
import syncstream.bottle
import syncstream.django
import syncstream.falcon
from syncstream import (
    NDJSONResponse,
    SSEResponse,
    StreamResponse,
    sleep,
    sse,
    streaming,
)
from tests.apps import django_app
from tests.support import pairs as in_pairs
from tests.support.pairs import Line, Threads, leave, tcp_pair
from tests.support.waits import TIMEOUT
from tests.wsgi.asking import ASK, get

assert callable(django_app.app)  # it configures Django


def by_flask(view):
    app = flask.Flask("test")
    app.add_url_rule("/", view_func=view)
    return app


def by_django(view):
    urls = types.ModuleType("urls")
    urls.urlpatterns = [path("", view)]
    handler = WSGIHandler()

    def app(environ, start_response):
        with override_settings(ROOT_URLCONF=urls):
            return handler(environ, start_response)

    return app


def by_bottle(view):
    app = bottle.Bottle()
    app.get("/", callback=view)
    return app


def by_pyramid(view):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources
        from pyramid.config import Configurator
    with Configurator() as config:
        config.include("syncstream.pyramid")
        config.add_route("root", "/")
        config.add_view(view, route_name="root")
        return config.make_wsgi_app()


class Resource:
    def __init__(self, view):
        self.on_get = self.on_head = view


def by_falcon(view):
    app = falcon.App()
    app.add_route("/", Resource(view))
    return app


FRAMEWORKS = {
    "flask": (by_flask, streaming),
    "django": (by_django, syncstream.django.streaming),
    "bottle": (by_bottle, syncstream.bottle.streaming),
    "pyramid": (by_pyramid, streaming),
    "falcon": (by_falcon, syncstream.falcon.streaming),
    "wsgi": (lambda view: view, streaming),
}


@pytest.fixture(params=FRAMEWORKS)
def serve(request):
    """Return a function: a view, and options of the decorator, to an application."""
    mount, decorate = FRAMEWORKS[request.param]

    def serve(view, **options):
        return mount(decorate(**options)(view) if options else decorate(view))

    return serve


def numbers():
    for i in range(3):
        yield f"Number: {i}\n"


async def numbers_later():
    for i in range(3):
        yield f"Number: {i}\n"
        await asyncio.sleep(0)


def a_generator(*args):
    yield from numbers()


async def an_async_generator(*args):
    async for line in numbers_later():
        yield line


async def a_coroutine(*args):
    await asyncio.sleep(0)
    return numbers_later()


async def a_coroutine_with_a_status(*args):
    return 201, numbers_later(), [("X-A", "1")]


async def of_a_plain_body(*args):
    return numbers()


ANSWERS = [
    (a_generator, 200),
    (an_async_generator, 200),
    (a_coroutine, 200),
    (a_coroutine_with_a_status, 201),
    (of_a_plain_body, 200),
    (lambda *args: numbers(), 200),
    (lambda *args: numbers_later(), 200),
    (lambda *args: map(str, numbers()), 200),
    (lambda *args: (202, numbers()), 202),
    (lambda *args: (202, numbers_later(), {"X-A": "1"}), 202),
    (lambda *args: (202, numbers(), (("X-A", "1"),)), 202),
    (lambda *args: (202, numbers(), iter([("X-A", "1")])), 202),
    (lambda *args: ("202 Accepted", numbers(), [("X-A", "1")]), 202),
    (lambda *args: (404, "".join(numbers())), 404),
    (lambda *args: (404, "".join(numbers()).encode(), [("X-A", "1")]), 404),
    (lambda *args: ("404 Not Found", "".join(numbers()), {}), 404),
    (lambda *args: ("404 Not Found", "".join(numbers()).encode()), 404),
    (lambda *args: ("404", "".join(numbers()), [("X-A", "1")]), 404),
    (lambda *args: (numbers(), 202), 202),
    (lambda *args: (numbers(), None, {"X-A": "1"}), 200),
    (lambda *args: (numbers_later(), None), 200),
    (lambda *args: (numbers(), {"X-A": "1"}), 200),
    (lambda *args: (numbers_later(), "202 Accepted", [("X-A", "1")]), 202),
]


@pytest.mark.parametrize(("view", "status"), ANSWERS)
def test_what_a_view_may_return(serve, view, status):
    """The chunks, HTML by default, the status, and the headers where they are given."""
    answer = get(serve(view))
    assert answer.data == b"Number: 0\nNumber: 1\nNumber: 2\n"
    assert answer.status_code == status
    assert answer.content_type == "text/html; charset=utf-8"
    assert answer.headers.get("X-A", "1") == "1"
    assert answer.headers["X-Accel-Buffering"] == "no"
    answer.close()


def test_headers_are_sent(serve):
    """They win over the defaults, but the connection is the server's."""
    headers = [
        *(("Content-Type", "text/csv"), ("X-A", "1")),
        *(("Connection", "keep-alive"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")),
    ]
    with get(serve(lambda *args: (200, numbers(), headers))) as answer:
        assert answer.content_type == "text/csv"
        assert answer.headers["X-A"] == "1"
        assert "Connection" not in answer.headers
        cookies = answer.headers.getlist("Set-Cookie")
        assert [cookie.split(";")[0].strip() for cookie in cookies] == ["a=1", "b=2"]


def test_options_are_those_of_a_raw_stream(serve):
    """Its media type is for a body without one of its own."""
    with get(serve(a_generator, content_type="text/plain", drain=0)) as answer:
        assert answer.content_type == "text/plain"
    view = an_async_generator
    with get(serve(view, content_type="text/event-stream"), headers=ASK) as answer:
        assert answer.data.startswith(b": ok\nNumber: 0\n")


@pytest.mark.parametrize("source", ["sync", "async"])
def test_an_event_stream(serve, source):
    """Its text is framed already; all else is as in any event stream."""

    def framed():
        yield "event: a\ndata: 1\n\n"
        yield b"data: 2\n\n"
        yield {"data": 3}

    async def framed_later():
        for item in framed():
            yield item

    make = framed if source == "sync" else framed_later
    headers = [("Content-Type", "text/event-stream")]
    answer = get(serve(lambda *args: (200, make(), headers)), headers=ASK)
    assert answer.data == (
        b": ok\nevent: a\ndata: 1\n\ndata: 2\n\ndata: 3\n\nid: syncstream-end\n\n"
    )
    assert answer.content_type == "text/event-stream"
    answer.close()


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204)])
def test_without_a_body_nothing_starts(serve, method, status):
    """The source is closed, unstarted."""
    started = []

    def body():
        started.append(True)
        yield "a"

    async def body_later():
        started.append(True)
        yield "a"

    for make in (body, body_later):
        app = serve(lambda *args, make=make: (status, make(), {"Content-Type": None}))
        # Not linted: for 204 it wants a Content-Length, which RFC 9110 §8.6 forbids.
        with Client(app).open("/", method=method) as answer:
            assert (answer.status_code, answer.data) == (status, b"")
    assert started == []


def test_what_a_framework_makes_itself():
    """It gets what the view has returned, untouched."""
    app = flask.Flask("test")
    made = flask.Response("made")
    results = {
        "text": ("text", 200, b"text"),
        "pair": (("text", 201), 201, b"text"),
        "looks-like-a-status": (("200 OK", 201), 201, b"200 OK"),
        "two-lines": (("500 cats", "201 Created"), 201, b"500 cats"),
        "twice": (("404 Not Found", "404 Not Found"), 404, b"404 Not Found"),
        "line-and-headers": (("200 OK", {"X-A": "1"}), 200, b"200 OK"),
        "triple": (("text", 201, {"X-A": "1"}), 201, b"text"),
        "json": ({"a": 1}, 200, b'{"a":1}\n'),
        "list": ([1], 200, b"[1]\n"),
        "response": (made, 200, b"made"),
        "redirect": (flask.redirect("/text"), 302, None),
        "events": (SSEResponse(["a"]), 200, b": ok\n\ndata: a\n\n"),
    }

    @app.get("/<name>")
    @streaming
    def view(name):
        return results[name][0]

    for name, (_, status, data) in results.items():
        with app.test_client().get(f"/{name}") as answer:
            assert answer.status_code == status
            assert data is None or answer.data == data
    app.testing = True
    results["bool"] = ((True, numbers()),)
    with pytest.raises(TypeError, match="valid response"):
        app.test_client().get("/bool")


def test_django_makes_its_own(serve):
    """Its HttpResponse is a view's result as ever."""
    view = syncstream.django.streaming(lambda request: HttpResponse("made", status=201))
    with get(by_django(view)) as answer:
        assert (answer.status_code, answer.data) == (201, b"made")


@pytest.mark.parametrize("body", [{"a": 1}, None, ["a"], 5, SSEResponse([])])
def test_a_status_with_another_body(body):
    """No framework takes it: the error says what to return."""
    app = by_flask(streaming(lambda: (200, body)))
    app.testing = True
    with pytest.raises(TypeError, match=f"got {type(body).__name__}: return the fr"):
        app.test_client().get("/")


@pytest.mark.parametrize("status", [99, 700, "200 O\nK"])
def test_a_status_that_is_none(status):
    """It is an error, as in the response's own arguments."""
    app = by_flask(streaming(lambda: (status, numbers())))
    app.testing = True
    with pytest.raises(ValueError, match="status must be an HTTP status"):
        app.test_client().get("/")


def test_wrong_options_fail_at_once():
    """When the view is decorated."""
    with pytest.raises(ValueError, match="send_timeout"):
        streaming(send_timeout=0)
    with pytest.raises(TypeError, match="content_type must be str"):
        streaming(content_type=None)
    with pytest.raises(TypeError, match="takes a view function, got 5"):
        streaming(5)


def test_django_needs_its_own():
    """The error names the import."""
    view = streaming(lambda request: numbers())
    with pytest.raises(TypeError, match=r"from syncstream\.django import streaming"):
        view(RequestFactory().get("/"))


def test_a_request_in_a_body():
    """Flask's request is there in a plain body, and in an asynchronous one."""
    app = flask.Flask("test")

    @app.get("/plain")
    @streaming
    def plain():
        yield flask.request.args["word"]

    @app.get("/later")
    @streaming
    async def later():
        word = flask.request.args["word"]

        async def body():
            yield word + flask.request.args["word"]

        return body()

    for name, data in {"plain": b"hi", "later": b"hihi"}.items():
        with app.test_client().get(f"/{name}?word=hi") as answer:
            assert answer.data == data


def test_an_asynchronous_view_fails(caplog):
    """Its error is the view's: the framework answers it."""
    app = flask.Flask("test")

    @app.get("/")
    @streaming
    async def view():
        await asyncio.sleep(0)
        flask.abort(410)

    with app.test_client().get("/") as answer:
        assert answer.status_code == 410


variable = contextvars.ContextVar("variable", default="unset")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_context_variables(kind):
    """The view has its caller's, and its body has those that the view has set."""

    @streaming
    async def view():
        seen = variable.get()
        variable.set("view's")

        def body():
            yield f"{seen}, {variable.get()}"

        async def body_later():
            yield f"{seen}, {variable.get()}"

        return body() if kind == "sync" else body_later()

    def app(environ, start_response):
        variable.set("caller's")
        return view()(environ, start_response)

    def answer():
        with get(app) as answer:
            return answer.data

    assert contextvars.copy_context().run(answer) == b"caller's, view's"


def test_an_asynchronous_view_returns_a_response():
    """Any of ours: ``async def`` needs nothing else."""

    async def data():
        for i in range(1, 3):
            await asyncio.sleep(0)
            yield {"data": i}

    @streaming
    async def view():
        return SSEResponse(data())

    with get(by_flask(view), headers=ASK) as answer:
        assert b"data: 1\n\ndata: 2\n\n" in answer.data


def of_the_request(request):
    yield request.path


def of_the_context(context, request):
    yield request.path


@pytest.mark.parametrize("decorate", [sse, streaming])
@pytest.mark.parametrize("view", [of_the_request, of_the_context])
def test_pyramid_sees_a_views_arguments(decorate, view):
    """It calls each with those that it takes."""
    with get(by_pyramid(decorate(view))) as answer:
        assert answer.status_code == 200
        assert b"/" in answer.data


# MicroPie's handlers, as its documentation has them, and without ``async``.


class AsyncApp:
    async def numbers(self, *request):
        async def generator():
            for i in range(5):
                yield f"Number: {i}\n"
                await asyncio.sleep(0)

        return generator()

    async def events(self, *request):
        async def event_generator():
            for i in range(2):
                yield f"data: Random number: {i}\n\n".encode()
                await asyncio.sleep(0)

        return 200, event_generator(), [("Content-Type", "text/event-stream")]

    async def missing(self, *request):
        return 404, "404 Not Found"


class PlainApp:
    def numbers(self, *request):
        def generator():
            for i in range(5):
                yield f"Number: {i}\n"
                sleep(0)

        return generator()

    def events(self, *request):
        def event_generator():
            for i in range(2):
                yield f"data: Random number: {i}\n\n".encode()
                sleep(0)

        return 200, event_generator(), [("Content-Type", "text/event-stream")]

    def missing(self, *request):
        return 404, "404 Not Found"


@pytest.mark.parametrize("app", [AsyncApp, PlainApp])
def test_micropies_handlers(serve, app):
    """They are methods, and do in each framework what they do there."""
    with get(serve(app().numbers)) as answer:
        assert answer.data == b"".join(b"Number: %d\n" % i for i in range(5))
        assert answer.content_type == "text/html; charset=utf-8"
    with get(serve(app().events)) as answer:
        numbers = b"data: Random number: 0\n\ndata: Random number: 1\n\n"
        assert answer.data == b": ok\n\n" + numbers
        assert answer.content_type == "text/event-stream"
    with get(serve(app().missing)) as answer:
        assert (answer.status_code, answer.data) == (404, b"404 Not Found")


@pytest.mark.parametrize("decorate", [streaming, syncstream.django.streaming])
def test_a_method_is_decorated_in_its_class(decorate):
    """``self`` is an argument like others."""

    class App:
        word = "method"

        @decorate
        async def view(self):
            return 200, iter([self.word]), [("Content-Type", "text/plain")]

    response = contextvars.Context().run(App().view)
    body = getattr(response, "streaming_content", None) or response.response
    assert b"".join(body) == b"method"
    response.close()


def test_micropies_generator_is_cancelled():
    """It may swallow that, and end."""
    story, waits = [], threading.Event()

    @streaming
    async def events():
        async def event_generator():
            try:
                while True:
                    yield "data: a\n\n"
                    asyncio.get_running_loop().call_soon(waits.set)
                    await asyncio.sleep(TIMEOUT)
            except asyncio.CancelledError:
                story.append("Client disconnected")

        return 200, event_generator(), [("Content-Type", "text/event-stream")]

    with tcp_pair() as (server, client):
        stream = events().response
        stream.connect(Line(server))
        join = Threads().start(lambda: in_pairs.serve(stream))
        assert waits.wait(TIMEOUT)
        leave(client)
        assert join() == [b": ok\n\n", b"data: a\n\n"]
    assert story == ["Client disconnected"]


# Flask's own order, for responses.

MAKE = [SSEResponse, NDJSONResponse, StreamResponse]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("source", ["sync", "async"])
def test_flasks_tuples_with_our_responses(make, source):
    """The status and the headers are the tuple's, the rest is the response's."""
    body = numbers if source == "sync" else numbers_later
    headers = {"X-A": "1", "Cache-Control": "no-store"}

    def view():
        return make(body()), 201, headers

    plain = get(make(body()), headers=ASK)
    with get(by_flask(view), headers=ASK) as answer:
        assert answer.status_code == 201
        assert answer.headers["X-A"] == "1"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.content_type == plain.content_type
        assert answer.data == plain.data
        assert (b"id: syncstream-end" in plain.data) is (make is SSEResponse)


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204)])
def test_flasks_tuples_without_a_body(make, method, status):
    """The source is closed, and has not been started."""
    story = []

    class Source:
        def __iter__(self):
            story.append("started")
            return iter("a")

        def close(self):
            story.append("closed")

    app = by_flask(lambda: (make(Source()), status))
    with app.test_client().open("/", method=method) as answer:
        assert (answer.status_code, answer.data) == (status, b"")
        assert "Content-Length" not in answer.headers
    assert story == ["closed"]
