"""Asynchronous sources: their task, what they are told, what holds the loop up."""

import asyncio
import contextvars
import gc
import logging
import os
import sys
import threading
import time
import types
import weakref

import pytest

from syncstream import (
    Hub,
    NDJSONResponse,
    SSEResponse,
    StreamResponse,
    current_stream,
    sleep,
    sse,
)
from syncstream.runtime.journal import journal
from syncstream.streams import async_source, async_task
from tests.support.waits import TIMEOUT, await_true
from tests.wsgi.asking import ASK, get


class Noted:
    """An asynchronous generator's story: what it did, in order."""

    def __init__(self):
        self.story = []
        self.may_end = threading.Event()

    async def numbers(self):
        """Yield numbers for ever; tell of each, and of the end."""
        n = 0
        try:
            while True:
                self.story.append(n)
                yield n
                n += 1
        except BaseException as error:
            self.story.append(type(error).__name__)
            raise
        finally:
            await asyncio.sleep(0)
            self.story.append("closed")

    async def waits(self):
        """Yield once, and wait."""
        try:
            yield "waiting"
            self.story.append("waits")
            await asyncio.sleep(TIMEOUT)
        except BaseException as error:
            self.story.append(type(error).__name__)
            raise
        finally:
            await asyncio.sleep(0)
            self.story.append("closed")


@pytest.fixture
def noted():
    return Noted()


def chunks_of(source, make=SSEResponse, **options):
    """Return a response and its chunks, without a server."""
    response = make(source, **options)
    return response, iter(response.response)


def next_in_a_thread(chunks):
    """Ask for the next chunk in another thread, as a server's thread would."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(chunks), daemon=True)
    thread.start()
    return thread, found


async def letters(*items):
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize(
    ("make", "items", "body"),
    [
        (SSEResponse, ("a", {"n": 1}, None, b": b\n\n"), b'data: a\n\ndata: {"n":1}'),
        (NDJSONResponse, ("a", {"n": 1}, None), b'"a"\n{"n":1}\n'),
        (StreamResponse, ("a", b"b", None), b"ab"),
    ],
)
def test_every_kind_of_response_takes_one(make, items, body):
    """What may be yielded is the same as for a generator."""
    assert get(make(letters(*items))).data == get(make(items)).data
    assert body in get(make(letters(*items))).data


def test_an_item_is_made_when_it_is_asked_for(noted):
    """And no more: the client's speed is the source's."""
    response, chunks = chunks_of(noted.numbers())
    assert next(chunks) == b": ok\n\n"
    assert noted.story == []
    assert next(chunks) == b"data: 0\n\n"
    assert next(chunks) == b"data: 1\n\n"
    time.sleep(0.02)
    assert noted.story == [0, 1]
    response.close()


def test_a_source_that_is_closed_at_its_yield(noted):
    """It gets a GeneratorExit there, and its ``finally`` is awaited."""
    response, chunks = chunks_of(noted.numbers())
    assert b"data: 0" in next(chunks) + next(chunks)
    response.close()
    assert noted.story == [0, "GeneratorExit", "closed"]


def test_a_source_that_is_closed_while_it_awaits(noted):
    """It is cancelled there, and its ``finally`` is awaited."""
    response, chunks = chunks_of(noted.waits())
    assert b"waiting" in next(chunks) + next(chunks)
    thread, found = next_in_a_thread(chunks)
    await_true(lambda: noted.story == ["waits"])
    response.response.stop("closed")
    thread.join(TIMEOUT)
    assert noted.story == ["waits", "CancelledError", "closed"]
    assert found == []
    response.close()
    assert noted.story == ["waits", "CancelledError", "closed"]


def test_a_source_that_is_never_begun_is_not_run(noted):
    """HEAD, and a response that is thrown away."""
    assert get(SSEResponse(noted.numbers()), "HEAD").status_code == 200
    SSEResponse(noted.numbers()).close()
    assert noted.story == []


class Upstream:
    """As the responses of asynchronous clients are."""

    def __init__(self, items=("a",), closer="aclose"):
        self.items = iter(items)
        self.closed = 0
        setattr(self, closer, self._close)

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return next(self.items)
        except StopIteration:
            raise StopAsyncIteration from None

    async def _close(self):
        await asyncio.sleep(0)
        self.closed += 1


class Iterated(Upstream):
    """One whose iterator is a generator of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.iterators = []

    def __aiter__(self):
        async def iterate():
            try:
                yield "a"
                yield "b"
            finally:
                self.iterators.append("closed")

        return iterate()


@pytest.mark.parametrize("closer", ["aclose", "close"])
@pytest.mark.parametrize("end", ["HEAD", "middle", "finished"])
@pytest.mark.parametrize("kind", [Upstream, Iterated])
def test_what_has_a_close_is_closed_once(kind, end, closer):
    """OpenAI's streams have an asynchronous ``close``, others ``aclose``."""
    upstream = kind(("a", "b"), closer)
    if end == "HEAD":
        get(SSEResponse(upstream), "HEAD").close()
    elif end == "finished":
        assert get(SSEResponse(upstream)).data == b": ok\n\ndata: a\n\ndata: b\n\n"
    else:
        response, chunks = chunks_of(upstream)
        assert b"data: a" in next(chunks) + next(chunks)
        response.close()
    assert upstream.closed == 1
    if kind is Iterated and end != "HEAD":
        assert upstream.iterators == ["closed"]


def test_a_source_of_both_kinds_is_iterated_as_the_plain_one():
    """Nothing waits for another thread without need."""

    class Both(list):
        def __aiter__(self):
            raise AssertionError("not this way")

    assert get(SSEResponse(Both("ab"))).data == b": ok\n\ndata: a\n\ndata: b\n\n"


def test_what_cannot_be_encoded_is_raised_at_its_yield():
    """The source may go on with something else."""
    seen = []

    async def source():
        try:
            yield 3j
        except TypeError as error:
            seen.append(str(error))
        yield "b"

    assert get(SSEResponse(source())).data == b": ok\n\ndata: b\n\n"
    assert "cannot encode builtins.complex" in seen[0]


def test_an_iterator_without_athrow_ends_by_what_it_cannot_encode(caplog):
    """As a plain iterator without ``throw`` does."""
    upstream = Upstream([3j, "b"])
    response, chunks = chunks_of(upstream)
    assert next(chunks) == b": ok\n\n"
    with pytest.raises(TypeError, match="cannot encode"):
        next(chunks)
    response.close()
    assert upstream.closed == 1


@pytest.mark.parametrize("make", [SSEResponse, NDJSONResponse])
def test_an_error_is_logged_once_with_its_line(make, caplog):
    """And is the response's status, where no byte has left."""

    async def source():
        raise ValueError("MARK")
        yield

    response, chunks = chunks_of(source(), make)
    if make is SSEResponse:
        assert next(chunks) == b": ok\n\n"
    with pytest.raises(ValueError, match="MARK"):
        next(chunks)
    response.close()
    (record,) = (one for one in caplog.records if one.levelname == "ERROR")
    assert "the source of a stream failed" in record.message
    lines = [frame.f_code.co_name for frame, _ in frames_of(record.exc_info[2])]
    assert lines[-1] == "source"


def frames_of(traceback):
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def test_an_error_at_its_end_is_logged(caplog):
    """In its ``finally``, after its client has left."""

    async def source():
        try:
            yield "a"
        finally:
            await asyncio.sleep(0)
            raise ValueError("MARK")

    response, chunks = chunks_of(source())
    assert b"data: a" in next(chunks) + next(chunks)
    response.close()
    assert "closing the source of a stream failed" in caplog.text
    assert caplog.text.count("ValueError: MARK") == 1


def test_a_cancel_that_is_swallowed_is_an_end_all_the_same():
    """What it yields then is dropped, and it is closed there."""
    story = []

    async def source():
        yield "a"
        try:
            story.append("waits")
            await asyncio.sleep(TIMEOUT)
        except asyncio.CancelledError:
            story.append("swallowed")
        try:
            yield "b"
        except GeneratorExit:
            story.append("closed")
            raise

    response, chunks = chunks_of(source())
    assert b"data: a" in next(chunks) + next(chunks)
    thread, found = next_in_a_thread(chunks)
    await_true(lambda: story)
    response.response.stop("kicked")
    thread.join(TIMEOUT)
    assert (story, found) == (["waits", "swallowed", "closed"], [])
    response.close()


def test_a_source_that_yields_while_it_is_closed_is_closed_all_the_same():
    """What it yields is dropped; it is closed there, without an await."""
    story = []

    async def source():
        try:
            yield "a"
        finally:
            try:
                yield "dropped"
            finally:
                story.append("closed")

    response, chunks = chunks_of(source())
    assert b"data: a" in next(chunks) + next(chunks)
    response.close()
    await_true(lambda: story == ["closed"])


def test_a_source_that_does_not_end_holds_nobody(caplog, monkeypatch):
    """It is named in the log, and its stream has ended."""
    monkeypatch.setattr(async_source, "CLOSE_WAIT", 0.05)
    caplog.set_level(logging.WARNING)
    ended = threading.Event()
    release = threading.Event()

    async def stubborn():
        try:
            yield "a"
        finally:
            while not release.is_set():
                await asyncio.sleep(0.01)
            ended.set()

    response, chunks = chunks_of(stubborn())
    assert b"data: a" in next(chunks) + next(chunks)
    response.close()
    assert response.response.reason == "closed"
    assert not ended.is_set()
    assert journal().flush()
    assert "stubborn (" in caplog.text
    assert "has not ended within 0.05 s after its cancel" in caplog.text
    release.set()
    assert ended.wait(TIMEOUT)


def test_a_stream_that_is_dropped_ends_its_source(noted):
    """Nobody has closed it; its task is not kept for ever."""
    response, chunks = chunks_of(noted.numbers())
    assert b"data: 0" in next(chunks) + next(chunks)
    stream = weakref.ref(response.response)
    del response, chunks
    gc.collect()
    assert stream() is None
    await_true(lambda: noted.story == [0, "GeneratorExit", "closed"])


def test_its_stream_is_the_current_one():
    """In the source, in a task that it starts, and nowhere else."""
    found = []

    async def other():
        return current_stream()

    async def source():
        found.append(current_stream())
        found.append(await asyncio.create_task(other()))
        found.append(await asyncio.to_thread(current_stream))
        yield current_stream().last_event_id

    response = SSEResponse(source())
    stream = response.response
    body = get(response, headers={**ASK, "Last-Event-ID": "7"}).data
    assert b"data: 7\n\n" in body
    assert found == [stream, stream, stream]
    assert current_stream() is None


def test_two_sources_have_a_stream_each():
    """In one event loop, at once."""
    found = {}

    async def source(name):
        for _ in range(3):
            await asyncio.sleep(0.001)
            found.setdefault(name, set()).add(id(current_stream()))
            yield name

    pairs = [chunks_of(source(name)) for name in "ab"]
    for _ in range(4):
        for _, chunks in pairs:
            next(chunks)
    for response, _ in pairs:
        response.close()
    ids = [{id(response.response)} for response, _ in pairs]
    assert found == dict(zip("ab", ids, strict=True))


VARIABLE = contextvars.ContextVar("variable", default="none")


def test_context_variables_are_those_of_the_view():
    """Copied when the response is made; what the source sets stays in it."""
    seen = []

    async def source():
        seen.append(VARIABLE.get())
        VARIABLE.set("the source's")
        yield "a"
        seen.append(VARIABLE.get())

    token = VARIABLE.set("the view's")
    response = SSEResponse(source())
    VARIABLE.set("later")
    assert get(response).data
    assert VARIABLE.get() == "later"
    VARIABLE.reset(token)
    assert seen == ["the view's", "the source's"]


@pytest.mark.parametrize(
    ("wait", "cure"),
    [
        (lambda: sleep(TIMEOUT), "await asyncio.sleep"),
        (lambda: current_stream().sleep(TIMEOUT), "await asyncio.sleep"),
        (lambda: current_stream().wait(threading.Event()), "asyncio.Queue"),
    ],
)
def test_a_wait_that_would_hold_the_loop_up_is_refused(wait, cure):
    """With the cure."""

    async def source():
        with pytest.raises(RuntimeError, match=cure):
            wait()
        yield "a"

    assert get(SSEResponse(source())).data == b": ok\n\ndata: a\n\n"


def test_a_source_that_blocks_the_loop_is_named_once(caplog, own_record, monkeypatch):
    """With the line before which it did."""
    caplog.set_level(logging.WARNING, "syncstream")
    monkeypatch.setattr(async_task, "BLOCKED", 0.01)

    async def blocker():
        for _ in range(2):
            time.sleep(0.02)
            yield "a"
        await asyncio.sleep(0)

    for _ in range(2):
        assert get(SSEResponse(blocker())).data
    assert journal().flush()
    (line,) = [r.getMessage() for r in caplog.records if "blocked" in r.getMessage()]
    assert f"{blocker.__qualname__} ({__file__}:" in line
    assert f"before {__file__}:{blocker.__code__.co_firstlineno + 3}" in line


@pytest.mark.usefixtures("own_record")
def test_a_call_that_blocks_is_named_by_the_sources_line(caplog, monkeypatch):
    """And by the innermost one, which may be a library's."""
    caplog.set_level(logging.WARNING, "syncstream")
    monkeypatch.setattr(async_task, "BLOCKED", 0.01)

    async def library():
        time.sleep(0.02)
        await asyncio.sleep(0)

    async def source():
        await library()
        yield "a"

    assert get(SSEResponse(source())).data
    assert journal().flush()
    (line,) = [r.getMessage() for r in caplog.records if "blocked" in r.getMessage()]
    own = f"{__file__}:{source.__code__.co_firstlineno + 1}"
    inner = f"{asyncio.tasks.__file__}:"
    assert f"before {own} (in {inner}" in line


def test_a_task_that_exits_does_not_end_the_loop(caplog):
    """It is one of the application's, beside a source; the others go on."""

    async def exits():
        sys.exit("MARK")

    async def source():
        task = asyncio.create_task(exits())
        await asyncio.wait([task])
        yield "a"
        await asyncio.sleep(0.01)
        assert task.exception().code == "MARK"
        yield "b"

    assert get(SSEResponse(source())).data == b": ok\n\ndata: a\n\ndata: b\n\n"
    assert journal().flush()
    assert "a task beside an asynchronous source failed" in caplog.text


def test_a_source_that_is_cancelled_by_others_fails(caplog):
    """Its client must not take the response for a whole one."""

    async def source():
        yield "a"
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    response, chunks = chunks_of(source())
    assert b"data: a" in next(chunks) + next(chunks)
    with pytest.raises(asyncio.CancelledError):
        next(chunks)
    response.close()
    assert response.response.reason == "error"


def test_a_forked_child_has_a_loop_of_its_own():
    """The parent's runs in the parent only."""
    assert get(SSEResponse(letters("a"))).data  # there is one here
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, get(SSEResponse(letters("b"))).data)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == b": ok\n\ndata: b\n\n"
    os.waitpid(pid, 0)
    assert get(SSEResponse(letters("c"))).data == b": ok\n\ndata: c\n\n"


def test_the_decorator_takes_asynchronous_generators():
    """With the options of the response; a coroutine function is refused."""

    @sse(end="reconnect", retry=5)
    async def view(name):
        """Be a view."""
        await asyncio.sleep(0)
        yield name

    assert view.__doc__ == "Be a view."
    body = get(view("a"), headers=ASK).data
    assert body == b": ok\nretry: 5\n\ndata: a\n\n"

    async def coroutine():
        pass

    with pytest.raises(TypeError, match="got the coroutine function"):
        sse(coroutine)


def test_what_is_no_source_is_refused():
    """A class that has not been called, and a coroutine."""
    with pytest.raises(TypeError, match="it has not been called"):
        SSEResponse(Upstream)
    with pytest.raises(TypeError, match="it has not been called"):
        SSEResponse(letters)

    async def coroutine():
        pass

    with pytest.raises(TypeError, match="a coroutine is not awaited"):
        SSEResponse(coroutine())


# Odd places and moments.


def test_a_subscription_is_not_read_in_the_loop():
    """It would block all asynchronous sources, until its next event."""
    hub = Hub()

    async def source():
        with pytest.raises(RuntimeError, match="must not wait in this way"):
            hub.subscribe("a").read(1)
        yield "a"

    assert get(SSEResponse(source())).data == b": ok\n\ndata: a\n\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")
@pytest.mark.parametrize("kind", ["group", "timeout"])
def test_a_cancel_of_the_sources_own_reaches_its_yield(kind):
    """A task group or a time-out around a ``yield``: its error is not lost."""
    is_over = threading.Event()

    async def fails():
        try:
            raise ValueError("MARK")
        finally:
            is_over.set()

    async def source():
        if kind == "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
                while True:
                    yield "a"
        else:
            asyncio.get_running_loop().call_later(0.02, is_over.set)
            async with asyncio.timeout(0.01):
                while True:
                    yield "a"

    response, chunks = chunks_of(source())
    assert b"data: a" in next(chunks) + next(chunks)
    assert is_over.wait(TIMEOUT)
    time.sleep(0.02)  # the client is slow: the source stands at its yield
    with pytest.raises(Exception) as info:  # noqa: PT011 (Python 3.10 lacks the group)
        for _ in chunks:
            pass
    name = "ExceptionGroup" if kind == "group" else "TimeoutError"
    assert type(info.value).__name__ == name
    response.close()
    assert response.response.reason == "error"


def test_an_end_while_it_is_closed_waits_for_that():
    """And does not cancel the close; what it has raised is not lost."""
    story, may_close = [], threading.Event()

    class Failing(Upstream):
        async def __anext__(self):
            raise OSError("MARK")

        async def _close(self):
            while not may_close.is_set():
                await asyncio.sleep(0.001)
            story.append("closed")

    response, chunks = chunks_of(Failing())
    assert next(chunks) == b": ok\n\n"
    threading.Timer(0.05, may_close.set).start()
    with pytest.raises(OSError, match="MARK"):
        next(chunks)
    response.close()
    assert story == ["closed"]


def test_an_error_at_an_end_that_nobody_awaits_is_logged(caplog, monkeypatch):
    """After the time for its close."""
    monkeypatch.setattr(async_source, "CLOSE_WAIT", 0.02)
    release, told = threading.Event(), threading.Event()

    async def source():
        try:
            yield "a"
        finally:
            while not release.is_set():
                await asyncio.sleep(0.001)
            told.set()
            raise ValueError("MARK")

    response, chunks = chunks_of(source())
    assert b"data: a" in next(chunks) + next(chunks)
    response.close()
    release.set()
    assert told.wait(TIMEOUT)

    def is_logged():
        journal().flush()
        return "ValueError: MARK" in caplog.text

    await_true(is_logged)
    assert "failed at its end" in caplog.text


def test_a_close_in_the_loops_thread_does_not_wait(noted):
    """A garbage collection may run there; it would wait for itself."""
    response, chunks = chunks_of(noted.numbers())
    assert b"data: 0" in next(chunks) + next(chunks)
    took = []

    async def other():
        began = time.monotonic()
        response.close()
        took.append(time.monotonic() - began)
        yield "a"

    assert get(SSEResponse(other())).data
    assert took[0] < async_source.CLOSE_WAIT / 2
    await_true(lambda: noted.story == [0, "GeneratorExit", "closed"])


@pytest.mark.parametrize("where", ["next", "iter"])
def test_a_stop_iteration_is_an_error(where):
    """In a plain ``def`` it would look like the end."""

    class Stops:
        def __aiter__(self):
            if where == "iter":
                raise StopIteration
            return self

        def __anext__(self):
            raise StopIteration

    response, chunks = chunks_of(Stops())
    assert next(chunks) == b": ok\n\n"
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        next(chunks)
    response.close()


@pytest.mark.parametrize("where", ["aiter", "dumps"])
def test_a_stop_async_iteration_is_the_end_of_a_step_only(where):
    """Where the iterator is made, or an item encoded, it is an error."""

    def stop(_):
        raise StopAsyncIteration

    class Iterator:
        async def __anext__(self):
            return ["a"]

    class Stops:
        __aiter__ = stop if where == "aiter" else lambda self: Iterator()

    response, chunks = chunks_of(Stops(), dumps=stop, end={"data": "done"})
    assert next(chunks) == b": ok\n\n"
    with pytest.raises(RuntimeError, match="raised StopAsyncIteration"):
        next(chunks)
    response.close()
    assert response.response.reason == "error"


def test_every_awaitable_is_awaited():
    """As ``async for`` does: coroutines of `types.coroutine` have no __await__."""
    story = []

    class Old:
        items = iter("ab")

        def __aiter__(self):
            return self

        @types.coroutine
        def __anext__(self):
            yield from asyncio.sleep(0).__await__()
            for item in self.items:
                return item
            raise StopAsyncIteration

        @types.coroutine
        def aclose(self):
            yield from asyncio.sleep(0).__await__()
            story.append("closed")

    assert get(SSEResponse(Old())).data == b": ok\n\ndata: a\n\ndata: b\n\n"
    assert story == ["closed"]


def test_a_head_starts_no_loop(monkeypatch):
    """Nor does a response that is thrown away."""

    def none():
        raise AssertionError("the loop is not needed")

    monkeypatch.setattr(async_task, "event_loop", none)
    assert get(SSEResponse(letters("a")), "HEAD").status_code == 200
    SSEResponse(letters("a")).close()


def test_a_forked_child_does_not_wait_for_the_parents_loop(noted):
    """A response that the parent has begun: its task is the parent's."""
    response, chunks = chunks_of(noted.numbers())
    assert b"data: 0" in next(chunks) + next(chunks)
    pid = os.fork()
    if not pid:
        began = time.monotonic()
        response.close()
        os._exit(time.monotonic() - began > async_source.CLOSE_WAIT / 2)
    assert os.waitpid(pid, 0)[1] == 0
    assert next(chunks) == b"data: 1\n\n"
    response.close()
