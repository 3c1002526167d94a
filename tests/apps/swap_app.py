"""A WSGI application whose streams leave their server, to a thread of their own.

/[WRAPPER/]events?tag=TAG, with ``n`` events; ``hold`` for a stream that lasts until
its client leaves. What is sent says who sent it: ``data: TAG handed 0`` the thread,
``data: TAG attached 0`` the server. /plain?tag=TAG is an ordinary answer. The wrappers
are middlewares that a stream may meet.
"""

import _thread
import json
import os
import select
import socket
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs

from syncstream.runtime.sockets import POLLRDHUP, native
from syncstream.servers import server_of
from syncstream.servers.swap import Refused, Swap

OPENING = b": ok\n\n"
JUNK = b": " + b"x" * 1_000_000 + b"\n\n"
LIMIT = 60  # seconds; a test ends its server before that

counts = Counter()  # of what became of streams, by reason, and of plain requests


class Events:
    """A stream's iterable."""

    def __init__(self, environ, query):
        self._environ = environ
        self._tag = query.get("tag", "")
        self._n = int(query.get("n", 3))
        self._hold = "hold" in query
        self._swap = None
        self._chunks = self._run()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._chunks)

    def _run(self):
        try:
            self._swap = Swap(self._environ, server_of(self._environ))
        except Refused as refusal:
            counts[str(refusal)] += 1
            if refusal.is_gone:
                return
        yield OPENING
        if self._swap is not None:
            taken = self._swap.take(OPENING)
            if taken is not None:
                counts["taken"] += 1
                native(_thread, "start_new_thread")(
                    serve, (taken, self._tag, self._n, self._hold)
                )
                return
            counts["undone"] += 1
            self._swap.undo()
        for i in range(self._n):
            yield f"data: {self._tag} attached {i}\n\n".encode()

    def close(self):
        if self._swap is not None:
            self._swap.close()
        self._chunks.close()


def serve(taken, tag, n, hold):
    """Send the events, and end; in a thread that gevent does not know."""
    fd = taken.fd
    try:
        send(fd, taken.head)
        for i in range(n):
            native(time, "sleep")(0.002)
            data = f"data: {tag} handed {i}\n\n".encode()
            send(fd, b"%x\r\n%s\r\n" % (len(data), data) if taken.is_chunked else data)
        poll = native(select, "poll")()
        poll.register(fd, POLLRDHUP)
        if hold and poll.poll(LIMIT * 1000):
            counts["left"] += 1
        if taken.is_chunked:
            send(fd, b"0\r\n\r\n")
        end(fd)
    except OSError as error:
        counts[type(error).__name__] += 1
    finally:
        native(os, "close")(fd)
        counts["closed"] += 1


def send(fd, data):
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            poll = native(select, "poll")()
            poll.register(fd, select.POLLOUT)
            poll.poll(LIMIT * 1000)


def end(fd):
    """Say that there is no more; unread bytes would make a reset of the close."""
    sock = native(socket, "socket")(fileno=fd)
    try:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    except BlockingIOError:
        pass
    finally:
        sock.detach()


class Wrapped:
    """What a middleware makes of an iterable."""

    def __init__(self, app_iter, wrapper):
        self._app_iter = app_iter
        self._chunks = wrapper(iter(app_iter))

    def __iter__(self):
        return self._chunks

    def close(self):
        self._chunks.close()
        self._app_iter.close()


def ahead(n):
    """Make the wrapper that asks for so many items before it passes the first on."""

    def wrapper(chunks):
        held = []
        for chunk in chunks:
            held.append(chunk)
            if len(held) >= n:
                yield held.pop(0)
        yield from held

    return wrapper


def peeking(chunks):
    """Ask for the first item before there is a head."""
    peeked = next(chunks)

    def rest():
        yield peeked
        yield from chunks

    return rest()


def compressed(chunks):
    squeeze = zlib.compressobj(wbits=31)
    yield squeeze.compress(b"") + squeeze.flush(zlib.Z_SYNC_FLUSH)
    for chunk in chunks:
        yield squeeze.compress(chunk) + squeeze.flush(zlib.Z_SYNC_FLUSH)
    yield squeeze.flush()


def large(chunks):
    for chunk in chunks:
        yield JUNK + chunk


def first(chunks):
    yield next(chunks)


HEADERS = {"gzip": ("Content-Encoding", "gzip")}
WRAPPERS = {
    "read": iter,
    "part": iter,
    "peek": peeking,
    "one": ahead(2),
    "two": ahead(3),
    "gzip": compressed,
    "large": large,
    "first": first,
    "length": iter,
}


def app(environ, start_response):
    query = {name: v[0] for name, v in parse_qs(environ["QUERY_STRING"]).items()}
    *wrappers, path = environ["PATH_INFO"].strip("/").split("/")
    if path == "plain":
        counts[f"plain {query['tag']}"] += 1
        return answer(query["tag"], start_response)
    if path == "state":
        return answer(json.dumps(state()), start_response)
    if path == "health":
        return answer("ok", start_response)
    if "read" in wrappers or "part" in wrappers:
        length = int(environ.get("CONTENT_LENGTH") or 6)
        environ["wsgi.input"].read(length if "read" in wrappers else 1)
    headers = [("Content-Type", "text/event-stream")]
    headers += [HEADERS[name] for name in wrappers if name in HEADERS]
    events = Events(environ, query)
    if "length" in wrappers:
        size = len(OPENING) + sum(len(f"data:  attached {i}\n\n") for i in range(3))
        headers.append(("Content-Length", str(size)))
    start_response("200 OK", headers)
    for name in wrappers:
        events = Wrapped(events, WRAPPERS[name])
    return events


def state():
    """What became of the streams, and what the process holds."""
    folder = Path("/proc/self/fdinfo")
    return {
        **counts,
        "fds": len(os.listdir("/proc/self/fd")),
        "watched": sum(watched_by(file) for file in folder.iterdir()),
    }


def watched_by(file):
    """Count the descriptors in an epoll, by its file in /proc."""
    try:
        return file.read_text().count("tfd:")
    except FileNotFoundError:  # iterdir's own descriptor
        return 0


def answer(text, start_response):
    body = text.encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


if "DESCRIPTORS" in os.environ:
    import resource

    most = int(os.environ["DESCRIPTORS"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

if "DEBUG" in os.environ:
    import logging

    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
