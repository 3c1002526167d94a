"""One good stream, and streams that are wrong in the ways that `doctor` names."""

import threading
import time
import zlib

from syncstream import Event, NDJSONResponse, SSEResponse

EVENTS = {"Content-Type": "text/event-stream; charset=utf-8"}
LIVE = {**EVENTS, "Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
FOREVER = threading.Event()


def ticks(pause=0.02):
    n = 0
    while True:
        yield Event({"n": n, "padding": "." * 20}, id=n)
        time.sleep(pause)
        n += 1


def encoded(events):
    return (event.encode() for event in events)


def collected(chunks, size):
    """Do what a buffering proxy does: fill a buffer, send it, start anew."""
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        if len(buffer) >= size:
            yield buffer[:size]
            buffer = buffer[size:]


def compressed(chunks):
    """Do what a compressing middleware does that never flushes."""
    packer = zlib.compressobj(wbits=31)
    return filter(None, map(packer.compress, chunks))


def silent():
    yield b""
    FOREVER.wait(30)
    yield b""


def failing():
    yield Event(1, id=1)
    yield Event(2, id=2)
    raise RuntimeError("doctor_app fails, as it should")


def app(environ, start_response):
    path = environ["PATH_INFO"]
    good = {
        "/good": lambda: SSEResponse(ticks(), retry=1000),
        "/ndjson": lambda: NDJSONResponse({"n": e.id} for e in ticks()),
        "/finished": lambda: SSEResponse([Event(1, id=1), Event(2, id=2)]),
        "/failing": lambda: SSEResponse(failing()),
    }
    if path in good:
        return good[path]()(environ, start_response)
    status, headers, body = "200 OK", dict(LIVE), b""
    if path == "/health":
        headers, body = {"Content-Type": "text/plain"}, [b"ok"]
    elif path == "/html":
        headers, body = {"Content-Type": "text/html"}, encoded(ticks())
    elif path == "/bare":
        headers, body = dict(EVENTS), encoded(ticks())
    elif path == "/gzip":
        body = encoded(ticks())
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            headers["Content-Encoding"] = "gzip"
            body = compressed(body)
    elif path == "/buffered":
        body = collected(encoded(ticks()), 5000)
    elif path == "/silent":
        body = silent()
    elif path == "/length":
        body = list(encoded(e for e, _ in zip(ticks(0), range(3), strict=False)))
        headers["Content-Length"] = str(len(b"".join(body)))
    elif path == "/echo":
        names = ("HTTP_LAST_EVENT_ID", "HTTP_COOKIE", "HTTP_ACCEPT")
        status = "403 " + " ".join(environ.get(name, "-") for name in names)
        body = []
    else:
        status, body = "404 Not Found", []
    start_response(status, list(headers.items()))
    return body
