"""`Stream.run`: calls that block, which a stream's end leaves behind."""

import contextvars
import logging
import threading
import time

import flask
import pytest
from werkzeug.test import create_environ

from syncstream import (
    ClientDisconnected,
    NDJSONResponse,
    SSEResponse,
    current_stream,
)
from syncstream.runtime.process import process
from syncstream.servers.connection import BEFORE_WAIT
from syncstream.streams import calls
from tests.support.pairs import (
    Line,
    Threads,
    check_script,
    leave,
    serve,
    stream_of,
    tcp_pair,
)
from tests.support.waits import TIMEOUT, await_true
from tests.wsgi.asking import get

variable = contextvars.ContextVar("variable", default="unset")


class Closable:
    def __init__(self, error=None):
        self.closed = 0
        self.error = error

    def close(self):
        self.closed += 1
        if self.error is not None:
            raise self.error


class Slow:
    """A call that lasts until it is told to return, or to raise."""

    def __init__(self):
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.outcome = Closable()

    def __call__(self):
        self.begun.set()
        assert self.may_end.wait(TIMEOUT)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def end(self):
        self.may_end.set()
        await_true(lambda: process().left_calls == 0)


@pytest.fixture
def slow():
    slow = Slow()
    yield slow
    slow.end()


def run_in_stream(*args, **kwargs):
    """Return what a stream's generator gets from `run`, which may raise."""
    found = []

    def source():
        found.append(current_stream().run(*args, **kwargs))
        yield None

    serve(stream_of(source(), Line()))
    (result,) = found
    return result


def test_it_returns_what_the_call_returns():
    """The call has its arguments, its context's variables, and a thread by name."""

    def call(a, *, b):
        seen = variable.get()
        variable.set("inner")
        return a, b, seen, threading.current_thread().name, current_stream()

    def run():
        variable.set("outer")
        found = run_in_stream(call, 1, b=2)
        assert variable.get() == "outer"
        return found

    *found, name, stream = contextvars.copy_context().run(run)
    assert found == [1, 2, "outer"]
    assert name.startswith("syncstream-run test_it_returns")
    assert stream is None


def test_it_closes_nothing_that_is_wanted():
    """The generator has it."""
    result = Closable()
    assert run_in_stream(lambda: result) is result
    assert result.closed == 0
    assert process().left_calls == 0


@pytest.mark.parametrize("kind", [ValueError, SystemExit, GeneratorExit])
def test_it_raises_what_the_call_raises(kind):
    """The same object, at the line of the generator."""
    error, seen = kind("MARK"), []

    def call():
        raise error

    def source():
        try:
            current_stream().run(call)
        except BaseException as caught:
            seen.append(caught)
        yield "a"

    assert b"data: a\n\n" in serve(stream_of(source(), Line()))
    assert seen == [error]


ENDS = {
    "leave": ClientDisconnected,
    "stop": GeneratorExit,
    "max_duration": GeneratorExit,
}


@pytest.mark.parametrize("outcome", ["result", "error", "cannot be closed"])
@pytest.mark.parametrize("end", ENDS)
def test_an_end_leaves_it_behind(end, outcome, slow, caplog):
    """At once; a late result is closed, a late error is logged at level DEBUG."""
    caplog.set_level(logging.DEBUG, "syncstream.stream")
    seen, story = [], []
    if outcome == "error":
        slow.outcome = ValueError("MARK")
    elif outcome == "cannot be closed":
        slow.outcome.error = ValueError("MARK")

    def source():
        try:
            current_stream().run(slow)
        except GeneratorExit as error:
            seen.append(type(error))
            raise
        finally:
            story.append(slow.may_end.is_set())
        yield "never"

    with tcp_pair() as (server, client):
        options = {"max_duration": 0.05} if end == "max_duration" else {}
        if options:
            response = SSEResponse(source(), **options)
            stream = response.response
            stream.connect(Line(server))
        else:
            stream = stream_of(source(), Line(server))
        join = Threads().start(lambda: serve(stream))
        assert slow.begun.wait(TIMEOUT)
        if end == "leave":
            leave(client)
        elif end == "stop":
            stream.stop("closed")
        assert b"never" not in b"".join(join())
    assert seen == [ENDS[end]]
    assert story == [False]
    assert process().left_calls == 1
    slow.end()
    if outcome != "error":
        await_true(lambda: slow.outcome.closed == 1)
    if outcome != "result":
        await_true(lambda: "ValueError: MARK" in caplog.text)
    assert [r.levelname for r in caplog.records if r.exc_info] == (
        [] if outcome == "result" else ["DEBUG"]
    )


def test_an_end_may_come_just_as_it_returns(monkeypatch):
    """The stream leaves while the call's thread is about to wake it."""
    result, begun, left = Closable(), threading.Event(), threading.Event()

    class Lock:
        """Ends the stream when the call's thread has said that it is done."""

        def __init__(self):
            self.lock = threading.Lock()

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()
            if threading.current_thread().name.startswith("syncstream-run"):
                stream.stop("closed")
                assert left.wait(TIMEOUT)

    class Process:
        lock, left_calls = Lock(), 0

    monkeypatch.setattr(calls, "process", Process)

    def call():
        assert begun.wait(TIMEOUT)
        return result

    def source():
        try:
            current_stream().run(call)
        finally:
            left.set()
        yield "never"

    stream = stream_of(source(), Line())
    join = Threads().start(lambda: serve(stream))
    await_true(lambda: stream.thread_wait)
    begun.set()
    assert b"never" not in b"".join(join())
    await_true(lambda: result.closed == 1)
    for thread in threading.enumerate():
        if thread.name.startswith("syncstream-run"):
            thread.join(TIMEOUT)


def test_a_class_that_is_returned_is_not_closed(slow):
    """Its ``close`` is its instances'."""
    slow.outcome = Closable

    def source():
        current_stream().run(slow)
        yield "never"

    stream = stream_of(source(), Line())
    join = Threads().start(lambda: serve(stream))
    assert slow.begun.wait(TIMEOUT)
    stream.stop("closed")
    join()
    slow.end()


def test_a_stream_that_has_ended_begins_none():
    """Its end is raised instead."""
    begun = []

    def source():
        current_stream().stop("closed")
        current_stream().run(begun.append, True)
        yield "never"

    serve(stream_of(source(), Line()))
    assert begun == []


def test_what_is_left_behind_is_limited(slow, monkeypatch, caplog):
    """Further calls hold their streams up, in the generator's own thread."""
    process().said.clear()
    monkeypatch.setattr(calls, "MOST_LEFT", 1)

    def source():
        current_stream().run(slow)
        yield "never"

    stream = stream_of(source(), Line())
    join = Threads().start(lambda: serve(stream))
    assert slow.begun.wait(TIMEOUT)
    stream.stop("closed")
    join()
    here = threading.get_ident()
    assert [run_in_stream(threading.get_ident) for _ in range(2)] == [here, here]
    await_true(lambda: "stream.run" in caplog.text)
    assert caplog.text.count("stream.run") == 1
    slow.end()
    assert run_in_stream(threading.get_ident) != here


def test_without_a_thread(monkeypatch):
    """The call is made all the same, in the generator's."""

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert run_in_stream(threading.get_ident) == threading.get_ident()
    assert process().left_calls == 0


def test_elsewhere_it_is_a_plain_call():
    """In another thread, which the stream's end does not end."""

    def source():
        stream, found = current_stream(), []
        thread = threading.Thread(
            target=lambda: found.append(stream.run(threading.get_ident))
        )
        thread.start()
        ident = thread.ident
        thread.join()
        yield str(found == [ident])

    assert b"data: True\n\n" in serve(stream_of(source(), Line()))


def test_an_asynchronous_source_has_its_own():
    """The error names it."""

    async def source():
        try:
            current_stream().run(time.sleep, 0)
        except RuntimeError as error:
            yield str(error)

    assert b"await asyncio.to_thread(call)" in get(NDJSONResponse(source())).data


async def coroutine():
    pass


def test_a_coroutine_function_is_refused():
    """Its result would be a coroutine that nobody awaits."""
    with pytest.raises(TypeError, match="make the source an asynchronous generator"):
        stream_of([]).run(coroutine)


def test_before_the_head():
    """A call before the first item still chooses the status."""
    app = flask.Flask("test")

    def refused():
        flask.abort(502)

    @app.get("/<name>")
    def view(name):
        def source():
            yield current_stream().run(refused if name == "refused" else lambda: 1)

        return NDJSONResponse(source())

    def status_of(path):
        statuses = []

        def start_response(status, headers, exc_info=None):
            statuses.append(status)

        body = app(create_environ(path), start_response)
        serve(body)
        return statuses[-1]

    assert status_of("/refused") == "502 Bad Gateway"
    assert status_of("/found") == "200 OK"


def test_the_calls_thread_gives_back_what_it_has_taken():
    """As Django's connections to databases, which belong to threads."""
    released = []

    def source():
        yield current_stream().run(threading.get_ident)

    environ = {BEFORE_WAIT: [lambda: released.append(threading.get_ident())]}
    with get(NDJSONResponse(source()), environ_base=environ) as answer:
        ident = int(answer.data)
    assert ident != threading.get_ident()
    assert ident in released


IN_GEVENT = """
from gevent import monkey
monkey.patch_all()
import gevent, threading, time
from syncstream import current_stream
from tests.support.pairs import Line, serve, stream_of

def call():
    try:
        time.sleep(60)
    except GeneratorExit as error:
        print(type(error).__name__, current_stream() is stream)
        raise

def source():
    print(current_stream().run(lambda: 5))
    current_stream().run(call)
    yield "never"

stream = stream_of(source(), Line())
greenlet = gevent.spawn(serve, stream)
gevent.sleep(0.05)
stream.stop("closed")
print(b"never" in b"".join(greenlet.get(timeout=10)))
"""


def test_under_gevent_the_call_is_interrupted():
    """It runs in the stream's greenlet."""
    lines = check_script(IN_GEVENT).splitlines()
    assert lines == ["5", "GeneratorExit True", "False"]
