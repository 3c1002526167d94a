"""freezegun stops the clock of a user's tests; what waits here goes on."""

import datetime
import queue
import subprocess
import sys
import time as its_time
from contextlib import closing

import freezegun
import pytest

from syncstream import Hub, current_stream
from syncstream.runtime.clock import time
from syncstream.runtime.waiting import wait
from syncstream.streams.contract import Life
from tests.support.pairs import Line, Threads, serve, stream_of
from tests.support.waits import await_true

PLACE = Threads()


@pytest.fixture(autouse=True)
def _frozen():
    with freezegun.freeze_time("2026-01-01"):
        before = its_time.monotonic()
        yield
        assert its_time.monotonic() == before, "the clock was not frozen"


def test_waits_have_their_time():
    """A queue's, a subscription's: alone, and in a generator."""
    with pytest.raises(queue.Empty):
        wait(queue.Queue(), 0.05)
    with closing(Hub()) as hub, closing(hub.subscribe("a")) as subscription:
        assert subscription.read(0.05) == []

    def source():
        with pytest.raises(queue.Empty):
            current_stream().wait(queue.Queue(), 0.05)
        yield datetime.date.today().isoformat()

    assert b"data: 2026-01-01\n\n" in serve(stream_of(source(), Line()))


@pytest.mark.parametrize("what", ["keepalive", "max_duration"])
def test_what_falls_due_does(what):
    """A stream's keepalive is written, and its time ends."""
    written = []

    class Writing(Line):
        @property
        def write(self):
            return written.append

    stream = stream_of(waits_for_ever(), Writing(), life=Life(**{what: 0.05}))
    join = PLACE.start(lambda: serve(stream))
    if what == "keepalive":
        await_true(lambda: len(written) >= 2)
        stream.stop()
    join()
    assert stream.reason == ("closed" if what == "keepalive" else "max_duration")


def waits_for_ever():
    current_stream().sleep(600)
    yield "a"


def test_a_clock_that_is_frozen_before_the_import():
    """As pytest's fixtures may: the first import is late."""
    code = """
import freezegun, time
with freezegun.freeze_time("2026-01-01"):
    frozen = time.monotonic()
    from syncstream.runtime.clock import time as ours
    first = ours.monotonic()
    assert first != frozen
    ours.sleep(0.001)
    assert ours.monotonic() > first
    assert ours.time() == time.time() == 1767225600
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_age_of_events_is_the_tests():
    """``time.time`` is what it is elsewhere."""
    assert time.time() == its_time.time() == 1767225600
