"""Questions to sockets: each is answered by the descriptor, at once, at every edge."""

import errno
import os
import socket
import sys
import threading

import pytest

import syncstream.runtime.sockets
from syncstream.runtime.sockets import (
    acknowledged,
    borrowed,
    forget,
    give_up_after,
    hang_up,
    has_timed_out,
    hold,
    is_hung_up,
    is_socket,
    is_unix,
    is_writable,
    native,
    queued,
    release,
    reset,
)
from tests.support.pairs import leave, tcp_pair
from tests.support.waits import await_true

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own ways")


@pytest.fixture
def closed():
    """The number of a descriptor that is closed."""
    one, other = socket.socketpair()
    with other:
        fd = one.fileno()
        one.close()
        yield fd


def fill(sock):
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        pass
    finally:
        sock.setblocking(True)


def test_a_closed_socket(closed):
    """It has hung up, takes nothing, and nothing raises."""
    for fd in (closed, -1):
        assert is_hung_up(fd) is True
        assert is_writable(fd) is True
        assert is_socket(closed) is False
        assert is_unix(closed) is False
        assert acknowledged(closed) is None
        assert queued(fd) is None
        assert has_timed_out(closed) is False
        assert give_up_after(closed, 5) is None
        assert hang_up(fd) is None
    assert reset(closed) is False


@pytest.mark.parametrize("has_rdhup", [True, False])
def test_a_peer_that_leaves(monkeypatch, has_rdhup):
    """It has hung up once it has, unread bytes or not; where that can be seen."""
    if not has_rdhup:
        monkeypatch.setattr(syncstream.runtime.sockets, "POLLRDHUP", 0)
    for how in ("FIN", "RST", "bytes, FIN"):
        with tcp_pair() as (server, client):
            assert is_hung_up(server.fileno()) is False
            client.sendall(b"unread")
            assert is_hung_up(server.fileno()) is False
            server.recv(10)
            leave(client, how)
            if has_rdhup or how != "bytes, FIN":
                await_true(lambda server=server: is_hung_up(server.fileno()))
            else:
                await_true(lambda server=server: server.recv(1, socket.MSG_PEEK))
                assert is_hung_up(server.fileno()) is False


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_full_socket(family):
    """It is writable until it is full, and what it holds is known."""
    with tcp_pair() if family == "tcp" else socketpair() as (server, client):
        assert is_writable(server.fileno()) is True
        assert is_unix(server.fileno()) is (family == "unix")
        assert is_socket(server.fileno()) is True
        assert queued(server.fileno()) == 0
        fill(server)
        assert is_writable(server.fileno()) is False
        assert queued(server.fileno()) > 0
        hang_up(server.fileno())
        assert is_writable(server.fileno()) is True  # the error is there to be read
        with pytest.raises(BrokenPipeError):
            server.send(b"x")
        assert server.fileno() >= 0
        assert client.recv(1) == b"x"


class socketpair:
    def __enter__(self):
        self._pair = socket.socketpair()
        return self._pair

    def __exit__(self, *_):
        for each in self._pair:
            each.close()


def test_what_is_no_connected_socket(tmp_path):
    """A listener, one that waits for datagrams, a file."""
    listener = socket.create_server(("127.0.0.1", 0))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listener, datagrams, open(tmp_path / "file", "wb") as file:
        for each in (listener, datagrams, file):
            assert is_socket(each.fileno()) is False
        assert is_unix(file.fileno()) is False
        assert acknowledged(file.fileno()) is None
        assert give_up_after(file.fileno(), 5) is None


@linux
def test_bytes_that_the_peer_has():
    """Are counted over TCP, and only there."""
    with tcp_pair() as (server, client):
        if not acknowledged(server.fileno()):  # the handshake counts as one
            pytest.skip("this kernel does not count them")
        before = acknowledged(server.fileno())
        server.sendall(b"x" * 1000)
        assert len(client.recv(1000, socket.MSG_WAITALL)) == 1000
        await_true(lambda: acknowledged(server.fileno()) == before + 1000)
    with socketpair() as (one, _):
        assert acknowledged(one.fileno()) is None


def test_other_systems_count_nothing(monkeypatch):
    """They neither count nor reset, and say so."""
    monkeypatch.setattr(sys, "platform", "win32")
    with tcp_pair() as (server, _):
        assert acknowledged(server.fileno()) is None
        assert queued(server.fileno()) is None
        assert reset(server.fileno()) is False
        assert is_hung_up(server.fileno()) is False


@linux
def test_a_reset_is_for_tcp():
    """The peer gets an error, not an end of file; the descriptor stays open."""
    with tcp_pair() as (server, client):
        assert reset(server.fileno()) is True
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        assert server.fileno() >= 0


USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", None)
OPTIONS = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")


@linux
@pytest.mark.parametrize(
    ("seconds", "milliseconds", "probes"),
    [
        (600.0, 600_000, (30, 10, 3)),
        (60.0, 60_000, (30, 10, 3)),
        (59.0, 59_000, (29, 9, 3)),
        (31.5, 31_500, (15, 5, 3)),
        (6.0, 6000, (3, 1, 3)),
        (2.0, 2000, (1, 1, 3)),
        (0.5, 500, (1, 1, 3)),
        (0.0006, 1, (1, 1, 3)),
        (1e9, 0x7FFFFFFF, (30, 10, 3)),
    ],
)
def test_the_kernel_gives_up(seconds, milliseconds, probes):
    """After this time; idle connections are probed several times before."""
    with tcp_pair() as (server, _):

        def option(name):
            return server.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))

        assert give_up_after(server.fileno(), seconds) is None
        assert option("TCP_USER_TIMEOUT") == milliseconds
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert tuple(map(option, OPTIONS)) == probes
        before = give_up_after(server.fileno(), None)
        assert before == milliseconds / 1000
        assert option("TCP_USER_TIMEOUT") == 0
        assert give_up_after(server.fileno(), 7) is None


@linux
def test_what_the_kernel_is_left_probes_nothing():
    """Without a time-out of ours no probe is switched on."""
    with tcp_pair() as (server, _):
        assert give_up_after(server.fileno(), None) is None
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_a_system_without_that_time_out(monkeypatch):
    """Nothing is set there."""
    monkeypatch.setattr(syncstream.runtime.sockets, "_TCP_USER_TIMEOUT", None)
    with tcp_pair() as (server, _):
        assert give_up_after(server.fileno(), 5) is None
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errno.ETIMEDOUT, True),
        (errno.EHOSTUNREACH, True),
        (errno.ENETUNREACH, True),
        (errno.ECONNRESET, False),
        (0, False),
    ],
    ids=str,
)
def test_who_has_timed_out(monkeypatch, error, expected):
    """The kernel's error tells; a reset is another end."""

    class Lent:
        def __init__(self, fd):
            assert fd == 7

        def __enter__(self):
            return self

        def __exit__(self, *_):
            """Nothing is closed."""

        def getsockopt(self, level, option):
            assert (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR)
            return error

    monkeypatch.setattr(syncstream.runtime.sockets, "borrowed", Lent)
    assert has_timed_out(7) is expected


def test_a_lent_socket_stays_open():
    """And is as blocking, or not, as it was."""
    before = socket.getdefaulttimeout()
    with tcp_pair() as (server, client):
        socket.setdefaulttimeout(5)
        try:
            with borrowed(server.fileno()) as sock:
                assert sock.fileno() == server.fileno()
                sock.send(b"a")
            assert os.get_blocking(server.fileno())
        finally:
            socket.setdefaulttimeout(before)
        assert client.recv(1) == b"a"
        with borrowed(server.fileno(), family=-1, protocol=-1) as sock:
            assert sock.family == socket.AF_INET
            assert sock.proto in (0, socket.IPPROTO_TCP)
        server.sendall(b"b")


def test_what_is_held_is_closed_in_a_child():
    """What is released is not, nor is anything else."""
    from tests.support.pairs import check_script

    script = """
import os, socket
from syncstream.runtime.sockets import hold, release
def state(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
mine, other, given = (os.dup(0) for _ in range(3))
for fd in (mine, given):
    hold(fd)
release(given)
assert not state(given)
given = os.dup(0)  # the number is another file's now
gone = os.dup(0)
hold(gone)
os.close(gone)  # by somebody else: no child stumbles over it
last = os.open("/dev/null", os.O_RDONLY)
assert last == gone
os.close(last)
pid = os.fork()
if not pid:
    assert [state(fd) for fd in (mine, other, given)] == [False, True, True]
    if not os.fork():
        assert [state(fd) for fd in (other, given)] == [True, True]
        os._exit(0)
    os._exit(os.wait()[1])
assert os.waitpid(pid, 0)[1] == 0
assert state(mine)
"""
    assert check_script(script) == ""


def test_a_release_closes(closed):
    """At once, and only what is open."""
    fd = os.dup(0)
    hold(fd)
    release(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_native_is_found_once():
    """The same as the module's own, without gevent."""
    assert native(threading, "get_ident") is threading.get_ident


@linux
def test_a_descriptor_is_forgotten_by_an_epoll():
    """By its number; one that was not there is no error."""
    import select

    with tcp_pair() as (server, client), select.epoll() as epoll:
        epoll.register(server.fileno(), select.EPOLLIN)
        client.sendall(b"a")
        assert epoll.poll(5)
        forget(epoll.fileno(), server.fileno())
        assert epoll.poll(0) == []
        forget(epoll.fileno(), server.fileno())
