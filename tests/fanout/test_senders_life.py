"""Senders: what they hold, over threads, forks, signals and under gevent."""

import contextlib
import gc
import sys
import threading
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from syncstream.fanout import sender as sender_module
from syncstream.fanout.sender import open_sender
from tests.fanout.sending import (
    EBADF,
    NAMES,
    NO_FD,
    OPENERS,
    aio,
    contexts,
    linux,
    socket_pairs,
    to_all,
    waiting,
)
from tests.support.descriptors import open_files
from tests.support.pairs import check_script
from tests.support.waits import TIMEOUT

pytestmark = pytest.mark.usefixtures("no_variable")


# What is held.


@linux
@pytest.mark.parametrize("name", NAMES)
def test_no_descriptor_is_left(name):
    """Open, use, close: twice as well; also where nobody closes it."""
    OPENERS[name]().close()
    files, memory = open_files(), Counter(contexts())

    def assert_nothing_is_left():
        assert (open_files() - files, Counter(contexts()) - memory) == ({}, {})

    for _ in range(50):
        sender = OPENERS[name]()
        sender.send(to_all([NO_FD] * 40, b"data"))
        sender.close()
        sender.close()
    assert_nothing_is_left()
    sender = OPENERS[name]()
    del sender
    assert_nothing_is_left()


@linux
def test_memory_is_stable(sender, send):
    """100,000 sends of different bytes leave nothing, without a garbage collection."""
    with socket_pairs(50) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        bad = [*fds, NO_FD]

        def fans(count):
            for n in range(count):
                data = b"%d" % n * 500
                assert send(sender, bad, data) == [(NO_FD, EBADF)]
                if not n % 20:
                    for _, far in pairs:
                        waiting(far)

        fans(100)
        gc.collect()
        gc.disable()
        try:
            tracemalloc.start()
            fans(2_200)  # as many tuples as the interpreter keeps for the next ones
            size, pages = allocated_here(), [mapped()]
            for _ in range(2):
                fans(1_000)
                pages.append(mapped())
            grown = allocated_here() - size
            assert grown < 20_000  # the smallest object for each call has 24 bytes
            # A thread of other tests may begin, or need an arena: but not each time.
            assert min(b - a for a, b in pairwise(pages)) < 128  # of 4 KiB
        finally:
            tracemalloc.stop()
            gc.enable()


def allocated_here():
    """Return the bytes that the senders and these tests hold; threads have more."""
    files = (sender_module.__file__, __file__)
    filters = [tracemalloc.Filter(True, file) for file in files]
    snapshot = tracemalloc.take_snapshot().filter_traces(filters)
    return sum(trace.size for trace in snapshot.traces)


def mapped():
    return int(Path("/proc/self/statm").read_text().split()[0])


@aio
def test_a_closed_one_says_so(send):
    """It does not send by a context that is another's now."""
    sender = open_sender("aio")
    sender.close()
    with pytest.raises(ValueError, match="the sender is closed"):
        send(sender, [0] * 8, b"data")


# Threads, processes.


@aio
def test_another_thread_may_go_on():
    """Opened in a thread that has ended, it works in another one."""
    with socket_pairs(10) as pairs:
        fds, opened = [near.fileno() for near, _ in pairs], []

        def run():
            opened.append(open_sender("aio"))
            opened.append(opened[0].send(to_all(fds, b"a")))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(TIMEOUT)
        assert opened[1:] == [[]]
        with contextlib.closing(opened[0]) as sender:
            assert sender.send(to_all(fds, b"b")) == []
            assert {waiting(far) for _, far in pairs} == {b"ab"}


FORK = """
import os, socket, sys, threading, warnings
from syncstream.fanout.sender import open_sender

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads and fork
name, how = sys.argv[1:]
open_one = open_sender if name == "chosen" else lambda: open_sender(name)
pairs = [socket.socketpair() for _ in range(40)]
for near, far in pairs:
    near.setblocking(False)
    far.settimeout(10)
fds = [near.fileno() for near, _ in pairs]

def to_all(fds, data):
    return [(fd, data) for fd in fds]

def send(sender, data):
    assert sender.send(to_all(fds, data)) == []
    assert {far.recv(9) for _, far in pairs} == {data}

def contexts():
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "[aio]" in line]

def child(sender):
    before = contexts()
    send(sender, b"old")
    sender.close()
    sender = open_one()
    send(sender, b"new")
    sender.close()
    assert len(contexts()) <= len(before)

def forked(sender):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            child(sender)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

if how == "same":
    sender = open_one()
    send(sender, b"before")
    for _ in range(3):
        forked(sender)
        send(sender, b"after")
else:
    senders, is_over, opened = [], threading.Event(), threading.Event()
    others = [socket.socketpair() for _ in range(40)]
    other_fds = [near.fileno() for near, _ in others]
    for pair in others:
        for each in pair:
            each.setblocking(False)
    def run():
        senders.append(open_one())
        count = 0
        while not is_over.is_set():
            assert senders[0].send(to_all(other_fds, b"%d," % count)) == []
            if count:
                opened.set()
            for _, far in others:
                assert far.recv(99) == b"%d," % count
            count += 1
        senders.append(count)
    thread = threading.Thread(target=run)
    thread.start()
    assert opened.wait(10)
    for _ in range(20):
        forked(senders[0])
    is_over.set()
    thread.join(10)
    assert senders[1] > 1
    sender = senders[0]
sender.close()
assert contexts() == []
for pair in [*pairs, *(others if how == "thread" else [])]:
    for each in pair:
        each.close()
print("right")
"""


@linux
@pytest.mark.parametrize("how", ["same", "thread"])
@pytest.mark.parametrize("name", NAMES)
def test_forks(name, how):
    """Parent and child are both right, the child by os.write or its own context.

    Forked by the thread that sends, and by another one in the middle of sends.
    """
    assert check_script(FORK, name, how) == "right\n"


GEVENT = """
import sys
name = sys.argv[1]
if sys.argv[2] == "before":
    from gevent import monkey
    monkey.patch_all()
from syncstream.fanout.sender import open_sender
from gevent import monkey
monkey.patch_all()
import gevent, os, socket, _socket
assert not monkey.is_object_patched("os", "write")
def to_all(fds, data):
    return [(fd, data) for fd in fds]
pairs = [_socket.socketpair() for _ in range(40)]
for near, far in pairs:
    near.setblocking(False)
fds = [near.fileno() for near, _ in pairs]
turns = []
def other():
    turns.append("other")

def use():
    sender = open_sender(None if name == "chosen" else name)
    for n in range(50):
        assert sender.send(to_all([*fds, 10**6], b"%d" % n)) == [(10**6, -9)]
        assert {far.recv(9) for _, far in pairs} == {b"%d" % n}
    turns.append("used")
    return sender

gevent.spawn(other)  # in the main thread: a send never lets another greenlet run
sender = use()
assert turns == ["used"], turns
gevent.sleep(0)
assert turns == ["used", "other"], turns
gevent.spawn(sender.send, to_all(fds, b"x")).get()  # another greenlet, no other thread
sender.close()
for _, far in pairs:
    assert far.recv(9) == b"x"

start = monkey.get_original("_thread", "start_new_thread")  # a native thread
lock = monkey.get_original("_thread", "allocate_lock")()
lock.acquire()
failed = []
def run():
    try:
        use().close()
    except BaseException as error:
        failed.append(error)
    lock.release()
start(run, ())
assert lock.acquire(True, 20)
assert failed == [], failed
for pair in pairs:
    for each in pair:
        each.close()
print("right")
"""


@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_under_gevent(name, patched):
    """Native in a patched process, in the hub's thread and in one of its own."""
    pytest.importorskip("gevent")
    assert check_script(GEVENT, name, patched) == "right\n"


# Convoys.


@contextlib.contextmanager
def computing():
    """Run a thread that never gives the GIL up by itself."""
    is_over = threading.Event()

    def run():
        while not is_over.is_set():
            sum(range(2_000))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(TIMEOUT)


def has_gil():
    return getattr(sys, "_is_gil_enabled", lambda: True)()


@aio
@pytest.mark.skipif(not has_gil(), reason="without a GIL there is no convoy")
def test_no_convoy(send):
    """Beside a thread that computes the GIL is given up once a batch, not 250 times."""
    with contextlib.closing(open_sender("aio")) as sender, socket_pairs(250) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        times = []
        with computing():
            for _ in range(20):
                began = time.monotonic()
                assert send(sender, fds, b"data") == []
                times.append(time.monotonic() - began)
                assert {waiting(far) for _, far in pairs} == {b"data"}
        # By os.write it is 5 ms for each that the computing thread gets between.
        assert min(times) < 0.25


# SIGPIPE.

SIGPIPE = """
import os, signal, socket, sys, threading
from syncstream.fanout.loop import fanout
from syncstream.runtime.journal import journal

os.environ["SYNCSTREAM_SENDER"] = sys.argv[1]
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
loop = fanout()
pairs = [socket.socketpair() for _ in range(20)]
for near, far in pairs:
    near.setblocking(False)
    far.close()
done, found, blocked = threading.Event(), [], {}

def send():
    pairs_of = [(near.fileno(), b"data") for near, _ in pairs]
    found.append(loop.sender.name)
    found.append({result for _, result in loop.sender.send(pairs_of)})
    found.append({result for _, result in loop.sender.send(pairs_of[:1])})
    done.set()

loop.call(send)
assert done.wait(10)
assert found == [sys.argv[1], {-32}, {-32}], found

def look(name, then=None):
    blocked[name] = signal.SIGPIPE in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    looked.release()

looked = threading.Semaphore(0)
lanes = loop.lanes()
loop.call(lambda: look("loop"))
for name in ("ends", "reads", "users", "asks", "logs"):  # begun by the loop
    loop.call(lambda name=name: getattr(lanes, name).do(lambda: look(name)))
look("main")
for _ in range(7):
    assert looked.acquire(timeout=10)
assert blocked == {**dict.fromkeys(blocked, False), "loop": True}, blocked
for near, _ in pairs:
    near.close()
print("right")
"""


@linux
@pytest.mark.parametrize("name", ["write", pytest.param("aio", marks=aio)])
def test_sigpipe_kills_nobody(name):
    """With SIG_DFL a client that leaves is EPIPE for the loop, and blocks no other."""
    assert check_script(SIGPIPE, name) == "right\n"
