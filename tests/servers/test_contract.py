"""What a connection asks its server, question by question, without a server."""

import _thread
import contextlib
import errno
import functools
import io
import logging
import os
import queue
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from syncstream import ClientDisconnected
from syncstream.runtime.journal import journal
from syncstream.runtime.process import AT_ONCE, Process
from syncstream.servers.connection import HANDOVER, Connection, Full
from syncstream.servers.contract import (
    Counter,
    at_once,
    connection_reset,
    decoded,
    drop_buffered,
    has_cipher,
    running,
    takes_directly,
    unpatched,
)
from syncstream.servers.request import last_event_id, names_event_stream
from syncstream.servers.swap import Refused
from tests.servers.environs import called, environ_of
from tests.support.descriptors import open_files
from tests.support.pairs import leave, tcp_pair
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.usefixtures("own_record")


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ([], True),
        (["django.http.response"], True),
        (["werkzeug.wsgi", "newrelic.api.web", "sentry_sdk.integrations.wsgi"], True),
        (["opentelemetry", "syncstream"], True),
        (["werkzeug.debug.tbtools", "werkzeug.debug"], True),
        (["werkzeug.middleware.shared_data"], False),
        (["django.http.responses"], False),
        (["newrelic", "flask_compress"], False),
        (["flask_compress", "newrelic"], False),
    ],
    ids=str,
)
def test_what_passes_chunks_on(between, expected):
    """If the modules between the generator and its server are all known to."""
    ask = functools.partial(takes_directly, "a_server")
    for server in ("a_server", "a_server.workers.sync"):
        assert called(ask, "syncstream.x", *between, server, "other") is expected
    assert called(ask, "syncstream.x", *between, "a_serverless") is False
    assert called(ask, "syncstream.x", *between) is False


def test_a_thread_of_ones_own_has_no_server():
    """All that there is passes chunks on, to nobody."""
    answers = queue.SimpleQueue()
    ask = functools.partial(takes_directly, "a_server")
    scope = {"__name__": "syncstream.x", "ask": ask, "put": answers.put}
    exec("def step():\n    put(ask())", scope)
    _thread.start_new_thread(scope["step"], ())
    assert answers.get(timeout=TIMEOUT) is False


def test_who_is_found_on_the_stack():
    """The innermost object of the module that has the attribute, by its variable."""
    one, other, odd = SimpleNamespace(a=1), SimpleNamespace(a=2), SimpleNamespace()
    ask = functools.partial(running, "a_server", "a")

    def within(name, ask, owner, variable="self"):
        return lambda: called(ask, name, owner=owner, variable=variable)

    inner = within("a_server.x", ask, odd)  # which has no such attribute
    assert within("a_server", inner, one)() is one
    assert within("a_server", within("a_server.y", inner, other), one)() is other
    assert within("a_serverless", inner, one)() is None
    assert within("a_server", inner, one, "worker")() is None
    ask = functools.partial(running, "a_server", "a", name="worker")
    assert within("a_server", ask, one, "worker")() is one
    frames = []
    called(lambda: frames.append(sys._getframe(1)), "a_server", owner=one)
    assert running("a_server", "a", frames[0]) is one


def test_a_counter_counts_what_was_written():
    """Not what could not be; and it leaves only what is its own."""

    class Response:
        def write(self, data):
            written.append(data)
            if data == b"fails":
                raise OSError
            return len(data)

    written, response = [], Response()
    counter = Counter(response.write)
    assert counter.sent == 0
    assert response.write(b"abc") == 3
    with pytest.raises(OSError, match=r"^$"):
        response.write(b"fails")
    response.write(b"de")
    assert (counter.sent, written) == (5, [b"abc", b"fails", b"de"])
    counter.close()
    counter.close()
    assert "write" not in vars(response)
    response.write = print  # another's
    Counter.close(counter)
    assert response.write is print


def test_what_was_read_ahead_is_dropped():
    """Of a buffered reader, without waiting for more; of nothing else."""
    one, other = socket.socketpair()
    with one, other, one.makefile("rb") as reader:
        other.sendall(b"GET /1\r\nGET /2\r\n")
        assert reader.readline() == b"GET /1\r\n"
        other.sendall(b"more")
        drop_buffered(reader)
        one.setblocking(False)
        assert one.recv(100) == b"more"
    closed = io.BufferedReader(io.BytesIO(b"a"))
    closed.close()
    drop_buffered(closed)
    drop_buffered(io.BytesIO(b"a"))
    drop_buffered(None)


def test_small_answers():
    """As they are asked for, everywhere."""
    told = []
    stopping = at_once(lambda: bool(told))
    assert stopping() is None
    told.append(1)
    assert stopping() == AT_ONCE
    error = connection_reset()
    assert isinstance(error, ConnectionResetError)
    assert error.args == (errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    assert decoded([(b"A", b"\xe9")]) == [("A", "é")]
    assert not has_cipher(None)
    assert has_cipher(SimpleNamespace(cipher=None))


@pytest.mark.parametrize(
    ("patched", "is_warned"),
    [(None, True), ((), True), (("time",), True), (("time", "socket"), False)],
    ids=str,
)
def test_gevent_without_patches(monkeypatch, patched, is_warned):
    """Each of the two that a stream waits in must be patched."""
    monkey = None
    if patched is not None:
        monkey = SimpleNamespace(is_module_patched=lambda name: name in patched)
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    assert bool(list(unpatched())) is is_warned


# Connections.


def connection_of(sock=None, environ=None, **answers):
    """Return a connection of a server that gives these answers."""
    connection = Connection(environ_of(sock) if environ is None else environ)
    for name, answer in answers.items():
        if name in ("threads", "unsent", "stopping", "key", "warnings"):
            answers[name] = lambda environ, answer=answer: answer
    connection.server = replace(connection.server, **answers)
    return connection


def test_a_full_kernel_makes_a_connection_full():
    """As bytes that the server keeps do; one without a socket is never full."""
    with tcp_pair() as (server, client):
        connection = connection_of(server)
        assert connection.is_full() is False
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                server.send(b"x" * 65536)
        assert connection.is_full() is True
        assert connection_of(server, unsent=5).is_full() is True
        client.setblocking(False)

        def has_room():
            with contextlib.suppress(BlockingIOError):
                client.recv(1 << 20)
            return not connection.is_full()

        await_true(has_room)
        assert connection_of(server, unsent=1).is_full() is True
        assert connection_of(server, unsent=1).unsent() == 1
    nowhere = connection_of(environ={}, unsent=0)
    assert nowhere.fd is None
    assert nowhere.is_full() is False
    assert nowhere.is_hung_up() is False
    assert connection_of(environ={}, unsent=1).is_full() is True


def test_a_client_that_leaves_is_seen():
    """By the connection, too."""
    with tcp_pair() as (server, client):
        connection = connection_of(server)
        assert connection.is_hung_up() is False
        leave(client)
        await_true(connection.is_hung_up)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("is_event_source", {}, True),
        ("is_event_source", {"REQUEST_METHOD": "POST"}, False),
        ("is_event_source", {"HTTP_ACCEPT": "*/*"}, False),
        ("is_event_source", {"HTTP_CACHE_CONTROL": " No-Cache "}, True),
        ("is_event_source", {"HTTP_CACHE_CONTROL": "no-store"}, False),
        ("is_event_source", {"HTTP_CACHE_CONTROL": ""}, False),
        ("parses_events", {}, True),
        ("parses_events", {"HTTP_ACCEPT": "application/json"}, False),
        ("parses_events", {"HTTP_ACCEPT": "*/*", "HTTP_X_STAINLESS_LANG": "x"}, True),
        ("is_head", {}, False),
        ("is_head", {"REQUEST_METHOD": "HEAD"}, True),
        ("is_multiprocess", {}, False),
        ("is_multiprocess", {"wsgi.multiprocess": True}, True),
    ],
)
def test_what_a_request_says(name, values, expected):
    """Of its client and its server."""
    environ = environ_of(
        None,
        HTTP_ACCEPT="text/event-stream",
        HTTP_CACHE_CONTROL="no-cache",
    )
    connection = connection_of(environ={**environ, **values})
    assert getattr(connection, name) is expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/event-stream", True),
        ("TEXT/Event-Stream", True),
        ("application/json, text/event-stream", True),
        ("text/event-stream;q=0.5, */*", True),
        (" text/event-stream ; charset=utf-8 ; q=0.001", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream; q = 0.000", False),
        ("text/event-stream;a=b;Q=0.0", False),
        ("text/event-stream-2", False),
        ("x-text/event-stream", False),
        ("*/*", False),
        ("text/*", False),
        ("", False),
    ],
)
def test_who_asks_for_events(accept, expected):
    """By name; what is refused by q=0 is not asked for."""
    assert names_event_stream(accept) is expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"HTTP_LAST_EVENT_ID": "5"}, "5"),
        ({"HTTP_LAST_EVENT_ID": " "}, None),
        ({"HTTP_LAST_EVENT_ID": "", "QUERY_STRING": "last_event_id=6"}, "6"),
        ({"HTTP_LAST_EVENT_ID": "5", "QUERY_STRING": "last_event_id=6"}, "5"),
        ({"QUERY_STRING": "lastEventId=7"}, "7"),
        ({"QUERY_STRING": "lastEventId=7&last_event_id=6"}, "6"),
        ({"QUERY_STRING": "last_event_id=&lastEventId=7"}, "7"),
        ({"QUERY_STRING": "last_event_id=%20&last_event_id=8"}, "8"),
        ({"QUERY_STRING": "last_event_id=+&lastEventId=7"}, "7"),
        ({"QUERY_STRING": "last_event_id=+"}, None),
        ({"QUERY_STRING": "a=lastEventId%3D"}, None),
        ({"QUERY_STRING": "x_last_event_id=5"}, None),
        ({"HTTP_LAST_EVENT_ID": "\xc3\xa9"}, "é"),
        ({"HTTP_LAST_EVENT_ID": "\xff"}, "\ufffd"),
        ({"HTTP_LAST_EVENT_ID": "€"}, "?"),
        ({"QUERY_STRING": "last_event_id=%ff"}, "\ufffd"),
        ({"QUERY_STRING": "&".join(["last_event_id=1"] * 2000)}, "1"),
    ],
    ids=range(18),
)
def test_the_id_of_a_request(values, expected):
    """The header first; blanks count as missing."""
    assert last_event_id(values) == expected
    assert Connection(values).last_event_id == expected


def test_a_connection_is_found_again():
    """In its environ, as long as it is referred to."""
    environ = environ_of(None)
    first = Connection.of(environ)
    assert Connection.of(environ) is first
    del first
    second = Connection.of(environ)
    assert isinstance(second, Connection)
    assert Connection.of({**environ}) is second  # a copy of the same request


def test_a_label_is_short():
    """Of 20 and 200 characters at most, and dots."""
    environ = {"REQUEST_METHOD": "M" * 20, "SCRIPT_NAME": "/a", "PATH_INFO": "/b"}
    assert Connection(environ).label == f"{'M' * 20} '/a/b'"
    environ = {"REQUEST_METHOD": "M" * 21, "PATH_INFO": "p" * 198}
    assert Connection(environ).label == f"{'M' * 20}... '{'p' * 198}'"
    environ = {"PATH_INFO": "p" * 199}
    assert Connection(environ).label == f" '{'p' * 199}..."


def test_hooks_before_a_wait(caplog):
    """All are called, every time; a failure is an error only once."""
    caplog.set_level(logging.DEBUG)
    calls = []
    hooks = [lambda: 1 / 0, lambda: calls.append(1)]
    connection = Connection({"syncstream.before_wait": hooks})
    for _ in range(3):
        connection.before_wait()
    assert len(calls) == 3
    assert connection.hooks == tuple(hooks)
    assert [r.levelname for r in caplog.records] == ["ERROR", "DEBUG", "DEBUG"]
    assert "a before_wait hook failed" in caplog.messages[0]
    Connection({}).before_wait()
    assert Connection({}).hooks == ()


def test_servers_are_told_apart():
    """By an object of theirs, which is not kept alive."""

    class Owner:
        """A server's own."""

    one, other = Owner(), Owner()
    keys = [connection_of(environ={}, key=key).server_key for key in (one, one, other)]
    assert keys[0] == keys[1] != keys[2]
    assert connection_of(environ={}, key=None).server_key == ("another server", None)
    del one
    assert keys[0][1]() is None
    named = connection_of(environ={}, key=None, name="named")
    assert named.server_key == ("named", None)


REFUSALS = {
    "stays": ({}, None, 1, 0),
    "gone": ({"is_gone": True}, ClientDisconnected, 1, 0),
    "no descriptor": ({"is_full": True}, Full, 9, 0),
    "choice": ({"is_choice": True}, Full, 9, 0),
    "choice, no threads": ({"is_choice": True}, None, None, 0),
    "one thread, parked": ({}, Full, 1, 1),
    "two threads, parked": ({}, None, 2, 1),
}


@pytest.mark.parametrize(
    ("options", "error", "threads", "parked"), REFUSALS.values(), ids=REFUSALS
)
def test_a_connection_that_cannot_leave(
    monkeypatch, caplog, options, error, threads, parked
):
    """It stays, or its stream is refused, which is said once."""

    def swap(environ, server):
        raise Refused("of a reason", **options)

    monkeypatch.setattr("syncstream.servers.connection.Swap", swap)
    monkeypatch.setattr(Process, "parked_streams", parked)
    for _ in range(2):
        connection = connection_of(environ={}, threads=threads)
        if error is None:
            assert connection.swap() is None
            continue
        with pytest.raises(error, match="of a reason") as caught:
            connection.swap()
        assert isinstance(caught.value.__cause__, Refused)
    assert len(caplog.records) == (error is Full)
    assert ("ulimit -Hn" in caplog.text) == bool(options.get("is_full"))
    assert ("few threads" in caplog.text) == (error is Full and "is_choice" in options)
    assert ("only thread" in caplog.text) == (error is Full and not options)


@pytest.mark.parametrize("value", [False, None, True])
def test_who_must_stay_is_not_taken(monkeypatch, value):
    """Where the application, or the middleware, has said so."""
    monkeypatch.setattr("syncstream.servers.connection.Swap", lambda *_: "taken")
    connection = Connection({HANDOVER: value})
    assert connection.swap() == (None if value is False else "taken")
    assert Connection({}).swap() == "taken"


@pytest.mark.parametrize("threads", [None, 1, 2, 3])
@pytest.mark.parametrize("streams", [0, 1, 2, 3])
def test_all_threads_are_taken(monkeypatch, caplog, threads, streams):
    """Said once that all are, unless there is just one."""
    monkeypatch.setattr(Process, "attached_streams", streams)
    for _ in range(2):
        connection_of(environ={}, threads=threads, warnings=()).warn()
    is_said = threads is not None and threads > 1 and streams >= threads
    assert ("streams occupy all" in caplog.text) == is_said
    assert len(caplog.records) == is_said


def test_drop_hangs_up_for_both_sides():
    """A write that waits fails, the server is told, and no descriptor stays."""
    told = []
    with tcp_pair() as (server, client):
        environ = environ_of(server)
        connection = connection_of(environ=environ, drop=told.append)
        before = open_files()
        connection.drop()
        assert open_files() - before == {}
        assert told == [environ]
        with pytest.raises(BrokenPipeError):
            server.send(b"x")
        assert client.recv(1) == b""
        server.close()
        connection.drop()
    assert len(told) == 1
    connection_of(environ={}, drop=told.append).drop()
    assert len(told) == 1


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("is_tls", [True, False])
def test_how_a_cut_is_seen(protocol, is_tls):
    """By the missing end mark, or by a reset; TLS marks its own end."""
    with tcp_pair() as (server, client):
        client.settimeout(TIMEOUT)
        environ = environ_of(server, SERVER_PROTOCOL=protocol)
        raised = ValueError()
        connection = connection_of(
            environ=environ, is_tls=lambda environ: is_tls, raises=lambda: raised
        )
        assert connection.cut() is raised
        if protocol == "HTTP/1.0" and not is_tls:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert client.recv(1) == b""
    assert journal().flush()
