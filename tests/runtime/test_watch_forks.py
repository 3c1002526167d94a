"""The watch over forks, and in the hands of other code."""

import gc
import os
import select
import socket
import sys
import threading
import time
import warnings
import weakref

import pytest

import syncstream.runtime.sockets
import syncstream.runtime.watch
from syncstream import sleep
from syncstream.process import stats
from syncstream.runtime.sockets import is_hung_up, is_unix
from syncstream.runtime.watch import elsewhere, watch
from syncstream.streams.contract import Life
from tests.runtime.places import place_of
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

# Forks.


def forked(work):
    """Run something in a forked child; return its exit status, None if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it has threads
        pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


def timeout_of(sock):
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
@pytest.mark.parametrize("before", [0, 7000])
def test_the_servers_own_time_out_is_given_back(own_watches, before):
    """The connection may serve other requests after the stream."""
    with tcp_pair() as (server, _):
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, before)
        stream = stream_of(["a"], Line(server), life=Life(send_timeout=0.4))
        chunks = iter(stream)
        next(chunks), next(chunks)
        await_true(lambda: timeout_of(server) not in (0, before))
        assert list(chunks) == []
        stream.close()
        assert timeout_of(server) == before


def test_a_descriptor_may_be_added_twice(own_watches):
    """After it was told of, and nobody has removed it: the newer one is told, too."""
    place, told = Threads(), []
    with tcp_pair() as (server, client):
        watch = place.watch()
        watch.add(server.fileno(), lambda: told.append("first"))
        leave(client)
        place.await_true(lambda: told)
        watch.add(server.fileno(), second := lambda: told.append("second"))
        place.await_true(lambda: len(told) == 2)
        watch.remove(server.fileno(), second)
    assert told == ["first", "second"]


def test_a_number_is_removed_and_added_at_once(own_watches, monkeypatch):
    """By two owners: the new one is told, whichever comes first."""
    removing, added = threading.Event(), threading.Event()

    class Slow:
        """An epoll that removes when something else has been added, if that can be."""

        def __init__(self):
            self._epoll = select.epoll()

        def __getattr__(self, name):
            return getattr(self._epoll, name)

        def unregister(self, fd):
            removing.set()
            added.wait(0.2)
            self._epoll.unregister(fd)

    monkeypatch.setattr(syncstream.runtime.watch, "native_epoll", lambda: Slow)
    place, told = Threads(), []
    with tcp_pair() as (server, client):
        watch = place.watch()
        watch.add(server.fileno(), first := lambda: told.append("first"))
        join = place.start(lambda: watch.remove(server.fileno(), first))
        assert removing.wait(TIMEOUT)
        watch.add(server.fileno(), second := lambda: told.append("second"))
        added.set()
        join()
        leave(client)
        place.await_true(lambda: told)
        watch.remove(server.fileno(), second)
    assert told == ["second"]


def test_what_was_told_is_kept_no_longer_than_watched(own_watches, monkeypatch):
    """Without epoll, too, where the watch notes whom it has told."""
    place, told = place_of("threads without epoll", monkeypatch), []

    def hung_up():
        told.append(1)

    reference = weakref.ref(hung_up)
    with tcp_pair() as (server, client):
        watch = place.watch()
        watch.add(server.fileno(), hung_up)
        leave(client)
        place.await_true(lambda: told)
        watch.remove(server.fileno(), hung_up)
        del hung_up
        place.await_true(lambda: gc.collect() >= 0 and reference() is None)


def test_a_socket_may_have_the_number_0():
    """Where standard input was closed, as a daemon's is."""
    before = os.dup(0)
    with tcp_pair() as (server, _):
        try:
            os.dup2(server.fileno(), 0)
            assert not is_hung_up(0)
        finally:
            os.dup2(before, 0)
            os.close(before)


def test_an_unknown_family_is_no_unix_socket(monkeypatch):
    """Systems other than Linux do not tell it."""
    monkeypatch.setattr(syncstream.runtime.sockets, "SO_DOMAIN", None)
    with tcp_pair() as (server, _):
        assert not is_unix(server.fileno())


def test_what_may_block_is_done_even_without_a_thread(own_watches, monkeypatch):
    """In the watch then, which is better than not at all."""
    done = []
    watch = Threads().watch()

    def start(function, args):
        raise RuntimeError("can't start new thread")

    # Where gevent was imported, `native` has kept the function that it was.
    monkeypatch.setattr(syncstream.runtime.watch, "native", lambda *_: start)
    elsewhere(watch, lambda: done.append(1))
    assert done == [1]


def test_a_forked_child_leaves_the_streams_alone(own_watches):
    """It closes those that it has inherited: its parent's are watched as before."""
    place, seen = Threads(), []

    def source():
        seen.append("waits")
        sleep(60)
        yield

    with tcp_pair() as (server, client), tcp_pair() as (server2, client2):
        stream = stream_of(source(), Line(server))
        join = place.start(lambda: serve(stream))
        place.await_true(lambda: seen)
        between = stream_of(iter(lambda: "a", None), Line(server2))
        chunks = iter(between)
        next(chunks), next(chunks)
        timeouts = timeout_of(server), timeout_of(server2)

        def child():
            nonlocal between, chunks
            assert stats()["open"] == 0
            stream.is_running = False
            stream.close()
            del between, chunks
            gc.collect()
            assert stats() == {"open": 0, "ended": {}}
            # Its own streams have a watch of their own.
            with tcp_pair() as (own, peer):
                own_stream = stream_of(source(), Line(own))
                seen.clear()
                own_join = place.start(lambda: serve(own_stream))
                place.await_true(lambda: seen)
                leave(peer)
                own_join()
                assert own_stream.reason == "disconnected"

        assert forked(child) == 0
        assert (timeout_of(server), timeout_of(server2)) == timeouts
        leave(client)
        assert join() == [b": ok\n\n"]
        assert stream.reason == "disconnected"
        leave(client2)
        place.await_true(lambda: between.reason)
        assert between.reason == "disconnected"
        chunks.close()


def test_a_fork_inside_of_the_lock_hangs_no_child(own_watches):
    """Whatever another thread holds just then, it is nobody's in the child."""
    place, seen = Threads(), []
    with tcp_pair() as (server, _):
        stream = stream_of(iter(lambda: "a", None), Line(server))
        chunks = iter(stream)
        next(chunks), next(chunks)
        held, go = threading.Event(), threading.Event()

        def hold():
            with watch().lock:
                held.set()
                go.wait(TIMEOUT)

        join = place.start(hold)
        assert held.wait(TIMEOUT)
        try:
            assert forked(stream.close) == 0
        finally:
            go.set()
        join()
        stream.close()
    assert seen == []


GEVENT_FORK = """
import gevent.monkey
gevent.monkey.patch_all()
import gc, os, sys, time
import gevent
from tests.support.pairs import Greenlets, Line, leave
from tests.support.waits import await_true
from tests.support.pairs import serve, stream_of, tcp_pair
from syncstream import sleep
from syncstream.process import stats
from syncstream.streams.contract import Life

place, seen, wrote = Greenlets(), [], []

def source():
    seen.append("waits")
    sleep(60)
    yield

class Written(Line):
    def write(self, data):
        wrote.append(os.getpid())

with tcp_pair() as (server, client), tcp_pair() as (server2, client2):
    life = Life(keepalive=0.02, send_timeout=30, max_duration=None)
    stream = stream_of(source(), Written(server), life=life)
    join = place.start(lambda: serve(stream))
    place.await_true(lambda: seen)
    between = stream_of(iter(lambda: "a", None), Line(server2))
    chunks = iter(between)
    place.start(lambda: [next(chunks), next(chunks)])()
    left_read, left = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            del wrote[:]
            if sys.argv[1] == "closes":
                between.close()
                stream.close()  # left to its greenlet, which nobody runs here
                gc.collect()
            os.write(left, b"1")
            assert stats() == {"open": 0, "ended": {}}, stats()
            gevent.sleep(0.3)  # our hub runs, and the parent's client leaves
            assert wrote == [], "the child has written"
            assert stream.reason in (None, "closed"), stream.reason
            with tcp_pair() as (own, peer):
                own_stream = stream_of(source(), Line(own))
                seen.clear()
                own_join = place.start(lambda: serve(own_stream))
                place.await_true(lambda: seen)
                leave(peer)
                own_join()
                assert own_stream.reason == "disconnected"
            status = 0
        except BaseException as error:
            print(f"in the child: {error!r}", flush=True)
        finally:
            os._exit(status)
    os.read(left_read, 1)
    # Without our hub: the child alone could take the event, if it looked.
    client_fd = client.detach()
    os.close(client_fd)
    time_over = time.monotonic() + 0.15
    while time.monotonic() < time_over:
        pass
    assert join() == [b": ok\\n\\n"]
    assert stream.reason == "disconnected"
    leave(client2)
    place.await_true(lambda: between.reason)
    assert between.reason == "disconnected"
    between.close()
    print("parent", os.waitpid(pid, 0)[1])
    os.close(left_read), os.close(left)
"""


@pytest.mark.parametrize("what", ["closes", "sleeps"])
def test_a_forked_hub_leaves_the_streams_alone(what):
    """It takes no event of its parent's, and writes nothing to its clients."""
    pytest.importorskip("gevent")
    script = "import warnings\nwarnings.simplefilter('ignore')\n" + GEVENT_FORK
    assert check_script(script, what) == "parent 0\n"
