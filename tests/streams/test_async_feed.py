"""An asynchronous source as the loop reads it: what it gives out, and when it ends."""

import threading
from types import SimpleNamespace

import pytest

from syncstream.errors import Closed
from syncstream.streams.async_feed import AsyncFeed
from syncstream.streams.async_task import SourceTask
from tests.support.waits import TIMEOUT


class Waiter:
    """Whom the source wakes: the test."""

    gevent_hub = None

    def __init__(self):
        self.is_woken = threading.Event()

    def wake(self):
        self.is_woken.set()
        return True


@pytest.fixture
def read():
    """Return a function that reads a source's next item, and never waits by it."""
    feeds = []

    def read(source):
        output = SimpleNamespace(encode=str.encode)
        run = SimpleNamespace(parts=SimpleNamespace(output=output), stream=None)
        feed, waiter = AsyncFeed(SourceTask(source), run), Waiter()
        feeds.append(feed)
        feed.detach(waiter)

        def poll():
            while True:
                waiter.is_woken.clear()
                chunk, _, _ = feed.poll()
                if chunk:
                    return chunk
                assert waiter.is_woken.wait(TIMEOUT)

        return feed, poll

    yield read
    for feed in feeds:
        feed.close()


@pytest.mark.parametrize("fails", [True, False])
def test_its_end_is_told_once(read, fails):
    """A wake that comes later finds no other one: a failed source never finishes."""

    async def source():
        yield "a"
        if fails:
            raise RuntimeError("MARK")

    feed, poll = read(source())
    assert poll() == b"a"
    with pytest.raises(RuntimeError if fails else Closed, match=r"MARK|finished"):
        poll()
    assert [feed.poll() for _ in range(3)] == [(b"", 0, True)] * 3
