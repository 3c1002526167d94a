"""Push style: views that send, plain ones in a greenlet and coroutines in a task."""

import asyncio
import contextlib
import contextvars
import functools
import gc
import inspect
import logging
import queue
import subprocess
import sys
import threading
import time
import weakref

import pytest
from werkzeug.wrappers import Request

from syncstream import (
    ClientDisconnected,
    Event,
    current_stream,
    sleep,
    with_sse,
)
from syncstream.runtime.journal import journal
from syncstream.streams import async_task
from syncstream.streams.interrupt import MOST_REMINDERS
from syncstream.streams.links import Link, place_of
from syncstream.streams.push import Pushed
from tests import ROOT
from tests.support.pairs import (
    Greenlets,
    Line,
    Threads,
    check_script,
    serve,
    stream_of,
    tcp_pair,
)
from tests.support.pairs import leave as hang_up
from tests.support.waits import TIMEOUT, await_true
from tests.wsgi.asking import ASK, get

OPENED = b": ok\n\n"


def plain(body):
    """Make a plain view of a coroutine function that awaits only what sends."""

    def view(sse):
        class Awaitable:
            async def send(self, *args, **kwargs):
                sse.send(*args, **kwargs)

            async def comment(self, text):
                sse.comment(text)

            async def close(self):
                sse.close()

        coroutine = body(Awaitable())
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("it awaits something else")

    return view


@pytest.fixture(params=["plain", "coroutine"])
def kind(request):
    """Both kinds of views, of the same body."""
    return plain if request.param == "plain" else lambda body: body


@pytest.fixture(params=[Threads, Greenlets], ids=["threads", "gevent"])
def place(request):
    """A thread's stream, and a greenlet's."""
    return request.param()


def chunks_of(view, **options):
    """Return a view's response and its chunks, without a server."""
    response = with_sse(**options)(view)()
    return response, iter(response.response)


def pushed(view):
    """Return the items of a plain view."""
    return Pushed(lambda sse: functools.partial(view, sse), view.__qualname__)


def body_of(view, **options):
    return get(with_sse(**options)(view)()).data.removeprefix(OPENED)


# What is sent.


@pytest.mark.parametrize(
    ("args", "fields", "sent"),
    [
        (["text"], {}, b"data: text\n\n"),
        (["two\nlines"], {}, b"data: two\ndata: lines\n\n"),
        ([b"text"], {}, b"data: text\n\n"),
        ([{"n": 1}], {}, b'data: {"n":1}\n\n'),
        ([{"data": 1}], {}, b'data: {"data":1}\n\n'),
        ([[1, None]], {}, b"data: [1,null]\n\n"),
        (["a", "name", 7, 5], {}, b"id: 7\nevent: name\nretry: 5\ndata: a\n\n"),
        (["a"], {"event": "name"}, b"event: name\ndata: a\n\n"),
        ([None], {"id": "7"}, b"id: 7\n\n"),
        ([Event("a", event="name", id=7)], {}, b"id: 7\nevent: name\ndata: a\n\n"),
    ],
)
def test_what_is_sent(kind, args, fields, sent):
    """The arguments are an event's fields; an event is sent as it is."""

    async def view(sse):
        await sse.send(*args, **fields)

    assert body_of(kind(view)) == sent


def test_a_comment_is_sent(kind):
    """Which may have lines, as an event's."""

    async def view(sse):
        await sse.comment("a")
        await sse.comment("b\nc")

    assert body_of(kind(view)) == b": a\n\n: b\n: c\n\n"


def test_the_responses_rules_are_the_views(kind):
    """``dumps``, ``framed``, ``end``, ``retry``, ``on_error``."""

    async def view(sse):
        await sse.send([1])
        await sse.send("data: framed\n\n")
        for kind in (bytes, bytearray, memoryview):
            await sse.send(kind(b"data: framed\n\n"))
        await sse.send("a", id=1)
        raise ValueError("MARK")

    def dumps(value):
        return f"<{value}>"

    def told(error):
        return Event(str(error), event="error")

    decorated = with_sse(dumps=dumps, framed=True, on_error=told, retry=9)(kind(view))
    body = get(decorated(), headers=ASK).data
    expected = (
        b": ok\nretry: 9\n\ndata: <[1]>\n\n"
        + b"data: framed\n\n" * 4
        + b"id: 1\ndata: a\n\nevent: error\ndata: MARK\n\n"
    )
    assert body.startswith(expected)


def test_what_cannot_be_sent(kind):
    """The view gets the error at its own line, and may go on."""
    seen = []

    async def view(sse):
        for args, fields in (
            ([3j], {}),  # encoding fails
            ([Event("a")], {"event": "name"}),
            (["a", "two\nlines"], {}),
            ([None], {}),
            ([None, "name"], {}),
        ):
            try:
                await sse.send(*args, **fields)
            except (TypeError, ValueError) as error:
                lines = inspect.getinnerframes(error.__traceback__)
                assert lines[0].function == "view"
                seen.append(str(error))
        await sse.send("b")

    assert body_of(kind(view)) == b"data: b\n\n"
    assert len(seen) == 5
    assert "cannot encode builtins.complex" in seen[0]
    assert "send() takes an Event alone" in seen[1]


def test_nothing_is_sent_after_close(kind):
    """The view may still work; the stream ends when it returns."""
    seen = []

    async def view(sse):
        await sse.send("a")
        await sse.close()
        for what in (sse.send, sse.comment):
            with pytest.raises(RuntimeError, match="nothing can be sent after close"):
                await what("b")
        seen.append(current_stream().reason)

    assert body_of(kind(view)) == b"data: a\n\n"
    assert seen == [None]


def test_a_coroutines_close_need_not_be_awaited():
    """It is no coroutine that does nothing then, and only warns."""

    async def view(sse):
        await sse.send("a")
        sse.close()
        with pytest.raises(RuntimeError, match="nothing can be sent after close"):
            await sse.send("b")

    assert body_of(view) == b"data: a\n\n"


# When it runs.


def test_a_view_runs_one_event_ahead_of_nobody(kind):
    """It begins when the first event is asked for; each ``send`` waits."""
    story = []

    async def view(sse):
        story.append("begins")
        for n in range(3):
            await sse.send(str(n))
            story.append(n)

    response, chunks = chunks_of(kind(view))
    assert next(chunks) == OPENED
    assert story == []
    assert next(chunks) == b"data: 0\n\n"
    time.sleep(0.01)
    assert story == ["begins"]
    assert next(chunks) == b"data: 1\n\n"
    assert story == ["begins", 0]
    assert list(chunks) == [b"data: 2\n\n"]
    assert story == ["begins", 0, 1, 2]
    response.close()
    assert response.response.reason == "finished"


def test_a_view_that_is_never_asked_is_not_run(kind, monkeypatch):
    """HEAD, and a response that is thrown away; no event loop is started."""

    def none():
        raise AssertionError("the loop is not needed")

    monkeypatch.setattr(async_task, "event_loop", none)
    story = []

    async def view(sse):
        story.append("runs")

    decorated = with_sse(kind(view))
    assert get(decorated(), "HEAD").status_code == 200
    decorated().close()
    assert story == []


def test_a_view_without_events(kind):
    """It ends the stream when it returns."""

    async def view(sse):
        pass

    response, chunks = chunks_of(kind(view))
    assert list(chunks) == [OPENED]
    assert response.response.reason == "finished"
    response.close()


@pytest.mark.parametrize(
    ("reason", "error"), [("disconnected", ClientDisconnected), ("kicked", None)]
)
def test_a_plain_view_is_told_of_the_end_where_it_sends(reason, error):
    """Its ``finally`` runs, once, in the same thread."""
    story = []

    def view(sse):
        try:
            sse.send("a")
        except GeneratorExit as told:
            story.append(type(told))
            raise
        finally:
            sleep(0.001)  # not interrupted
            story.append(threading.get_ident())

    line = Line()
    stream = stream_of(pushed(view), line)
    chunks = iter(stream)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    if reason == "disconnected":
        line.is_hung_up = lambda: True
    else:
        stream.stop(reason)
    stream.close()
    stream.close()
    assert stream.reason == reason
    assert story == [error or GeneratorExit, threading.get_ident()]


def test_a_coroutine_is_cancelled_where_it_sends():
    """Its ``finally`` is awaited, once."""
    story = []

    async def view(sse):
        try:
            await sse.send("a")
        except asyncio.CancelledError:
            story.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0.001)
            story.append("closed")

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    response.close()
    assert story == ["cancelled", "closed"]


def test_a_coroutine_is_cancelled_where_it_waits(place):
    """At once, when its client leaves."""
    story = []

    async def view(sse):
        try:
            story.append("waits")
            await asyncio.sleep(TIMEOUT)
        except asyncio.CancelledError:
            story.append("cancelled")
            raise

    with tcp_pair() as (server, client):
        source = with_sse(view)().response
        source.connect(Line(server))
        join = place.start(lambda: serve(source))
        place.await_true(lambda: story == ["waits"])
        hang_up(client)
        assert join() == [OPENED]
    assert story == ["waits", "cancelled"]
    assert source.reason == "disconnected"


@pytest.mark.parametrize("wait", ["sleep", "stream.sleep", "stream.wait"])
def test_a_wait_of_a_plain_view_ends_with_its_client(place, wait):
    """At once: the view's greenlet is what runs the stream."""
    story = []

    def view(sse):
        stream = current_stream()
        story.append(stream)
        waits = {
            "sleep": lambda: sleep(TIMEOUT),
            "stream.sleep": lambda: stream.sleep(TIMEOUT),
            "stream.wait": lambda: stream.wait(items, TIMEOUT),
        }
        sse.send("a")
        try:
            waits[wait]()
        except ClientDisconnected:
            story.append("left")
            raise
        finally:
            sleep(0.001)
            story.append("closed")

    if isinstance(place, Greenlets):
        from gevent.queue import Queue

        items = Queue()
    else:
        items = queue.Queue()
    with tcp_pair() as (server, client):
        stream = stream_of(pushed(view), Line(server))
        join = place.start(lambda: serve(stream))
        place.await_true(lambda: stream.has_waited)
        began = time.monotonic()
        hang_up(client)
        assert join() == [OPENED, b"data: a\n\n"]
        assert time.monotonic() - began < TIMEOUT / 2
    assert story == [stream, "left", "closed"]
    assert stream.reason == "disconnected"


def test_a_plain_view_waits_for_a_queue(place):
    """Others put what it sends."""

    def view(sse):
        stream = current_stream()
        while (item := stream.wait(items)) is not None:
            sse.send(item)

    if isinstance(place, Greenlets):
        from gevent.queue import Queue

        items = Queue()
    else:
        items = queue.Queue()
    stream = stream_of(pushed(view), Line())
    join = place.start(lambda: serve(stream))
    for item in ("a", "b", None):
        place.pause()
        items.put(item)
    assert b"".join(join()).startswith(b": ok\n\ndata: a\n\ndata: b\n\n")


def test_a_linked_read_of_a_plain_view_ends_with_its_client():
    """In a thread, as a generator's; its ``finally`` may use the link."""
    story = []

    def view(sse):
        current_stream().link(upstream)
        sse.send("a")
        try:
            story.append("reads")
            upstream.recv(1)
        finally:
            story.append(upstream.fileno() >= 0)
        sse.send("not sent")

    with tcp_pair() as (server, client), tcp_pair() as (upstream, _):
        stream = stream_of(pushed(view), Line(server))
        join = Threads().start(lambda: serve(stream))
        await_true(lambda: story == ["reads"])
        hang_up(client)
        assert join() == [OPENED, b"data: a\n\n"]
    assert story == ["reads", True]
    assert stream.reason == "disconnected"


# Views that do as they please.


@pytest.mark.parametrize("caught", [GeneratorExit, BaseException])
def test_a_plain_view_that_swallows_its_end(caught, caplog):
    """Each further ``send`` raises it again, and an endless loop ends, too."""
    import gevent

    gevent.get_hub()  # which never runs: it must not be left to log the warning
    story = []

    def view(sse):
        while True:
            try:
                sse.send("a")
            except caught as error:
                story.append(type(error))
                with pytest.raises(GeneratorExit):
                    sse.send("b")

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    assert 0 < len(story) <= MOST_REMINDERS + 1
    assert journal().flush()
    assert "swallows the end of its waits, and is ended there" in caplog.text
    assert f"the view {view.__qualname__} ({__file__}:" in caplog.text


def test_a_plain_view_that_swallows_the_end_of_a_wait(place):
    """What it sends then is dropped, and it is ended there."""
    story = []

    def view(sse):
        sse.send("a")
        try:
            sleep(TIMEOUT)
        except GeneratorExit:
            story.append("swallowed")
        try:
            sse.send("b")
        finally:
            story.append("ended")

    stream = stream_of(pushed(view), Line())
    join = place.start(lambda: serve(stream))
    place.await_true(lambda: stream.has_waited)
    stream.stop("closed")
    assert join()[:2] == [OPENED, b"data: a\n\n"]
    assert story == ["swallowed", "ended"]


@pytest.mark.parametrize("where", ["send", "wait", "handler"])
def test_a_plain_view_that_swallows_some_ends_cleans_up(where):
    """Of a few calls, each in a ``try`` of its own; then it goes on to its end."""
    story = []

    def call_thrice(call):
        for _ in range(3):
            try:
                call()
            except BaseException as error:
                story.append(type(error))

    def view(sse):
        try:
            sse.send("a")
        except BaseException as error:
            story.append(type(error))
            if where == "handler":
                call_thrice(lambda: sse.send("b"))
        if where != "handler":
            call_thrice(lambda: sse.send("b") if where == "send" else sleep(TIMEOUT))
        story.append("cleaned up")

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    assert story == [GeneratorExit] * 4 + ["cleaned up"]


def test_a_plain_view_that_loops_in_a_handler_is_ended():
    """Where its end is being handled, and swallowed again and again."""
    story = []

    def view(sse):
        try:
            sse.send("a")
        except GeneratorExit:
            while True:
                try:
                    sse.send("b")
                except GeneratorExit:
                    story.append("swallowed")

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    assert len(story) <= MOST_REMINDERS + 1


@pytest.mark.parametrize("is_task", [False, True])
def test_a_coroutine_that_swallows_its_end_holds_up_nobody(is_task, caplog):
    """A loop of sends awaits nothing, and would keep the event loop for ever."""
    story, tasks = [], []

    async def send(sse, data):
        for n in range(10**9):
            try:
                await sse.send(data)
            except BaseException:
                story.append(n)

    async def view(sse):
        if is_task:
            tasks.append(asyncio.create_task(send(sse, "a")))
            await asyncio.wait(tasks)
        else:
            await send(sse, "a")

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    await_true(lambda: len(story) >= MOST_REMINDERS)

    async def other(sse):
        if is_task:
            await asyncio.wait(tasks)
            assert isinstance(tasks.pop().exception(), ClientDisconnected)
        await sse.send(sys.gettrace() is None)

    assert body_of(other) == b"data: true\n\n"
    assert len(story) <= MOST_REMINDERS + 2
    assert journal().flush()
    assert caplog.text.count("swallows the end of its stream, and is ended there") == 1


def test_a_coroutine_that_swallows_some_ends_cleans_up():
    """Of a few sends, each in a ``try`` of its own."""
    story = []

    async def view(sse):
        for _ in range(4):
            try:
                await sse.send("a")
            except BaseException as error:
                story.append(type(error))
        story.append("cleaned up")

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    told = [ClientDisconnected] * 3
    assert story == [asyncio.CancelledError, *told, "cleaned up"]


def test_a_coroutine_that_swallows_its_cancel():
    """A further ``send`` raises ClientDisconnected."""
    story = []

    async def view(sse):
        while True:
            try:
                await sse.send("a")
            except asyncio.CancelledError:
                story.append("swallowed")
            except ClientDisconnected:
                story.append("told")
                raise

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    assert story == ["swallowed", "told"]


def test_an_error_is_logged_once_with_its_line(kind, caplog):
    """And the response is no whole one."""

    async def view(sse):
        await sse.send("a")
        raise ValueError("MARK")

    response, chunks = chunks_of(kind(view))
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    with pytest.raises(ValueError, match="MARK"):
        next(chunks)
    response.close()
    assert response.response.reason == "error"
    (record,) = [r for r in caplog.records if r.exc_info]
    assert "the source of a stream failed" in record.message
    assert inspect.getinnerframes(record.exc_info[2])[-1].function == "view"


def leak_plainly(sse):
    rows = iter(["a"])
    while True:
        sse.send(next(rows))


async def leak_later(sse):
    async def rows():
        yield "a"

    found = rows()
    while True:
        await sse.send(await anext(found))


@pytest.mark.parametrize(
    ("view", "error"),
    [(leak_plainly, StopIteration), (leak_later, StopAsyncIteration)],
    ids=["plain", "coroutine"],
)
def test_a_leaked_end_of_an_iterator_is_an_error(view, error, caplog):
    """As in a generator: no client is told of an end in order."""
    response, chunks = chunks_of(view, end=Event("[DONE]"))
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    with pytest.raises(RuntimeError, match=f"{view.__name__} .* {error.__name__}"):
        next(chunks)
    response.close()
    assert response.response.reason == "error"
    assert caplog.text.count("the source of a stream failed") == 1


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
def test_an_end_that_dumps_leaks_is_an_error(kind, error):
    """It is raised at the ``send``."""

    def dumps(value):
        raise error

    async def view(sse):
        await sse.send([1])

    response, chunks = chunks_of(kind(view), dumps=dumps)
    assert next(chunks) == OPENED
    with pytest.raises((RuntimeError, StopAsyncIteration)):
        next(chunks)
    response.close()
    assert response.response.reason == "error"


def test_an_error_at_its_end_is_logged(kind, caplog):
    """In a ``finally``, after the client has left."""

    async def view(sse):
        try:
            await sse.send("a")
        finally:
            raise ValueError("MARK")

    response, chunks = chunks_of(kind(view))
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    response.close()
    assert "closing the source of a stream failed" in caplog.text
    assert caplog.text.count("ValueError: MARK") == 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exit_of_a_coroutine_is_an_error(error):
    """It must not end the event loop."""

    async def view(sse):
        raise error("MARK")

    response, chunks = chunks_of(view)
    assert next(chunks) == OPENED
    with pytest.raises(error, match="MARK"):
        next(chunks)
    response.close()


def test_a_response_comes_too_late(kind, caplog):
    """As for ``@sse``: the head has left."""

    async def view(sse):
        return "not found", 404

    response, chunks = chunks_of(kind(view))
    assert next(chunks) == OPENED
    with pytest.raises(TypeError, match="which no client receives"):
        list(chunks)
    response.close()
    assert "the response's head has left" in caplog.text


@pytest.mark.parametrize("inner", ["generator", "coroutine"])
def test_a_plain_view_that_runs_nothing(inner):
    """A decorator in between hides what it is."""

    async def coroutine(sse):
        raise AssertionError

    def generator(sse):
        yield

    found = generator if inner == "generator" else coroutine
    response, chunks = chunks_of(lambda sse: found(sse))
    assert next(chunks) == OPENED
    with pytest.raises(TypeError, match=f"has returned a {inner}"):
        next(chunks)
    response.close()


# Where it runs.

VARIABLE = contextvars.ContextVar("variable", default="none")


def test_context_variables_are_the_requests(kind):
    """What the view sets stays in it."""
    seen = []

    async def view(sse):
        seen.append(VARIABLE.get())
        VARIABLE.set("the view's")
        await sse.send("a")
        seen.append(VARIABLE.get())

    token = VARIABLE.set("the request's")
    response, chunks = chunks_of(kind(view))
    VARIABLE.reset(token)  # as a middleware does that the response has left
    assert list(chunks) == [OPENED, b"data: a\n\n"]
    assert VARIABLE.get() == "none"
    response.close()
    assert seen == ["the request's", "the view's"]


def test_the_request_of_another_stream_is_not_its_own():
    """A view whose response is made in another one's, and read behind that."""
    made, seen = [], []

    @with_sse
    def inner(sse):
        seen.append(current_stream())
        sse.send("b")

    def view(sse):
        made.append(inner())
        sse.send("a")

    assert body_of(view) == b"data: a\n\n"
    assert get(made[0]).data == b": ok\n\ndata: b\n\n"
    assert seen == [made[0].response]


def test_its_stream_is_the_current_one(kind):
    """In the view, and nowhere else; nested views have their own."""
    found = []

    async def inner(sse):
        found.append(current_stream())
        await sse.send("a")
        found.append(current_stream())

    inside = kind(inner)

    async def view(sse):
        found.append(current_stream())
        if kind is plain:
            await sse.send(body_of(inside).decode().split()[-1])
        else:
            await sse.send("a")
        found.append(current_stream())

    response, chunks = chunks_of(kind(view))
    assert list(chunks) == [OPENED, b"data: a\n\n"]
    assert found[0] is found[-1] is response.response
    if len(found) > 2:
        assert found[1] is found[2] is not found[0]
    assert current_stream() is None
    response.close()


def test_a_plain_view_sends_in_its_own_thread_only():
    """Others are told what to do instead."""
    seen = []

    def view(sse):
        def other():
            with pytest.raises(RuntimeError, match=r"own thread.*queue\.Queue"):
                sse.send("b")
            seen.append("refused")

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        sse.send("a")

    assert body_of(view) == b"data: a\n\n"
    assert seen == ["refused"]


def test_the_tasks_of_a_coroutine_may_send():
    """Each waits for its own; what is cancelled is not sent."""

    async def view(sse):
        async def count(name):
            for n in range(2):
                await sse.send(f"{name}{n}")

        await asyncio.gather(count("a"), count("b"))
        first = asyncio.create_task(sse.send("first"))
        waits = asyncio.create_task(sse.send("never"))
        await asyncio.sleep(0)  # both have begun, and nothing else has run
        waits.cancel()
        await asyncio.wait([first, waits])
        await sse.send("last")

    events = body_of(view).decode().split()[1::2]
    assert sorted(events[:4]) == ["a0", "a1", "b0", "b1"]
    assert events[4:] == ["first", "last"]


@pytest.mark.parametrize("is_left", [False, True])
def test_a_task_that_outlives_its_view_sends_no_more(is_left):
    """It is cancelled where it sends, or told."""
    story, tasks = [], []

    async def view(sse):
        async def other():
            with contextlib.suppress(asyncio.CancelledError, ClientDisconnected):
                while True:
                    await sse.send("other")
            with pytest.raises(ClientDisconnected):
                await sse.send("late")
            story.append("told")

        tasks.extend(asyncio.create_task(other()) for _ in range(3))
        await sse.send("a")
        if is_left:
            await asyncio.sleep(TIMEOUT)

    response, chunks = chunks_of(view)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    if is_left:
        assert next(chunks) == b"data: other\n\n"
        response.close()
    else:  # until the view has had its turn
        sent = list(chunks)
        assert sent == [b"data: other\n\n"] * len(sent)
        assert 1 <= len(sent) <= 3
    await_true(lambda: story == ["told"] * 3)


def test_a_coroutine_sends_in_its_own_event_loop_only():
    """Threads are told what to do instead."""
    seen = []

    async def view(sse):
        loop = asyncio.get_running_loop()

        def other():
            with pytest.raises(RuntimeError, match="run_coroutine_threadsafe"):
                asyncio.run(sse.send("b"))
            asyncio.run_coroutine_threadsafe(sse.send("a"), loop).result(TIMEOUT)
            seen.append("sent")

        await asyncio.to_thread(other)

    assert body_of(view) == b"data: a\n\n"
    assert seen == ["sent"]


def test_a_view_that_blocks_the_loop_is_named_once(caplog, own_record, monkeypatch):
    """With the line before which it did."""
    caplog.set_level(logging.WARNING, "syncstream")
    monkeypatch.setattr(async_task, "BLOCKED", 0.01)

    async def view(sse):
        time.sleep(0.02)
        await sse.send("a")

    for _ in range(2):
        assert body_of(view) == b"data: a\n\n"
    assert journal().flush()
    (line,) = [r.getMessage() for r in caplog.records if "blocked" in r.getMessage()]
    assert f"{view.__qualname__} ({__file__}:" in line
    assert f"before {__file__}:{view.__code__.co_firstlineno + 2}" in line


def test_a_plain_view_stays_in_the_thread_where_it_has_begun(caplog):
    """A greenlet cannot move: that is said, whoever asks it or closes it."""
    story = []

    def view(sse):
        try:
            sse.send("a")
        finally:
            story.append("ended")

    items = pushed(view)
    assert next(items) == "a"

    def other():
        for call in (lambda: next(items), items.close):
            with pytest.raises(RuntimeError, match="runs in another thread than this"):
                call()

    Threads().start(other)()
    assert story == []
    items.close()
    assert story == ["ended"]


def test_a_stream_that_is_dropped_ends_its_view(kind):
    """Nobody has closed it."""
    story = []

    async def view(sse):
        try:
            await sse.send("a")
        except BaseException as error:
            story.append(type(error).__name__)
            raise

    response, chunks = chunks_of(kind(view))
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    stream = weakref.ref(response.response)
    del response, chunks
    gc.collect()
    assert stream() is None
    await_true(lambda: story)


def test_nothing_of_a_view_is_left_to_the_collector(caplog):
    """Neither its variables nor its error's, once the stream has ended."""
    caplog.set_level(logging.CRITICAL, "syncstream")  # a log record keeps the error

    class Large:
        """Something that should not stay."""

    kept = []

    def view(sse):
        large = Large()
        kept.append(weakref.ref(large))
        sse.send("a")
        raise ValueError("MARK")

    gc.disable()
    try:
        stream = stream_of(pushed(view), Line())
        with contextlib.suppress(ConnectionResetError):
            list(stream)
        stream.close()
        assert stream.reason == "error"
        del stream
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_finally_of_a_view_may_use_what_it_has_linked():
    """As a generator's: the links' read is in one place, the clean-up in another."""
    places = []

    class Closable:
        def close(self):
            """Be one."""

    def view(sse):
        links = [Link(Closable())]
        try:
            places.append(place_of(links))
            raise ValueError
        except ValueError:
            places.append(place_of(links))

    assert list(pushed(view)) == []
    first, second = places
    assert first
    assert first != second


# Under gevent.


def test_a_plain_view_is_interrupted_in_every_wait_of_gevents():
    """And what gevent's kill of the request's greenlet raises reaches it."""
    import gevent

    story = []

    def view(sse):
        sse.send("a")
        try:
            gevent.sleep(TIMEOUT)
        except BaseException as error:
            story.append(type(error).__name__)
            raise
        finally:
            gevent.sleep(0.001)
            story.append("closed")

    for how in ("stop", "kill"):
        stream = stream_of(pushed(view), Line())
        chunks = []

        def read(chunks=chunks, stream=stream):
            try:
                chunks.extend(stream)
            except ConnectionResetError:
                chunks.append("cut")
            stream.close()

        greenlet = gevent.spawn(read)
        Greenlets().await_true(lambda chunks=chunks: len(chunks) == 2)
        gevent.sleep(0)
        if how == "stop":
            stream.stop("closed")
        else:
            greenlet.kill()
        greenlet.join(TIMEOUT)
        assert chunks[1] == b"data: a\n\n"
    assert story == ["GeneratorExit", "closed", "GreenletExit", "closed"]
    assert stream.reason == "shutdown"


def test_a_timeout_of_gevents_waits_for_the_views_turn():
    """It hits while the server writes, and is raised at the ``send`` after that."""
    import gevent

    story = []

    def view(sse):
        with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.01):
            sse.send("a")
            story.append("sent")
        sse.send("b")

    def serve_slowly():
        chunks = iter(stream)
        assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
        gevent.sleep(0.05)  # the server writes
        assert story == []
        return list(chunks)

    stream = stream_of(pushed(view), Line())
    assert gevent.spawn(serve_slowly).get(timeout=TIMEOUT)[0] == b"data: b\n\n"
    assert story == []
    stream.close()


def test_a_thread_beside_gevent_waits_as_a_thread():
    """gevent is imported, and has patched nothing."""
    import gevent  # noqa: F401 (that is enough)

    hubs = []

    def view(sse):
        sse.send("a")
        hubs.append(sys.modules["gevent._hub_local"].get_hub_if_exists())
        sleep(TIMEOUT)

    stream = stream_of(pushed(view), Line())
    join = Threads().start(lambda: serve(stream))
    await_true(lambda: stream.thread_wait)
    stream.stop("closed")
    assert join()[:2] == [OPENED, b"data: a\n\n"]
    assert hubs == [None]


def test_locals_and_sockets_of_a_patched_process():
    """A view waits in patched sockets and queues, and its client's leave ends that."""
    done = check_script("""
from gevent import monkey; monkey.patch_all()
import queue, socket, time, gevent
from syncstream import sleep
from tests.support.pairs import Greenlets, Line, leave, serve, tcp_pair, stream_of
from tests.streams.test_push import pushed

def recv(): peer.recv(1)
def get(): queue.Queue().get()

for wait in (recv, get, lambda: time.sleep(60), lambda: sleep(60)):
    with tcp_pair() as (server, client), tcp_pair() as (peer, _):
        def view(sse):
            sse.send("a")
            try:
                wait()
            except GeneratorExit as error:
                print(type(error).__name__, end=" ")
                raise
            finally:
                time.sleep(0.001)
                print("closed", end=" ")
        stream = stream_of(pushed(view), Line(server))
        join = Greenlets().start(lambda: serve(stream))
        gevent.sleep(0.02)
        began = time.monotonic()
        leave(client)
        assert len(join()) == 2
        print(stream.reason, time.monotonic() - began < 5)
""")
    assert done == "ClientDisconnected closed disconnected True\n" * 4


# The decorator.


def test_options_and_names_are_kept():
    """It is used with and without options."""

    @with_sse(end="reconnect", retry=5)
    def view(sse, name):
        """Be a view."""
        sse.send(name)

    assert view.__doc__ == "Be a view."
    assert [*inspect.signature(view).parameters] == ["name"]
    assert get(view(name="a"), headers=ASK).data == b": ok\nretry: 5\n\ndata: a\n\n"


def positional_only(sse, /, **kwargs):
    sse.send(kwargs)


def by_keyword(*args, **kwargs):
    kwargs["sse"].send([*args])


def with_user(view):
    """Decorate a view with one more argument."""

    @functools.wraps(view)
    def wrapper(*args, **kwargs):
        return view("ann", *args, **kwargs)

    return wrapper


def logged(view):
    """Decorate a view that gets the same arguments."""

    @functools.wraps(view)
    def wrapper(request, *args, **kwargs):
        return view(request, *args, **kwargs)

    return wrapper


A1 = '["ann",1]'


@pytest.mark.parametrize(
    ("view", "args", "kwargs", "data"),
    [
        (lambda sse: sse.send("a"), [], {}, "a"),
        (lambda request, sse: sse.send(request), ["r"], {}, "r"),
        (lambda request, sse, **rest: sse.send(rest), ["r"], {"n": 1}, '{"n":1}'),
        (lambda request, n, sse: sse.send(n), ["r"], {"n": 1}, "1"),
        (lambda sse, n: sse.send(n), [], {"n": 1}, "1"),
        (lambda n, sse: sse.send(n), [], {"n": 1}, "1"),
        (lambda request, *, sse: sse.send(request), ["r"], {}, "r"),
        (lambda request, out: out.send(request), ["r"], {}, "r"),
        (lambda out, n: out.send(n), [], {"n": 1}, "1"),
        (lambda *args: args[-1].send(args[0]), ["r"], {}, "r"),
        (lambda **kwargs: kwargs.pop("sse").send(kwargs), [], {"n": 1}, '{"n":1}'),
        (positional_only, [], {"n": 1}, '{"n":1}'),
        (lambda request, sse, n: sse.send([request, n]), ["r", 1], {}, '["r",1]'),
        (lambda sse, request: sse.send(request), ["r"], {}, "r"),
        (lambda request, sse, *rest: sse.send(rest), ["r", 1], {}, "[1]"),
        (with_user(lambda user, sse: sse.send(user)), [], {}, "ann"),
        (with_user(lambda user, out: out.send(user)), [], {}, "ann"),
        (with_user(lambda user, *, sse: sse.send(user)), [], {}, "ann"),
        (with_user(lambda user, n, sse: sse.send([user, n])), [], {"n": 1}, A1),
        (with_user(lambda user, r, sse: sse.send([user, r])), ["r"], {}, '["ann","r"]'),
        (logged(lambda request, sse, n: sse.send([request, n])), ["ann", 1], {}, A1),
        (logged(lambda sse, request: sse.send(request)), ["r"], {}, "r"),
    ],
)
def test_where_the_sender_goes(view, args, kwargs, data):
    """To the argument ``sse``, else after the positional ones."""
    response = with_sse(view)(*args, **kwargs)
    assert get(response).data == f": ok\n\ndata: {data}\n\n".encode()


def generator(sse):
    yield


async def async_generator(sse):
    yield


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (generator, "use @sse, or sse.send"),
        (async_generator, "use @sse, or sse.send"),
        (lambda: None, "add sse to its arguments"),
        ("view", "takes a view function"),
    ],
)
def test_what_is_no_view_is_refused(view, message):
    """Where it is decorated."""
    with pytest.raises(TypeError, match=message):
        with_sse(view)


def test_wrong_options_and_arguments_are_refused():
    """Options where it is decorated; arguments before the response is made."""
    with pytest.raises(ValueError, match="keepalive"):
        with_sse(keepalive=-1)
    with pytest.raises(TypeError, match="missing a required argument: 'n'"):
        with_sse(lambda sse, n: None)()


def test_a_plain_view_needs_greenlet(monkeypatch):
    """The error says what to install; a coroutine needs nothing."""
    monkeypatch.setitem(sys.modules, "greenlet", None)

    async def coroutine(sse):
        await sse.send("a")

    with_sse(coroutine)
    with pytest.raises(ImportError, match=r"pip install 'syncstream-wsgi\[push\]'"):
        with_sse(lambda sse: None)


def test_it_works_where_greenlet_was_not_imported():
    """Until a view is decorated."""
    script = """
import sys
import syncstream
assert "greenlet" not in sys.modules
from syncstream import sleep, with_sse, SSEResponse

def numbers():
    yield "first"
    sleep(0.001)
    yield "last"

early = iter(SSEResponse(numbers()).response)
print(next(early) + next(early))

@with_sse
def view(sse):
    sse.send("a")
    sleep(0.001)

print(list(view().response), list(early))
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    a, last = b"data: a\n\n", b"data: last\n\n"
    assert done.stdout.splitlines() == [
        repr(b": ok\n\ndata: first\n\n"),
        f"{[OPENED, a]} {[last]}",
    ], done.stderr


# The examples of microdot's documentation, as they stand: but for the first line,
# and for the seconds that they wait.

EVENTS = """
@app.route('/events')
@with_sse
async def events(request, sse):
    for i in range(10):
        await asyncio.sleep(1)
        await sse.send({'counter': i})  # unnamed event
    await sse.send('end', event='comment')  # named event
"""
DISCONNECTED = """
@app.route('/events')
@with_sse
async def events(request, sse):
    try:
        i = 0
        while True:
            await asyncio.sleep(1)
            await sse.send({'counter': i})
            i += 1
    except asyncio.CancelledError:
        print('Client disconnected!')
"""


def in_plain(text):
    """Return an example in its synchronous form."""
    words = {
        "async def": "def",
        "await asyncio.sleep": "sleep",
        "await ": "",
        "asyncio.CancelledError": "ClientDisconnected",
    }
    for before, after in words.items():
        text = text.replace(before, after)
    return text


class App:
    """An application with routes, whose views take the request, as microdot's is."""

    def __init__(self):
        self.views = {}

    def route(self, path):
        return lambda view: self.views.setdefault(path, view)

    def __call__(self, environ, start_response):
        request = Request(environ)
        return self.views[request.path](request)(environ, start_response)


@pytest.fixture(params=["as it stands", "in plain form"])
def microdot(request):
    """Run an example's text; return its view, and what it has printed."""

    class Fast:
        CancelledError = asyncio.CancelledError

        @staticmethod
        def sleep(seconds):
            return asyncio.sleep(seconds / 1000)

    def run(text):
        app, printed = App(), []
        names = {
            **{"app": app, "asyncio": Fast, "print": printed.append},
            **{"with_sse": with_sse, "ClientDisconnected": ClientDisconnected},
            "sleep": lambda seconds: sleep(seconds / 1000),
        }
        exec(text if request.param == "as it stands" else in_plain(text), names)
        return app.views["/events"], printed

    return run


def test_microdots_events(microdot):
    """Ten numbers, one by one, and a named event."""
    view, _ = microdot(EVENTS)
    numbers = b"".join(b'data: {"counter":%d}\n\n' % n for n in range(10))
    body = get(view(None)).data
    assert body == OPENED + numbers + b"event: comment\ndata: end\n\n"


def test_microdots_clean_up(microdot):
    """The client leaves, and the view says so."""
    view, printed = microdot(DISCONNECTED)
    with tcp_pair() as (server, client):
        stream = view(None).response
        stream.connect(Line(server))
        chunks = iter(stream)
        assert next(chunks) + next(chunks) == b': ok\n\ndata: {"counter":0}\n\n'
        hang_up(client)
        list(chunks)
        stream.close()
    assert printed == ["Client disconnected!"]
    assert stream.reason == "disconnected"
