"""Stream: one life, one end, the source closed once, in the right place."""

import asyncio
import contextvars
import gc
import io
import itertools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import closing
from types import SimpleNamespace

import pytest

from syncstream import (
    ClientDisconnected,
    Closed,
    Event,
    Hub,
    SSEResponse,
    Stream,
    current_stream,
    sleep,
)
from syncstream.fanout.departure import Departure
from syncstream.protocol import raw, sse
from syncstream.runtime.journal import journal
from syncstream.runtime.process import AT_ONCE
from syncstream.runtime.sockets import is_hung_up
from syncstream.runtime.watch import Watch, watch
from syncstream.servers.swap import Taken
from syncstream.streams.closing import Closing as StreamClosing
from syncstream.streams.contract import Format, Life
from syncstream.streams.keepalive import Keepalive
from syncstream.streams.outcome import Outcome
from syncstream.streams.output import Output
from syncstream.streams.send_timeout import SendTimeout
from tests.support.pairs import Line as PairsLine
from tests.support.pairs import Threads, serve, tcp_pair, vanish
from tests.support.waits import TIMEOUT, await_true

EVENTS = Format(sse.encoder(), sse.ends_blank, is_events=True)
RAW = Format(raw.encode, lambda tail: False)


class Line(PairsLine):
    """A connection as a stream sees it, without a server."""

    fd = None

    def __init__(self):
        super().__init__()
        self.hung_up = False

    def is_hung_up(self):
        return self.hung_up

    def cut(self):
        return ConnectionResetError("cut")


class Browser(Line):
    is_event_source = parses_events = True


@pytest.fixture
def line():
    return Line()


@pytest.fixture(params=["threads", "gevent"])
def spawn(request):
    """Run a function beside this one: in a thread, or in a greenlet."""
    if request.param == "threads":

        def run(function):
            context = contextvars.copy_context()  # as Python 3.14 may do
            thread = threading.Thread(target=context.run, args=(function,))
            thread.start()
            thread.join()

    else:
        gevent = pytest.importorskip("gevent")

        def run(function):
            gevent.spawn(function).join()

    return run


def stream_of(source, line=None, format=EVENTS, **options):
    stream = Stream(source, format, departure=Departure, **options)
    if line is not None:
        stream.connect(line)
    return stream


class Closing:
    """A source that counts how often it is closed."""

    def __init__(self, items=()):
        self.items = iter(items)
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.items)

    def close(self):
        self.closed += 1


def test_the_opening_leaves_before_the_source_starts():
    """A comment, and retry, come before the source is even asked."""
    source = Closing(["a"])
    source.items = iter(["a"])
    chunks = iter(stream_of(source, Browser(), retry=2000, end="reconnect"))
    assert next(chunks) == b": ok\nretry: 2000\n\n"
    assert list(chunks) == [b"data: a\n\n"]


@pytest.mark.parametrize("retry", [None, 2000])
@pytest.mark.parametrize(
    ("parses_events", "is_event_source"), [(False, False), (True, False), (True, True)]
)
def test_what_is_added_is_what_a_client_can_read(parses_events, is_event_source, retry):
    """No ``retry:`` but for EventSources; no blank line for those that read by lines.

    A keepalive after a comment, or in the midst of comments of the application's, is
    as good as one after an event; within an event there is none.
    """
    line = Line()
    line.parses_events, line.is_event_source = parses_events, is_event_source
    items = iter(["a", None, Event(comment="c"), None, b": x\n", None, b"data: b\n"])
    items = itertools.chain(items, [None, b"\n", None])
    options = {"life": Life(keepalive=1e-9), "retry": retry, "end": "reconnect"}
    body = b"".join(stream_of(items, line, **options))
    blank = b"" if parses_events else b"\n"
    keepalive = b": keepalive\n" + blank
    opening = b": ok\n" + blank
    if retry and is_event_source:
        opening = b": ok\nretry: 2000\n\n"
    assert body == b"".join(
        (
            *(opening, b"data: a\n\n", keepalive, b": c\n", blank, keepalive),
            *(b": x\n", keepalive, b"data: b\n", b"\n", keepalive),
        )
    )
    assert [event.data for event in sse.Decoder().feed(body)] == ["a", "b"]


def test_none_is_a_checkpoint():
    """None and empty chunks write nothing, and no empty chunk ever leaves."""
    assert list(stream_of([None, "a", b"", "b"]))[1:] == [
        b"data: a\n\n",
        b"data: b\n\n",
    ]
    assert list(stream_of(["", "a", b"", None], format=RAW)) == [b"a"]


@pytest.mark.parametrize("close_after", [0, 1, 2, 9])
def test_a_source_is_closed_once(close_after):
    """Whenever it ends, and however often close() is called."""
    source = Closing(["a", "b", "c"])
    stream = stream_of(source)
    chunks = iter(stream)
    for _ in range(close_after):
        next(chunks, None)
    stream.close()
    stream.close()
    assert source.closed == 1
    assert list(stream) == []
    assert list(chunks) == []
    assert stream.reason == ("finished" if close_after == 9 else "closed")


def test_an_iterable_and_its_iterator_are_both_closed():
    """A generator behind an object with a close() of its own is closed first."""
    order = []

    class Source:
        def __iter__(self):
            try:
                yield "a"
                yield "b"
            finally:
                order.append("generator")

        def close(self):
            order.append("source")

    stream = stream_of(Source())
    chunks = iter(stream)
    next(chunks), next(chunks)
    stream.close()
    assert order == ["generator", "source"]


def test_an_error_is_logged_once_and_cuts(line, caplog):
    """With its traceback; a jittered retry leaves; the rest is not run."""

    def source():
        yield "a"
        raise RuntimeError("broken")

    stream = stream_of(source(), Browser())
    chunks = iter(stream)
    assert next(chunks) == b": ok\n"
    assert next(chunks) == b"data: a\n\n"
    retry = int(next(chunks).removeprefix(b"retry: "))
    assert 5000 <= retry <= 15000
    with pytest.raises(ConnectionResetError, match="cut"):
        next(chunks)
    stream.close()
    assert stream.reason == "error"
    assert [record.getMessage() for record in caplog.records] == [
        "the source of GET '/test' failed"
    ]
    assert caplog.records[0].exc_info[1].args == ("broken",)


def test_an_iterator_that_fails_is_closed(line):
    """Once, and as it is cut: no generator, it has no `finally` that would run."""

    class Failing(Closing):
        def __next__(self):
            raise RuntimeError("broken")

    source = Failing()
    chunks = iter(stream_of(source, line))
    with pytest.raises(ConnectionResetError):
        list(chunks)
    assert source.closed == 1


def test_on_error_says_the_last_word(line):
    """What on_error returns is the last event."""

    def source():
        yield "a"
        raise RuntimeError("broken")

    def on_error(error):
        return Event({"error": str(error)}, event="error")

    chunks = iter(stream_of(source(), Browser(), on_error=on_error))
    next(chunks), next(chunks)
    assert next(chunks).startswith(b'event: error\ndata: {"error":"broken"}\n\nretry: ')
    assert list(chunks) == []  # in order: the event is the sign


def test_nothing_is_added_within_an_event(line):
    """After half an event of the source's own framing no words are added."""

    def source():
        yield b"data: half"
        raise RuntimeError("broken")

    chunks = iter(stream_of(source(), line, on_error=lambda error: "error"))
    next(chunks), next(chunks)
    with pytest.raises(ConnectionResetError):
        next(chunks)


def fails(error):
    raise SystemExit("worse")


@pytest.mark.parametrize(
    "on_error",
    [fails, lambda error: Event(event="failed"), lambda error: {1}],
    ids=["fails", "no data", "no JSON"],
)
def test_on_error_may_fail(on_error, line, caplog):
    """An exception in on_error is logged, and the stream is cut all the same.

    So it is where what on_error returns cannot be encoded, or would fire nothing.
    """
    chunks = iter(stream_of(iter([object()]), line, on_error=on_error))
    with pytest.raises(ConnectionResetError):
        list(chunks)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "the source of GET '/test' failed",
        "on_error of GET '/test' failed",
    ]


def test_what_cannot_be_encoded_is_thrown_at_the_yield(caplog):
    """The generator may catch it there and go on; else its line is in the log."""

    def source():
        with pytest.raises(TypeError, match=r"cannot encode builtins\.object"):
            yield object()
        try:
            yield Event("a"), {"not": {1, 2}}
        except TypeError:
            yield "caught"
        with pytest.raises(ValueError, match="data must be given with event"):
            yield Event(event="done")
        with pytest.raises(TypeError, match="a memoryview must be a row of bytes"):
            yield memoryview(b"data").cast("I")
        yield object()  # the user's line

    body = []
    with pytest.raises(TypeError, match=r"cannot encode builtins\.object"):
        body.extend(stream_of(source()))
    assert b"data: caught\n\n" in body
    assert "yield object()  # the user's line" in caplog.text


def test_a_generator_that_yields_while_it_is_closed(caplog):
    """The value is dropped, the rest of its clean-up runs, one line is logged."""
    done = []

    def source():
        try:
            yield "a"
        finally:
            try:
                yield "bye"
            finally:
                done.append(True)

    stream = stream_of(source())
    chunks = iter(stream)
    next(chunks), next(chunks)
    stream.close()
    assert done == [True]
    assert caplog.text.count("generator ignored GeneratorExit") == 1


def test_errors_of_closing_are_logged(caplog):
    """Django swallows what a close raises, so the stream logs it."""

    def source():
        try:
            yield "a"
        finally:
            raise KeyError("clean-up")

    stream = stream_of(source())
    chunks = iter(stream)
    next(chunks), next(chunks)
    stream.close()
    assert "closing the source of a stream failed" in caplog.text
    assert "KeyError: 'clean-up'" in caplog.text


def test_a_hang_up_closes_at_the_next_yield(line):
    """The value is not written, the generator is closed, the server told."""
    how = []

    def source():
        try:
            line.hung_up = True
            yield "unsent"
        except GeneratorExit:
            how.append("closed")
            raise

    stream = stream_of(source(), line)
    chunks = iter(stream)
    next(chunks)
    assert list(chunks) == []
    assert how == ["closed"]
    assert stream.reason == "disconnected"
    assert not stream.connected


def test_sleep_raises_once_and_then_never_again(line, caplog):
    """A wait ends with ClientDisconnected; in `finally` it is a plain sleep."""
    seen = []

    def source():
        try:
            line.hung_up = True
            sleep(0)
        except Exception:
            seen.append("Exception")
        except GeneratorExit as error:
            seen.append(type(error))
            raise
        finally:
            sleep(0)
            current_stream().sleep(0)
            seen.append("finally")
        yield "never"

    chunks = iter(stream_of(source(), line))
    next(chunks)
    assert list(chunks) == []
    assert seen == [ClientDisconnected, "finally"]
    journal().flush()
    assert caplog.records == []


def test_who_looks_after_the_watch_may_clean_up_too(line):
    """The watch has seen the hang-up first: the source knows it by its own look."""
    seen = []
    with tcp_pair() as (server, client):

        def source():
            yield "a"
            client.close()
            await_true(lambda: stream.reason)
            seen.append(stream.connected)
            sleep(0.001)
            seen.append("cleaned up")

        stream = stream_of(source(), PairsLine(server))
        Threads().start(lambda: serve(stream))()
    assert stream.reason == "disconnected"
    assert seen == [False, "cleaned up"]


def test_a_client_that_leaves_during_close_is_not_told_again(line):
    """Once closing has begun, waits are plain."""
    seen = []

    def source():
        try:
            yield "a"
        finally:
            line.hung_up = True
            sleep(0)
            seen.append(current_stream().reason)

    stream = stream_of(source(), line)
    chunks = iter(stream)
    next(chunks), next(chunks)
    stream.close()
    assert seen == ["closed"]


def test_current_stream_is_the_running_one():
    """Inside the generator only, and in generators that it runs."""

    def inner():
        yield current_stream()

    seen = []

    def source():
        seen.append(current_stream())
        seen.extend(inner())
        yield "a"
        seen.append(current_stream())

    stream = stream_of(source())
    assert current_stream() is None
    for _ in stream:
        assert current_stream() is None
    assert seen == [stream, stream, stream]


def test_nested_streams_see_themselves():
    """A stream that runs another one's body finds itself again afterwards."""
    seen = []

    def inner():
        seen.append(current_stream())
        yield "inner"

    def outer():
        child = stream_of(inner())
        for chunk in child:
            seen.append(current_stream())
            yield chunk
        seen.append(current_stream() is not child)

    stream = stream_of(outer())
    list(stream)
    assert seen[0] is stream
    assert seen[1] is not stream
    assert seen[2:] == [stream, True]


def test_contexts_are_not_inherited(spawn):
    """Threads and greenlets that a generator starts are outside of its stream."""
    seen = []

    def source():
        spawn(lambda: seen.append(current_stream()))
        seen.append(current_stream() is not None)
        yield "a"

    list(stream_of(source()))
    assert seen == [None, True]


def test_a_stream_moves_between_threads_with_its_context():
    """A step in another thread, in a copy of the context, finds the stream, too."""
    seen = []

    def source():
        for _ in range(3):
            seen.append(current_stream())
            yield "a"

    stream = stream_of(source())
    chunks = iter(stream)
    next(chunks), next(chunks)
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(next, chunks))
    thread.start()
    thread.join()
    next(chunks)
    assert seen == [stream, stream, stream]


def test_streams_side_by_side_do_not_mix(spawn):
    """Two streams that run at once each see themselves."""
    seen = {}

    def source(name):
        for _ in range(20):
            seen.setdefault(name, set()).add(current_stream())
            sleep(0)
            seen[name].add(current_stream())
            yield name

    streams = {name: stream_of(source(name)) for name in "abc"}
    threads = [threading.Thread(target=list, args=(s,)) for s in streams.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {name: {stream} for name, stream in streams.items()}


def test_close_from_another_thread_leaves_it_to_the_running_one():
    """The generator is closed by the thread that is inside it."""
    inside, go = threading.Event(), threading.Event()
    closed_in = []

    def source():
        try:
            inside.set()
            go.wait(10)
            yield "unsent"
        finally:
            closed_in.append(threading.get_ident())

    stream = stream_of(source())
    chunks = []
    thread = threading.Thread(target=lambda: chunks.extend(stream))
    thread.start()
    assert inside.wait(10)
    stream.close()
    assert closed_in == []
    go.set()
    thread.join()
    assert closed_in == [thread.ident]
    assert chunks == [b": ok\n\n"]


@pytest.mark.parametrize("how", ["stop", "close"])
def test_who_closes_a_source_between_two_steps(how):
    """After stop() the thread that iterates; close() does, as nobody else may."""
    waits, go, closed_in = threading.Event(), threading.Event(), []

    def source():
        try:
            while True:
                yield "a"
        finally:
            closed_in.append(threading.get_ident())

    stream = stream_of(source())

    def serve():
        for chunk in stream:
            if chunk.startswith(b"data"):
                waits.set()
                go.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    assert waits.wait(10)
    getattr(stream, how)()
    before = [*closed_in]
    go.set()
    thread.join()
    assert before == ([threading.get_ident()] if how == "close" else [])
    assert closed_in == [threading.get_ident() if how == "close" else thread.ident]


@pytest.fixture
def hasty_threads():
    """Let threads change places a thousand times as often as they do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_close_races_with_next(caplog):
    """100 times: close() from another thread loses or doubles nothing."""
    for _ in range(100):
        source = Closing(iter(lambda: "a", None))
        stream = stream_of(source)
        thread = threading.Thread(target=list, args=(stream,))
        thread.start()
        stream.close()
        thread.join()
        stream.close()
        assert source.closed == 1
    assert [r for r in caplog.records if "no connection" not in r.message] == []


def test_on_close_runs_once_in_order(caplog):
    """After the source was closed; a failing callback does not stop the others."""
    order = []

    def source():
        try:
            current_stream().on_close(lambda: order.append("first"))
            current_stream().on_close(lambda: 1 / 0)
            current_stream().on_close(lambda: order.append("second"))
            yield "a"
        finally:
            order.append("source")

    stream = stream_of(source())
    list(stream)
    stream.close()
    stream.close()
    stream.on_close(lambda: order.append("late"))
    assert order == ["source", "first", "second", "late"]
    assert caplog.text.count("ZeroDivisionError") == 1


def test_greenlet_exit_is_a_shutdown(line, caplog):
    """gevent's kill cuts the stream, with one line, and does not leave next()."""
    gevent = pytest.importorskip("gevent")

    def source():
        yield "a"
        gevent.sleep(30)

    stream = stream_of(source(), line)
    chunks = []

    def read():
        with pytest.raises(ConnectionResetError, match="cut"):
            chunks.extend(stream)

    greenlet = gevent.spawn(read)
    gevent.sleep(0.01)
    greenlet.kill()
    assert stream.reason == "shutdown"
    assert caplog.messages == ["the greenlet of GET '/test' was killed"]


@pytest.mark.parametrize("stops", [True, False])
def test_the_end_block(line, stops):
    """Only who asks as an EventSource does is told to stop."""
    line.is_event_source = stops
    body = b"".join(stream_of(["a"], line, end="stop"))
    assert body.endswith(b"id: syncstream-end\n\n") is stops
    assert b"syncstream-end" not in b"".join(stream_of(["a"], line, end="reconnect"))


def test_split_framing_is_whole_again(line):
    """Bytes that complete a block over several chunks end at a boundary."""
    line.is_event_source = True
    body = b"".join(stream_of([b"data: a", b"\r", b"\n\r", b"\n"], line, end="stop"))
    assert body.endswith(b"data: a\r\n\r\nid: syncstream-end\n\n")


async def agen():
    yield "a"


async def coro():
    return []


def generator():
    yield "a"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (lambda: coro(), "make it a generator"),
        (lambda: generator, "has not been called"),
        (lambda: agen, "has not been called"),
        (lambda: "text", "put it in a list"),
        (lambda: b"bytes", "put it in a list"),
        (lambda: {"data": 1}, "put it in a list"),
        (lambda: Event("a"), "put it in a list"),
        (lambda: None, "cannot be iterated"),
        (lambda: 5, "cannot be iterated"),
        (lambda: Closing, "has not been called"),
    ],
)
def test_bad_sources_are_refused(source, problem):
    """With a message that says what came and how to mend it; no warnings."""
    value = source()
    with pytest.raises(TypeError, match=problem) as info:
        SSEResponse(value)
    assert "source must be a generator" in str(info.value)
    if hasattr(value, "aclose"):
        asyncio.run(value.aclose())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"end": "never"}, ValueError),
        ({"retry": -1}, ValueError),
        ({"retry": 1.5}, TypeError),
        ({"retry": True}, TypeError),
        ({"on_error": "text"}, TypeError),
        ({"handover": "auto"}, TypeError),
        ({"handover": 1}, TypeError),
        ({"handover": True}, ValueError),  # for a generator
    ],
)
def test_bad_options_are_refused(options, error):
    """The message names the argument."""
    with pytest.raises(error, match=next(iter(options))):
        SSEResponse([], **options)


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_sleep_refuses_nonsense(seconds):
    """Negative and NaN durations are a ValueError."""
    with pytest.raises(ValueError, match="seconds must be 0 or more"):
        sleep(seconds)


def test_sleep_lets_other_greenlets_run():
    """In a greenlet it gives way, without monkey-patching."""
    gevent = pytest.importorskip("gevent")
    order = []

    def one():
        order.append(1)
        sleep(0.01)
        order.append(3)

    gevent.joinall([gevent.spawn(one), gevent.spawn(order.append, 2)])
    assert order == [1, 2, 3]
    start = time.monotonic()
    sleep(0.01)
    assert time.monotonic() - start >= 0.009


def test_the_end_is_logged_for_debugging(line, caplog):
    """One line a stream, with its one reason."""
    caplog.set_level(logging.DEBUG, "syncstream")
    stream = stream_of(["a"], line)
    list(stream)
    stream.close()
    stream.close()
    messages = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"GET '/test' ended: finished, \d+\.\d{3} s, \d events, \d+ bytes", messages[0]
    )


def test_dropping_or_delegating_ends_the_stream():
    """Who wraps a stream by `yield from`, or drops it, closes it at once."""

    def wrapper(stream):
        yield from stream

    for wrap in (iter, wrapper):
        source = Closing(["a", "b"])
        stream = stream_of(source)
        chunks = wrap(stream)
        assert next(chunks), next(chunks)
        del stream, chunks
        assert source.closed == 1


@pytest.fixture
def _no_collector():
    """Objects go when the last reference goes, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_a_stream_leaves_nothing_behind(line, steps):
    """No cycle and no thread's context keeps a stream that has ended."""
    stream = stream_of(["a", "b"], line)
    gone = weakref.ref(stream)
    chunks = iter(stream)
    for _ in range(steps):
        next(chunks, None)
    stream.close()
    del stream, chunks
    assert gone() is None


@pytest.mark.usefixtures("_no_collector")
def test_an_error_keeps_nothing_alive(line, monkeypatch):
    """What a failing item was made from is released with the stream."""
    # pytest keeps what is logged, and so the error.
    monkeypatch.setattr(logging.getLogger("syncstream.stream"), "disabled", True)
    done = []

    def rows():
        try:
            yield 1
        finally:
            done.append(True)

    stream = stream_of((1 / (row - 1) for row in rows()), line)
    with pytest.raises(ConnectionResetError):
        list(stream)
    stream.close()
    del stream
    assert done == [True]


class Broken(RuntimeError):
    """An exception whose own methods fail."""

    def __str__(self):
        raise ValueError("str")

    __repr__ = __str__

    def __bool__(self):
        raise ValueError("bool")


@pytest.mark.parametrize("where", ["next", "close", "on_close", "on_error", "iter"])
def test_broken_exceptions_are_logged(line, caplog, where):
    """Once, with a traceback, and nothing but the cut leaves next()."""

    class Source:
        def __iter__(self):
            if where == "iter":
                raise Broken
            return self

        def __next__(self):
            raise StopIteration if where in ("close", "on_close") else Broken

        def close(self):
            if where == "close":
                raise Broken

    def on_error(error):
        if where == "on_error":
            raise Broken

    stream = stream_of(Source(), line, on_error=on_error)
    if where == "on_close":
        stream.on_close(lambda: (_ for _ in ()).throw(Broken))
    if where in ("close", "on_close"):
        list(stream)
    else:
        with pytest.raises(ConnectionResetError, match="cut"):
            list(stream)
    stream.close()
    assert len(caplog.records) == (2 if where == "on_error" else 1)
    assert all(record.exc_info[0] is Broken for record in caplog.records)


def test_a_broken_log_handler_breaks_no_stream(line, capsys, monkeypatch):
    """The error goes to stderr, and the stream ends as ever."""

    class Handler(logging.Handler):
        def emit(self, record):
            raise OSError("disk full")

    def source():
        yield "a"
        raise RuntimeError("broken")

    logger = logging.getLogger("syncstream.stream")
    monkeypatch.setattr(logger, "handlers", [Handler()])
    chunks = iter(stream_of(source(), line, on_error=lambda error: "sorry"))
    next(chunks), next(chunks)
    assert next(chunks).startswith(b"data: sorry\n\nretry: ")
    assert list(chunks) == []
    error = capsys.readouterr().err
    assert 'raise RuntimeError("broken")' in error
    assert "the source of GET '/test' failed (not logged: RuntimeError, OSE" in error


def test_a_source_that_plays_disconnected_has_failed(line, caplog):
    """ClientDisconnected counts only if the client has gone."""

    def source():
        yield "a"
        raise ClientDisconnected

    stream = stream_of(source(), line)
    with pytest.raises(ConnectionResetError, match="cut"):
        list(stream)
    assert stream.reason == "error"
    assert caplog.messages == ["the source of GET '/test' failed"]


def test_the_watch_may_be_faster(line, monkeypatch):
    """A client that has gone already may be told of before add() returns."""
    add = Watch.add

    def told_at_once(self, fd, hung_up):
        add(self, fd, hung_up)
        hung_up()

    monkeypatch.setattr(Watch, "add", told_at_once)
    server, client = socket.socketpair()
    with server:
        client.close()
        line.fd = server.fileno()
        source = Closing(["a"])
        # A short limit is watched from the first step on.
        stream = stream_of(source, line, life=Life(send_timeout=0.9))
        assert list(stream) == []
        stream.close()
        assert (stream.reason, source.closed) == ("disconnected", 1)


@pytest.mark.parametrize(
    "pause",
    [
        pytest.param(lambda _: sleep(0), id="sleep"),
        pytest.param(
            lambda _: current_stream().wait(threading.Event(), 0.01), id="wait"
        ),
        pytest.param(lambda _: current_stream().link(io.BytesIO()), id="link"),
        # It waits unknown to us.
        pytest.param(lambda added: await_true(lambda: added), id="another wait"),
    ],
)
def test_a_source_is_watched_from_its_first_wait_on(line, monkeypatch, pause):
    """One that is over before costs the watch nothing."""
    add, added = Watch.add, []

    def counted(self, fd, hung_up):
        added.append(fd)
        add(self, fd, hung_up)

    def source():
        yield "a"
        assert added == []
        pause(added)
        assert added == [line.fd]
        yield "b"

    monkeypatch.setattr(Watch, "add", counted)
    server, client = socket.socketpair()
    with server, client:
        line.fd = server.fileno()
        for given, expected in ((["a"], []), (source(), [line.fd])):
            stream = stream_of(given, line)
            list(stream)
            stream.close()
            assert (stream.reason, added) == ("finished", expected)
            assert line.fd not in watch().watched


class Sent:
    """What a client is sent, and a look at it, in times that we name."""

    def __init__(self, line):
        self.line = line
        self.output = Output(RAW, None, "stop")
        self.output.connect(line, is_encoded=False, written=b"")
        self.send_timeout = SendTimeout(self.output, 10)
        self.began = time.monotonic()

    def send(self, size, at=0):
        self.output.bytes += size
        self.output.moved = self.began + at

    def is_over(self, at):
        return self.send_timeout.look(self.began + at, self.line.fd, is_running=False)


@pytest.fixture
def large(line):
    """Give a client that has been sent a large chunk."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        server, _ = listener.accept()
        with server:
            line.fd = server.fileno()
            sent = Sent(line)
            sent.send(1 << 20)
            yield sent


def test_a_busy_source_hides_no_full_client(line, large):
    """What was sent before has not all gone, whatever the source does now."""
    line.is_full = lambda: True
    looks = [
        large.send_timeout.look(large.began + at, line.fd, is_running=True)
        for at in (1, 2, 15)
    ]
    assert looks == [False, False, True]


def keepalive_of(line):
    """Return one that is due, of a source that is at work."""
    output = Output(EVENTS, None, "stop")
    output.connect(line, is_encoded=False, written=b"")
    busy = SimpleNamespace(is_running=True)
    return Keepalive(lambda: busy, Outcome(), output, 1e-9)


def test_who_has_left_is_written_no_keepalive(line):
    """It would take the error that tells why."""
    written = []
    line.write = written.append
    keepalive = keepalive_of(line)
    keepalive.write()
    assert len(written) == 1
    line.hung_up = True
    keepalive.write()
    assert len(written) == 1


def test_a_keepalive_is_awaited_while_it_is_written(line):
    """The server's own write comes after it, not into it."""
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def write(data):
        began.set()
        assert may_end.wait(TIMEOUT)

    line.write = write
    keepalive = keepalive_of(line)
    place = Threads()
    join = place.start(keepalive.write)
    assert began.wait(TIMEOUT)
    assert keepalive.is_writing
    awaits = place.start(lambda: (keepalive.await_writer(), ended.set()))
    assert not ended.wait(0.05)
    may_end.set()
    join()
    awaits()
    assert not keepalive.is_writing


def test_an_unwatched_stream_ends_with_its_server(monkeypatch):
    """It looks for itself, between two items."""

    def full():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("syncstream.streams.monitor.watch", full)
    line, told = Browser(), []
    line.stopping = lambda: AT_ONCE if told else None
    line.server_key = object()  # no other test's server

    def source():
        yield "a"
        told.append(1)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            yield "b"

    stream = Stream(source(), EVENTS)
    stream.connect(line)
    for _ in stream:
        """It is sent."""
    stream.close()
    assert stream.reason == "shutdown"


def test_what_fails_after_a_close_was_ignored_is_logged(line, caplog):
    """Both: that it has yielded, and what it raised when it was closed again."""

    def source():
        try:
            yield "a"
        finally:
            try:
                yield "ignored"
            finally:
                raise LookupError("at last")

    stream = Stream(source(), EVENTS)
    stream.connect(line)
    chunks = iter(stream)
    assert [next(chunks), next(chunks)] == [b": ok\n\n", b"data: a\n\n"]
    stream.close()
    assert "generator ignored GeneratorExit" in caplog.text
    assert "LookupError: at last" in caplog.text


def test_a_source_that_ignores_every_close_is_given_up(line):
    """After ten: it holds nobody up."""
    closes, over = [], []

    def source():
        while not over:
            try:
                yield "a"
            except GeneratorExit:
                closes.append(1)

    stream = Stream(source(), EVENTS)
    stream.connect(line)
    chunks = iter(stream)
    assert [next(chunks), next(chunks)] == [b": ok\n\n", b"data: a\n\n"]
    stream.close()
    assert len(closes) == 10
    over.append(1)


def test_who_reads_on_after_the_end_has_not_failed(line, caplog):
    """A subscription that has ended with the stream says so: that is no error."""

    def source():
        try:
            sleep(60)
            yield "a"
        except GeneratorExit:
            raise Closed("kicked") from None

    stream = Stream(source(), EVENTS)
    stream.connect(line)
    join = Threads().start(lambda: list(stream))
    await_true(lambda: stream.thread_wait)
    stream.stop("kicked")
    join()
    stream.close()
    assert "at its end" not in caplog.text


def test_a_dropped_iterator_ends_its_stream(line):
    """A middleware that drops its iterable, and closes nothing."""
    seen = []

    def source():
        try:
            yield "a"
            yield "b"
        finally:
            seen.append("finally")

    stream = Stream(source(), EVENTS)
    stream.connect(line)
    chunks = iter(stream)
    assert [next(chunks), next(chunks)] == [b": ok\n\n", b"data: a\n\n"]
    del chunks
    gc.collect()
    assert seen == ["finally"]
    assert stream.reason is not None


def test_a_closed_socket_is_noticed_where_epoll_forgets_it(monkeypatch):
    """waitress closes from its own thread: its streams' numbers are looked at."""
    monkeypatch.setattr("syncstream.streams.monitor.VANISH_EVERY", 0.01)
    place, seen = Threads(), []

    def source():
        try:
            sleep(60)
            yield "a"
        except ClientDisconnected:
            seen.append("left")
            raise

    with tcp_pair() as (server, _):
        line = PairsLine(server)
        line.may_vanish = True
        life = Life(keepalive=None, max_duration=None, send_timeout=None)
        stream = Stream(source(), EVENTS, life=life)
        stream.connect(line)
        join = place.start(lambda: list(stream))
        await_true(lambda: stream.thread_wait)
        line.sock = None
        join()
        stream.close()
    assert seen == ["left"]


def test_a_client_that_is_slow_at_last_is_not_dropped(line, large):
    """A large chunk may take longer than send_timeout, as long as it goes on."""
    assert not large.is_over(20)
    line.is_full = lambda: True
    for later in (24, 25, 29):
        assert not large.is_over(later)
    assert large.is_over(30)


@pytest.fixture
def unix_line(line):
    """A line to a client by a Unix socket, which never has room."""
    server, client = socket.socketpair()
    with server, client:
        line.fd = server.fileno()
        line.is_full = lambda: True
        line.peer = client
        yield line


def test_a_large_chunk_goes_in_pieces(unix_line):
    """Where TCP does not tell what the client has taken."""
    data = bytes(range(256)) * 1000
    stream = stream_of([data, b"end"], unix_line, RAW, life=Life(send_timeout=1000))
    pieces = list(stream)
    assert stream.reason == "finished"
    assert b"".join(pieces) == data + b"end"
    assert [len(piece) for piece in pieces] == [65536, 65536, 65536, 59392, 3]


def test_what_a_unix_socket_accepts_counts(unix_line):
    """Each piece of a large chunk is accepted when the next goes."""
    sent = Sent(unix_line)
    for n in range(5):
        sent.send(65536)
        assert not sent.is_over(9 * n)


def test_a_queue_that_is_read_counts(unix_line):
    """So does what is taken of one piece; after send_timeout without, it is over."""
    sent = Sent(unix_line)
    sent.send(100_000)
    os.write(unix_line.fd, b"x" * 50_000)
    os.write(unix_line.fd, b"x" * 50_000)
    assert not sent.is_over(0)
    unix_line.peer.recv(90_000)
    assert not sent.is_over(9)
    assert not sent.is_over(18)
    assert sent.is_over(19)


def test_who_takes_nothing_is_dropped(line):
    """By the watch: its stream ends, and the write that waits for it fails."""
    drops = []
    server, client = socket.socketpair()
    with server, client:
        line.fd, line.is_full = server.fileno(), lambda: True
        line.drop = lambda: drops.append(1)
        stream = stream_of(["large"], line, RAW, life=Life(send_timeout=0.1))
        chunks = iter(stream)
        next(chunks)
        await_true(lambda: drops)
        assert stream.reason == "send_timeout"
        assert list(chunks) == []


def test_what_the_server_keeps_was_not_accepted(unix_line):
    """Its own buffers may grow (waitress): that says nothing of the client."""
    sent, pieces = Sent(unix_line), 0
    unix_line.unsent = lambda: 10 * pieces
    for pieces in range(1, 51):  # read by `unsent`, too
        sent.send(4)
        if sent.is_over(pieces - 1):
            break
    assert pieces == 11


def test_no_client_is_dropped_for_a_process_that_was_stopped(line, large):
    """Long ago nothing was in its way, and now the next chunk has just been sent."""
    assert not large.is_over(2)
    line.is_full = lambda: True
    for later in (40, 44):
        assert not large.is_over(later)
    assert large.is_over(45)


def test_who_was_given_up_by_the_kernel_has_not_left(line, monkeypatch):
    """Also where the generator is faster than the watch to see that it is gone."""
    monkeypatch.setattr(Watch, "add", lambda self, fd, hung_up: None)
    with tcp_pair() as (server, client):
        vanish(client)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 100)
        line.fd = server.fileno()
        line.is_hung_up = lambda: is_hung_up(line.fd)

        def source():
            server.sendall(b"x")
            while True:
                sleep(0.01)
                yield None

        stream = stream_of(source(), line, life=Life(send_timeout=None))
        assert list(stream) == [b": ok\n\n"]
        stream.close()
        assert stream.reason == "send_timeout"
        with pytest.raises(BrokenPipeError):  # not TimeoutError, which servers log
            server.sendall(b"x")


class Unswapped:
    """A swap that nobody can make use of."""

    undone = 0

    def undo(self):
        self.undone += 1


def test_without_epoll_nothing_is_taken_from_a_server(line, monkeypatch, caplog):
    """There is no loop then: nothing is tried, and nothing said."""
    monkeypatch.setattr("syncstream.fanout.departure.native_epoll", lambda: None)
    swaps = []
    line.swap = lambda: swaps.append(1)
    with closing(Hub()) as hub:
        stream = stream_of(hub.subscribe("a", after="start"), line)
        chunks = iter(stream)
        assert next(chunks) == b": ok\n\n"
        hub.publish("a", "1")
        assert b"data: 1\n\n" in next(chunks)
        stream.close()
    assert (swaps, caplog.messages) == ([], [])


@pytest.fixture
def leaving(line):
    """Give a subscription's stream whose client leaves its server for the loop."""
    with tcp_pair() as (server, _), closing(Hub()) as hub:

        class Leaving(Unswapped):
            at_take = None

            def take(self, opening):
                if self.at_take is not None:
                    self.at_take()
                fd = os.dup(server.fileno())
                os.set_blocking(fd, False)
                return Taken(fd, b"HTTP/1.1 200 OK\r\n\r\n" + opening, False)

            def close(self):
                """It was taken."""

        line.swap = Leaving
        stream = stream_of(hub.subscribe("a"), line)
        ended = threading.Event()
        stream.on_close(ended.set)
        yield stream
        stream.stop("kicked")
        assert ended.wait(TIMEOUT)
        assert stream.reason == "kicked"


def test_a_stop_that_comes_as_a_client_leaves_is_done(line, leaving):
    """In the moment when its connection is the loop's already, and it is not."""
    line.swap.at_take = lambda swap: leaving.stop("kicked")
    assert list(leaving) == [b": ok\n\n"]
    leaving.close()
    await_true(lambda: leaving.reason == "kicked")


def test_a_client_that_leaves_as_a_stop_comes_is_stopped(leaving, monkeypatch):
    """It was not the loop's yet when the stop looked, and is when it is decided."""
    decide, chunks = Outcome.decide, iter(leaving)
    assert next(chunks) == b": ok\n\n"

    def decide_late(outcome, reason):
        monkeypatch.undo()
        assert list(chunks) == []
        return decide(outcome, reason)

    monkeypatch.setattr(Outcome, "decide", decide_late)
    leaving.stop("kicked")
    leaving.close()
    await_true(lambda: leaving.reason == "kicked")


class Told(Closing):
    """A place, and a link, of a client that leaves."""

    at_leave = None

    def stay(self):
        """It holds a thread."""

    def leave_thread(self):
        if self.at_leave is not None:
            self.at_leave()

    def release(self):
        """It is nobody's."""


@pytest.mark.parametrize("when", ["before", "behind"])
def test_what_is_given_as_a_client_leaves_is_done(leaving, monkeypatch, when):
    """Before it counts as the loop's, or after a look that found it not there yet."""
    seen, linked, chunks = [], Told(), iter(leaving)

    def give():
        leaving.link(linked)
        leaving.on_close(lambda: seen.append("told"))

    if when == "before":
        place = Told()
        place.at_leave = give
        leaving.hold(place)
        assert list(chunks) == [b": ok\n\n"]
    else:
        on_close = StreamClosing.on_close

        def on_close_late(closing, callback):
            monkeypatch.undo()
            assert list(chunks) == []
            on_close(closing, callback)

        assert next(chunks) == b": ok\n\n"
        monkeypatch.setattr(StreamClosing, "on_close", on_close_late)
        give()
    leaving.close()
    leaving.stop("kicked")
    await_true(lambda: (seen, linked.closed) == (["told"], 1))


def test_the_exit_of_a_responses_callback_goes_on(line, leaving):
    """Though its client has been handed over, and only the response is closed."""
    line.lets_exits_through = True
    leaving.on_response_close(lambda: signal.raise_signal(signal.SIGINT))
    assert list(leaving) == [b": ok\n\n"]
    with pytest.raises(KeyboardInterrupt):
        leaving.close()
    assert leaving.reason is None


def test_who_was_handed_over_is_connected_until_its_end(line, leaving):
    """Whatever has become of the descriptor that its server had."""
    assert list(leaving) == [b": ok\n\n"]
    line.hung_up = True
    assert leaving.connected
    leaving.stop("kicked")
    await_true(lambda: not leaving.connected)


def test_a_loop_that_cannot_start_is_said_once(line, monkeypatch, caplog):
    """Its clients stay with their server, and get what they wait for."""

    def full():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("syncstream.fanout.departure.fanout", full)
    swap = Unswapped()
    hub = Hub()
    line.swap = lambda: swap
    for n in range(3):
        stream = stream_of(hub.subscribe(f"a{n}", after="start"), line)
        chunks = iter(stream)
        assert next(chunks) == b": ok\n\n"
        hub.publish(f"a{n}", n)
        assert f"data: {n}\n\n".encode() in next(chunks)
        stream.close()
        assert swap.undone == n + 1
        line = type(line)()
        line.swap = lambda: swap
    hub.close()
    said = [text for text in caplog.messages if "cannot leave their server" in text]
    assert said == [
        "subscribers cannot leave their server, and hold its threads or greenlets:"
        " OSError(24, 'Too many open files')"
    ]
    assert "Traceback" not in caplog.text
