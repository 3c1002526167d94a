"""Middlewares that stand between a stream and its server.

`own` hands out a ``write`` of its own, as New Relic's does; `blocks` makes blocks of 7
bytes of the body, and hands on the server's.
"""

import time
from urllib.parse import parse_qs

from syncstream import SSEResponse
from tests.apps.control import gate
from tests.apps.life import plain


def gated(key):
    for n in range(3):
        yield n
        gate(key)


def busy(key):
    """Be busy for the time of some keepalives."""
    for n in range(3):
        yield n
        time.sleep(0.35)


SOURCES = {"/gated": gated, "/busy": busy}


def app(environ, start_response):
    query = {name: v[0] for name, v in parse_qs(environ["QUERY_STRING"]).items()}
    if environ["PATH_INFO"] == "/health":
        return plain("ok", start_response)
    source = SOURCES[environ["PATH_INFO"]](query["key"])
    return SSEResponse(source, keepalive=0.1, end="reconnect")(environ, start_response)


def own(inner):
    """Hand out another write, and pass all that is yielded on at once."""

    def application(environ, start_response):
        def start(*args):
            outer = start_response(*args)
            return lambda data: outer(data)

        body = inner(environ, start)
        try:
            yield from body
        finally:
            body.close()

    return application


def blocks(inner):
    """Hand on the server's write, and hold back what makes no whole block."""

    def application(environ, start_response):
        body = inner(environ, start_response)
        return held(body)

    return application


def held(body):
    data = b""
    try:
        for chunk in body:
            data += chunk
            while len(data) >= 7:
                yield data[:7]
                data = data[7:]
        yield data
    finally:
        body.close()


def first(inner):
    """Call the application now, as servers do."""

    def application(environ, start_response):
        if environ["PATH_INFO"] == "/health":
            return app(environ, start_response)
        return inner(environ, start_response)

    return application


own_write = first(own(app))
in_blocks = first(blocks(app))
