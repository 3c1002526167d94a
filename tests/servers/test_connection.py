"""Connections: hang-ups are seen, cuts are visible, with sockets that are real."""

import os
import resource
import socket
import ssl
import struct
import sys
import threading
import urllib.request
from dataclasses import replace

import pytest
from werkzeug.serving import make_server
from werkzeug.test import create_environ, run_wsgi_app

import syncstream.runtime.process
from syncstream import Hub, SSEResponse
from syncstream.runtime.journal import journal
from syncstream.runtime.process import process
from syncstream.runtime.sockets import acknowledged, give_up_after, is_hung_up, queued
from syncstream.servers import server_of
from syncstream.servers.connection import Connection
from syncstream.servers.swap import check_descriptor
from tests.support.waits import await_true


@pytest.fixture
def pair():
    """A TCP connection: our end as a server has it, and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), 10)
        server, _ = listener.accept()
    with server, client:
        yield server, client


def environ_of(server, protocol="HTTP/1.1"):
    return {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/events",
        "SERVER_PROTOCOL": protocol,
        "gunicorn.socket": server,
    }


def test_a_hang_up_is_seen_behind_unread_bytes(pair):
    """A FIN is seen though bytes wait before it; a reset, too; nothing is read."""
    server, client = pair
    assert not is_hung_up(server.fileno())
    client.sendall(b"stray bytes")
    assert not is_hung_up(server.fileno())
    client.shutdown(socket.SHUT_WR)
    await_true(lambda: is_hung_up(server.fileno()))  # a busy kernel takes a moment
    assert server.recv(100) == b"stray bytes"


def test_a_reset_is_seen(pair):
    """As a hang-up."""
    server, client = pair
    linger = struct.pack("ii", 1, 0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.close()
    await_true(lambda: is_hung_up(server.fileno()))


def test_a_closed_descriptor_is_a_hang_up(pair):
    """The server has closed the socket: there is nobody left."""
    server, _ = pair
    connection = Connection(environ_of(server))
    assert not connection.is_hung_up()
    server.close()
    assert connection.is_hung_up()


def test_a_look_leaves_a_socket_blocking(pair):
    """Whatever socket.setdefaulttimeout says: the server relies on it."""
    server, _ = pair
    connection = Connection(environ_of(server))
    socket.setdefaulttimeout(60)
    try:
        assert not connection.is_hung_up()
        check_descriptor(server.fileno())
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(server.fileno())


def test_what_a_client_takes_is_seen(pair):
    """By TCP it is acknowledged; else the kernel's queue for it changes."""
    server, _ = pair
    server.sendall(b"x" * 1000)
    await_true(lambda: acknowledged(server.fileno()) == 1000)
    server, client = socket.socketpair()
    with server, client:
        fd = server.fileno()
        server.sendall(b"x" * 1000)
        assert acknowledged(fd) is None
        assert queued(fd) == queued(fd) > 0
        client.recv(1000)
        await_true(lambda: queued(fd) == 0)
    assert queued(-1) is None


def test_an_unknown_server_shows_no_hang_up():
    """Without a socket to look at, the client counts as there."""
    connection = Connection({"REQUEST_METHOD": "GET", "SERVER_SOFTWARE": "WSGIServer"})
    assert connection.server.name == "another server"
    assert not connection.is_hung_up()
    assert isinstance(connection.cut(), ConnectionResetError)


def test_what_a_server_keeps_makes_a_connection_full(pair):
    """waitress takes all that is written, and has it in a buffer of its own."""
    server, _ = pair

    class Channel:
        total_outbufs_len = 0
        socket = server

        def client_disconnected(self):
            return False

    channel = Channel()
    environ = {**environ_of(server), "SERVER_SOFTWARE": "waitress"}
    del environ["gunicorn.socket"]
    environ["waitress.client_disconnected"] = channel.client_disconnected
    connection = Connection(environ)
    assert not connection.is_full()
    channel.total_outbufs_len = 1
    assert connection.is_full()


def test_a_server_that_shows_no_socket_is_warned_of(caplog):
    """Once; not so a test client, which names no server."""
    process().said.pop("no socket", None)
    Connection({"REQUEST_METHOD": "GET"}).warn()
    assert caplog.text == ""
    for _ in range(2):
        Connection({"SERVER_SOFTWARE": "mod_wsgi/6.1\x1b"}).warn()
    assert caplog.text.count("mod_wsgi/6.1\\x1b shows no socket") == 1


def test_http_1_0_is_cut_by_a_reset(pair):
    """The client reads all that was sent, then a reset, though the server goes on."""
    server, client = pair
    server.sendall(b"data: 0\n\n")
    assert Connection(environ_of(server, "HTTP/1.0")).cut() is None
    assert client.recv(100) == b"data: 0\n\n"
    with pytest.raises(ConnectionResetError):
        client.recv(100)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        server.sendall(b"more")  # what servers take for a client that has gone


def test_http_1_1_is_shut_down(pair):
    """All that was sent arrives; the end mark, whoever writes it, does not."""
    server, client = pair
    server.sendall(b"data: 0\n\n")
    assert Connection(environ_of(server)).cut() is None
    with pytest.raises(BrokenPipeError):
        server.sendall(b"0\r\n\r\n")
    assert client.recv(100) == b"data: 0\n\n"
    assert client.recv(100) == b""


@pytest.fixture
def no_descriptors():
    """The process may open no more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_full_descriptor_table(pair, no_descriptors):
    """Neither the look for a hang-up nor the reset needs a descriptor."""
    server, client = pair
    connection = Connection(environ_of(server, "HTTP/1.0"))
    assert not connection.is_hung_up()
    assert connection.cut() is None
    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_where_a_reset_cannot_be_had(pair, caplog, monkeypatch):
    """On other systems than Linux the client sees an end, and the log says so."""
    server, client = pair
    monkeypatch.setattr("sys.platform", "darwin")
    Connection(environ_of(server, "HTTP/1.0")).cut()
    assert client.recv(100) == b""
    text = "was cut, but the client takes it for finished: no reset is possible"
    await_true(lambda: text in caplog.text)


def test_the_log_is_safe_from_the_request():
    """Escape sequences and endless lines of a request do not reach the log."""
    environ = {"REQUEST_METHOD": "\x1b[31mX", "PATH_INFO": "/\n" + "x" * 100_000}
    label = Connection(environ).label
    assert "\x1b" not in label
    assert "\n" not in label
    assert len(label) < 300


def test_tls_is_told_from_plain(pair):
    """A TLS socket of the server's is not reset, whoever says https."""
    server, client = pair
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    environ = {**environ_of(server), "wsgi.url_scheme": "https"}
    assert not server_of(environ).is_tls(environ)  # a proxy's word
    wrapped = context.wrap_socket(
        server, server_side=True, do_handshake_on_connect=False
    )
    with wrapped:
        environ["gunicorn.socket"] = wrapped
        assert server_of(environ).is_tls(environ)
        environ["SERVER_PROTOCOL"] = "HTTP/1.0"
        Connection(environ).cut()
    assert client.recv(100) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
@pytest.mark.parametrize("seconds", [3.5, 11.5, 31.5, 61.5, 301.5])
def test_a_lost_probe_ends_no_idle_connection(pair, seconds):
    """Three go unanswered before TCP_USER_TIMEOUT, after which one is enough."""
    server, _ = pair
    give_up_after(server.fileno(), seconds)
    idle = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    interval = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
    assert idle + 2 * interval < seconds


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("is_unix", [True, False])
def test_where_no_cut_can_be_seen_it_is_said(pair, is_unix, protocol, caplog):
    """Once: a proxy that speaks HTTP/1.0, nginx by default, to a Unix socket."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        environ = environ_of(ours if is_unix else pair[0], protocol)
        environ["wsgi.multithread"] = True
        process().said.pop("unmarked", None)
        for _ in range(2):
            Connection(environ).warn()
    is_said = is_unix and protocol == "HTTP/1.0"
    assert ("proxy_http_version 1.1" in caplog.text) == is_said
    assert len(caplog.records) == is_said


class Response:
    """A server's response, as cheroot's: its write may be replaced for a time."""

    def write(self, data):
        """It goes nowhere."""


def connection_of(pair, write, headers=()):
    """Return a connection whose server has this ``write``, and sends these headers."""
    connection = Connection.of(environ_of(pair[0]))
    connection.server = replace(
        connection.server,
        own_write=lambda environ: write,
        sent=lambda write: None,
        headers=lambda write: list(headers),
        warnings=lambda environ: (),
        threads=lambda environ: None,
    )
    connection.find_write()
    return connection


def test_a_server_s_write_is_counted_for_one_response(pair):
    """The next one of the connection has it as it was."""
    response = Response()
    connection = connection_of(pair, response.write)
    response.write(b"abc")
    assert connection.has_got(3)
    connection.leave_write()
    assert "write" not in vars(response)


def test_compression_by_the_server_s_side_is_warned_of(pair, monkeypatch, caplog):
    """A middleware compresses what it passes on, and leaves ``write`` as it is."""
    monkeypatch.setattr(syncstream.runtime.process, "processes", {})
    encoded = [("content-encoding", "gzip")]
    connection = connection_of(pair, Response().write, encoded)
    assert connection.write is None
    connection.warn()
    assert "compresses streams" in caplog.text


def test_werkzeug_shows_its_headers():
    """Those that it sends, given its own ``write``."""
    seen = []

    def app(environ, start_response):
        write = start_response("200 OK", [("X-A", "1")])
        seen.append(server_of(environ).headers(write))
        return [b""]

    with make_server("127.0.0.1", 0, app) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}", timeout=10).close()
        thread.join()
    assert seen == [[("X-A", "1")]]


@pytest.mark.parametrize(("threads", "is_told"), [(1, False), (2, True)])
def test_streams_that_hold_all_threads_are_warned_of(
    pair, monkeypatch, caplog, threads, is_told
):
    """Not of a server of one: it has been said what that is for."""
    monkeypatch.setattr(syncstream.runtime.process, "processes", {})
    monkeypatch.setattr(type(process()), "attached_streams", threads)
    connection = connection_of(pair, Response().write)
    connection.server = replace(connection.server, threads=lambda environ: threads)
    connection.warn()
    assert ("streams occupy all" in caplog.text) == is_told


@pytest.mark.parametrize("source", ["generator", "subscription"])
def test_an_adapter_that_fails_ends_no_stream(source, own_record, caplog):
    """A release of the server may differ from ours: then it is an unknown server."""
    hub = Hub()
    hub.publish("a", "1")
    given = iter("1") if source == "generator" else hub.subscribe("a", after="start")
    response = SSEResponse(given)
    environ = create_environ("/events")
    environ["waitress.client_disconnected"] = "none that its adapter knows"
    chunks, status, _ = run_wsgi_app(response, environ)
    assert status == "200 OK"
    assert b"data: 1\n\n" in next(chunks) + next(chunks)
    chunks.close()
    hub.close()
    journal().flush()
    text = "the server has something that syncstream does not know of waitress"
    assert [text in r.message for r in caplog.records if r.exc_info] == [True]
