"""A WSGI application for clients that read slowly, or not at all: test_slow_clients.py.

/flood, /hand (by the middleware), /chunk (one large) and /sub, a subscriber of what
comes after a POST to /publish. Each ends what takes nothing for 1 s. ?key=KEY: why a
stream ended comes as ``KEY-ended``.
"""

from urllib.parse import parse_qs

from syncstream import (
    Hub,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
)
from tests.apps.control import note

SEND_TIMEOUT = 1.0
LINE = "x" * 10_000
hub = Hub(capacity=100_000)


def told(key):
    stream = current_stream()
    stream.on_close(lambda: note(f"{key}-ended", stream.reason))


def flood(key):
    told(key)
    while True:
        yield LINE


def hand(key):
    told(key)
    while True:
        yield f"data: {LINE}\n\n".encode()


def chunk(key):
    told(key)
    yield bytes(64 << 20)


def subscriber(key):
    response = SSEResponse(
        hub.subscribe("all", after="start"), send_timeout=SEND_TIMEOUT
    )
    stream = response.response
    stream.on_close(lambda: note(f"{key}-ended", stream.reason))
    return response


def plain(environ, start_response):
    path = environ["PATH_INFO"].strip("/")
    key = parse_qs(environ["QUERY_STRING"]).get("key", [""])[0]
    if path == "hand":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return hand(key)
    if path == "flood":
        response = SSEResponse(flood(key), send_timeout=SEND_TIMEOUT)
    elif path == "chunk":
        response = StreamResponse(chunk(key), send_timeout=SEND_TIMEOUT)
    elif path == "sub":
        response = subscriber(key)
    else:
        if path == "publish":
            for _ in range(2000):
                hub.publish("all", LINE)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    return response(environ, start_response)


app = StreamMiddleware(plain, send_timeout=SEND_TIMEOUT)
