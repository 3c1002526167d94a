"""Clients that read slowly, over a Unix socket, where nothing acknowledges."""

import contextlib
import socket
import threading
import time

import pytest

from apps.slow_app import SEND_TIMEOUT
from live import LiveServer, unique_key
from proxy import Nginx
from test_proxy import location

SOURCES = ("flood", "hand", "chunk", "sub")
KINDS = ("gunicorn-gthread", "gunicorn-gevent", "waitress")


@pytest.fixture(scope="module", params=KINDS)
def nginx(request, tmp_path_factory):
    """A server that nginx reaches by a Unix socket; nginx buffers next to nothing."""
    path = tmp_path_factory.mktemp("slow") / "socket"
    options = ["-b", f"unix:{path}"] if "gunicorn" in request.param else []
    env = {"UNIX_SOCKET": str(path)}
    with LiveServer(request.param, "apps.slow_app:app", *options, env=env) as server:
        with server.get("/publish") as client:
            assert client.rest() == b"ok"
        config = location(f"http://unix:{path}", listen="sndbuf=32k")
        with Nginx(config) as nginx:
            nginx.control = server.control
            yield nginx


class Reader(threading.Thread):
    """Reads a little, again and again, for so many seconds."""

    def __init__(self, nginx, path, seconds):
        super().__init__()
        self.key = unique_key()
        self.client = nginx.connect()
        self.client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        self.client.request("GET", f"/{path}?key={self.key}")
        self.path, self.seconds = path, seconds
        self.has_ended = False

    def run(self):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if not self.client.socket.recv(8192):
                self.has_ended = True
                return
            time.sleep(0.02)


def test_who_reads_steadily_is_kept(nginx):
    """For longer than send_timeout; who reads nothing more is dropped after that."""
    with contextlib.ExitStack() as stack:
        readers = [Reader(nginx, path, 4 * SEND_TIMEOUT) for path in SOURCES]
        frozen = [Reader(nginx, path, 0) for path in SOURCES]
        for each in (*readers, *frozen):
            stack.callback(each.client.close)
        for reader in readers:
            reader.start()
        for each in frozen:
            assert nginx.control.next(f"{each.key}-ended") == "send_timeout", each.path
        for reader in readers:
            reader.join()
        ended = {r.path: nginx.control.pending(f"{r.key}-ended") for r in readers}
        assert ended == {path: [] for path in SOURCES}
        assert not any(reader.has_ended for reader in readers)
