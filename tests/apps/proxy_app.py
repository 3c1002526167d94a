"""A WSGI application for proxies' tests: streams, and what proxies make hard."""

import threading
import time
from urllib.parse import parse_qs

from syncstream import (
    Event,
    NDJSONResponse,
    SSEResponse,
    StreamResponse,
    current_stream,
    sleep,
)
from tests.apps.control import gate, note
from tests.apps.sources import SOURCES, noted


@noted
def watching(key):
    """Yield 0, then look at the connection, and yield nothing, until it is gone."""
    yield 0
    while current_stream().connected:
        time.sleep(0.01)


@noted
def sleeping(key):
    """Yield 0, then sleep for longer than any test; note it while asleep."""
    yield 0
    threading.Timer(0.1, note, (f"{key}-asleep", True)).start()
    sleep(30)
    yield 1


@noted
def resumed(key):
    """Yield the id after which the client wants to go on."""
    yield Event({"after": current_stream().last_event_id})


@noted
def commenting(key):
    """Be silent but for comments for 4 s, then yield 0."""
    for _ in range(16):
        sleep(0.25)
        yield Event(comment="keepalive")
    yield 0


@noted
def dozing(key):
    """Be silent for 4 s, then yield 0."""
    sleep(4)
    yield 0


@noted
def gated_three(key):
    """Yield 0, 1, 2, each when the test opens the gate; note what was taken."""
    for n in range(3):
        gate(key)
        yield n
        note(f"{key}-made", n)
    gate(key)


@noted
def failing(key):
    """Yield 0, and fail when the test opens the gate."""
    yield 0
    gate(key)
    raise RuntimeError("MARK")


SOURCES = {
    **SOURCES,
    "watching": watching,
    "sleeping": sleeping,
    "resumed": resumed,
    "commenting": commenting,
    "dozing": dozing,
    "gated_three": gated_three,
    "failing": failing,
}
RESPONSES = {
    "sse": SSEResponse,
    "kept": lambda source: SSEResponse(source, keepalive=0.25),
    "ndjson": NDJSONResponse,
    "raw": lambda source: StreamResponse(map(str, source)),
}


def app(environ, start_response):
    """/KIND/SOURCE?key=KEY"""
    _, kind, *rest = environ["PATH_INFO"].split("/")
    if kind == "port":  # of the proxy's end of the connection
        body = environ["REMOTE_PORT"].encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
    if kind == "health":
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    source = SOURCES[rest[0]](parse_qs(environ["QUERY_STRING"])["key"][0])
    return RESPONSES[kind](source)(environ, start_response)
