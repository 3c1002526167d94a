"""A step that fails leaves nothing behind of those before it.

Each step between a request and its stream fails in turn; afterwards there is no place
taken, no stream counted, nothing watched, and the application did as without us.
"""

import gc
import os
import resource
import socket
import weakref
from collections import Counter, deque
from dataclasses import replace

import pytest

from syncstream import (
    Hub,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
)
from syncstream.fanout import loop as fanout_module
from syncstream.fanout.loop import Fanout, fanout
from syncstream.runtime import watch as watch_module
from syncstream.runtime.process import Process, process
from syncstream.runtime.watch import Watch, watch
from syncstream.servers import descriptors, server_of
from syncstream.servers import swap as handover
from syncstream.servers.connection import Connection, Full
from syncstream.servers.swap import Swap
from syncstream.streams.capacity import Place
from syncstream.streams.monitor import Monitor
from syncstream.streams.stream import Stream
from tests.fanout.peers import settle
from tests.servers.environs import environ_of
from tests.support.descriptors import open_files
from tests.support.live import LiveServer, unique_key
from tests.support.pairs import Line, serve, stream_of, tcp_pair
from tests.support.waits import await_true

EVENTS = [("Content-Type", "text/event-stream")]
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Failure(Exception):
    """What fails a step."""


def fail(*args, **options):
    raise Failure


def never():
    raise AssertionError("a source has begun")
    yield


def ours(environ, start_response):
    return SSEResponse(never())(environ, start_response)


def by_hand(environ, start_response):
    start_response("200 OK", EVENTS)
    return never()


def lazy(environ, start_response):
    start_response("200 OK", EVENTS)
    yield from never()


def late(environ, start_response):
    start_response("200 OK", EVENTS)
    raise Failure


def ours_late(environ, start_response):
    ours(environ, start_response)
    raise Failure


def nothing(environ, start_response):
    start_response("200 OK", EVENTS)


@pytest.fixture
def connection():
    """A request's environ, over a connection."""
    gc.collect()
    before = process().open_streams  # other tests'
    with tcp_pair() as (server, _):
        yield {
            **environ_of(server),
            "wsgi.multithread": True,
            "test.before": before,
        }


def start_response(status, headers, exc_info=None):
    return lambda data: None


def limited(app):
    return StreamMiddleware(
        app, max_streams=1, limit_by=lambda environ: "me", max_per_key=1
    )


def run(app, environ, start_response=start_response):
    """Do as a server does, up to the first chunk."""
    body = app(environ, start_response)
    try:
        next(iter(body))
    finally:
        getattr(body, "close", int)()


def assert_nothing_is_left(middleware, environ):
    """Nothing is counted, and there is a place for the next one."""
    gc.collect()
    capacity = middleware.capacity
    assert (capacity.count, capacity.threads, capacity.counts) == (0, 0, {})
    assert process().open_streams <= environ["test.before"]
    assert environ["gunicorn.socket"].fileno() not in watch().watched
    fresh = dict(environ)
    fresh.pop("syncstream.connection", None)
    middleware.app = SSEResponse(["a"])
    assert middleware(fresh, start_response) is not None


@pytest.mark.parametrize("app", [ours, by_hand, lazy, late, ours_late])
def test_a_head_that_is_refused(app, connection):
    """The server's error reaches the server, and no source has begun."""
    middleware = limited(app)
    with pytest.raises(Failure):
        run(middleware, connection, fail)
    assert_nothing_is_left(middleware, connection)


@pytest.mark.parametrize("app", [late, ours_late])
def test_an_application_that_fails_after_its_head(app, connection):
    middleware = limited(app)
    with pytest.raises(Failure):
        run(middleware, connection)
    assert_nothing_is_left(middleware, connection)


def test_an_application_that_returns_nothing(connection):
    """As without us it is a TypeError."""
    middleware = limited(nothing)
    with pytest.raises(TypeError):
        run(middleware, connection)
    assert_nothing_is_left(middleware, connection)


def test_a_response_whose_head_is_refused_is_closed(connection):
    """Nobody else would: it has not been returned."""
    ended = []
    response = SSEResponse(never())
    response.call_on_close(lambda: ended.append("closed"))
    with pytest.raises(Failure):
        response(connection, fail)
    assert ended == ["closed"]


def test_another_answer_after_a_head_that_was_refused(connection):
    """An application may catch the error, and answer something else."""
    answers = []

    def refusing(status, headers, exc_info=None):
        if status == "200 OK":
            raise Failure
        answers.append(status)
        return answers.append

    def app(environ, start_response):
        try:
            start_response("200 OK", EVENTS)
        except Failure:
            start_response("500 Oh", [("Content-Type", "text/plain")])
        yield b"text"

    middleware = limited(app)
    body = middleware(connection, refusing)
    assert list(body) == [b"text"]
    body.close()
    assert answers == ["500 Oh"]
    assert_nothing_is_left(middleware, connection)


@pytest.mark.parametrize("app", [SSEResponse, StreamResponse])
@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (Watch, "add"),
        (Watch, "call_at"),
        (Process, "opened"),
        (Process, "have_exit"),
        (Monitor, "observe"),
        (Stream, "hold"),
    ],
)
def test_a_step_of_the_stream_that_fails(
    connection, own_record, monkeypatch, app, owner, step
):
    """Whatever the stream begins with; and what was half done is tried again."""
    watch()
    # With such a limit it is watched from its first step on.
    middleware = limited(app(["a"], send_timeout=0.9))
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(Failure):
            run(middleware, connection)
    assert_nothing_is_left(middleware, connection)
    assert not own_record.is_looking


def test_a_swap_that_is_not_watched_is_undone(connection, monkeypatch):
    """The server has its connection back."""
    watch()
    server = connection["gunicorn.socket"]
    before = server.getpeername()
    with monkeypatch.context() as patch:
        patch.setattr(watch_module.Watch, "call_at", fail)
        with pytest.raises(Failure):
            Swap(connection, server_of(connection))
    assert server.family == socket.AF_INET
    assert server.getpeername() == before


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (Fanout, "add"),
        (Fanout, "call"),
        (fanout_module, "hold"),
        (descriptors, "hold"),
        (handover, "_inode"),
        (Place, "leave_thread"),
    ],
)
def test_a_hand_over_that_fails(connection, monkeypatch, owner, step):
    """Nobody has its client's descriptor, nor its place; it ends, once."""
    watch()
    settle(fanout())
    hub, ended = Hub(), []
    response = SSEResponse(hub.subscribe("a"))
    response.call_on_close(lambda: ended.append("closed"))
    middleware, server = limited(response), connection["gunicorn.socket"]
    begin, before = getattr(owner, step), open_files()
    failures = []

    def fail_once(*args, **options):
        if not failures:
            failures.append(step)
            raise Failure
        return begin(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail_once)
        body = middleware(connection, start_response)
        with pytest.raises(Failure):
            deque(map(server.sendall, map(HEAD.__add__, body)))
        body.close()
    assert ended == ["closed"]
    assert hub.stats()["subscribers"] == 0
    assert_nothing_is_left(middleware, connection)
    pair = os.readlink(f"/proc/self/fd/{server.fileno()}")  # in the connection's place
    assert open_files() - before - Counter([pair]) == {}
    hub.close()


class Linked:
    """What an application has linked to its stream."""

    def __init__(self, name, closed):
        self.name, self.closed = name, closed

    def close(self):
        self.closed.append(self.name)


@pytest.mark.parametrize("failing", [None, (Fanout, "add"), (Place, "leave_thread")])
def test_links_go_with_their_client(connection, monkeypatch, failing):
    """They are closed at its end, once, the last one first, before the callbacks."""
    watch()
    hub, closed, server = Hub(), [], connection["gunicorn.socket"]

    def authorize(subscription):
        for name in "ab":
            current_stream().link(Linked(name, closed))
        return True

    response = SSEResponse(hub.subscribe("a", authorize=authorize))
    stream = response.response
    stream.on_close(lambda: closed.append("callback"))
    middleware, expected = limited(response), ["b", "a", "callback"]
    with monkeypatch.context() as patch:
        if failing is not None:
            patch.setattr(*failing, fail)
        body = middleware(connection, start_response)
        try:
            deque(map(server.sendall, map(HEAD.__add__, body)))
        except Failure:
            assert failing is not None
        else:
            assert (failing, stream.reason, closed) == (None, None, [])
            stream.link(Linked("late", closed))
            expected.append("late")
    body.close()
    hub.close()
    await_true(lambda: len(closed) >= len(expected))
    settle(fanout())
    assert closed == expected


def test_who_would_block_the_only_thread_is_refused(own_record, connection, caplog):
    """While clients that have left depend on the process; and the log says so, once."""
    watch()
    hub, server = Hub(), connection["gunicorn.socket"]
    body = SSEResponse(hub.subscribe("a"))(dict(connection), start_response)
    deque(map(server.sendall, map(HEAD.__add__, body)))
    body.close()
    odd = Connection(dict(connection))
    exact = server_of(odd.environ)
    odd.server = replace(exact, stays=lambda environ: "odd", threads=lambda e: 1)
    for _ in range(2):
        with pytest.raises(Full, match="the server has one thread, and odd"):
            odd.swap()
    hub.close()
    await_true(lambda: body.reason == "closed")
    settle(fanout())
    assert caplog.text.count("would have blocked the only thread") == 1


def test_a_second_reader_of_a_subscription(connection):
    """It gets an error, which names the mistake; the first one goes on."""
    watch()
    hub = Hub()
    subscription, server = hub.subscribe("a"), connection["gunicorn.socket"]
    body = SSEResponse(subscription)(dict(connection), start_response)
    for step in range(2):
        second = SSEResponse(subscription)
        with tcp_pair() as (other, _):
            with pytest.raises(RuntimeError, match="a subscription has one reader"):
                second({**connection, "gunicorn.socket": other}, start_response)
            second.close()
        if not step:
            deque(map(server.sendall, map(HEAD.__add__, body)))
            body.close()
    assert body.reason is None
    assert hub.stats()["subscribers"] == 1
    hub.close()
    await_true(lambda: body.reason == "closed")
    settle(fanout())


def test_a_second_reader_of_one_that_was_handed_over(connection):
    """Its stream is gone, with its request; its client is not, and goes on."""
    watch()
    hub = Hub()
    subscription, server = hub.subscribe("a"), connection["gunicorn.socket"]
    body = SSEResponse(subscription)(dict(connection), start_response)
    deque(map(server.sendall, map(HEAD.__add__, body)))
    body.close()
    stream = weakref.ref(body)
    del body
    gc.collect()
    assert stream() is None
    for _ in range(2):
        second = SSEResponse(subscription)
        with tcp_pair() as (other, _):
            with pytest.raises(RuntimeError, match="a subscription has one reader"):
                second({**connection, "gunicorn.socket": other}, start_response)
            second.close()
    settle(fanout())
    assert hub.stats()["subscribers"] == 1
    assert subscription.reason is None
    hub.close()
    settle(fanout())
    await_true(lambda: subscription.reader is None)


def test_a_refusal_is_logged_as_it_is(caplog):
    """A method that a client has chosen is no format of the line."""

    class Refusing(Line):
        def swap(self):
            raise Full("the method is %ABC, not GET")

    hub = Hub()
    with caplog.at_level("DEBUG", "syncstream.stream"):
        serve(stream_of(hub.subscribe("a"), Refusing()))
    hub.close()
    assert "GET '/test' was refused: the method is %ABC, not GET" in caplog.messages


def test_a_limit_that_is_lowered(connection, monkeypatch):
    """By an operator's prlimit(1), for one: clients stay with their server."""
    descriptors.descriptor_limit()

    def refuse(*args):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(descriptors, "descriptor_limit", lambda: 1 << 20)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(handover.Refused, match="RLIMIT_NOFILE: current limit"):
        Swap(connection, server_of(connection))


@pytest.mark.parametrize("app", ["app", "wrapped"])
@pytest.mark.parametrize("kind", ["gunicorn-gthread", "waitress"])
def test_a_header_that_the_server_refuses(kind, app):
    """A generator application gets a 500, with the middleware as without it."""
    with LiveServer(kind, f"tests.apps.bare:{app}") as server:
        key = unique_key()
        with server.get(f"/bad-header/three?key={key}") as client:
            client.read_head()
            assert client.status == 500
        assert "None" not in server.log()
        with server.get("/health") as client:
            assert client.rest() == b"ok"


def test_a_hub_is_left_alone(connection):
    """A subscriber whose head is refused has not subscribed."""
    hub = Hub()
    middleware = limited(SSEResponse(hub.subscribe("a")))
    with pytest.raises(Failure):
        run(middleware, connection, fail)
    assert hub.stats()["subscribers"] == 0
    assert_nothing_is_left(middleware, connection)
    hub.close()
