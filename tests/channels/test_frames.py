"""`Frames`: a subscription in a response."""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from syncstream.channels.windows import Windows
from tests.channels.readers import Line
from tests.support.pairs import Browser, serve, stream_of


def test_in_a_response(hub):
    """Given to a stream: chunks that hold all there is, and the bytes are shared."""
    ids = hub.publish_many("a", "12")
    chunks = []
    for _ in range(2):
        subscription = hub.subscribe("a", after="start")
        stream = stream_of(subscription, Line(), end=None)
        chunks.append([next(stream), next(stream)])
        hub.publish_many("a", [])
        stream.close()
    wire = b"id: %b\ndata: 1\n\nid: %b\ndata: 2\n\n" % tuple(i.encode() for i in ids)
    assert chunks[0][1] == chunks[1][1] == wire
    assert hub.stats()["subscribers"] == 0


def test_events_are_counted_under_the_lock(hub, monkeypatch):
    """Two responses at once: without it, one's count could overwrite the other's."""
    counts = []

    def is_free(lock):
        found = lock.acquire(blocking=False)
        if found:
            lock.release()
        return found

    def count(windows, value):
        with ThreadPoolExecutor() as other:  # the lock is reentrant
            counts.append((value, other.submit(is_free, windows.lock).result()))
        vars(windows)["delivered"] = value

    delivered = property(lambda windows: vars(windows)["delivered"], count)
    monkeypatch.setattr(Windows, "delivered", delivered, raising=False)
    hub.publish_many("a", "12")
    stream = stream_of(hub.subscribe("a", after="start"), Line())
    with contextlib.closing(stream):
        next(stream)
        next(stream)
        hub.publish("a", "3")
        next(stream)
    assert counts == [(2, False), (3, False)]
    assert hub.stats()["delivered"] == 3


@pytest.mark.parametrize("is_generator", [False, True])
def test_who_is_denied_or_kicked_is_told_to_come_back_late(hub, is_generator):
    """A browser comes back for ever: not soon, and not all at once."""

    def source(subscription):
        yield from subscription

    def stream_to(subscription):
        given = source(subscription) if is_generator else subscription
        return stream_of(given, Browser(), end="stop")

    waits = set()
    for _ in range(20):
        denied = hub.subscribe("a", authorize=lambda subscription: False)
        kicked = hub.subscribe("a", after="start")
        hub.publish("a", "x")
        stream = stream_to(kicked)
        for chunk in stream:
            if b"x" in chunk:
                hub.kick(lambda subscription: True)
        last = chunk
        stream.close()
        for block in (serve(stream_to(denied))[-1], last):
            waits.add(int(re.fullmatch(rb"retry: (\d+)\n\n", block)[1]))
    assert 5000 <= min(waits) <= max(waits) <= 15_000
    assert len(waits) > 30


def test_an_end_of_the_stream_frees_a_generators_subscription(hub):
    """Even where the generator's frame is held."""
    held = []

    def source():
        subscription = hub.subscribe("a", after="start")
        held.append(subscription)
        yield from subscription

    hub.publish("a", "1")
    stream = stream_of(source(), Line())
    next(stream)
    next(stream)
    assert hub.stats()["subscribers"] == 1
    stream.close()
    assert hub.stats()["subscribers"] == 0
    assert held[0].is_closed


@pytest.mark.parametrize("channels", [("a",), ("a", "b")])
def test_what_is_held_is_given_back_before_each_wait(hub, place, channels):
    """A database connection, for one: whatever ran since the wait before took it."""
    held = ["the view's"]

    def snapshot():
        held.append("the snapshot's")
        return ["so far"]

    line = Line("f-f")
    line.before_wait = held.clear
    waits = []

    def run():
        stream = stream_of(hub.subscribe(*channels, on_gap=snapshot), line, end=None)
        for chunk in stream:
            waits.append(chunk)
            held.append("a middleware's")

    join = place.start(run)
    for number in range(3):
        place.await_true(lambda: b"so far" in b"".join(waits))
        place.await_true(lambda: not held)
        hub.publish("a", f"event {number}")
        text = b"event %d" % number
        place.await_true(lambda text=text: text in b"".join(waits))
    place.await_true(lambda: not held)
    hub.close()
    join()
