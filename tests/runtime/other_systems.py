"""Serve streams, and read them, where Linux has what other systems lack.

    python other_systems.py werkzeug|waitress win32|darwin

What these systems do not have is taken away before syncstream is imported, and the name
of the system is theirs. Prints what was found wrong, and "done". For test_systems.py.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import socketserver  # noqa: F401 (the standard library is to keep what it has)
import subprocess  # noqa: F401
import sys
import threading
import time

import waitress
import werkzeug.serving
import werkzeug.wrappers

KIND, SYSTEM = sys.argv[1:]
PREFIXES = {
    os: ("eventfd", "EFD_"),
    select: ("epoll", "EPOLL", "POLLRDHUP"),
    socket: ("TCP_", "SO_DOMAIN", "SO_PROTOCOL", "SOCK_NONBLOCK", "SOCK_CLOEXEC"),
}
MODULES = []
if SYSTEM == "win32":
    PREFIXES[os] += ("register_at_fork", "fork")
    PREFIXES[select] += ("poll", "POLL")
    PREFIXES[socket] += ("AF_UNIX", "MSG_DONTWAIT", "MSG_NOSIGNAL")
    PREFIXES[signal] = ("SIGHUP", "SIGQUIT", "siginterrupt")
    MODULES = ["fcntl", "resource", "termios"]
NODELAY = socket.TCP_NODELAY
for module, prefixes in PREFIXES.items():
    for name in [name for name in vars(module) if name.startswith(prefixes)]:
        delattr(module, name)
socket.TCP_NODELAY = NODELAY
for name in MODULES:
    sys.modules[name] = None


def library(name, *args, **options):
    raise TypeError("LoadLibrary() argument 1 must be str, not None")


if SYSTEM == "win32":
    ctypes.CDLL = ctypes.PyDLL = library
sys.platform = SYSTEM

import syncstream  # noqa: E402
from syncstream import Hub, SSEResponse, StreamResponse, current_stream, sleep  # noqa: E402

TIMEOUT = 15
hub = Hub()
streams, ends = {}, {}


def lived(source):
    def run():
        stream = streams[source.__name__] = current_stream()
        stream.on_close(lambda: ends.update({source.__name__: stream.reason}))
        yield from source()

    return run


@lived
def ticking():
    for n in range(3):
        sleep(0.05)
        yield n


@lived
def sleeping():
    yield "asleep"
    sleep(60)


@lived
def stopped():
    yield "asleep"
    sleep(60)


@lived
def served():
    yield "asleep"
    sleep(60)


@lived
def flood():
    while True:
        yield "x" * 10_000


@lived
def chunk():
    yield bytes(8 << 20)


def app(environ, start_response):
    name = environ["PATH_INFO"].strip("/")
    if name == "events":
        response = SSEResponse(hub.subscribe("a"), keepalive=0.1)
    elif name == "chunk":
        response = StreamResponse(chunk(), send_timeout=1)
    else:
        response = SSEResponse(globals()[name](), keepalive=0.1, send_timeout=1)
    return response(environ, start_response)


def serve():
    """Start the server; return its port, and what stops it."""
    if KIND == "waitress":
        server = waitress.create_server(app, host="127.0.0.1", port=0, threads=8)
        threading.Thread(target=server.run, daemon=True).start()
        return int(server.effective_port), lambda: server.trigger.pull_trigger(
            server.close
        )
    server = werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True
    # A write goes on when a third of Linux's buffer is free, which may be megabytes.
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    return server.port, stop


class Records(logging.Handler):
    def emit(self, record):
        if record.name.startswith("syncstream"):
            print("logged:", self.format(record))


def open_client(name, room=None):
    client = socket.socket()
    client.settimeout(TIMEOUT)
    if room is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.connect(("127.0.0.1", port))
    headers = "Host: a\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n"
    client.sendall(f"GET /{name} HTTP/1.1\r\n{headers}".encode())
    return client


def read_until(client, text):
    data = b""
    while text not in data:
        part = client.recv(65536)
        if not part:
            raise EOFError(data)
        data += part
    return data


def await_end(name, reason):
    deadline = time.monotonic() + TIMEOUT
    while name not in ends:
        if time.monotonic() > deadline:
            print(name, "did not end")
            return
        time.sleep(0.01)
    if ends[name] != reason:
        print(name, "ended as", ends[name])


logging.basicConfig(level=logging.WARNING, handlers=[Records()])
port, stop = serve()

with open_client("ticking") as client:
    read_until(client, b"data: 2\n\n")
    await_end("ticking", "finished")
with open_client("sleeping") as client:
    read_until(client, b": keepalive\n")
await_end("sleeping", "disconnected")
with open_client("stopped") as client:
    read_until(client, b"asleep")
    streams["stopped"].stop("kicked")
    read_until(client, b"retry: ")
    await_end("stopped", "kicked")
with open_client("events") as client:
    read_until(client, b": keepalive\n")
    hub.publish("a", "event")
    read_until(client, b"data: event\n\n")
with open_client("flood") as client:
    client.recv(100)
    await_end("flood", "send_timeout")
if KIND != "waitress":  # which takes all of it, up to 16 MB
    with open_client("chunk", 8192) as client:
        began = time.monotonic()
        while time.monotonic() - began < 2:
            client.recv(40_000)
            time.sleep(0.05)
        if "chunk" in ends:
            print("chunk ended as", ends["chunk"])
with open_client("served") as client:
    read_until(client, b"asleep")
    stop()
    await_end("served", "shutdown")
    read_until(client, b"retry: ")
if SYSTEM == "win32":
    for url in ("local:", "postgresql://localhost/test"):
        try:
            Hub(url)
        except OSError as error:
            if "needs a Unix system" not in str(error):
                print(url, error)
        else:
            print(url, "was opened")
print("done", syncstream.__name__)
