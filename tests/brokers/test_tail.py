"""The loop of a listener: its pauses, what is said of a failure, and its end."""

import logging
import random
import threading

import pytest

from syncstream.brokers import tail as module
from syncstream.brokers.health import Health
from syncstream.brokers.tail import Mark, Stopped, Tail, jitter
from syncstream.errors import Unavailable
from syncstream.runtime.clock import time
from syncstream.runtime.journal import journal
from tests.brokers.sinks import Told
from tests.support.waits import TIMEOUT

log = logging.getLogger("syncstream.brokers")


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def health(told):
    health = Health(log)
    health.sink = told
    return health


@pytest.fixture
def tail(health):
    return Tail("the engine", health, log)


class Fails:
    """A source that fails, and is stopped after so many pauses."""

    def __init__(self, count, listen=None, lose=None):
        self.pauses = []
        self.has_left = 0
        self._count = count
        self._listen = listen
        self._lose = lose

    def listen(self):
        if self._listen is not None:
            self._listen()
        raise Unavailable("no engine")

    def lose(self):
        if self._lose is not None:
            self._lose()

    def rest(self, seconds):
        self.pauses.append(seconds)
        if len(self.pauses) == self._count:
            raise Stopped

    def leave(self):
        self.has_left += 1


def assert_near(pauses, longest):
    for pause, most in zip(pauses, longest, strict=True):
        assert most / 2 <= pause <= most


def test_pauses_grow(tail):
    """From one to the next, up to the longest; and not by chance all alike."""
    source = Fails(10)
    tail.run(source)
    assert_near(source.pauses, [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0])
    assert len({*source.pauses[-4:]}) > 1


@pytest.mark.parametrize(
    ("seconds", "pauses"),
    [(1.9, [0.05, 0.1, 0.2, 0.4]), (2.0, [0.05, 0.05, 0.05, 0.05])],
)
def test_who_served_for_long_pauses_as_at_first(
    tail, health, monkeypatch, seconds, pauses
):
    """As long as the longest pause: then it asks no more often than it may anyway."""
    now = 0.0

    class Clock:
        def monotonic(self):
            return now

    def serve():
        nonlocal now
        for _ in range(2):
            tail.serves(since=health.moment())
            now += seconds / 2

    monkeypatch.setattr(module, "time", Clock())
    source = Fails(4, serve)
    tail.run(source)
    assert_near(source.pauses, pauses)


def test_moments_are_not_an_applications_to_choose():
    """Workers of one seed would all ask at once."""
    found = []
    for _ in range(2):
        random.seed(1)
        found.append([jitter(0, 1) for _ in range(10)])
    assert found[0] != found[1]


def test_a_failure_is_told_once_and_so_is_its_end(tail, health, told, caplog):
    """An engine's is not logged: whoever is told does that."""
    tries = []

    def third_serves():
        tries.append(None)
        if len(tries) == 3:
            tail.serves(since=health.moment())

    tail.run(Fails(3, third_serves))
    journal().flush()
    assert told.states == [False, True, False]
    assert told.reasons[0] == "no engine"
    assert caplog.text == ""


@pytest.mark.parametrize("step", ["listen", "lose"])
def test_what_nobody_expects_is_logged(tail, told, caplog, step):
    """And it goes on."""

    def fail():
        raise RuntimeError("a fault of ours")

    source = Fails(3, **{step: fail})
    tail.run(source)
    journal().flush()
    assert len(source.pauses) == 3
    assert told.states == [False]
    assert caplog.text.count("RuntimeError: a fault of ours") == 3
    assert "the engine: the listener" in caplog.text


class Killed(BaseException):
    """As gevent's GreenletExit."""


def kill():
    raise Killed


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (Fails(1, kill), Killed),
        (Fails(1, lose=kill), Killed),
        (type("Returns", (Fails,), {"listen": lambda self: None})(1), AssertionError),
    ],
    ids=["listen", "lose", "return"],
)
def test_what_ends_it_unasked_is_told(tail, told, source, kind):
    """Nothing listens any more."""
    with pytest.raises(kind):
        tail.run(source)
    assert told.states == [False]
    assert kind.__name__ in told.reasons[0]
    assert source.has_left == 1
    assert tail.await_end(time.monotonic())


def test_its_end_is_waited_for(tail):
    """It has left by then, whatever that has raised."""
    may_end, found = threading.Event(), []

    class Source(Fails):
        def rest(self, seconds):
            assert may_end.wait(TIMEOUT)
            raise Stopped

        def leave(self):
            super().leave()
            raise OSError("cannot be closed")

    source = Source(1)

    def run():
        with pytest.raises(OSError, match="cannot be closed"):
            tail.run(source)

    threads = [
        threading.Thread(target=run),
        threading.Thread(target=lambda: found.append(tail.await_end(None))),
    ]
    assert tail.await_end(time.monotonic()) is False
    for thread in threads:
        thread.start()
    may_end.set()
    assert tail.await_end(time.monotonic() + TIMEOUT)
    assert source.has_left == 1
    for thread in threads:
        thread.join(TIMEOUT)
    assert found == [True]


def test_a_mark_lets_all_go_on():
    """Those who wait, and those who come later."""
    mark, found = Mark(), []
    barrier = threading.Barrier(9)

    def wait():
        barrier.wait(TIMEOUT)
        found.append(mark.wait(time.monotonic() + TIMEOUT))

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert mark.wait(time.monotonic()) is False
    barrier.wait(TIMEOUT)
    mark.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert found == [True] * 8
    assert mark.wait(time.monotonic())
