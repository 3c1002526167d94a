"""A WSGI application that clients of every kind come to: tests/soak/streams.py.

/SOURCE?n=5&wait=sleep&keepalive=1&send_timeout=2 is an `SSEResponse`, /hand/SOURCE a
generator by hand under `StreamMiddleware`. Each source is counted when it begins and
when its `finally` runs; /state tells what this process holds.
"""

import gc
import itertools
import queue
import sys
import threading
import time
from urllib.parse import parse_qs

from syncstream import SSEResponse, StreamMiddleware, current_stream, sleep
from syncstream.runtime.watch import watch
from syncstream.streams.stream import Stream
from tests.apps.life import plain, state

PAYLOAD = "x" * 16000


class Tally:
    """A number that any thread may add one to. (A step is one call in C.)"""

    def __init__(self):
        self._steps, self._looks = itertools.count(), itertools.count()

    def add(self):
        next(self._steps)

    def total(self):
        return next(self._steps) - next(self._looks)


begun, ended = Tally(), Tally()


def counted(source):
    """Count a source's beginnings and ends."""

    def run(query):
        begun.add()
        try:
            yield from source(query)
        finally:
            ended.add()

    return run


@counted
def ticks(query):
    """Yield so many numbers, a little apart."""
    for n in range(int(query["n"])):
        yield n
        sleep(0.05)


@counted
def idle(query):
    """Yield once, then wait for what never comes."""
    yield "waiting"
    wait = query["wait"]
    if wait == "sleep":
        sleep(3600)
    elif wait == "queue":
        current_stream().wait(queue.Queue())
    else:
        current_stream().wait(threading.Event())


@counted
def busy(query):
    """Block, as far as we know, so that keepalives come between the yields."""
    while True:
        yield "busy"
        time.sleep(0.3)


@counted
def flood(query):
    """Yield as fast as it goes."""
    while True:
        yield PAYLOAD


SOURCES = {"ticks": ticks, "idle": idle, "busy": busy, "flood": flood}


def hand_written(environ, start_response):
    """The application that `StreamMiddleware` wraps."""
    name, query = asked(environ)
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    return (f"data: {item}\n\n".encode() for item in SOURCES[name](query))


def asked(environ):
    query = {name: v[0] for name, v in parse_qs(environ["QUERY_STRING"]).items()}
    return environ["PATH_INFO"].rpartition("/")[2], query


wrapped = StreamMiddleware(hand_written, keepalive=1, send_timeout=2)


def app(environ, start_response):
    name, query = asked(environ)
    if name == "health":
        return plain("ok", start_response)
    if name == "state":
        return plain(repr(held()), start_response)
    if environ["PATH_INFO"].startswith("/hand/"):
        return wrapped(environ, start_response)
    life = {key: float(query[key]) for key in ("keepalive", "send_timeout")}
    return SSEResponse(SOURCES[name](query), **life)(environ, start_response)


def held():
    """Return what this process holds; the garbage is collected first."""
    gc.collect()
    objects = gc.get_objects()
    greenlet = getattr(sys.modules.get("greenlet"), "greenlet", ())
    alive = [item for item in objects if isinstance(item, greenlet) and not item.dead]
    mine = watch()
    return {
        **state(),
        "begun": begun.total(),
        "ended_sources": ended.total(),
        "streams": sum(isinstance(item, Stream) for item in objects),
        "greenlets": len(alive),
        "watched": len(mine.watched),
        "timers": sum(timer.callback is not None for _, _, timer in mine.timers),
    }
