"""The places in which a watch runs: threads and greenlets, without epoll too."""

import pytest

import syncstream.runtime.sockets
import syncstream.runtime.watch
from tests.support.pairs import (
    Greenlets,
    Threads,
)

LEAVES = ("FIN", "RST", "bytes, FIN")
PLACES = ("threads", "gevent")


def place_of(kind, monkeypatch):
    if "without" in kind:
        monkeypatch.setattr(syncstream.runtime.watch, "native_epoll", lambda: None)
    if "POLLRDHUP" in kind:
        monkeypatch.setattr(syncstream.runtime.sockets, "POLLRDHUP", 0)
    if "gevent" in kind:
        pytest.importorskip("gevent")
        return Greenlets()
    return Threads()
