"""The watch: it sees those who leave, and only them, and it is a clock."""

import contextlib
import itertools
import logging
import os
import random
import ssl
import time

import pytest

import syncstream.runtime.sockets
import syncstream.runtime.watch
from syncstream import ClientDisconnected, sleep
from syncstream.runtime.journal import journal
from syncstream.streams.contract import Life
from tests.runtime.places import LEAVES, PLACES, place_of
from tests.support.pairs import (
    Line,
    Threads,
    leave,
    serve,
    stream_of,
    tcp_pair,
)

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


def test_what_comes_later_is_called_once(any_place, caplog):
    """All of it, in its order, even if one fails; what is given meanwhile, too."""
    watch, came = any_place.watch(), []

    def last():
        came.append("last")

    def again():
        came.append("again")
        watch.later(last)

    for callback in (lambda: came.append("first"), lambda: 1 / 0, again):
        watch.later(callback)
    assert came == []
    any_place.await_true(lambda: len(came) >= 3)
    any_place.pause(0.1)
    assert came == ["first", "again", "last"]
    any_place.await_true(lambda: "ZeroDivisionError" in caplog.text)


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
