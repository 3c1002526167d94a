"""Ends that a source resists, and ends of the whole process that hit in a source."""

import queue
import random
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest

from syncstream import Stream, current_stream, sleep
from syncstream.protocol import sse
from syncstream.streams.contract import Format
from syncstream.streams.ends import come_back
from syncstream.streams.outcome import Outcome
from tests.streams.test_feed import Source
from tests.support.pairs import Greenlets, Line, Threads, serve, stream_of
from tests.support.waits import TIMEOUT, await_true


def queue_of(place):
    """Return a queue that can be waited for there."""
    if place.name == "threads":
        return queue.Queue()
    from gevent.queue import Queue

    return Queue()


@pytest.fixture
def line():
    return Line()


def swallowing(seen):
    while True:
        try:
            seen.append("waits")
            sleep(0.001)
        except:  # noqa: E722
            continue


def suppressing(seen):
    while True:
        with suppress(BaseException):
            seen.append("waits")
            sleep(0.001)


def helped(seen):
    def pause():
        try:
            sleep(0.001)
        except BaseException:
            seen.append("swallowed")

    while True:
        seen.append("waits")
        pause()


def locking(seen):
    lock = threading.Lock()
    while True:
        try:
            with lock:
                seen.append("waits")
                sleep(0.001)
        except BaseException:
            assert not lock.locked()


def tidying(seen):
    taken = []
    for _ in iter(int, 1):
        try:
            assert not taken
            taken.append(1)
            try:
                seen.append("waits")
                sleep(0.001)
            finally:
                taken.pop()
                assert not taken
        except GeneratorExit:
            seen.append("swallowed")


@pytest.mark.parametrize("place", [Threads(), Greenlets()], ids=lambda p: p.name)
@pytest.mark.parametrize("loop", [swallowing, suppressing, helped, locking, tidying])
def test_a_source_that_swallows_its_end_is_ended(line, caplog, loop, place):
    """At its next wait, whatever it catches; its `finally` may wait, to its end."""
    seen = []

    def source():
        try:
            yield "a"
            loop(seen)
        finally:
            with suppress(queue.Empty):
                current_stream().wait(queue_of(place), 0.001)
            sleep(0.001)
            seen.append("cleaned up")

    stream = stream_of(source(), line)
    join = place.start(lambda: serve(stream))
    place.await_true(lambda: "waits" in seen)
    stream.stop()
    assert join() == [b": ok\n\n", b"data: a\n\n"]
    assert seen[-1] == "cleaned up"
    assert sys.gettrace() is None
    place.await_true(lambda: caplog.records)  # it is said beside the stream
    (record,) = caplog.records
    message = record.getMessage()
    assert "source (" in message
    assert "test_ends.py:" in message
    assert "swallows the end of its waits" in message


@pytest.mark.parametrize("where", ["step", "close", "callback", "on_error"])
@pytest.mark.parametrize("exits", [True, False], ids=["ours", "elsewhere"])
def test_ctrl_c_goes_on_in_the_main_thread(line, caplog, where, exits):
    """Of a server that ends by it: the source is closed, the response cut, before."""
    closed = []
    line.lets_exits_through = exits

    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)

    def source():
        try:
            yield "a"
            if where == "step":
                interrupt()
            if where == "on_error":
                raise RuntimeError("broken")
        finally:
            closed.append(1)
            if where == "close":
                interrupt()

    cuts = []
    line.cut = lambda: cuts.append(1) or ConnectionResetError("cut")
    stream = stream_of(source(), line, on_error=interrupt)
    if where == "callback":
        stream.on_close(interrupt)
    ends = pytest.raises(KeyboardInterrupt)
    if not exits:
        is_cut = where in ("step", "on_error")
        ends = pytest.raises(ConnectionResetError) if is_cut else nullcontext()
    chunks = iter(stream)
    next(chunks), next(chunks)
    if where == "close":
        stream.stop()
    with ends:
        list(chunks)
    # Beside an exit only then: what the server does until then might fail otherwise.
    assert not (exits and cuts)
    stream.close()
    assert len(cuts) == (where == "on_error" or (where == "step" and not exits))
    assert closed == [1]
    assert bool(caplog.records) == (not exits or where == "on_error")


@pytest.mark.parametrize("where", ["begin", "before_wait", "iter", "encode"])
@pytest.mark.parametrize("ends", ["exit", "late"])
def test_what_is_raised_beside_the_steps_is_no_less(line, caplog, where, ends):
    """Before the first step, and in the encoding of what a plain iterator gives."""
    line.lets_exits_through = True
    told = iter([True])

    def end(*args):
        if not next(told, False):
            return b"data: a\n\n"
        if ends == "exit":
            signal.raise_signal(signal.SIGINT)
        stream.stop()
        raise RuntimeError("broken")

    class Plain:
        def __iter__(self):
            if where == "iter":
                end()
            return iter("ab")

    source, encode = Plain(), end if where == "encode" else sse.encoder()
    if where == "begin":
        source = Source([b"data: a\n\n"])
        source.begin = end
    elif where == "before_wait":
        line.before_wait = end
    stream = Stream(source, Format(encode, sse.ends_blank, is_events=True))
    stream.connect(line)
    with pytest.raises(KeyboardInterrupt) if ends == "exit" else nullcontext():
        serve(stream)
    assert stream.reason == ("shutdown" if ends == "exit" else "closed")
    said = ["the source of GET '/test' failed at its end (closed)"]
    assert caplog.messages == ([] if ends == "exit" else said)


@pytest.mark.parametrize("exits", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("is_dropped", [True, False])
def test_an_exit_between_two_steps_cuts(line, exits, is_dropped):
    """The server closes what it has not read to its end, and nothing else tells."""
    cuts = []
    line.cut = lambda: cuts.append(1)
    stream = stream_of(iter("ab"), line)

    def serve():
        for _ in stream:  # its iterator goes with this frame, or with the next line
            raise exits

    with suppress(exits):
        try:
            if is_dropped:
                serve()
            chunks = iter(stream)
            next(chunks)
            raise exits
        finally:
            stream.close()
    assert stream.reason == "closed"
    assert cuts == ([] if exits is ValueError else [1])


def test_a_source_that_exits_has_failed(line, caplog):
    """sys.exit() in a source ends nobody else's server, wherever it runs."""
    line.lets_exits_through = True

    def source():
        yield "a"
        sys.exit(3)

    stream = stream_of(source(), line)
    with pytest.raises(ConnectionResetError):
        list(stream)
    assert stream.reason == "error"
    assert caplog.records[0].exc_info[1].code == 3


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_exit_of_a_signals_handler_goes_on(line, wrapped):
    """SIGTERM's under Werkzeug, for one; also behind a tracing tool's handler."""
    line.lets_exits_through = True

    def leave(number, frame):
        sys.exit(7)

    def source():
        yield "a"
        signal.raise_signal(signal.SIGUSR1)

    handler = (lambda number, frame: leave(number, frame)) if wrapped else leave
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(SystemExit) as exited:
            list(stream_of(source(), line))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert exited.value.code == 7


def test_what_cannot_be_encoded_beside_an_end_is_logged(line, caplog):
    """The generator is closed then: it is not told of its item any more."""

    def encode(item):
        stream.stop()
        raise TypeError("no bytes")

    stream = Stream((n for n in "ab"), Format(encode, sse.ends_blank, is_events=True))
    stream.connect(line)
    serve(stream)
    assert stream.reason == "closed"
    said = ["the source of GET '/test' failed at its end (closed)"]
    assert caplog.messages == said


def test_an_end_has_its_time_at_once(monkeypatch):
    """Whoever sees the end would else take it for one of long ago."""
    outcome, seen = Outcome(), []

    def monotonic():
        seen.append(outcome.reason)
        return 7.0

    monkeypatch.setattr(
        "syncstream.streams.outcome.time", SimpleNamespace(monotonic=monotonic)
    )
    assert outcome.at == 0
    assert [outcome.decide("kicked"), outcome.decide("closed")] == [True, False]
    assert (seen[0], outcome.reason, outcome.at) == (None, "kicked", 7.0)


def test_a_ghost_is_named_once(line, caplog, monkeypatch):
    """A source that has not noticed for long that its stream has ended."""
    monkeypatch.setattr("syncstream.streams.monitor.GHOST", 0.05)
    monkeypatch.setattr("syncstream.streams.monitor.STUCK", 0.02)
    go, left = threading.Event(), threading.Event()

    def source():
        yield "a"
        left.set()
        go.wait(TIMEOUT)

    stream = stream_of(source(), line)
    join = Threads().start(lambda: serve(stream))
    assert left.wait(TIMEOUT)
    stopped = time.monotonic()
    stream.stop()
    await_true(lambda: caplog.records)
    await_true(lambda: time.monotonic() - stopped > 0.2)
    go.set()
    join()
    (record,) = caplog.records
    message = record.getMessage()
    assert "source (" in message
    assert "has not yielded" in message
    assert "syncstream.sleep" in message


@pytest.mark.parametrize("tells", [True, False], ids=["linked", "deaf"])
def test_a_stop_interrupts_no_cleaning_up(line, monkeypatch, tells):
    """Of a source whose linked read has ended: that is how it was told."""
    monkeypatch.setattr("syncstream.streams.monitor.STUCK", 0.02)
    mine, upstream = socket.socketpair()
    waits, cleans, seen = threading.Event(), threading.Event(), []

    def source():
        try:
            yield "a"
            if tells:
                current_stream().link(mine)
            waits.set()
            mine.recv(1)
        finally:
            cleans.set()
            for _ in range(20):
                time.sleep(0.01)
            seen.append("cleaned up")

    stream = stream_of(source(), line)
    join = Threads().start(lambda: serve(stream))
    assert waits.wait(TIMEOUT)
    since = time.monotonic()
    stream.stop()
    stopped = time.monotonic()
    with mine, upstream:
        if not tells:
            await_true(lambda: time.monotonic() - stopped > 0.03)
            stream.shut_down(since, since + TIMEOUT)
            upstream.send(b"x")
        assert cleans.wait(TIMEOUT)
        for _ in range(30):
            stream.shut_down(since, since + TIMEOUT)
            time.sleep(0.005)
        join()
    assert seen == ["cleaned up"]


def test_nobody_comes_back_before_the_least_time(monkeypatch):
    """Nor before what the application has set; whatever chance says."""
    monkeypatch.setattr(random, "uniform", lambda least, most: least)
    for reason in ("shutdown", "max_duration"):
        assert come_back(reason, 0) == b"retry: 1000\n\n"
    for reason in ("denied", "kicked", "error"):
        assert come_back(reason, 0) == b"retry: 5000\n\n"
    assert come_back("kicked", 7000) == b"retry: 7000\n\n"
