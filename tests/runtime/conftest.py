"""Watches of a test's own, in each place."""

import pytest

import syncstream.runtime.sockets
import syncstream.runtime.watch
from tests.runtime.places import PLACES, place_of


@pytest.fixture
def own_watches(monkeypatch):
    """A test with watches of its own, which end with it."""
    own = syncstream.runtime.watch.Watches()
    monkeypatch.setattr(syncstream.runtime.watch, "watches", own)
    yield
    own.close()


@pytest.fixture(
    params=[
        "threads",
        "gevent",
        "threads without epoll",
        "gevent without epoll",
        "threads without epoll and POLLRDHUP",
    ]
)
def any_place(request, own_watches, monkeypatch):
    """Each way in which a watch works."""
    place = place_of(request.param, monkeypatch)
    place.kind = request.param
    return place


@pytest.fixture(params=PLACES)
def place(request, own_watches, monkeypatch):
    """Threads, greenlets; with epoll."""
    return place_of(request.param, monkeypatch)
