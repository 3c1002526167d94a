"""Clients that read slowly, over a Unix socket, where nothing acknowledges."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass

import pytest

from tests.apps.slow_app import SEND_TIMEOUT
from tests.support.live import Client, Control, LiveServer, unique_key
from tests.support.nginx import Nginx, location
from tests.support.waits import TIMEOUT

SOURCES = ("flood", "hand", "chunk", "sub")
KINDS = ("gunicorn-gthread", "gunicorn-gevent", "waitress")


@pytest.fixture(scope="module", params=KINDS)
def front(request, tmp_path_factory):
    """A server that nginx reaches by a Unix socket; nginx buffers next to nothing."""
    path = tmp_path_factory.mktemp("slow") / "socket"
    options = ["-b", f"unix:{path}"] if "gunicorn" in request.param else []
    env = {"UNIX_SOCKET": str(path)}
    with LiveServer(
        request.param, "tests.apps.slow_app:app", *options, env=env
    ) as server:
        with server.get("/publish") as client:
            assert client.rest() == b"ok"
        # By a Unix socket there, too: TCP's windows close and open in megabytes.
        front = path.with_name("front")
        config = location(f"http://unix:{path}", listen=f"; listen unix:{front}")
        with Nginx(config) as nginx:
            with nginx.get("/") as client:  # it listens to all when it answers
                assert client.rest() == b"ok"
            yield Front(str(front), server.control)


@dataclass
class Front:
    """Where nginx listens; and what the streams say."""

    path: str
    control: Control


class Reader(threading.Thread):
    """Reads a little, again and again, for so many seconds."""

    def __init__(self, front, source, seconds):
        super().__init__()
        self.key, self.source, self.seconds = unique_key(), source, seconds
        self.client = Client(socket.socket(socket.AF_UNIX))
        self.client.socket.settimeout(TIMEOUT)
        self.client.socket.connect(front.path)
        self.client.request("GET", f"/{source}?key={self.key}")
        self.has_ended = False

    def run(self):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if not self.client.socket.recv(16_384):
                self.has_ended = True
                return
            time.sleep(0.01)


def test_who_reads_steadily_is_kept(front):
    """For longer than send_timeout; who reads nothing more is dropped after that."""
    with contextlib.ExitStack() as stack:
        readers = [Reader(front, source, 4 * SEND_TIMEOUT) for source in SOURCES]
        frozen = [Reader(front, source, 0) for source in SOURCES]
        for each in (*readers, *frozen):
            stack.callback(each.client.close)
        for reader in readers:
            reader.start()
        for each in frozen:
            ended = front.control.next(f"{each.key}-ended")
            assert ended == "send_timeout", each.source
        for reader in readers:
            reader.join()
        for reader in readers:
            assert front.control.pending(f"{reader.key}-ended") == [], reader.source
            assert not reader.has_ended, reader.source
