"""The servers' files, each against as much of its server as it looks at.

The tests of deployments run the same on the servers themselves.
"""

import io
import os
import queue
import signal
import socketserver
import sys
import time
from types import SimpleNamespace

import pytest

from syncstream.runtime.process import AT_ONCE
from syncstream.servers import OTHER, SERVERS, gunicorn, server_of
from tests.servers.environs import called, environ_of, gunicorn_body

pytestmark = pytest.mark.usefixtures("own_record")
BY_NAME = {server.name: server for server in SERVERS}
SOCKET = SimpleNamespace(fileno=lambda: 7)
TLS = SimpleNamespace(fileno=lambda: 7, cipher=lambda: None)


class Owner:
    """A part of a server, with these attributes, and methods that do nothing."""

    def __init__(self, **names):
        vars(self).update(names)

    def write(self, data):
        """It goes nowhere."""

    def start_response(self, status, headers, exc_info=None):
        """Neither does this."""


def asked(question, environ, module=None, owner=None, variable="self"):
    """Ask an adapter's question from within a function of its server."""

    def ask():
        return question(environ)

    return (
        ask() if module is None else called(ask, module, owner=owner, variable=variable)
    )


ENVIRONS = {
    "gunicorn": {"gunicorn.socket": None},
    "werkzeug": {"werkzeug.socket": None, "SERVER_SOFTWARE": "Werkzeug/3"},
    "waitress": {"waitress.client_disconnected": None},
    "uwsgi": {"uwsgi.version": b"2"},
    "pywsgi": {"SERVER_SOFTWARE": "gevent/26 Python/3"},
    "cheroot": {"SERVER_SOFTWARE": "Cheroot/11.1"},
    "wsgiref": {"SERVER_SOFTWARE": "WSGIServer/0.2"},
    "a test client": {"SERVER_SOFTWARE": "gunicorn/27"},
    "another server": {"SERVER_SOFTWARE": "mod_wsgi/5"},
}


@pytest.mark.parametrize("name", ENVIRONS)
def test_a_server_is_told_by_its_environ(name):
    """And the facts that it has no say in are those of its file."""
    server = server_of(ENVIRONS[name])
    assert server.name == name
    assert (server is OTHER) == (name == "another server")
    for protocol, expected in (("HTTP/1.0", False), ("HTTP/1.1", True)):
        many = {"wsgi.multithread": True, "wsgi.multiprocess": False}
        environ = {**ENVIRONS[name], **many, "SERVER_PROTOCOL": protocol}
        never = name in ("uwsgi", "wsgiref")
        assert server.marks_end(environ) is (expected and not never)
    has_error = name in ("cheroot", "a test client", "another server")
    assert (server.raises() is not None) is has_error
    assert server.answers_errors is (name not in ("cheroot", "uwsgi"))
    assert server.logs_errors is (name not in ("a test client", "another server"))
    assert server.closes_first is (name in ("cheroot", "waitress"))
    assert server.closes_early is (name == "waitress")
    assert server.raises_system_error is (name == "uwsgi")
    exits = ("gunicorn", "werkzeug", "wsgiref", "another server")
    assert server.lets_exits_through is (name in exits)


# cheroot

CHEROOT = BY_NAME["cheroot"]


def cheroot_body(sock):
    return SimpleNamespace(rfile=SimpleNamespace(raw=SimpleNamespace(_sock=sock)))


def test_cheroots_socket():
    """By its body's reader, or by its connection, if the body was replaced."""
    for sock, is_tls in ((SOCKET, False), (TLS, True)):
        body = cheroot_body(sock)
        environ = {"wsgi.input": body}
        assert CHEROOT.socket(environ) is sock
        assert CHEROOT.is_tls(environ) is is_tls
        body.rfile._raw = body.rfile.raw  # as older ones have it
        del body.rfile.raw
        assert CHEROOT.socket(environ) is sock
        gateway = Owner(req=SimpleNamespace(conn=body))
        for given in (io.BytesIO(), None):
            environ = {"wsgi.input": given}
            found = asked(CHEROOT.socket, environ, "cheroot.wsgi", gateway)
            assert found is sock
            assert CHEROOT.socket(environ) is None


@pytest.mark.parametrize("started", [True, False])
def test_cheroots_head(started):
    """It can begin anew once start_response was called, until its headers are sent."""
    request = SimpleNamespace(sent_headers=False, outheaders=[(b"A", b"1")])
    gateway = Owner(started_response=started, req=request, remaining_bytes_out=5)

    def ask(question, *more):
        return asked(lambda _: question({}, *more), {}, "cheroot.wsgi", gateway)

    expected = gateway.start_response if started else None
    assert ask(CHEROOT.start_response) == expected
    assert CHEROOT.start_response({}) is None
    assert ask(CHEROOT.own_write) == gateway.write
    assert CHEROOT.own_write({}) is None
    assert CHEROOT.headers(gateway.write) == [("A", "1")]
    request.sent_headers = True
    assert ask(CHEROOT.forget_head, None) is False
    assert gateway.remaining_bytes_out == 5
    request.sent_headers = False
    assert ask(CHEROOT.forget_head, None) is started
    assert request.outheaders == ([] if started else [(b"A", b"1")])
    assert gateway.remaining_bytes_out == (None if started else 5)
    assert CHEROOT.forget_head({}, None) is False


@pytest.mark.parametrize(
    ("remaining", "closes"), [(0, False), (1, True), (None, False)]
)
def test_cheroot_reads_no_body_that_it_is_not_sent(remaining, closes):
    """The connection is closed instead."""
    reader = (
        SimpleNamespace() if remaining is None else SimpleNamespace(remaining=remaining)
    )
    request = SimpleNamespace(rfile=reader, close_connection=False)
    asked(CHEROOT.leave_body, {}, "cheroot.wsgi", Owner(req=request))
    assert request.close_connection is closes
    CHEROOT.leave_body({})


def test_cheroots_stop():
    """When it is no longer ready, or is interrupted."""
    server = SimpleNamespace(ready=True, interrupt=None, numthreads=5)
    worker = Owner(server=server)
    stopping = asked(CHEROOT.stopping, {}, "cheroot.server", worker)
    assert stopping() is None
    server.interrupt = KeyboardInterrupt
    assert stopping() == AT_ONCE
    server.ready, server.interrupt = False, None
    assert stopping() == AT_ONCE
    assert CHEROOT.stopping({}) is None
    assert asked(CHEROOT.threads, {}, "cheroot.server", worker) == 5
    assert CHEROOT.threads({}) is None
    assert asked(CHEROOT.key, {}, "cheroot.server", worker) is server


# gevent.pywsgi

PYWSGI = BY_NAME["pywsgi"]


def test_pywsgis_socket_and_head():
    """By its body's reader, or by its handler, if the body was replaced."""
    for sock, is_tls in ((SOCKET, False), (TLS, True)):
        reader = SimpleNamespace(raw=SimpleNamespace(_sock=sock))
        environ = {"wsgi.input": SimpleNamespace(rfile=reader)}
        assert PYWSGI.socket(environ) is sock
        assert PYWSGI.is_tls(environ) is is_tls
        handler = Owner(rfile=reader, response_headers=[(b"A", b"1")])
        for given in ({}, {"wsgi.input": io.BytesIO()}):
            assert asked(PYWSGI.socket, given, "gevent.pywsgi", handler) is sock
            assert PYWSGI.socket(given) is None
        write = asked(PYWSGI.own_write, {}, "gevent.pywsgi", handler)
        assert write == handler.write
        assert PYWSGI.headers(write) == [("A", "1")]
    assert PYWSGI.own_write({}) is None


def test_pywsgis_stop():
    """When it has been closed; its pool is the number of requests."""
    server = SimpleNamespace(started=True, pool=SimpleNamespace(size=9))
    handler = Owner(server=server)
    stopping = asked(PYWSGI.stopping, {}, "gevent.pywsgi", handler)
    assert stopping() is None
    server.started = False
    assert stopping() == AT_ONCE
    assert PYWSGI.stopping({}) is None
    assert PYWSGI.stopping({"gunicorn.sock": 1}) is None  # no worker is found
    assert asked(PYWSGI.threads, {}, "gevent.pywsgi", handler) == 9
    server.pool = None
    assert asked(PYWSGI.threads, {}, "gevent.pywsgi", handler) is None
    assert asked(PYWSGI.key, {}, "gevent.pywsgi", handler) is server


# waitress

WAITRESS = BY_NAME["waitress"]


class Channel(Owner):
    def client_disconnected(self):
        """The key of the environ."""


def test_waitress_by_its_channel():
    """Which is found by the method that it shows."""
    pulled = []
    dispatcher = SimpleNamespace(threads={1, 2, 3}, stop_count=0)
    server = SimpleNamespace(
        trigger=SimpleNamespace(pull_trigger=pulled.append),
        task_dispatcher=dispatcher,
        accepting=True,
    )
    channel = Channel(
        socket=SOCKET,
        server=server,
        adj=SimpleNamespace(threads=3, channel_request_lookahead=0),
        total_outbufs_len=5,
        outbuf_lock=object(),
        connected=True,
        handle_close=print,
    )
    environ = {"waitress.client_disconnected": channel.client_disconnected}
    assert WAITRESS.socket(environ) is SOCKET
    assert WAITRESS.is_tls(environ) is False
    assert WAITRESS.unsent(environ) == 5
    assert WAITRESS.threads(environ) == 3
    assert WAITRESS.key(environ) is server
    assert WAITRESS.lock(environ) is channel.outbuf_lock
    assert WAITRESS.is_closing(environ) is False
    channel.connected = False
    assert WAITRESS.is_closing(environ) is True
    WAITRESS.drop(environ)
    assert pulled == [print]
    assert WAITRESS.stays(environ) is None
    channel.adj.channel_request_lookahead = 1
    assert "reads ahead" in WAITRESS.stays(environ)
    stopping = WAITRESS.stopping(environ)
    for count, accepting, expected in (
        (0, True, None),
        (2, True, None),
        (3, True, AT_ONCE),
        (4, True, AT_ONCE),
        (0, False, AT_ONCE),
    ):
        dispatcher.stop_count, server.accepting = count, accepting
        assert stopping() == expected
    task = Owner(response_headers=[("A", "1")])
    assert asked(WAITRESS.own_write, environ, "waitress.task", task) == task.write
    assert WAITRESS.own_write(environ) is None
    assert WAITRESS.headers(task.write) == [("A", "1")]


# Werkzeug

WERKZEUG = BY_NAME["werkzeug"]


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("processes", [True, False])
def test_werkzeug_by_its_environ(threads, processes):
    """Without threads and processes it speaks HTTP/1.0, to one client at a time."""
    many = {"wsgi.multithread": threads, "wsgi.multiprocess": processes}
    is_many = threads or processes
    for sock, is_tls in ((SOCKET, False), (TLS, True)):
        environ = {**many, "werkzeug.socket": sock, "SERVER_PROTOCOL": "HTTP/1.1"}
        assert WERKZEUG.socket(environ) is sock
        assert WERKZEUG.is_tls(environ) is is_tls
    assert WERKZEUG.marks_end(environ) is is_many
    assert not WERKZEUG.marks_end({**environ, "SERVER_PROTOCOL": "HTTP/1.0"})
    assert WERKZEUG.threads(environ) == (None if is_many else 1)
    assert (WERKZEUG.stays(environ) is not None) is processes


def listening(fds):
    return SimpleNamespace(socket=SimpleNamespace(fileno=lambda: fds[-1]))


def test_the_stop_of_a_server_that_closes_its_socket():
    """Werkzeug's and wsgiref's; Django's runserver is among these."""
    modules = (
        "werkzeug.serving",
        "wsgiref.simple_server",
        "django.core.servers.basehttp",
    )
    for module in modules:
        fds = [0]
        server = listening(fds)
        handler = Owner(server=server, rfile=None)
        adapter = BY_NAME["werkzeug" if "werkzeug" in module else "wsgiref"]
        stopping = asked(adapter.stopping, {}, module, handler)
        assert stopping() is None
        fds.append(-1)
        assert stopping() == AT_ONCE
        assert adapter.stopping({}) is None
        assert asked(adapter.key, {}, module, handler) is server
        assert adapter.key({}) is None


def test_werkzeugs_write():
    """It has the headers in a variable that it closes over."""
    headers_set = [("A", "1")]

    def write(data):
        return headers_set

    found = asked(WERKZEUG.own_write, {}, "werkzeug.serving", write, "write")
    assert found is write
    assert WERKZEUG.headers(write) is headers_set
    assert WERKZEUG.own_write({}) is None


# wsgiref

WSGIREF = BY_NAME["wsgiref"]


def test_wsgirefs_socket():
    """By the body's reader, Django's wrappers of it, or the handler."""
    for sock, is_tls in ((SOCKET, False), (TLS, True)):
        reader = SimpleNamespace(raw=SimpleNamespace(_sock=sock))
        wrapped = Owner(raw=reader.raw)
        for given in (
            reader,
            SimpleNamespace(_read=wrapped.write),
            SimpleNamespace(stream=reader),
        ):
            environ = {"wsgi.input": given}
            assert WSGIREF.socket(environ) is sock
            assert WSGIREF.is_tls(environ) is is_tls
        handler = Owner(rfile=reader)
        for module in ("wsgiref.simple_server", "django.core.servers.basehttp"):
            assert asked(WSGIREF.socket, {}, module, handler) is sock
        assert WSGIREF.socket({}) is None


def test_wsgirefs_write():
    """Its headers, and how much it has written."""
    for module in ("wsgiref.handlers", "django.core.servers.basehttp"):
        headers = SimpleNamespace(items=lambda: [("A", "1")])
        handler = Owner(bytes_sent=5, headers=headers)
        write = asked(WSGIREF.own_write, {}, module, handler)
        assert write == handler.write
        assert WSGIREF.sent(write) == 5
        assert WSGIREF.headers(write) == [("A", "1")]
    assert WSGIREF.own_write({}) is None
    assert WSGIREF.sent(print) is None


def test_wsgirefs_threads():
    """One, unless its class says otherwise; then a stream blocks all others."""

    class Threaded(socketserver.ThreadingMixIn):
        """A server of threads."""

    for server, threads in ((object(), 1), (Threaded(), None)):
        handler = Owner(server=server, rfile=None)
        question = "wsgiref.simple_server", handler
        assert asked(WSGIREF.threads, {}, *question) == threads
        warned = asked(lambda _: list(WSGIREF.warnings({})), {}, *question)
        assert len(warned) == (threads == 1)
    assert WSGIREF.threads({}) is None
    assert list(WSGIREF.warnings({})) == []


# uWSGI

UWSGI = BY_NAME["uwsgi"]


@pytest.fixture
def uwsgi(monkeypatch):
    """The module that its programs have."""
    made = SimpleNamespace(opt={}, cores=3, connection_fd=lambda: 9)
    monkeypatch.setitem(sys.modules, "uwsgi", made)
    return made


@pytest.mark.parametrize(
    ("https", "option", "expected"),
    [
        ("on", "https-socket", True),
        ("on", "ssl-socket2", True),
        ("on", "suwsgi-socket", True),
        ("on", "http-socket", False),
        ("off", "https-socket", False),
        (None, "https-socket", False),
    ],
)
def test_uwsgis_tls(uwsgi, https, option, expected):
    """Its own, not a proxy's."""
    uwsgi.opt = {"a": 1, option: "x"}
    environ = {} if https is None else {"HTTPS": https}
    assert UWSGI.is_tls(environ) is expected


def test_uwsgis_facts(uwsgi):
    """The descriptor, which is read once, the cores, and what it is warned of."""
    sock = UWSGI.socket({})
    uwsgi.connection_fd = lambda: 10
    assert sock.fileno() == 9
    assert type(sock) in UWSGI.plain_sockets
    assert UWSGI.threads({}) == 3
    assert list(UWSGI.warnings({})) == []
    for seconds in (b"0", ""):
        uwsgi.opt = {"harakiri": seconds and int(seconds)}
        assert list(UWSGI.warnings({})) == []
    uwsgi.opt = {"harakiri": b"30"}
    [warning] = UWSGI.warnings({})
    assert "older than 30 s" in warning


def test_uwsgi_with_gevent(uwsgi, monkeypatch):
    """Its patches are looked at then, and only then."""
    monkeypatch.setitem(sys.modules, "gevent.monkey", None)
    uwsgi.opt = {"gevent": b"100"}
    [warning] = UWSGI.warnings({})
    assert "has not patched" in warning


# gunicorn

GUNICORN = BY_NAME["gunicorn"]


def test_gunicorns_socket():
    """It is in the environ; over HTTP/2 several streams share it."""
    for sock, is_tls in ((SOCKET, False), (TLS, True)):
        environ = environ_of(sock)
        assert GUNICORN.socket(environ) is sock
        assert GUNICORN.is_tls(environ) is is_tls
        assert GUNICORN.socket({**environ, "SERVER_PROTOCOL": "HTTP/2.0"}) is None
        assert GUNICORN.socket({"gunicorn.socket": sock}) is sock
    assert GUNICORN.stays(environ) is None
    assert "HTTP/2" in GUNICORN.stays({**environ, "x-gunicorn.http2.y": 1})
    del environ["wsgi.input"]
    assert "read ahead" in GUNICORN.stays(environ)


def gunicorn_response(**names):
    unreader = SimpleNamespace(buf=b"pipelined")
    reader = SimpleNamespace(parser="parser", length=5)
    request = SimpleNamespace(unreader=unreader, body=SimpleNamespace(reader=reader))
    return Owner(req=request, headers=[("A", "1")], sent=5, **names)


def test_gunicorns_response():
    """Its write, headers and count, from its frame."""
    response = gunicorn_response()
    place = "gunicorn.workers.sync", response, "resp"
    write = asked(GUNICORN.own_write, {}, *place)
    assert write == response.write
    assert GUNICORN.own_write({}) is None
    assert GUNICORN.headers(write) == [("A", "1")]
    assert (GUNICORN.sent(write), GUNICORN.sent(print)) == (5, None)
    assert asked(GUNICORN.stays, {}, *place) is None  # its body was replaced
    headers = response.headers
    assert GUNICORN.forget_head({}, write) is True
    assert headers == []
    headers.append(("B", "2"))
    assert asked(lambda _: GUNICORN.forget_head({}, None), {}, *place) is True
    assert headers == []
    assert GUNICORN.forget_head({}, None) is False
    response.headers = ()  # another version's
    assert GUNICORN.forget_head({}, write) is False


def test_what_gunicorn_has_read_ahead():
    """Is dropped: of the connection, and of a body in chunks."""
    response = gunicorn_response()
    place = "gunicorn.workers.sync", response, "resp"
    body = gunicorn_body()
    asked(GUNICORN.drop_read_ahead, {"wsgi.input": body}, *place)
    assert body.reader.unreader.buf.getvalue() == b""
    assert response.req.unreader.buf == b"pipelined"
    assert response.req.body.failed is True
    reader = response.req.body.reader
    assert (reader.parser, reader.length) == (None, 0)
    asked(GUNICORN.drop_read_ahead, {}, *place)
    assert response.req.unreader.buf.getvalue() == b""
    response.req.body.reader = object()  # which takes no attributes
    asked(GUNICORN.drop_read_ahead, {}, *place)
    GUNICORN.drop_read_ahead({})


def worker(module="gunicorn.workers.gthread", **cfg):
    """Return a worker as this module's classes are."""
    kind = type("Worker", (), {"__module__": module})
    made = kind()
    settings = {
        "graceful_timeout": 30,
        "timeout": 30,
        "threads": 4,
        "worker_connections": 1000,
        "max_requests": 0,
        "workers": 1,
        "worker_int": lambda worker: made.hooks.append("int"),
        "worker_abort": lambda worker: made.hooks.append("abort"),
        **cfg,
    }
    made.cfg = SimpleNamespace(**settings)
    made.cfg.set = lambda name, value: setattr(made.cfg, name, value)
    made.hooks, made.alive, made.reloader = [], True, None
    made.ppid = os.getppid()
    made.tmp = SimpleNamespace(last_update=time.monotonic)
    return made


def test_gunicorns_worker():
    """It is found by its frame, the innermost first."""
    found = worker()
    assert called(gunicorn.worker, "gunicorn.workers.gthread", owner=found) is found
    assert called(gunicorn.worker, "gunicorn.app", owner=found) is None


@pytest.mark.parametrize(
    ("module", "cfg", "silent", "left"),
    [
        ("gunicorn.workers.gthread", {}, 0, 27.5),
        ("gunicorn.workers.gthread", {"graceful_timeout": 2}, 0, 0),
        ("gunicorn.workers.gthread", {"timeout": 5}, 0, 27.5),
        ("gunicorn.workers.sync", {"timeout": 5}, 0, 4),
        ("gunicorn.workers.sync", {"timeout": 5}, 3, 1),
        ("gunicorn.workers.sync", {"timeout": 5}, 10, -6),
        ("gunicorn.workers.sync", {"timeout": 0}, 10, 27.5),
        ("gunicorn.workers.sync", {"timeout": 300}, 0, 27.5),
    ],
)
def test_how_long_gunicorns_worker_may_go_on(monkeypatch, module, cfg, silent, left):
    """Its graceful timeout less 2.5 s; a sync one until 1 s before it is killed."""
    monkeypatch.delenv("SYNCSTREAM_DRAIN", raising=False)
    found = worker(module, **cfg)
    heard = time.monotonic() - silent
    found.tmp.last_update = lambda: heard
    stop = gunicorn.stopping(found)
    assert stop() is None
    found.alive = False
    until = stop()
    assert until - time.monotonic() == pytest.approx(left, abs=0.5)
    assert stop() == until  # asked again, it stays
    monkeypatch.setenv("SYNCSTREAM_DRAIN", "50")
    other = worker(module, **cfg)
    other.alive = False
    until = gunicorn.stopping(other)()
    assert until - time.monotonic() == pytest.approx(50, abs=0.5)


@pytest.mark.parametrize("kind", ["sync", "gthread"])
@pytest.mark.parametrize(("timeout", "left"), [(5, 3), (0, 27.5), (300, 27.5)])
def test_how_long_gunicorns_worker_may_take_to_exit(kind, timeout, left):
    """It has closed the file of its heartbeats, which its master still looks at."""

    def closed():
        raise ValueError("I/O operation on closed file")

    found = worker(f"gunicorn.workers.{kind}", timeout=timeout)
    heard = time.monotonic() - 1
    found.tmp.last_update = lambda: heard
    stop = gunicorn.stopping(found)
    assert stop() is None
    found.tmp.last_update = closed
    found.alive = False
    assert stop() - time.monotonic() == pytest.approx(left, abs=0.5)


@pytest.mark.parametrize("hook", ["worker_int", "worker_abort"])
def test_gunicorns_immediate_end(hook):
    """By its hooks, the former of which are called; there is one for a worker."""
    found = worker()
    stop = gunicorn.stopping(found)
    assert gunicorn.stopping(found) is stop
    assert gunicorn.stopping(None) is None
    assert stop() is None
    assert stop.is_quitting is False
    getattr(found.cfg, hook)(found)
    assert stop() == AT_ONCE
    assert found.hooks == [hook.removeprefix("worker_")]


@pytest.mark.parametrize("how", ["orphan", "reload"])
def test_a_worker_that_does_not_wait(how):
    """Its master has gone; or its code has changed, in development."""
    found = worker()
    stop = gunicorn.stopping(found)
    if how == "orphan":
        found.ppid += 1
    else:
        found.reloader = object()
        assert stop() is None
        found.alive = False
    assert stop() == AT_ONCE


@pytest.mark.parametrize("threads", [True, False])
def test_how_many_requests_gunicorns_worker_serves(threads):
    """gthread's threads, gevent's connections, one of sync."""
    environ, place = {"wsgi.multithread": threads}, "gunicorn.workers.x"
    gthread, gevent = worker(), worker()
    gthread.tpool = None
    assert asked(GUNICORN.threads, environ, place, gthread) == (4 if threads else 1)
    assert asked(GUNICORN.threads, environ, place, gevent) == (1000 if threads else 1)
    assert GUNICORN.threads(environ) == (None if threads else 1)


def test_gunicorns_sigterm_ends_system_calls(monkeypatch):
    """Of a worker that serves in its main thread."""
    calls = queue.SimpleQueue()
    monkeypatch.setattr(signal, "siginterrupt", lambda *words: calls.put(words))
    assert GUNICORN.stopping({"wsgi.multithread": True}) is None
    assert calls.empty()
    assert GUNICORN.stopping({"wsgi.multithread": False}) is None
    assert calls.get(timeout=0) == (signal.SIGTERM, True)


@pytest.mark.parametrize(
    ("cfg", "threads", "words"),
    [
        ({}, True, []),
        ({"max_requests": 5}, True, ["max_requests"]),
        ({"max_requests": 5, "workers": 2}, True, []),
        ({}, False, ["--timeout kills it after 30 s"]),
        ({"timeout": 0}, False, ["while a stream is open: run"]),
        ({"max_requests": 5}, False, ["by up to 30 s", "kills it after 30 s"]),
    ],
)
def test_what_gunicorn_is_warned_of(cfg, threads, words):
    """A worker of its own that is replaced, and one that serves nothing else."""
    environ = {"wsgi.multithread": threads, "SERVER_PROTOCOL": "HTTP/1.1"}

    def ask(environ):
        return list(GUNICORN.warnings(environ))

    warnings = asked(ask, environ, "gunicorn.workers.x", worker(**cfg))
    assert len(warnings) == len(words)
    assert all(word in text for word, text in zip(words, warnings, strict=True))
    stops = asked(
        lambda environ: list(GUNICORN.stop_warnings(environ)),
        environ,
        "gunicorn.workers.x",
        worker(**cfg),
    )
    assert stops == [text for text in warnings if "max_requests" in text]
    alone = list(GUNICORN.warnings(environ))
    assert ["kills" in text for text in alone] == [False] * (not threads)
