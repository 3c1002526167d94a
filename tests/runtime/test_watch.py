"""The watch: it sees those who leave, and only them, costs nothing, and lives on."""

import contextlib
import gc
import itertools
import logging
import os
import random
import select
import socket
import ssl
import sys
import threading
import time
import warnings
import weakref

import pytest

import syncstream.runtime.sockets
import syncstream.runtime.watch
from syncstream import ClientDisconnected, current_stream, sleep
from syncstream.process import stats
from syncstream.runtime.journal import journal
from syncstream.runtime.sockets import is_hung_up, is_unix
from syncstream.runtime.watch import elsewhere, watch
from syncstream.streams.contract import Life
from tests.support.descriptors import open_files
from tests.support.pairs import (
    Greenlets,
    Line,
    Threads,
    check_script,
    leave,
    serve,
    stream_of,
    tcp_pair,
)
from tests.support.waits import TIMEOUT, await_true

LEAVES = ("FIN", "RST", "bytes, FIN")
PLACES = ("threads", "gevent")


def place_of(kind, monkeypatch):
    if "without" in kind:
        monkeypatch.setattr(syncstream.runtime.watch, "native_epoll", lambda: None)
    if "POLLRDHUP" in kind:
        monkeypatch.setattr(syncstream.runtime.sockets, "POLLRDHUP", 0)
    if "gevent" in kind:
        pytest.importorskip("gevent")
        return Greenlets()
    return Threads()


@pytest.fixture
def own_watches(monkeypatch):
    """A test with watches of its own, which end with it."""
    own = syncstream.runtime.watch.Watches()
    monkeypatch.setattr(syncstream.runtime.watch, "watches", own)
    yield
    own.close()


@pytest.fixture(
    params=[
        "threads",
        "gevent",
        "threads without epoll",
        "gevent without epoll",
        "threads without epoll and POLLRDHUP",
    ]
)
def any_place(request, own_watches, monkeypatch):
    """Each way in which a watch works."""
    place = place_of(request.param, monkeypatch)
    place.kind = request.param
    return place


@pytest.fixture(params=PLACES)
def place(request, own_watches, monkeypatch):
    """Threads, greenlets; with epoll."""
    return place_of(request.param, monkeypatch)


# Hang-ups.


@pytest.mark.parametrize("how", LEAVES)
def test_a_hang_up_is_told_once(any_place, how):
    """However the client leaves, and nothing before that."""
    if how == "bytes, FIN" and "POLLRDHUP" in any_place.kind:
        return  # an end behind bytes cannot be seen there
    calls = []
    watch = any_place.watch()
    with tcp_pair() as (server, client):
        watch.add(server.fileno(), lambda: calls.append(watch.remove))
        any_place.pause(0.02)
        assert calls == []
        leave(client, how)
        any_place.await_true(lambda: calls)
        any_place.pause(3 * syncstream.runtime.watch.LOOK_EVERY)
        fd = server.fileno()
        watch.remove(fd, watch.watched[fd])
        assert len(calls) == 1


@pytest.mark.parametrize("how", LEAVES)
def test_a_stream_ends_at_a_hang_up(any_place, how):
    """A wait in its generator ends with ClientDisconnected."""
    if how == "bytes, FIN" and "POLLRDHUP" in any_place.kind:
        return
    seen = []

    def source():
        try:
            yield "a"
            seen.append("waits")
            sleep(60)
        except BaseException as error:
            seen.append(type(error))
            raise

    with tcp_pair() as (server, client):
        stream = stream_of(source(), Line(server))
        join = any_place.start(lambda: serve(stream))
        any_place.await_true(lambda: seen)
        leave(client, how)
        assert join() == [b": ok\n\n", b"data: a\n\n"]
    assert seen == ["waits", ClientDisconnected]
    assert stream.reason == "disconnected"


def tls_pair(server, client):
    """Encrypt a pair without certificates: both ends are ours."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("aNULL:@SECLEVEL=0")
        contexts.append(context)
    join = Threads().start(lambda: contexts[0].wrap_socket(server, server_side=True))
    secret = contexts[1].wrap_socket(client)
    return join(), secret


@pytest.mark.parametrize("how", ["FIN", "unwrap", "bytes, FIN"])
def test_a_hang_up_is_told_behind_tls(place, how):
    """The close alert and what was not read do not hide it."""
    calls = []
    watch = place.watch()
    with tcp_pair() as pair:
        server, client = tls_pair(*pair)
        with server, client:
            watch.add(server.fileno(), lambda: calls.append(1))
            if how == "unwrap":
                client.setblocking(False)
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.unwrap()  # the alert alone
                place.pause(0.02)
                assert calls == []
            leave(client, how)
            place.await_true(lambda: calls)


def test_bytes_do_not_wake_it(own_watches, monkeypatch):
    """A client that pipelines, or floods, costs the watch nothing."""
    for kind in PLACES:
        place, reads = place_of(kind, monkeypatch), []
        with tcp_pair() as (server, client):
            watch = place.watch()

            def counted(timeout, read=watch.read, reads=reads):
                reads.append(timeout)
                return read(timeout)

            # Of this watch alone: other tests' may have timers.
            monkeypatch.setattr(watch, "read", counted)
            watch.add(server.fileno(), lambda: None)
            place.pause(0.02)
            del reads[:]
            for _ in range(200):
                client.sendall(b"stray")
                server.recv(5)
                client.sendall(b"stray")
            client.sendall(b"x" * 10_000)
            place.pause(0.05)
            assert len(reads) < 5  # a timer's, at most; 400 came
            hung_up = watch.watched[server.fileno()]
            watch.remove(server.fileno(), hung_up)


def test_a_stranger_with_the_number_is_left_alone(any_place):
    """Closed and reused between registration and event: nobody is ended."""
    calls = []
    watch = any_place.watch()
    with tcp_pair() as (old, client), tcp_pair() as (stranger, other):
        fd = old.fileno()
        with old.dup() as kept:  # epoll goes on to report the old one
            watch.add(fd, lambda: calls.append("old"))
            os.dup2(stranger.fileno(), fd)
            leave(client)
            any_place.await_true(
                lambda: syncstream.runtime.sockets.is_hung_up(kept.fileno())
            )
            any_place.pause(0.12)
            assert calls == []
            assert watch.watched.pop(fd)
        assert not syncstream.runtime.sockets.is_hung_up(stranger.fileno())
        other.close()


def test_remove_leaves_a_stranger_watched(any_place):
    """The number has become another's, who has registered it for himself."""
    calls = []

    def mine():
        calls.append("mine")

    def strangers():
        calls.append("stranger's")

    watch = any_place.watch()
    with tcp_pair() as (old, _), tcp_pair() as (stranger, client):
        fd = old.fileno()
        watch.add(fd, mine)
        os.dup2(stranger.fileno(), fd)
        watch.add(fd, strangers)
        watch.remove(fd, mine)
        leave(client)
        any_place.await_true(lambda: calls)
        watch.remove(fd, strangers)
        any_place.pause(0.06)
    assert calls == ["stranger's"]


def test_a_connection_is_watched_again(any_place):
    """For one stream after the other, on a connection that is kept."""
    watch = any_place.watch()
    with tcp_pair() as (server, client):
        for n in range(100):
            calls = []
            watch.add(server.fileno(), calls.append)
            watch.remove(server.fileno(), calls.append)  # another object: not his

            def hung_up(n=n, calls=calls):
                calls.append(n)

            watch.add(server.fileno(), hung_up)
            if n < 99:
                watch.remove(server.fileno(), hung_up)
        leave(client)
        any_place.await_true(lambda: calls)
        watch.remove(server.fileno(), hung_up)
    assert watch.watched == {}


# The clock.


def test_timers_come_in_order(any_place):
    """2,000 of them, set in any order; the cancelled ones do not come."""
    watch, came, timers = any_place.watch(), [], {}
    with watch.lock:  # none comes before all are set, however busy the machine is
        now = time.monotonic() + 0.05
        times = [now + n / 10_000 for n in range(2000)]
        for when in random.sample(times, len(times)):
            timers[when] = watch.call_at(when, lambda when=when: came.append(when))
        cancelled = set(random.sample(times, 700))
        for when in cancelled:
            watch.cancel(timers[when])
            watch.cancel(timers[when])
    expected = [when for when in times if when not in cancelled]
    any_place.await_true(lambda: len(came) >= len(expected))
    any_place.pause(0.02)
    assert came == expected


def test_no_timer_comes_early(any_place):
    """The loop's clock is not ours."""
    watch, early = any_place.watch(), []
    came = []
    for n in range(50):
        when = time.monotonic() + n / 1000

        def call(when=when):
            came.append(when)
            if time.monotonic() < when:
                early.append(when)

        watch.call_at(when, call)
    any_place.await_true(lambda: len(came) == 50)
    assert early == []


def test_a_timer_comes_again_until_it_is_cancelled(any_place):
    """Whenever its callback says; from then on not any more."""
    watch, came = any_place.watch(), []

    def call():
        came.append(time.monotonic())
        if len(came) == 5:
            watch.cancel(timer)
        return time.monotonic() + 0.003

    with watch.lock:  # it does not come before we know it
        timer = watch.call_at(time.monotonic(), call)
    any_place.await_true(lambda: len(came) == 5)
    any_place.pause(0.03)
    assert len(came) == 5


def test_a_sooner_timer_is_not_kept_waiting(any_place):
    """By one that was set before it, nor by one months away."""
    watch, came = any_place.watch(), []
    late = [
        watch.call_at(time.monotonic() + seconds, lambda: came.append("late"))
        for seconds in (60, 40 * 86400.0, 1e12, 1e300)
    ]
    any_place.pause(0.01)
    watch.call_at(time.monotonic() + 0.01, lambda: came.append("soon"))
    any_place.await_true(lambda: came)
    assert came == ["soon"]
    for timer in late:
        watch.cancel(timer)


def test_a_time_months_away_stops_no_clock(any_place):
    """epoll takes 24 days, gevent and locks take centuries at most."""
    watch, came = any_place.watch(), []
    for seconds in (40 * 86400.0, 1e12, 1e300):
        timer = watch.call_at(time.monotonic() + seconds, lambda: came.append("late"))
        any_place.pause(0.02)
        watch.cancel(timer)
    watch.call_at(time.monotonic() + 0.01, lambda: came.append("soon"))
    any_place.await_true(lambda: came)
    assert came == ["soon"]


def test_cancelled_timers_are_dropped(place):
    """100,000 streams that came and went leave a few behind, and no live one out."""
    watch, came = place.watch(), []
    later = time.monotonic() + 60
    keep = [
        watch.call_at(time.monotonic() + 0.5, lambda n=n: came.append(n))
        for n in range(100)
    ]
    for _ in range(100_000):
        watch.cancel(watch.call_at(later, lambda: came.append("cancelled")))
    assert len(watch.timers) < 3000
    place.await_true(lambda: len(came) == len(keep))
    assert came == list(range(100))


def test_a_busy_clock_starves_nobody(any_place):
    """A timer that is always due lets hang-ups, and greenlets, come through."""
    watch, calls, ticks = any_place.watch(), [], itertools.count()

    def busy():
        next(ticks)
        return time.monotonic()

    timer = watch.call_at(0, busy)
    try:
        with tcp_pair() as (server, client):
            watch.add(server.fileno(), lambda: calls.append(1))
            leave(client)
            any_place.await_true(lambda: calls)
    finally:
        timer.callback = None


def test_a_callback_that_fails_is_logged(any_place, caplog):
    """Once, and the watch goes on."""
    watch, calls = any_place.watch(), []
    watch.call_at(time.monotonic(), lambda: 1 / 0)
    with tcp_pair() as (server, client), tcp_pair() as (server2, client2):
        watch.add(server.fileno(), lambda: 1 / 0)
        watch.add(server2.fileno(), lambda: calls.append("hung up"))
        leave(client)
        any_place.await_true(lambda: caplog.text.count("ZeroDivisionError") >= 2)
        for fd in (server.fileno(),):
            watch.watched.pop(fd)
        leave(client2)
        watch.call_at(time.monotonic(), lambda: calls.append("timer"))
        any_place.await_true(lambda: len(calls) >= 2)
        watch.watched.pop(server2.fileno())
    assert sorted(set(calls)) == ["hung up", "timer"]
    text = "a callback of the watch failed: its stream may not notice an end"
    assert text in caplog.messages


def test_it_is_used_from_many_threads(own_watches, monkeypatch):
    """Adding, removing and timers race; every timer comes, no descriptor stays."""
    place = Threads()
    watch, came = place.watch(), []
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(tcp_pair()) for _ in range(8)]

        def work(server):
            for _ in range(300):
                watch.add(server.fileno(), came.append)
                gone = watch.call_at(time.monotonic() + 60, came.append)
                watch.call_at(time.monotonic(), lambda: came.append(1))
                watch.cancel(gone)
                hung_up = watch.watched[server.fileno()]
                watch.remove(server.fileno(), hung_up)

        joins = [place.start(lambda s=server: work(s)) for server, _ in pairs]
        for join in joins:
            join()
        place.await_true(lambda: len(came) >= 8 * 300)
    assert came == [1] * 2400
    assert watch.watched == {}


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


# No descriptors.

FULL = """
import logging, os, resource, sys, threading
from tests.support.pairs import Greenlets, Line, Threads, leave, serve
from tests.support.waits import await_true
from tests.support.pairs import stream_of, tcp_pair
from syncstream import sleep

records = []
class Handler(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("syncstream").addHandler(Handler())

place = Greenlets() if sys.argv[1] == "gevent" else Threads()
seen = []

def source():
    seen.append("waits")
    sleep(60 if len(sys.argv) < 3 else 0.05)
    yield "a"

place.pause()  # the hub has its descriptors
spare = int(sys.argv[2])
with tcp_pair() as (server, client), tcp_pair() as (server2, client2):
    stream = stream_of(source(), Line(server))
    second = stream_of(source(), Line(server2))
    serve(stream_of(["imports"], Line()))
    import syncstream.runtime.watch as module
    module.watches = module.Watches()
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    full = []
    try:
        while True:
            full.append(os.dup(0))
    except OSError:
        pass
    for fd in full[:spare]:
        os.close(fd)
    del full[:spare]
    join = place.start(lambda: serve(stream))
    assert join() == [b": ok\\n\\n", b"data: a\\n\\n"]
    for fd in full:
        os.close(fd)
    assert records == ["GET '/test' is not watched for a hang-up"], records
    before = len(os.listdir("/proc/self/fd"))
    sys.argv.pop()
    seen.clear()
    join = place.start(lambda: serve(second))
    place.await_true(lambda: seen)
    leave(client2)
    assert join() == [b": ok\\n\\n"]
    assert second.reason == "disconnected"
    assert len(records) == 1
"""


@pytest.mark.parametrize(
    ("kind", "spare"), [("threads", 0), ("threads", 1), ("gevent", 0)]
)
def test_without_descriptors_streams_go_unwatched(kind, spare):
    """With one warning; the next one is watched again."""
    if kind == "gevent":
        pytest.importorskip("gevent")
    assert check_script(FULL, kind, str(spare)) == ""


def test_an_unwatched_stream_is_stopped(monkeypatch, caplog):
    """Its wait ends at once all the same, in a thread."""

    def full():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("syncstream.streams.monitor.watch", full)
    place, seen = Threads(), []

    def source():
        seen.append("waits")
        sleep(60)
        yield

    stream = stream_of(source(), Line())
    join = place.start(lambda: serve(stream))
    place.await_true(lambda: seen and stream.thread_wait)
    stream.stop("shutdown")
    join()
    assert stream.reason == "shutdown"
    assert caplog.messages == ["GET '/test' is not watched for a hang-up"]


def test_no_thread_no_descriptor_is_lost(own_watches, monkeypatch, caplog):
    """Where no thread can be started, trying again and again leaks nothing."""

    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    before = open_files()
    for _ in range(20):
        assert len(serve(stream_of(["a"], Line()))) == 2
    gc.collect()
    assert open_files() - before == {}
    assert len(caplog.messages) == 20


# Garbage.


def cyclic(line, on_close):
    """Begin a stream that only the collector can end."""
    stream = stream_of(iter(lambda: "a", None), line)
    stream.on_close(on_close)
    chunks = iter(stream)
    next(chunks), next(chunks)
    cycle = [stream, chunks]
    cycle.append(cycle)


def number_ended():
    return sum(total["streams"] for total in stats()["ended"].values())


@pytest.mark.parametrize("collector", ["another thread's", "in every allocation"])
def test_collected_streams_do_not_lock_up(own_watches, collector):
    """Wherever the collector strikes: in the watch's lock, in the counting."""
    ended, stop = [], threading.Event()

    def collect():
        while not stop.is_set():
            gc.collect()

    def on_close():
        ended.append(stats()["open"])

    thresholds = gc.get_threshold()
    thread = threading.Thread(target=collect, daemon=True)
    gc.collect()  # what other tests have left ends now, and does not count
    gc.freeze()  # the rest of the test run is not looked through
    before = number_ended()
    try:
        if collector == "another thread's":
            thread.start()
        else:
            gc.set_threshold(1)
        with tcp_pair() as (server, _):
            for _ in range(400):
                cyclic(Line(server), on_close)
                stats()
    finally:
        gc.set_threshold(*thresholds)
        stop.set()
        if thread.ident:
            thread.join(TIMEOUT)
        gc.unfreeze()
    gc.collect()
    assert len(ended) == 400
    assert number_ended() == before + 400


# What it costs.

IDLE = """
import contextlib, resource, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
from tests.support.pairs import Greenlets, Threads
import socket
place = Greenlets() if sys.argv[1] == "gevent" else Threads()
watch = place.watch()
with contextlib.ExitStack() as stack:
    for _ in range(2000):
        ends = socket.socketpair()
        for end in ends:
            stack.enter_context(end)
        watch.add(ends[0].fileno(), print)
        watch.call_at(time.monotonic() + 15, lambda: None)
    place.pause(0.2)
    before = time.process_time()
    place.pause(1)
    print(time.process_time() - before)
"""


@pytest.mark.parametrize("kind", PLACES)
def test_idle_connections_cost_nothing(kind):
    """2,000 of them: less than 1 % of a processor."""
    if kind == "gevent":
        pytest.importorskip("gevent")
    assert float(check_script(IDLE, kind)) < 0.01


# gevent: interrupted in next(), or not at all.

RACE = """
import sys, time, random, threading, itertools
import logging
if sys.argv[1] == "patched":
    import gevent.monkey
    gevent.monkey.patch_all()
import gevent, gevent.event, gevent.queue
from gevent.monkey import get_original
from tests.support.pairs import Line, leave, stream_of, tcp_pair
from syncstream import current_stream, sleep
import syncstream

records = []
class Handler(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage() + repr(record.exc_info))
logging.getLogger("syncstream").addHandler(Handler())
start_new_thread = get_original("_thread", "start_new_thread")

ROUNDS, AT_ONCE = 20, 100
how = sys.argv[2]
finals, errors, served, reasons = {}, [], [], {}

def wait_by(kind, delay):
    if kind == 0:
        gevent.sleep(delay)
    elif kind == 1:
        sleep(delay)
    elif kind == 2:
        event = gevent.event.Event()
        gevent.spawn_later(delay, event.set)
        syncstream.current_stream().wait(event, 5)
    elif kind == 3:
        items = gevent.queue.Queue()
        gevent.spawn_later(delay, items.put, "b")
        items.get()
    else:
        lock = gevent.lock.BoundedSemaphore(1)
        lock.acquire()
        gevent.spawn_later(delay, lock.release)
        lock.acquire()

def source(key, delay):
    finals[key] = 0
    try:
        yield "a"
        for _ in range(3):
            wait_by(key % 5, delay)
            yield "b"
        while True:
            wait_by(key % 5, 0.0005)
            yield "c"
    finally:
        finals[key] += 1

def server_code(key, stream):
    place = "iterating"
    try:
        for chunk in stream:
            place = "writing"
            gevent.sleep(0 if key % 2 else 0.0003)
            place = "iterating"
        place = "closing"
        stream.close()
        place = "the next request"
        until = time.monotonic() + 0.02
        while time.monotonic() < until:
            gevent.sleep(0.001)
        served.append(key)
    except BaseException as error:
        errors.append((place, repr(error)))

def end(key, delay, client, stream):
    gevent.sleep(3 * delay + random.uniform(-0.0006, 0.0012))
    if how == "hang-up":
        leave(client)
    elif how == "native":
        start_new_thread(stream.stop, ("kicked",))
    else:
        stream.stop("kicked")

import contextlib
import gevent.lock
keys = itertools.count()
for _ in range(ROUNDS):
    with contextlib.ExitStack() as stack:
        greenlets = []
        for _ in range(AT_ONCE):
            key, delay = next(keys), random.choice((0.001, 0.002))
            server, client = stack.enter_context(tcp_pair())
            stream = stream_of(source(key, delay), Line(server))
            greenlets.append(gevent.spawn(server_code, key, stream))
            greenlets.append(gevent.spawn(end, key, delay, client, stream))
            reasons[key] = stream
        gevent.joinall(greenlets, timeout=30)
    del stream
n = ROUNDS * AT_ONCE
assert errors == [], errors[:5]
assert records == [], records[:5]
assert len(served) == n, len(served)
assert set(finals.values()) == {1}, finals
assert len(finals) > n / 2  # on a busy machine some never came to run
expected = "disconnected" if how == "hang-up" else "kicked"
assert {stream.reason for stream in reasons.values()} == {expected}
"""


@pytest.mark.parametrize("how", ["hang-up", "native", "greenlet"])
@pytest.mark.parametrize("kind", ["patched", "unpatched"])
def test_nothing_is_thrown_into_the_servers_code(kind, how):
    """2,000 waits that end just when the client leaves, or the stream is stopped.

    Nothing leaves next(), `finally` runs once, the next request is unharmed.
    """
    pytest.importorskip("gevent")
    assert check_script(RACE, kind, how) == ""


def test_a_greenlet_is_interrupted_whatever_it_waits_in(own_watches):
    """gevent's own sleep, sockets, pools: all but the processor."""
    gevent = pytest.importorskip("gevent")
    for module in ("event", "queue", "socket"):
        pytest.importorskip(f"gevent.{module}")

    place = Greenlets()
    with tcp_pair() as (quiet, _):
        waits = {
            "sleep": lambda: gevent.sleep(60),
            "event": gevent.event.Event().wait,
            "queue": gevent.queue.Queue().get,
            "socket": lambda: gevent.socket.wait_read(quiet.fileno()),
            "join": lambda: gevent.spawn(gevent.sleep, 60).join(),
        }
        for wait in waits.values():
            seen = []

            def source(wait=wait, seen=seen):
                try:
                    seen.append("waits")
                    wait()
                    yield
                except ClientDisconnected:
                    seen.append("told")
                    raise

            with tcp_pair() as (server, client):
                stream = stream_of(source(), Line(server))
                join = place.start(lambda stream=stream: serve(stream))
                place.await_true(lambda seen=seen: seen)
                leave(client)
                join()
                assert seen == ["waits", "told"]


@pytest.mark.parametrize("when", ["self", "greenlet", "thread", "before", "between"])
def test_stop_in_a_hub(own_watches, when):
    """From wherever: the wait ends, `finally` waits plainly, to its end."""
    gevent = pytest.importorskip("gevent")
    place, seen = Greenlets(), []

    def source():
        try:
            seen.append("runs")
            if when == "self":
                current_stream().stop("kicked")
            yield "a"
            gevent.sleep(60)
        except BaseException as error:
            seen.append(type(error))
            raise
        finally:
            current_stream().stop("denied")  # too late
            start = time.monotonic()
            gevent.sleep(0.03)
            sleep(0.03)
            seen.append(time.monotonic() - start >= 0.06)

    stream = stream_of(source(), Line())
    if when == "before":
        stream.stop("kicked")
        (last,) = place.start(lambda: serve(stream))()
        assert last.startswith(b"retry: ")
        assert (stream.reason, seen) == ("kicked", [])
        return

    def server():
        try:
            for chunk in stream:
                if chunk == b"data: a\n\n" and when == "between":
                    stream.stop("kicked")
                gevent.sleep(0)
        finally:
            stream.close()

    join = place.start(server)
    place.await_true(lambda: seen)
    place.pause(0.01)
    if when == "greenlet":
        gevent.spawn(stream.stop, "kicked")
    elif when == "thread":
        join_thread = Threads().start(lambda: stream.stop("kicked"))
    join()
    if when == "thread":
        join_thread()
    assert stream.reason == "kicked"
    assert seen == ["runs", GeneratorExit, True]
    gevent.sleep(0.02)


# The clock of a stream.


@pytest.mark.parametrize("seconds", [1e7, 1e12, 1e300])
def test_a_life_of_years(own_watches, seconds, caplog):
    """No number of seconds is too much for the kernel or the clock."""
    life = Life(keepalive=seconds, send_timeout=seconds, max_duration=seconds)
    place, seen = Threads(), []

    def source():
        seen.append("waits")
        sleep(60)
        yield

    with tcp_pair() as (server, client):
        stream = stream_of(source(), Line(server), life=life)
        join = place.start(lambda: serve(stream))
        place.await_true(lambda: seen)
        leave(client)
        assert join() == [b": ok\n\n"]
    assert stream.reason == "disconnected"
    journal().flush()
    assert caplog.records == []


def test_no_logger_is_used_before_it_is_needed(own_watches, caplog):
    """Streams that begin, wait and end in good order log nothing above DEBUG."""
    caplog.set_level(logging.INFO, "syncstream")
    for _ in range(10):
        serve(stream_of(["a"], Line()))
    journal().flush()
    assert caplog.records == []
