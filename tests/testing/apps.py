"""One application for the tests of the kit, in several frameworks."""

import asyncio
import queue
import threading
import time

import django
import flask
from django.conf import settings
from django.http import StreamingHttpResponse
from django.urls import path

import syncstream
import syncstream.django

hub = syncstream.Hub("memory:")
ended = queue.Queue()
"""What the sources say when they end: how, and in which thread."""


def ticks():
    """Count for ever, and say how it ends."""
    try:
        yield from range(10**9)
    except BaseException as error:
        ended.put((type(error).__name__, threading.get_ident()))
        raise


def failing():
    yield "first"
    raise LookupError("no such row")


def busy():
    while True:
        sum(range(100))


def told():
    """Wait for ever, and say how it ends."""
    try:
        yield "first"
        syncstream.sleep(60)
    except BaseException as error:
        ended.put((type(error).__name__, threading.get_ident()))
        raise


async def asleep():
    yield "first"
    await asyncio.sleep(60)


def locked():
    lock = threading.Lock()
    with lock:
        lock.acquire()


def then(wait):
    yield "first"
    wait()
    yield "second"


SOURCES = {
    "three": lambda: iter("abc"),
    "ticks": ticks,
    "failing": failing,
    "told": told,
    "asleep": asleep,
    "news": lambda: hub.subscribe("news"),
    "waits": lambda: then(lambda: syncstream.sleep(60)),
    "sleeps": lambda: then(lambda: time.sleep(60)),
    "blocks": lambda: then(lambda: queue.SimpleQueue().get()),
    "locks": lambda: then(locked),
    "loops": lambda: then(busy),
}


def framed(items):
    for item in items:
        yield f"data: {item}\n\n".encode()


flask_app = flask.Flask(__name__)


@flask_app.get("/<name>")
def stream(name):
    return syncstream.SSEResponse(SOURCES[name]())


@flask_app.get("/from/<int:first>")
def resumable(first):
    """Count on from the id that the client has."""
    last = syncstream.last_event_id(flask.request)
    first = first if last is None else int(last) + 1
    return syncstream.SSEResponse(
        syncstream.Event(n, id=n) for n in range(first, first + 3)
    )


@flask_app.get("/raw")
def raw():
    return flask.Response(b"x" * size for size in (1, 100_000, 3, 1_000_000))


@flask_app.get("/echoed-id")
def echoed_id():
    return syncstream.last_event_id(flask.request)


@flask_app.post("/login")
def login():
    flask.session["who"] = flask.request.get_json()["who"]
    return "", 204


@flask_app.get("/whoami")
def whoami():
    return syncstream.SSEResponse([flask.session["who"], flask.request.args["q"]])


@flask_app.get("/quiet")
def quiet():
    return syncstream.SSEResponse(then(lambda: syncstream.sleep(60)), keepalive=0.05)


@flask_app.get("/slow")
def slow():
    time.sleep(60)


@flask_app.get("/broken")
def broken():
    raise LookupError("no such view")


@flask_app.get("/untidy")
def untidy():
    def rows():
        try:
            yield b"data: 1\n\n"
        finally:
            raise LookupError("no such file")

    return flask.Response(rows(), mimetype="text/event-stream")


flask_app.secret_key = "tests"


@flask_app.get("/plain/<name>")
def plain(name):
    return flask.Response(framed(SOURCES[name]()), mimetype="text/event-stream")


def django_stream(request, name):
    return syncstream.django.SSEResponse(SOURCES[name]())


def django_plain(request, name):
    return StreamingHttpResponse(framed(SOURCES[name]()))


async def _asynchronous():
    yield b"never"


urlpatterns = [
    path("asynchronous", lambda request: StreamingHttpResponse(_asynchronous())),
    path("<name>", django_stream),
    path("plain/<name>", django_plain),
]


def configure_django():
    """Configure Django, unless another test's application has."""
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="tests")
        django.setup()
