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
