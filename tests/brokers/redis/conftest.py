"""Real servers, and lines to them that can be cut."""

import pytest

from syncstream.brokers.redis import beats
from tests.support.clock import Clock
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import Proxy


@pytest.fixture(scope="session")
def shared():
    """One server, for tests that leave it as it was."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def server():
    """A server of the test's own."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def proxy(server):
    """A line to that server."""
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def clock():
    with Clock() as clock:
        yield clock


@pytest.fixture
def quick(monkeypatch):
    """Beats, and what is found out by them, in a tenth of the time."""
    monkeypatch.setattr(beats, "BEAT", 0.2)
    monkeypatch.setattr(beats, "ROUND", 1.0)
