"""The watch without descriptors, under garbage collection, and what it costs."""

import gc
import threading
import time

import pytest

from syncstream import ClientDisconnected, current_stream, sleep
from syncstream.process import stats
from syncstream.runtime.journal import journal
from tests.runtime.places import PLACES
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
from tests.support.waits import TIMEOUT

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
    assert journal().flush()
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
    assert journal().flush()
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
