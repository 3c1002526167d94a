"""An asynchronous source as the loop reads it: what it gives out, and when it ends."""

import asyncio
import logging
import threading
import time
from types import SimpleNamespace

import pytest

from syncstream.errors import Closed
from syncstream.runtime.journal import journal
from syncstream.streams import async_task
from syncstream.streams.async_feed import AsyncFeed
from syncstream.streams.async_task import SourceTask
from syncstream.streams.links import Link
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

    def read(source, encode=str.encode):
        output = SimpleNamespace(is_whole=True, end_source=lambda: None)

        def encoded(item):
            output.is_whole = item.endswith("\n")
            return encode(item)

        output.encode = encoded
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


def test_it_is_whole_by_what_was_given_out(read):
    """Not by what its task has made since: nothing may come between two halves."""
    made = threading.Event()

    async def source():
        for item in ("half", " and half\n", "more"):
            yield item
            await asyncio.sleep(0)
        made.set()

    feed, poll = read(source())
    assert feed.is_whole
    for is_whole in (False, True, False):
        assert poll()
        made.wait(0.02)  # its task goes on meanwhile
        assert feed.is_whole == is_whole


def test_an_encoder_that_blocks_the_loop_is_named(
    read, caplog, own_record, monkeypatch
):
    """As the source itself is: all others wait for both."""
    caplog.set_level(logging.WARNING, "syncstream")
    monkeypatch.setattr(async_task, "BLOCKED", 0.01)

    def encode(item):
        time.sleep(0.02)
        return item.encode()

    async def source():
        yield "a"

    _, poll = read(source(), encode)
    assert poll() == b"a"
    assert journal().flush()
    assert "source (" in caplog.text
    assert "has blocked the event loop for 0.0" in caplog.text


class Linked:
    """What a source has linked: it notes its close, which may take until it is let."""

    def __init__(self, may_close):
        self.may_close, self.closed = may_close, threading.Event()

    def close(self):
        assert self.may_close.wait(TIMEOUT)
        self.closed.set()


def test_a_close_that_takes_long_holds_nobody(read):
    """Others end meanwhile; what comes after its source's end waits for it."""
    may_close, done, other = (threading.Event() for _ in range(3))

    async def source():
        yield "a"
        await asyncio.sleep(60)

    feed, poll = read(source())
    linked = Linked(may_close)
    feed.link(Link(linked))
    assert poll() == b"a"
    feed.cancel(done.set)
    second, poll = read(source())
    assert poll() == b"a"
    second.cancel(other.set)
    assert other.wait(TIMEOUT)
    assert not done.is_set()
    may_close.set()
    assert done.wait(TIMEOUT)
    assert linked.closed.is_set()
    late = Linked(may_close)
    feed.link(Link(late))
    assert late.closed.is_set()
