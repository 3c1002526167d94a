"""Descriptors of taken connections, and the races of those that take them."""

import errno
import os
import resource
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from syncstream.runtime.watch import watch
from syncstream.servers import descriptors, server_of, swap
from syncstream.servers.descriptors import (
    LOWEST,
    descriptor_limit,
    duplicate,
    none_left,
    soft_limit,
)
from syncstream.servers.swap import Refused, Swap
from tests.servers.environs import environ_of
from tests.support.descriptors import open_files
from tests.support.pairs import Threads, tcp_pair
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()
MILLION = 1 << 20
INFINITE = resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch):
    """Limits of our own: [soft, hard], and what was set."""

    class Limits(list):
        RLIMIT_NOFILE, RLIM_INFINITY = resource.RLIMIT_NOFILE, INFINITE
        fails = None

        def getrlimit(self, which):
            assert which == resource.RLIMIT_NOFILE
            return tuple(self)

        def setrlimit(self, which, pair):
            assert which == resource.RLIMIT_NOFILE
            if self.fails is not None:
                raise self.fails
            self[:] = pair
            self.seen.append(pair)

    own = Limits([1024, 4096])
    own.seen = []
    monkeypatch.setattr(descriptors, "resource", own)
    descriptor_limit.cache_clear()
    yield own
    descriptor_limit.cache_clear()


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 4096),
        (1024, MILLION, MILLION),
        (1024, MILLION + 1, MILLION),
        (1024, INFINITE, MILLION),
        (4096, 4096, 4096),
        (MILLION, MILLION, MILLION),
        (MILLION + 5, MILLION + 5, MILLION + 5),
        (MILLION + 5, INFINITE, MILLION + 5),
        (INFINITE, INFINITE, MILLION),
    ],
)
def test_how_many_descriptors_there_may_be(limits, soft, hard, expected):
    """By the hard limit, a million at most; more only where the soft one is higher."""
    limits[:] = soft, hard
    assert descriptor_limit() == expected
    assert tuple(limits) == (soft, hard)


@pytest.mark.parametrize("error", [OSError(1, "no"), ValueError("no")], ids=repr)
def test_a_limit_that_cannot_be_raised(limits, error):
    """The soft one counts then; where it need not be raised nobody tries."""
    limits.fails = error
    assert descriptor_limit() == 1024
    descriptor_limit.cache_clear()
    limits[:] = 4096, 4096
    assert descriptor_limit() == 4096


@pytest.mark.parametrize(
    ("soft", "is_raised"), [(99, True), (100, False), (101, False)]
)
def test_the_limit_is_raised_for_a_moment(limits, soft, is_raised):
    """If it is lower; and it is as it was afterwards, also after a failure."""
    limits[:] = soft, 4096
    with soft_limit.raised(100):
        assert tuple(limits) == (100 if is_raised else soft, 4096)
    assert tuple(limits) == (soft, 4096)

    def fail():
        with soft_limit.raised(100):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tuple(limits) == (soft, 4096)
    limits[:] = INFINITE, INFINITE
    limits.seen.clear()
    with soft_limit.raised(100):
        assert limits.seen == []


def test_the_limit_is_raised_by_one_at_a_time(limits):
    """Or one would restore what another has raised."""
    inside, go_on, came = threading.Event(), threading.Event(), threading.Event()

    def first():
        with soft_limit.raised(2000):
            inside.set()
            assert go_on.wait(TIMEOUT)

    def second():
        with soft_limit.raised(3000):
            came.set()
            return tuple(limits)

    joins = [PLACE.start(first)]
    assert inside.wait(TIMEOUT)
    joins.append(PLACE.start(second))
    assert not came.wait(0.1)
    assert tuple(limits) == (2000, 4096)
    go_on.set()
    assert [join() for join in joins] == [None, (3000, 4096)]
    assert tuple(limits) == (1024, 4096)


def test_a_child_that_is_forked_meanwhile(limits):
    """It has the limit that was, once, and a lock that nobody holds."""
    with soft_limit.raised(2000):
        soft_limit.forked()
        assert tuple(limits) == (1024, 4096)
        with soft_limit.raised(3000):
            assert tuple(limits) == (3000, 4096)
    limits.seen.clear()
    soft_limit.forked()
    assert limits.seen == []


@pytest.mark.parametrize(
    ("most", "lowest", "reserve"),
    [(MILLION, 4096, 64), (16384, 4096, 64), (16383, 4095, 64), (400, 100, 50)],
)
def test_where_a_connection_lies(limits, monkeypatch, most, lowest, reserve):
    """From 4096 on, or a quarter of the limit; a few remain for the server."""
    limits[:] = most, most
    asked, held, released, numbers = [], [], [], []
    monkeypatch.setattr(
        descriptors,
        "fcntl",
        SimpleNamespace(
            F_DUPFD_CLOEXEC="cloexec",
            fcntl=lambda *words: asked.append(words) or numbers[-1],
        ),
    )
    monkeypatch.setattr(descriptors, "hold", held.append)
    monkeypatch.setattr(descriptors, "release", released.append)
    numbers.append(most - reserve - 1)
    assert duplicate(7) == numbers[-1]
    assert asked == [(7, "cloexec", lowest)]
    assert (held, released) == (numbers, [])
    numbers.append(most - reserve)
    with pytest.raises(OSError, match=f"no descriptor is left of {most}") as caught:
        duplicate(7)
    assert caught.value.errno == errno.EMFILE
    assert released == numbers[-1:]
    assert LOWEST == 4096
    assert str(none_left(5)) == f"[Errno {errno.EMFILE}] no descriptor is left of 5"

    def fail(fd):
        raise MemoryError

    monkeypatch.setattr(descriptors, "hold", fail)
    numbers.append(5)
    with pytest.raises(MemoryError):
        duplicate(7)
    assert released[-1] == 5


# Swaps.

HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
OPENING = b": ok\n\n"


@pytest.fixture
def connected():
    """A server's and a client's end; no descriptor is left."""
    watch()
    before = open_files()
    with tcp_pair() as (server, client):
        client.settimeout(TIMEOUT)
        yield server, client
    await_true(lambda: not open_files() - before, lambda: open_files() - before)


@pytest.mark.parametrize(
    ("error", "expected", "is_full"),
    [
        (OSError(errno.EMFILE, "too many"), Refused, True),
        (OSError(errno.ENFILE, "too many"), Refused, True),
        (OSError(errno.ENOMEM, "no memory"), Refused, False),
        (ValueError("lowered"), Refused, False),
        (MemoryError(), MemoryError, None),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=repr,
)
@pytest.mark.parametrize("step", ["socketpair", "dup2"])
def test_a_swap_that_fails_changes_nothing(
    connected, monkeypatch, step, error, expected, is_full
):
    """Whichever step it is: nothing is taken, and no descriptor is kept."""
    server, client = connected

    def fail(*words, **names):
        raise error

    with monkeypatch.context() as patch:
        if step == "socketpair":
            patch.setattr(swap, "_socket", SimpleNamespace(socketpair=fail))
        else:
            patch.setattr(os, "dup2", fail)
        environ = environ_of(server)
        with pytest.raises(expected) as caught:
            Swap(environ, server_of(environ))
    if is_full is not None:
        assert caught.value.is_full is is_full
        assert not caught.value.is_gone
    server.sendall(b"attached")
    assert client.recv(100) == b"attached"


def test_a_swap_without_a_watch(connected, monkeypatch):
    """It is refused: nobody would drain it."""
    for error in (OSError("no descriptor"), RuntimeError("no thread")):

        def fail(error=error):
            raise error

        monkeypatch.setattr(swap, "watch", fail)
        environ = environ_of(connected[0])
        with pytest.raises(Refused, match="it cannot be watched: no ") as caught:
            Swap(environ, server_of(environ))
        assert not caught.value.is_full


def test_a_server_that_is_closing_keeps_its_connection(connected):
    """Its client has as good as left."""
    environ = environ_of(connected[0])
    closing = replace(server_of(environ), is_closing=lambda environ: True)
    with pytest.raises(Refused, match="the server is closing it") as caught:
        Swap(environ, closing)
    assert caught.value.is_gone


class Draining(int):
    """The most that is read, whose comparison holds up the watch's thread."""

    def __new__(cls):
        made = super().__new__(cls, swap.MOST_WRITTEN)
        made.drains, made.go_on = threading.Event(), threading.Event()
        return made

    def __ge__(self, other):
        if threading.current_thread().name == "syncstream-watch":
            self.drains.set()
            assert self.go_on.wait(TIMEOUT)
        return int(self) >= other


@pytest.mark.parametrize("how", ["take", "undo"])
def test_a_pair_is_read_by_one_at_a_time(connected, monkeypatch, how):
    """While the watch drains it, nobody takes or undoes it: bytes would be lost."""
    server, client = connected
    most = Draining()
    monkeypatch.setattr(swap, "MOST_WRITTEN", most)
    environ, begins, ended = environ_of(server), threading.Event(), []

    def serve():
        one = Swap(environ, server_of(environ))
        server.sendall(HEAD + OPENING)
        assert most.drains.wait(TIMEOUT)
        begins.set()
        taken = one.take(OPENING) if how == "take" else one.undo()
        ended.append(time.monotonic())
        one.close()
        return taken

    join = PLACE.start(serve)
    assert begins.wait(TIMEOUT)
    time.sleep(0.1)
    assert ended == []
    most.go_on.set()
    taken = join()
    if how == "take":
        assert taken.head == HEAD + OPENING
        os.close(taken.fd)
    else:
        assert client.recv(100) == HEAD + OPENING


class Asked(dict):
    """An environ that holds up who asks for its protocol, if told to."""

    go_on = asked = None

    def get(self, name, default=None):
        if name == "SERVER_PROTOCOL" and self.go_on is not None:
            self.asked.set()
            assert self.go_on.wait(TIMEOUT)
        return super().get(name, default)


def test_nothing_is_drained_while_it_is_taken(connected):
    """What comes then is the server's end mark, not part of the opening."""
    server, _ = connected
    environ = Asked(environ_of(server))
    swapped = threading.Event()

    def serve():
        one = Swap(environ, server_of(environ))
        server.sendall(HEAD + OPENING)
        environ.asked, environ.go_on = threading.Event(), threading.Event()
        swapped.set()
        taken = one.take(OPENING)
        one.close()
        return taken

    join = PLACE.start(serve)
    assert swapped.wait(TIMEOUT)
    assert environ.asked.wait(TIMEOUT)
    server.sendall(b"more")
    time.sleep(0.4)  # the watch looks every 0.25 s
    environ.go_on.set()
    taken = join()
    assert taken.head == HEAD + OPENING
    os.close(taken.fd)


def test_a_large_answer_does_not_block_its_server(connected):
    """What a pair cannot hold is drained meanwhile, and comes back as it was."""
    server, client = connected
    data = os.urandom(2_000_000)
    environ = environ_of(server)

    def serve():
        one = Swap(environ, server_of(environ))
        server.sendall(data)
        assert one.take(OPENING) is None
        one.undo()

    join = PLACE.start(serve)
    received = bytearray()
    while len(received) < len(data):
        received += client.recv(1 << 20)
    join()
    assert received == data


@pytest.mark.parametrize("kind", ["listener", "datagrams", "pipe", "pair", "closed"])
def test_what_is_no_connection(kind):
    """It is told by the kernel, not by its class."""
    one, other = socket.socketpair()
    reader, writer = os.pipe()
    with (
        one,
        other,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
    ):
        probe = os.dup(0)
        os.close(probe)
        fds = {
            "listener": (listener.fileno(), None),
            "datagrams": (datagrams.fileno(), "the socket is not a stream"),
            "pipe": (reader, "not a socket: "),
            "pair": (one.fileno(), "the socket is one of a pair"),
            "closed": (probe, "not a socket: "),
        }
        fd, reason = fds[kind]
        if reason is None:
            swap.check_descriptor(fd)
        else:
            with pytest.raises(Refused, match=reason) as caught:
                swap.check_descriptor(fd)
            assert not caught.value.is_gone
    os.close(reader)
    os.close(writer)


def test_a_refusal_says_one_thing():
    """Each by its own name; none by default."""
    plain = Refused("why")
    assert (str(plain), plain.is_gone, plain.is_full, plain.is_choice) == (
        "why",
        *[False] * 3,
    )
    for name in ("is_gone", "is_full", "is_choice"):
        refused = Refused("why", **{name: True})
        set_ = [n for n in ("is_gone", "is_full", "is_choice") if getattr(refused, n)]
        assert set_ == [name]
