"""A WSGI application for the life of a stream: waits, silence, floods, ends.

/KIND/SOURCE?key=KEY, and the options of `SSEResponse` in the query. KIND is "sse",
"ndjson" or "raw" for a response, "hand" for a generator by hand. Each source tells
when, how and where it has ended: ``{key}-ended`` is [time.monotonic(), exception, in
its own thread]. So does a subscriber, /sub?key=KEY; the last is then: it had been
handed over.
"""

import asyncio
import os
import queue
import signal
import threading
import time
from urllib.parse import parse_qs

import psutil
import requests

from syncstream import (
    Hub,
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
    sleep,
)
from syncstream.process import stats
from syncstream.runtime.process import process
from syncstream.servers.connection import Connection
from tests.apps.control import gate, note

OPTIONS = {
    "keepalive": float,
    "send_timeout": float,
    "max_duration": float,
    "drain": float,
    "retry": int,
    "end": str,
}


def lived(source):
    """Note a source's start, and its end."""

    def run(key, query):
        thread = threading.get_ident()
        note(f"{key}-started", os.getpid())
        how = "finished"
        try:
            yield from source(key, query)
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            now = time.monotonic()
            note(f"{key}-ended", [now, how, threading.get_ident() == thread])

    return run


def waits(wait):
    """Make the source that yields once, then waits in some way."""

    @lived
    def source(key, query):
        yield "waiting"
        soon = threading.Timer(0.02, note, (f"{key}-waiting", True))
        soon.start()
        wait()
        yield "woken"

    return source


def wait_for_queue():
    current_stream().wait(queue.Queue())


def wait_for_event():
    current_stream().wait(threading.Event())


def wait_for_condition():
    condition = threading.Condition()
    with condition:
        current_stream().wait(condition)


async def asynchronous(key, query):
    """Yield once, then wait in the event loop."""
    how = "finished"
    try:
        yield "waiting"
        asyncio.get_running_loop().call_later(0.02, note, f"{key}-waiting", True)
        await asyncio.sleep(30)
    except BaseException as error:
        how = type(error).__name__
        raise
    finally:
        now, is_parked = time.monotonic(), process().parked_streams > 0
        note(f"{key}-ended", [now, how, is_parked])


@lived
def linked(key, query):
    """Read from an upstream that sends one line, and then nothing."""
    upstream = requests.get(query["upstream"], stream=True, timeout=60)
    current_stream().link(upstream)
    for line in upstream.iter_lines(chunk_size=1):
        yield line.decode()


@lived
def ticking(key, query):
    """Yield numbers, and sleep in between."""
    n = 0
    while True:
        yield n
        n += 1
        sleep(0.05)


@lived
def flood(key, query):
    """Yield as fast as it goes."""
    payload = "x" * 1000
    while True:
        note_moment(key)
        yield payload


@lived
def spinning(key, query):
    """Yield little, and work in between; neither waits, nor does a write."""
    while True:
        until = time.monotonic() + 0.005
        while time.monotonic() < until:
            pass
        yield "spun"


moments = {}


def note_moment(key):
    moments[key] = time.monotonic()


@lived
def pieces(key, query):
    """Yield numbered events, some of them in pieces, with pauses of a plain kind.

    Each time after a dozen of them the gate must be opened.
    """
    for n in range(int(query["n"])):
        if n % 12 == 11:
            gate(key)
        event = f"id: {n}\ndata: event {n}\n\n".encode()
        if n % 3 == 0:
            yield event
        elif n % 3 == 1:
            yield event[:5]
            time.sleep(0.002)
            yield event[5:]
        else:
            yield event[:-1]
            time.sleep(0.0001)
            yield event[-1:]
        if n % 2:
            time.sleep(0.002)


@lived
def blocked(key, query):
    """Block in a plain way until the gate is open."""
    yield "waiting"
    gate(key)
    yield "woken"


@lived
def told(key, query):
    """Do the same; another thread tells when the stream has ended meanwhile."""
    stream = current_stream()

    def tell():
        while stream.reason is None:
            time.sleep(0.005)
        note(f"{key}-told", stream.reason)

    yield "waiting"
    threading.Thread(target=tell, daemon=True).start()
    note(f"{key}-waiting", True)
    gate(key)
    yield "woken"
    gate(key)
    yield "woken again"


@lived
def large(key, query):
    """Yield more than the kernel takes at once, and sleep."""
    for _ in range(9):
        yield "x" * 1_000_000
    threading.Timer(0.02, note, (f"{key}-waiting", True)).start()
    sleep(30)


@lived
def finishing(key, query):
    """Yield a row, wait until the server is to stop, and finish the others."""
    yield "row 0\n"
    note(f"{key}-waiting", True)
    while query["stopping"]() is None:
        time.sleep(0.01)
    for n in range(1, 20):
        time.sleep(0.01)
        yield f"row {n}\n"


@lived
def endless(key, query):
    """Yield rows for ever, a few each second."""
    note(f"{key}-waiting", True)
    while True:
        yield "row\n"
        time.sleep(0.05)


@lived
def deaf(key, query):
    """Neither yield nor wait in ours."""
    yield "row\n"
    note(f"{key}-waiting", True)
    while True:
        time.sleep(0.05)


@lived
def gated(key, query):
    """Yield a number for each time the gate is opened."""
    n = 0
    while True:
        gate(key)
        yield n
        n += 1


@lived
def stubborn(key, query):
    """Swallow the end, and yield once more."""
    yield "waiting"
    try:
        sleep(30)
    except BaseException:
        yield "swallowed"
    note(f"{key}-went-on", True)


if "WRAP_HANDLERS" in os.environ:
    # As some tracing tools do, whatever is installed.
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
        before = signal.getsignal(number)
        signal.signal(number, lambda n, frame, before=before: before(n, frame))

SOURCES = {
    "sleep": waits(lambda: sleep(30)),
    "queue": waits(wait_for_queue),
    "event": waits(wait_for_event),
    "condition": waits(wait_for_condition),
    "time.sleep": waits(lambda: time.sleep(30)),
    "blocked": blocked,
    "told": told,
    "run": waits(lambda: current_stream().run(time.sleep, 30)),
    "async": asynchronous,
    "linked": linked,
    "ticking": ticking,
    "flood": flood,
    "spinning": spinning,
    "pieces": pieces,
    "gated": gated,
    "finishing": finishing,
    "endless": endless,
    "deaf": deaf,
    "large": large,
    "stubborn": stubborn,
}


hub = Hub()


def subscribed(key):
    """Return a subscriber's response, which notes its end."""
    response = SSEResponse(hub.subscribe("life"))
    stream = response.response

    def ended():
        now = time.monotonic()
        note(f"{key}-ended", [now, stream.reason, process().parked_streams > 0])

    stream.on_close(ended)
    return response


def app(environ, start_response):
    query = {name: v[0] for name, v in parse_qs(environ["QUERY_STRING"]).items()}
    _, kind, *rest = environ["PATH_INFO"].split("/")
    if kind == "health":
        return plain("ok", start_response)
    if kind == "stats":
        return plain(repr(state()), start_response)
    if kind == "moment":
        return plain(repr(moments.get(query["key"])), start_response)
    if kind == "sub":
        return subscribed(query["key"])(environ, start_response)
    query["stopping"] = lambda: Connection.of(environ).stopping()
    source = SOURCES[rest[0]](query.get("key"), query)
    if kind == "hand":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return (
            item if isinstance(item, bytes) else f"data: {item}\n\n".encode()
            for item in source
        )
    options = {
        name: None if query[name] == "None" else kind(query[name])
        for name, kind in OPTIONS.items()
        if name in query
    }
    response = {"sse": SSEResponse, "ndjson": NDJSONResponse, "raw": StreamResponse}
    return response[kind](source, **options)(environ, start_response)


def state():
    """What the process holds, for tests that look for leaks."""
    me = psutil.Process()
    return {
        **stats(),
        "threads": me.num_threads(),
        "fds": me.num_fds(),
        "rss": me.memory_info().rss,
        "cpu": sum(me.cpu_times()[:2]),
        "pid": me.pid,
    }


def plain(text, start_response):
    body = text.encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


wrapped = StreamMiddleware(app, keepalive=float(os.environ.get("KEEPALIVE", 15)))
limited = StreamMiddleware(app, reserve_threads=1)
