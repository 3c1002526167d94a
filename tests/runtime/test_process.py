"""A process and its streams: how they end, what is counted, what holds at its exit."""

import atexit
import contextlib
import logging
import math
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from werkzeug.serving import make_server

import syncstream.runtime.process
from syncstream import ClientDisconnected, NDJSONResponse, SSEResponse, sleep
from syncstream.runtime.journal import journal
from syncstream.runtime.process import (
    AT_ONCE,
    Process,
    drain_of_environment,
    process,
    stats,
)
from syncstream.streams.contract import Life
from syncstream.streams.ends import REASONS
from syncstream.streams.monitor import jittered
from tests import ROOT
from tests.support.pairs import (
    Browser,
    Line,
    Threads,
    check_script,
    leave,
    serve,
    stream_of,
    tcp_pair,
)
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()
RETRY = re.compile(rb"retry: (\d+)\n\n")


pytestmark = pytest.mark.usefixtures("own_record")


def stopped(reason, *, line=None, while_waiting=True, yields=("a",), **options):
    """Run a stream until it waits, or after its first items, stop it: its body."""
    waits, seen = threading.Event(), []

    def source():
        try:
            yield from yields
            waits.set()
            while while_waiting:
                sleep(60)
            yield "more"
            yield "never"
        except BaseException as error:
            seen.append(type(error))
            raise
        finally:
            seen.append("finally")

    stream = stream_of(source(), line or Line(), **options)
    if while_waiting:
        join = PLACE.start(lambda: serve(stream))
        assert waits.wait(TIMEOUT)
        stream.stop(reason)
        body = join()
    else:
        chunks = iter(stream)
        body = [next(chunks) for _ in range(1 + len(yields))]
        stream.stop(reason)
        body += list(chunks)
        stream.close()
    return stream, b"".join(body), seen


@pytest.mark.parametrize("while_waiting", [True, False])
@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_reason_to_stop(reason, while_waiting):
    """A whole response, the source closed once, and what the client is told."""
    line = Line()
    line.is_event_source = True
    stream, body, seen = stopped(
        reason, line=line, while_waiting=while_waiting, end="stop"
    )
    assert stream.reason == reason
    assert seen == [GeneratorExit, "finally"]
    head = b": ok\n\ndata: a\n\n"
    assert body.startswith(head)
    rest = body[len(head) :]
    if reason == "finished":
        assert rest == b"id: syncstream-end\n\n"
    elif reason == "shutdown":
        assert 1000 <= int(RETRY.fullmatch(rest)[1]) <= 3000
    elif reason in ("denied", "kicked"):
        assert 5000 <= int(RETRY.fullmatch(rest)[1]) <= 15000
    else:
        assert rest == b""
    assert stats()["ended"][reason]["streams"] == 1
    assert stats()["open"] == 0


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_who_does_not_come_back_is_cut(reason):
    """But where the application has ended the stream: what there is, is whole."""
    line = Line()
    line.is_event_source = False
    if reason in ("closed", "finished"):
        _, body, seen = stopped(reason, line=line)
        assert body == b": ok\n\ndata: a\n\n"
        assert seen == [GeneratorExit, "finally"]
    else:
        with pytest.raises(ConnectionResetError, match="cut"):
            stopped(reason, line=line)


@pytest.mark.parametrize(
    ("is_event_source", "drain", "until", "expected"),
    [
        (True, None, 30, 0),
        (True, 10, 30, 10),
        (True, 40, 30, 30),
        (False, None, 30, 30),
        (False, 10, 30, 10),
        (False, 40, 30, 30),
        (False, 0, 30, 0),
        (False, 10, -1, -1),
    ],
)
def test_for_how_long_a_generator_goes_on(is_event_source, drain, until, expected):
    """At most as long as the server leaves, whatever it has asked for."""
    line = Line()
    line.is_event_source = is_event_source
    for since, is_over in ((expected - 5, False), (expected + 5, True)):
        stream = stream_of(iter(()), line, life=Life(drain=drain))
        asked = time.monotonic() - since
        stream.shut_down(asked, asked + until)
        assert stream.reason == ("shutdown" if is_over else None)
        stream.close()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, None), ("0", 0), ("2.5", 2.5), ("x", None), ("-1", None)],
)
def test_the_drain_of_the_environment(monkeypatch, caplog, text, seconds):
    """What is no number of seconds is ignored, and said: not by the watch itself."""
    if text is not None:
        monkeypatch.setenv("SYNCSTREAM_DRAIN", text)
    assert drain_of_environment() == seconds
    assert journal().flush()
    assert len(caplog.records) == (text is not None and seconds is None)
    assert all(r.thread != threading.get_ident() for r in caplog.records)


def test_the_end_id_is_for_end_stop_alone():
    """And for a client that asks as an EventSource does."""
    for end, is_event_source in (("reconnect", True), ("stop", False)):
        line = Line()
        line.is_event_source = is_event_source
        _, body, _ = stopped("finished", line=line, end=end)
        assert body == b": ok\n\ndata: a\n\n"


def test_nothing_is_put_into_an_event():
    """Where the source has left one open, it stays so: no retry and no id."""
    for reason in ("shutdown", "finished"):
        line = Line()
        line.is_event_source = True
        _, body, _ = stopped(reason, line=line, yields=[b"data: half\n"], end="stop")
        assert body == b": ok\n\ndata: half\n"


def test_a_retry_of_ones_own_is_the_least():
    """What the application has asked for is jittered upwards."""
    _, body, _ = stopped("shutdown", line=Browser(), retry=20_000)
    assert 20_000 <= int(RETRY.search(body, 20)[1]) <= 60_000


@pytest.mark.parametrize("reason", sorted({*REASONS, "max_duration"}))
def test_no_other_client_gets_a_retry(reason):
    """Others make an event, or bad JSON, of a block without data."""
    life = Life(max_duration=0.1 if reason == "max_duration" else None)
    line = Line()
    line.is_event_source = False
    stream = stream_of(iter(lambda: None, 1), line, life=life, retry=5000)
    chunks = iter(stream)
    found = [next(chunks)]
    if reason != "max_duration":
        stream.stop(reason)
    with contextlib.suppress(ConnectionResetError):  # where it is cut
        found += chunks
    assert found == [b": ok\n\n"]
    assert stream.reason == reason


def test_the_retry_is_jittered():
    """Clients that were here together do not return together."""
    found = set()
    for _ in range(30):
        _, body, _ = stopped("shutdown", line=Browser(), while_waiting=False)
        found.add(RETRY.search(body)[1])
    assert len(found) > 10


def test_the_first_reason_wins():
    """Whichever thread is first; on_close runs once."""
    for _ in range(60):
        closes = []
        waits = threading.Event()

        def source(waits=waits):
            waits.set()
            sleep(60)
            yield

        stream = stream_of(source(), Line())
        stream.on_close(lambda closes=closes, stream=stream: closes.append(1))
        join = PLACE.start(lambda stream=stream: serve(stream))
        assert waits.wait(TIMEOUT)
        seen = []

        def stop(reason, stream=stream, seen=seen):
            stream.stop(reason)
            seen.append(stream.reason)

        reasons = sorted(REASONS)
        random.shuffle(reasons)
        for joined in [PLACE.start(lambda r=reason: stop(r)) for reason in reasons]:
            joined()
        join()
        stream.stop("denied")
        stream.close()
        assert set(seen) == {stream.reason}
        assert closes == [1]
    assert sum(total["streams"] for total in stats()["ended"].values()) == 60


@pytest.mark.parametrize("reason", ["", "disconnected", "error", "refused", None])
def test_reasons_that_are_none(reason):
    """The application cannot play the client, or us."""
    stream = stream_of([])
    with pytest.raises(ValueError, match="reason must be one of closed, denied"):
        stream.stop(reason)
    assert stream.reason is None


def test_stop_before_the_first_step():
    """The source never runs; it is closed, the callbacks run, the client is told."""
    ran, closes = [], []

    def source():
        ran.append(1)
        yield "a"

    stream = stream_of(source(), Line())
    stream.on_close(lambda: closes.append(1))
    stream.stop("denied")
    assert RETRY.fullmatch(b"".join(serve(stream)))
    assert (ran, closes, stream.reason) == ([], [1], "denied")


def test_stop_by_the_generator_itself():
    """Its next wait, or yield, ends it."""
    from syncstream import current_stream

    for waits in (True, False):
        seen = []

        def source(waits=waits, seen=seen):
            try:
                current_stream().stop("kicked")
                if waits:
                    sleep(60)
                yield "unsent"
            finally:
                seen.append("finally")

        stream = stream_of(source(), Line())
        assert serve(stream)[0] == b": ok\n\n"
        assert (stream.reason, seen) == ("kicked", ["finally"])


def test_close_from_elsewhere_ends_a_wait():
    """And a client that leaves afterwards does not matter any more."""
    with tcp_pair() as (server, client):
        waits = threading.Event()

        def source():
            waits.set()
            sleep(60)
            yield

        stream = stream_of(source(), Line(server))
        join = PLACE.start(lambda: serve(stream))
        assert waits.wait(TIMEOUT)
        stream.close()
        join()
        assert stream.reason == "closed"
        client.close()


def test_an_end_that_the_source_finds_out_first(caplog):
    """ClientDisconnected of the source's own, by a client that has gone."""
    with tcp_pair() as (server, client):

        def source():
            leave(client)
            await_true(line.is_hung_up)
            raise ClientDisconnected
            yield

        line = Line(server)
        stream = stream_of(source(), line)
        assert serve(stream) == [b": ok\n\n"]
    assert stream.reason == "disconnected"
    journal().flush()
    assert caplog.records == []


# How long it lives.


@pytest.mark.parametrize(
    "value", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, False, "15", [1]]
)
@pytest.mark.parametrize("name", ["keepalive", "send_timeout", "max_duration"])
def test_durations_that_are_none(name, value):
    """Said at construction, by name, wherever the number was given."""
    is_type = isinstance(value, (bool, str, list))
    match = f"{name} must be (seconds|above 0)"
    makers = [lambda: Life(**{name: value}), lambda: SSEResponse([], **{name: value})]
    if name != "keepalive":
        makers.append(lambda: NDJSONResponse([], **{name: value}))
    for make in makers:
        with pytest.raises(TypeError if is_type else ValueError, match=match):
            make()


def test_durations_that_are():
    """None, and any number above 0."""
    for value in (None, 1, 0.001, 10**6, 1e-9):
        assert Life(value, value, value).max_duration == value


def test_max_duration_ends_a_wait_and_a_busy_source():
    """In good order, up to a tenth early, never late by more than a look."""

    def waiting():
        sleep(60)
        yield

    def busy():
        while True:
            time.sleep(0.001)
            yield None

    for source in (waiting, busy):
        start = time.monotonic()
        stream = stream_of(source(), Browser(), life=Life(max_duration=0.2))
        body = b"".join(serve(stream))
        assert time.monotonic() - start >= 0.18
        assert stream.reason == "max_duration"
        assert 1000 <= int(RETRY.search(body)[1]) <= 3000


def test_max_duration_is_jittered():
    """By a tenth at most, downwards."""
    lives = [jittered(1000.0) for _ in range(200)]
    assert 900 <= min(lives) < 930
    assert 970 < max(lives) <= 1000


# What is counted.


def test_every_stream_is_counted_once():
    """20 threads, 500 streams each, and somebody who asks all the time."""
    stop, seen = threading.Event(), []

    def ask():
        while not stop.is_set():
            seen.append(sum(t["streams"] for t in stats()["ended"].values()))

    def work():
        for n in range(500):
            stream = stream_of(["a", "b"], Line())
            if n % 2:
                serve(stream)
            else:
                chunks = iter(stream)
                next(chunks)
                stream.close()

    asking = PLACE.start(ask)
    for join in [PLACE.start(work) for _ in range(20)]:
        join()
    stop.set()
    asking()
    assert seen == sorted(seen)
    ended = stats()["ended"]
    assert stats()["open"] == 0
    assert {reason: total["streams"] for reason, total in ended.items()} == {
        "finished": 5000,
        "closed": 5000,
    }
    assert ended["finished"]["events"] == 10_000
    # ": ok", two events of 9 bytes each; and ": ok" alone
    assert ended["finished"]["bytes"] == 5000 * (6 + 18)
    assert ended["closed"]["bytes"] == 5000 * 6
    assert ended["closed"]["events"] == 0


def test_what_was_never_sent_is_not_counted():
    """HEAD's streams, for one; a refused one is."""
    stream_of([]).close()
    assert stats() == {"open": 0, "ended": {}}
    stream_of([]).refuse()
    assert stats()["ended"]["refused"]["streams"] == 1


def test_the_open_ones_are_counted():
    """From the first step to the end, whatever that is."""
    streams = [stream_of(iter(lambda: "a", None), Line()) for _ in range(5)]
    chunks = [iter(stream) for stream in streams]
    assert stats()["open"] == 0
    for one in chunks:
        next(one)
    assert stats()["open"] == process().open_streams == 5
    for stream in streams:
        stream.close()
    assert stats()["open"] == 0


def test_a_callback_may_ask(own_record):
    """Inside of the counting, too, where a collection has brought it."""
    with own_record.lock:
        assert stats() == {"open": 0, "ended": {}}


def test_a_warning_comes_once(caplog):
    """From 50 threads at once."""
    log, record = logging.getLogger("syncstream.test"), process()
    together = threading.Barrier(50)

    def warn():
        together.wait(TIMEOUT)
        record.warn_once(log, "all is full")

    for join in [PLACE.start(warn) for _ in range(50)]:
        join()
    assert caplog.messages == ["all is full"]


def test_all_threads_have_one_record(monkeypatch):
    """Whichever asks first in a forked child."""
    for _ in range(50):
        monkeypatch.setattr(syncstream.runtime.process, "processes", {})
        together = threading.Barrier(8)

        def ask(together=together):
            together.wait(TIMEOUT)
            return process()

        joins = [PLACE.start(ask) for _ in range(8)]
        assert len({id(join()) for join in joins}) == 1


def test_a_server_that_stops_ends_its_streams(own_record):
    """Those that wait, and those that are busy; the flag is looked at meanwhile."""
    line, flag, waits = Line(), [], threading.Barrier(3)
    line.stopping = lambda: AT_ONCE if flag else None

    def waiting():
        waits.wait(TIMEOUT)
        sleep(60)
        yield

    def busy():
        waits.wait(TIMEOUT)
        while True:
            yield None

    streams = [stream_of(waiting(), line), stream_of(busy(), line)]
    joins = [PLACE.start(lambda s=stream: serve(s)) for stream in streams]
    waits.wait(TIMEOUT)
    flag.append(1)
    for join in joins:
        assert b"".join(join()).count(b"retry: ") == 1
    assert [stream.reason for stream in streams] == ["shutdown", "shutdown"]
    # It rests when there are none, and looks again when there are.
    await_true(lambda: not own_record.is_looking)
    flag.clear()
    waits = threading.Barrier(2)
    stream = stream_of(waiting(), line)
    join = PLACE.start(lambda: serve(stream))
    waits.wait(TIMEOUT)
    assert own_record.is_looking
    flag.append(1)
    join()
    assert stream.reason == "shutdown"


# The process's exit.

EXIT = """
import sys, threading, time
from tests.support.pairs import Line, serve, stream_of
from syncstream import sleep
import queue
ready = threading.Semaphore(0)

def source(n):
    try:
        ready.release()
        if n % 2:
            sleep(60)
        else:
            from syncstream import current_stream
            current_stream().wait(queue.Queue())
        yield
    except GeneratorExit:
        print("ended", flush=True)
        raise
    finally:
        print("finally", flush=True)

def stubborn():
    ready.release()
    while True:
        try:
            time.sleep(60)
        except GeneratorExit:
            pass
        yield

def serve_all(stream):
    serve(stream)

sources = [source(n) for n in range(10)]
if sys.argv[1] == "stubborn":
    sources.append(stubborn())
for one in sources:
    thread = threading.Thread(target=serve, args=(stream_of(one, Line()),), daemon=True)
    thread.start()
for _ in sources:
    ready.acquire()
if sys.argv[1] == "raises":
    sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["plain", "raises", "stubborn"])
def test_at_exit_streams_end(kind):
    """`finally` runs, in daemon threads, too; a stubborn one is not waited for."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", EXIT, kind],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == ""
    assert done.returncode == (3 if kind == "raises" else 0)
    assert done.stdout.count("ended") == done.stdout.count("finally") == 10
    assert time.monotonic() - start < 15


EXIT_GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent
from tests.support.pairs import Line, serve, stream_of
from syncstream import sleep

began = []

def source():
    try:
        began.append(1)
        sleep(60)
        yield
    finally:
        sleep(0.02)
        print("finally", flush=True)

for _ in range(5):
    gevent.spawn(serve, stream_of(source(), Line()))
while len(began) < 5:
    gevent.sleep(0.001)
"""


def test_at_exit_greenlets_end():
    """gevent's too: the hub runs once more."""
    pytest.importorskip("gevent")
    assert check_script(EXIT_GEVENT) == "finally\n" * 5


FORK = """
import os, warnings
warnings.simplefilter("ignore")
from tests.support.pairs import Line, Threads, serve, stream_of
from syncstream.runtime.journal import journal
from syncstream.runtime.process import process, stats

serve(stream_of(["a"], Line()))
record = process()
open_one = stream_of(iter(lambda: "a", None), Line())
chunks = iter(open_one)
next(chunks)
assert stats()["open"] == 1
pid = os.fork()
if not pid:
    assert stats() == {"open": 0, "ended": {}}, stats()
    assert process() is not record
    open_one.close()
    del chunks, open_one
    assert stats() == {"open": 0, "ended": {}}, stats()
    serve(stream_of(["a"], Line()))
    assert stats()["ended"]["finished"]["streams"] == 1
    raise SystemExit(5)  # its own exit, with at-exit and all
assert os.waitpid(pid, 0)[1] >> 8 == 5
assert stats()["open"] == 1
assert stats()["ended"]["finished"]["streams"] == 1
assert open_one.reason is None
open_one.close()
"""


def test_a_forked_child_starts_at_zero():
    """And what it does with its parent's streams counts nowhere."""
    assert check_script(FORK) == ""


def test_a_signal_may_stop_and_ask():
    """In the middle of whatever the main thread does."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    came = []

    def tell(*args):
        came.append(stats()["open"])
        process().stop()

    before = signal.signal(signal.SIGUSR1, tell)
    done, served = threading.Event(), 0

    def send():
        while not done.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            time.sleep(0.0005)

    try:
        join = PLACE.start(send)
        while served < 300 or not came:
            serve(stream_of(["a", "b"], Line()))
            stats()
            served += 1
        done.set()
        join()
    finally:
        done.set()
        signal.signal(signal.SIGUSR1, before)
    assert sum(t["streams"] for t in stats()["ended"].values()) == served


def test_a_server_that_has_stopped_does_not_end_the_next_ones_streams():
    """Test suites start one server after another, and some programs have two."""

    def app(environ, start_response):
        return SSEResponse(range(3), end="reconnect")(environ, start_response)

    def fetch(server):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/") as response:
            return response.read()

    def start():
        server = make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        return server, thread

    def stop(server, thread):
        server.shutdown()
        thread.join()
        server.server_close()

    body = b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"
    one, other = start(), start()
    assert fetch(one[0]) == fetch(other[0]) == body
    stop(*one)
    assert fetch(other[0]) == body
    stop(*other)
    third = start()
    assert fetch(third[0]) == body
    stop(*third)


def test_a_server_that_takes_anothers_place_is_asked_for_again():
    """Under the same name and port; the old one has stopped for ever."""
    record = Process()
    stopped, alive = (lambda: AT_ONCE), (lambda: None)

    class Stream:
        def shut_down(self, since, until):
            """It is not looked at here."""

    streams = [Stream(), Stream()]
    old = record.opened(streams[0], None, "server", lambda: stopped)
    new = record.opened(streams[1], None, "server", lambda: alive)
    assert record.until(old) == AT_ONCE
    assert record.until(new) is None


def test_a_stream_that_nobody_closes_is_counted():
    """A middleware like ``yield from app(…)`` does not pass close() on."""
    before = stats()["ended"].get("finished", {}).get("streams", 0)
    called = []
    stream = stream_of(["a"])
    stream.on_close(lambda: called.append(stream.reason))
    assert list(stream)
    assert called == ["finished"]
    assert stats()["ended"]["finished"]["streams"] == before + 1
    stream.close()
    assert called == ["finished"]
    assert stats()["ended"]["finished"]["streams"] == before + 1


def test_a_broken_handler_does_not_break_a_warning(monkeypatch, capsys):
    """It goes to stderr then."""
    log = logging.getLogger("syncstream.test")
    monkeypatch.setattr(log, "filters", [lambda record: 1 / 0])
    Process().warn_once(log, "take note")
    assert "take note" in capsys.readouterr().err


def test_what_is_remembered_is_found_once(own_record):
    """Each of a few; a cache that clients could fill begins anew."""
    found = []

    def remembered(key):
        return own_record.memo(key, lambda: found.append(key) or key)

    assert [remembered(key) for key in "abab"] == ["a", "b", "a", "b"]
    assert found == ["a", "b"]
    for key in range(1000):
        remembered(key)
    assert remembered("a") == "a"
    assert found.count("a") == 2


def test_the_exit_is_registered_once(own_record, monkeypatch):
    """However many callbacks and streams there are: each would be kept for ever."""
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    for _ in range(3):
        own_record.at_exit(lambda: None)
    assert len(registered) == 1
