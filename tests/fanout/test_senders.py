"""Senders: the same promises for each, whatever the kernel, the peers and forks do."""

import contextlib
import ctypes
import errno
import gc
import os
import re
import resource
import select
import socket
import struct
import sys
import threading
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncstream.fanout import sender as sender_module
from syncstream.fanout.sender import open_sender
from tests.support.descriptors import open_files
from tests.support.pairs import check_script, leave, tcp_pair
from tests.support.programs import lack
from tests.support.waits import TIMEOUT

MANY = 1500
NO_FD = 1_000_000  # beyond every limit: never open
PYTHON = ctypes.PyDLL(None)  # before a test replaces it
EPIPE, EBADF = -errno.EPIPE, -errno.EBADF

OPENERS = {
    "write": lambda: open_sender("write"),
    "aio": lambda: open_sender("aio"),
    "chosen": lambda: open_sender(None),
}
CALLS = {  # io_setup, io_destroy, io_getevents, io_submit
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
    "riscv64": (0, 1, 4, 2),
}

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's")


def forbidden():
    """Return why the kernel has no AIO for us, by its own word; "" if it has."""
    calls = CALLS.get(os.uname().machine)
    if sys.platform != "linux" or sys.maxsize < 1 << 32 or calls is None:
        return "AIO is 64-bit Linux's, on x86_64, aarch64 and riscv64"
    libc = ctypes.CDLL(None, use_errno=True)
    context = ctypes.c_ulong(0)
    if libc.syscall(ctypes.c_long(calls[0]), 8, ctypes.byref(context)) < 0:
        return f"io_setup: {os.strerror(ctypes.get_errno())}"
    libc.syscall(ctypes.c_long(calls[1]), context)
    return ""


# Not a failure in CI: no package brings it. But a skip only where the kernel says so.
FORBIDDEN = forbidden()
aio = pytest.mark.skipif(bool(FORBIDDEN), reason=FORBIDDEN)
NAMES = [pytest.param(n, marks=aio) if n == "aio" else n for n in OPENERS]


def to_all(fds, data):
    """Pair each descriptor with the same bytes."""
    return [(fd, data) for fd in fds]


WAYS = {
    "pairs": lambda sender, fds, data: sender.send(to_all(fds, data)),
    "to all": lambda sender, fds, data: sender.send_to_all(fds, data),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def send(request):
    """Each way to send many descriptors the same bytes."""
    return request.param


def contexts():
    """Return the process's AIO contexts, by their memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "[aio]" in line]


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    """The environment of the test run forces nothing."""
    monkeypatch.delenv("SYNCSTREAM_SENDER", raising=False)


@pytest.fixture(params=NAMES)
def sender(request):
    """Each sender, in the test's thread."""
    sender = OPENERS[request.param]()
    with contextlib.closing(sender):
        yield sender


@pytest.fixture
def room():
    """Descriptors for `MANY` pairs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MANY + 200
    if 0 <= hard < wanted:
        lack(f"ulimit -Hn is {hard}, this needs {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def socket_pairs(count, size=None):
    """Give non-blocking pairs, near ends with a send buffer of so many bytes."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(count):
            near, far = (stack.enter_context(s) for s in socket.socketpair())
            near.setblocking(False)
            far.setblocking(False)
            if size is not None:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
            pairs.append((near, far))
        yield pairs


def waiting(far):
    """Return all the bytes that wait at a peer."""
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := far.recv(1 << 20):
            parts.append(part)
    return b"".join(parts)


def fill(near):
    """Fill a send buffer to the last byte; return how many went in."""
    total = 0
    for size in (65536, 1024, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                total += near.send(b"." * size)
    return total


# What is sent.


def test_all_bytes_in_order_to_many(sender, room, send):
    """1,500 descriptors, more than a batch has: each gets each send whole, in order."""
    sent = [b"event %d;" % n for n in range(5)]
    with socket_pairs(MANY) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        for data in sent:
            assert send(sender, fds, data) == []
        assert {waiting(far) for _, far in pairs} == {b"".join(sent)}


@pytest.mark.parametrize("kind", [list, tuple, dict.fromkeys, iter, set])
def test_any_iterable_will_do(sender, kind):
    """A list, a dictionary's keys, an iterator: of pairs."""
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        pairs_of = kind(to_all([*fds, NO_FD], b"a"))
        assert sorted(sender.send(pairs_of)) == [(NO_FD, EBADF)]
        assert {waiting(far) for _, far in pairs} == {b"a"}


def test_nothing_to_send(sender, send):
    """No descriptors, or no bytes: nothing happens, but that bad ones are told."""
    with socket_pairs(20) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        assert sender.send([]) == []
        assert send(sender, fds, b"") == []
        assert send(sender, [*fds, NO_FD], b"") == [(NO_FD, EBADF)]
        assert {waiting(far) for _, far in pairs} == {b""}


def test_each_its_own(sender, room):
    """Channels of one user each: bytes of their own, of all sizes, in one send."""
    with socket_pairs(700) as pairs:
        for turn in range(3):
            sent = [b"%d/%d;" % (turn, n) * (n % 50) for n in range(len(pairs))]
            fds = [near.fileno() for near, _ in pairs]
            several = list(zip(fds, sent, strict=True))
            several.insert(300, (NO_FD, b"lost"))
            assert sender.send(several) == [(NO_FD, EBADF)]
            assert [waiting(far) for _, far in pairs] == sent


def test_each_its_own_in_part(sender):
    """Each is told of its own: some are full, some take a part, some are gone."""
    with socket_pairs(60, size=10_000) as pairs:
        for near, _ in pairs[::3]:
            fill(near)
        for n, (_, far) in enumerate(pairs):
            if n % 6:  # every other of the full ones has room again
                waiting(far)
        sent = [os.urandom(200 + 1_000 * n) for n in range(len(pairs))]
        fds = [near.fileno() for near, _ in pairs]
        rest = dict(sender.send(zip(fds, sent, strict=True)))
        for n, (fd, (_, far)) in enumerate(zip(fds, pairs, strict=True)):
            taken = rest.get(fd, len(sent[n]))
            came = waiting(far)
            assert came[len(came) - taken :] == sent[n][:taken]
            if n % 6 == 0:
                assert taken == 0
            else:
                assert taken > 0
                assert len(came) == taken


def test_each_size_of_a_batch(sender, room, send):
    """Around AIO's 8 and its 256, none is left out or doubled."""
    sizes = (1, 2, 6, 7, 8, 9, 63, 64, 255, 256, 257, 262, 263, 264, 511, 513, 3, 1500)
    with socket_pairs(MANY) as pairs:
        for size in sizes:
            data = b"%d" % size
            some = pairs[-size:]
            fds = [near.fileno() for near, _ in some]
            assert send(sender, [*fds, NO_FD], data) == [(NO_FD, EBADF)]
            assert {waiting(far) for _, far in some} == {data}
        assert {waiting(far) for _, far in pairs} == {b""}


def test_a_descriptor_twice(sender, send):
    """It gets the bytes twice: nobody looks whether they are distinct."""
    with socket_pairs(1) as [(near, far)]:
        assert send(sender, [near.fileno()] * 40, b"ab") == []
        assert waiting(far) == b"ab" * 40


def test_large_data(sender, send):
    """1 MiB: what each took is told, and is its beginning; the rest can follow."""
    data = os.urandom(1 << 20)
    with socket_pairs(40, size=50_000) as pairs:
        fds = {near.fileno(): far for near, far in pairs}
        taken = dict(send(sender, fds, data))
        assert taken.keys() == fds.keys()
        for fd, far in fds.items():
            assert 0 < taken[fd] < len(data)
            assert waiting(far) == data[: taken[fd]]


def test_large_data_over_tcp(sender):
    """Some read meanwhile, and get all of it by repeated sends of what is left."""
    data = os.urandom(1 << 20)
    with tcp_pair() as (near, client):
        near.setblocking(False)
        came = []
        reader = threading.Thread(target=lambda: came.append(read_all(client)))
        reader.start()
        rest = data
        while rest:
            told = sender.send([(near.fileno(), rest)])
            [(_, taken)] = told or [(0, len(rest))]
            assert taken >= 0
            rest = rest[taken:]
            if rest:
                select.select([], [near], [], TIMEOUT)
        near.shutdown(socket.SHUT_WR)
        reader.join(TIMEOUT)
        assert came == [data]


def read_all(client):
    client.settimeout(TIMEOUT)
    return b"".join(iter(lambda: client.recv(65536), b""))


# Peers that do not take it.


def test_full_ones_are_told(sender, send):
    """A full buffer: 0 bytes; one with some room: as many as went in."""
    data = b"x" * 100_000
    with socket_pairs(40, size=20_000) as pairs:
        full = {near.fileno(): fill(near) for near, _ in pairs[::2]}
        rest = dict(send(sender, [near.fileno() for near, _ in pairs], data))
        for near, far in pairs:
            taken = rest[near.fileno()]
            before = full.get(near.fileno())
            if before is None:
                assert 0 < taken < len(data)
            else:
                assert taken == 0
            assert len(waiting(far)) == (before or 0) + taken


def test_closed_and_gone_ones_are_told(sender, send):
    """EBADF and EPIPE, ENOTSOCK or EBADF for what is no socket to send to."""
    with socket_pairs(40) as pairs:
        for _, far in pairs[::4]:
            far.close()
        fds = [near.fileno() for near, _ in pairs]
        gone = [(fd, EPIPE) for fd in fds[::4]]
        bad = [(-1, EBADF), (NO_FD, EBADF)]
        rest = send(sender, [-1, *fds, NO_FD], b"bytes")
        assert sorted(rest) == sorted(gone + bad)
        alive = [far for _, far in pairs if far.fileno() >= 0]
        assert [waiting(far) for far in alive] == [b"bytes"] * 30


PLACES = [(0,), (39,), (0, 39), (7, 8, 9), range(20), range(1, 40, 2), range(40)]


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_closed_descriptor_stops_nobody_else(sender, places, send):
    """Wherever it is in a batch, the others get theirs, once."""
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        for place in places:
            pairs[place][0].close()
        for data in (b"one", b"two"):
            assert sorted(send(sender, fds, data)) == [
                (fds[place], EBADF) for place in places
            ]
            for n, (_, far) in enumerate(pairs):
                assert waiting(far) == (b"" if n in places else data)


@pytest.mark.parametrize("how", ["RST", "FIN"])
def test_reset_peers(sender, how, send):
    """A reset is told at once, then EPIPE; a plain end once its reset has come back."""
    with tcp_pair() as (near, client):
        near.setblocking(False)
        fds = [near.fileno()] * 40  # so many that it is AIO
        leave(client, how)
        poll = select.poll()
        poll.register(near, select.POLLRDHUP)
        assert poll.poll(TIMEOUT * 1000)
        if how == "FIN":
            send(sender, [near.fileno()], b"bytes")
            poll.register(near, 0)
            assert poll.poll(TIMEOUT * 1000)  # POLLERR, POLLHUP
        results = [result for _, result in send(sender, fds, b"bytes")]
        first = -errno.ECONNRESET if how == "RST" else EPIPE
        assert results == [first] + [EPIPE] * 39


STATES = st.sampled_from(["ready", "full", "some", "gone", "bad"])
# bytes; how; whether all are read after it
STEPS = st.tuples(st.integers(1, 40_000), st.sampled_from(list(WAYS)), st.booleans())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(states=st.lists(STATES, max_size=40), steps=st.lists(STEPS, max_size=5))
def test_like_a_model(name, states, steps):
    """Random mixtures: each is told of as many bytes as came, or of its own error."""
    with contextlib.ExitStack() as stack:
        sender = stack.enter_context(contextlib.closing(OPENERS[name]()))
        pairs = stack.enter_context(socket_pairs(len(states), size=10_000))
        fds, streams = [], []
        for state, (near, far) in zip(states, pairs, strict=True):
            held = fill(near) if state == "full" else 0
            if state == "some":
                held = near.send(b"." * 3_000)
            if state == "gone":
                far.close()
            fds.append(NO_FD + len(fds) if state == "bad" else near.fileno())
            streams.append(b"." * held)
        is_read = False
        for size, way, reads in steps:
            data = os.urandom(size)
            rest = WAYS[way](sender, fds, data)
            told = dict(rest)
            assert len(told) == len(rest)
            assert set(told) <= set(fds)
            for n, state in enumerate(states):
                result = told.get(fds[n], size)
                if state in ("gone", "bad"):
                    assert result == (EPIPE if state == "gone" else EBADF)
                    continue
                assert 0 <= result <= size
                if state == "full" and not is_read:
                    assert result == 0
                if not streams[n]:
                    assert result == size or result > 1_000
                streams[n] += data[:result]
            if reads:
                is_read = True
                for n, (_, far) in enumerate(pairs):
                    if far.fileno() >= 0:
                        assert waiting(far) == streams[n]
                        streams[n] = b""
        for n, (_, far) in enumerate(pairs):
            if far.fileno() >= 0:
                assert waiting(far) == streams[n]


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


# Which one.


@aio
def test_aio_is_chosen():
    """Where it works; it has os.write for the few."""
    with contextlib.closing(open_sender()) as sender:
        assert sender.name == "aio"


@pytest.mark.parametrize("name", ["write", pytest.param("aio", marks=aio)])
def test_the_variable_forces_one(monkeypatch, name):
    """SYNCSTREAM_SENDER, unless the caller names one."""
    monkeypatch.setenv("SYNCSTREAM_SENDER", name)
    for sender in (open_sender(), open_sender(None)):
        assert type(sender) is type(open_sender(name))
        assert sender.name == name
        sender.close()
    assert open_sender("write").name == "write"


def test_wrong_names(monkeypatch):
    """They are refused, and the two are named."""
    for name in ("epoll", "uring", "pydll", "", "AIO"):
        text = f"name must be write or aio, got {name!r}"
        with pytest.raises(ValueError, match=re.escape(text)):
            open_sender(name)
    monkeypatch.setenv("SYNCSTREAM_SENDER", "fast")
    text = "SYNCSTREAM_SENDER must be write or aio, got 'fast'"
    with pytest.raises(ValueError, match=text):
        open_sender()
    monkeypatch.setenv("SYNCSTREAM_SENDER", "")  # as if it were not there
    open_sender().close()


def a_machine(name):
    return lambda: os.uname_result(("Linux", "host", "6.1", "#1", name))


MACHINES = {
    "i686": (os, "uname", a_machine("i686")),
    "armv7l": (os, "uname", a_machine("armv7l")),
    "ppc64le": (os, "uname", a_machine("ppc64le")),
    "s390x": (os, "uname", a_machine("s390x")),
    "32 bits": (struct, "calcsize", lambda code: {"P": 4}[code]),
    "big endian": (sys, "byteorder", "big"),
    "darwin": (sys, "platform", "darwin"),
}


@pytest.mark.parametrize("where", MACHINES)
def test_other_machines(monkeypatch, where):
    """No system call is made by a number that is another call's there."""

    def library(name, **options):
        raise AssertionError("a system call is near")

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(ctypes, "PyDLL", library)
    monkeypatch.setattr(*MACHINES[where])
    with pytest.raises(OSError, match=r"the system calls of .* are not known") as found:
        open_sender("aio")
    assert found.value.errno == errno.ENOSYS
    assert open_sender().name == "write"


FORBID = """
import ctypes, struct

def forbid(call, error):
    # seccomp(2), as containers do: this system call fails, all others are let through.
    # Without an error it kills.
    LOAD, IS, RETURN, ALLOW = 0x20, 0x15, 6, 0x7FFF0000
    FAIL = 0x50000 | error if error else 0x80000000  # SECCOMP_RET_KILL_PROCESS
    steps = [(LOAD, 0, 0, 0), (IS, 0, 1, call)]
    steps += [(RETURN, 0, 0, FAIL), (RETURN, 0, 0, ALLOW)]
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HP", len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.c_char_p(filters)) == 0  # PR_SET_SECCOMP
"""

FORBIDDING = """
import logging, os, socket, sys
from syncstream.fanout.sender import open_sender

call, error = int(sys.argv[1]), int(sys.argv[2])
forbid(call, error)
before = sorted(os.listdir("/proc/self/fd"))
try:
    open_sender("aio")
except OSError as found:
    assert found.errno == error, found
    print(found.strerror)
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s")
sender = open_sender()
assert sorted(os.listdir("/proc/self/fd")) == before
near, far = socket.socketpair()
with near, far:
    near.setblocking(False)
    assert sender.send([(near.fileno(), b"a")] * 20) == []
    assert far.recv(99) == b"a" * 20
from syncstream.runtime.journal import journal

journal().flush()
print(sender.name)
"""


CALLED = CALLS.get(os.uname().machine, (206, 207, 208, 209))
NEEDED = {"io_setup": CALLED[0], "io_getevents": CALLED[2], "io_submit": CALLED[3]}
ERRORS = {name: getattr(errno, name) for name in ("EPERM", "ENOSYS", "EAGAIN")}


@aio
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("call", NEEDED)
def test_a_kernel_that_forbids_it(call, error):
    """Asked for, it is an OSError that says so; else os.write, silently."""
    out = check_script(FORBID + FORBIDDING, str(NEEDED[call]), str(error))
    assert out.splitlines() == [f"{call}: {os.strerror(error)}", "DEBUG", "write"]


KILLING = """
import logging, signal, socket, sys, threading
from syncstream.fanout.loop import fanout
from syncstream.fanout.sender import open_sender

forbid(int(sys.argv[1]), 0)
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
calls = []
signal.signal(signal.SIGCHLD, lambda *_: calls.append("SIGCHLD"))
loop = fanout()
started = threading.Event()
loop.call(started.set)
assert started.wait(10)
from syncstream.runtime.journal import journal

journal().flush()
print(loop.sender.name)
try:
    open_sender("aio")
except PermissionError:
    pass
else:
    print("opened")
assert calls == []
"""


@aio
@pytest.mark.parametrize("number", CALLED)
def test_a_filter_that_kills(number):
    """seccomp may kill for a call that it does not know: a child tries it first."""
    out = check_script(FORBID + KILLING, str(number))
    text = f"system call {number} is forbidden here (seccomp), on pain of death"
    assert out == f"sending by os.write: [Errno 1] {text}\nwrite\n"


@aio
def test_a_filter_that_lets_it_pass():
    """As container runtimes do, which forbid io_uring: it is used."""
    script = """
from syncstream.fanout.sender import open_sender
forbid(425, 0)
print(open_sender().name)
"""
    assert check_script(FORBID + script) == "aio\n"


# Kernels that queue, as gVisor does: by a libc that makes the calls later.


class Iocb(ctypes.Structure):
    """struct iocb, of linux/aio_abi.h."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
    )


class Event(ctypes.Structure):
    """struct io_event."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("iocb", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class Queueing:
    """A kernel that accepts writes, and makes them last first, when it is asked.

    Attributes:
        waits: What io_getevents(2) does next where it may wait: an errno, an exception
            to raise, or how many it answers; without one, all.
        made: Contexts less those that were destroyed.
    """

    def __init__(self):
        self.queue, self.waits, self.made = [], [], 0

    def library(self, name, use_errno=False):
        return {"syscall": Syscall(self), "write": PYTHON["write"]}

    def call(self, number, *args):
        name = ("setup", "destroy", "getevents", "submit")[CALLED.index(number.value)]
        return getattr(self, name)(*args)

    def setup(self, count, context):
        self.made += 1
        return 0

    def destroy(self, context):
        self.made -= 1
        while self.queue:
            self.write()
        return 0

    def submit(self, context, count, pointers):
        if isinstance(pointers, ctypes.Array):
            pointers = ctypes.byref(pointers)
        pointers = ctypes.cast(pointers, ctypes.POINTER(ctypes.POINTER(Iocb)))
        for n in range(count.value):
            iocb = pointers[n].contents
            try:
                os.fstat(ctypes.c_int32(iocb.fd).value)
            except OSError as error:
                ctypes.set_errno(error.errno)
                return n or -1
            self.queue.append((iocb.data, iocb.fd, iocb.buffer, iocb.size))
        return count.value

    def getevents(self, context, least, most, events, time):
        if not isinstance(events, ctypes.Array):
            events = ctypes.cast(events, ctypes.POINTER(Event))
        else:
            events = ctypes.cast(ctypes.byref(events), ctypes.POINTER(Event))
        if time is not None:  # it may not wait, and nothing is there yet
            return 0
        step = self.waits.pop(0) if self.waits else "all"
        if isinstance(step, BaseException):
            raise step
        if step == errno.EINTR:
            ctypes.set_errno(step)
            return -1
        count = least.value if step == "all" else min(step, least.value)
        for n in range(count):
            events[n] = self.write()
        return count

    def write(self):
        slot, fd, buffer, size = self.queue.pop()
        try:
            result = os.write(fd, ctypes.string_at(buffer, size))
        except OSError as error:
            result = -error.errno
        return Event(slot, 0, result, 0)


class Syscall:
    """The C function syscall(2)."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, *args):
        return self.kernel.call(*args)


@pytest.fixture
def queueing(monkeypatch):
    """Give such a kernel, and a sender for it."""
    kernel = Queueing()
    if Path("/proc/self/status").read_text().count("Seccomp:\t0") != 1:
        pytest.skip("a real filter would be asked for the real calls")
    monkeypatch.setattr(ctypes, "CDLL", kernel.library)
    monkeypatch.setattr(ctypes, "PyDLL", kernel.library)
    with contextlib.closing(open_sender("aio")) as sender:
        yield kernel, sender
    assert kernel.made == 0


SHORT = ([], [errno.EINTR], [1] * 40, [0, errno.EINTR, 3, errno.EINTR, errno.EINTR, 30])


@aio
@pytest.mark.parametrize("waits", SHORT, ids=str)
def test_answers_that_come_late(queueing, waits, send):
    """In another order, a few at a time, over signals: each is told of its own."""
    kernel, sender = queueing
    with socket_pairs(40, size=10_000) as pairs:
        for near, _ in pairs[::4]:
            fill(near)
        pairs[5][1].close()
        fds = [near.fileno() for near, _ in pairs]
        kernel.waits[:] = waits
        rest = sender.send([(NO_FD, b"x"), *((fd, b"%d" % fd) for fd in fds)])
        told = {NO_FD: EBADF, fds[5]: EPIPE, **dict.fromkeys(fds[::4], 0)}
        assert sorted(rest) == sorted(told.items())
        assert kernel.queue == []
        assert kernel.waits == []
        for fd, (_, far) in zip(fds, pairs, strict=True):
            if fd not in told:
                assert waiting(far) == b"%d" % fd
        kernel.waits[:] = waits
        assert send(sender, fds[1:4], b"few") == []
        assert [waiting(far) for _, far in pairs[1:4]] == [b"few"] * 3


@aio
def test_bytes_are_kept_until_they_are_answered(queueing):
    """Also beyond an exception that ends a send: the next one waits for the old."""
    kernel, sender = queueing
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        kernel.waits[:] = [5, KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            sender.send((fd, b"old %06d" % n) for n, fd in enumerate(fds))
        assert len(kernel.queue) == 35
        gc.collect()
        noise = [b"bad %06d" % n for n in range(10_000)]  # where others were
        assert sender.send((fd, b",new %06d" % n) for n, fd in enumerate(fds)) == []
        assert len(noise) == 10_000
        assert [waiting(far) for _, far in pairs] == [
            b"old %06d,new %06d" % (n, n) for n in range(40)
        ]


@aio
def test_the_same_bytes_are_kept_until_they_are_answered(queueing):
    """Sent to all, and nobody else has them."""
    kernel, sender = queueing
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        kernel.waits[:] = [5, KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            sender.send_to_all(fds, b"%06d" % len(fds) * 50)
        gc.collect()
        noise = [b"bad %06d" % n * 30 for n in range(10_000)]
        assert sender.send_to_all(fds, b"new") == []
        assert len(noise) == 10_000
        assert {waiting(far) for _, far in pairs} == {b"000040" * 50 + b"new"}


@aio
def test_a_kernel_that_answers_no_more(queueing, send):
    """It is an OSError, and nobody is told that they took it."""
    kernel, sender = queueing
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        kernel.getevents, getevents = lambda *_: -1, kernel.getevents
        ctypes.set_errno(errno.EINVAL)
        with pytest.raises(OSError, match="io_getevents: Invalid argument"):
            send(sender, fds, b"lost")
        kernel.getevents = getevents
        assert send(sender, fds, b",data") == []
        assert {waiting(far) for _, far in pairs} == {b"lost,data"}


SIGNALS = """
import os, signal, socket, sys
from syncstream.fanout.sender import open_sender

sender = open_sender("aio")
pairs = [socket.socketpair() for _ in range(200)]
for pair in pairs:
    for each in pair:
        each.setblocking(False)
fds = [near.fileno() for near, _ in pairs]

class Interrupted(Exception): pass

def interrupt(*_):
    raise Interrupted

signal.signal(signal.SIGALRM, interrupt)
times = 0
for n in range(3000):
    if times == 250:  # enough: a busy machine has a minute for all
        break
    data = b"%d," % n
    is_whole = False
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00002 + n % 97 / 97 * 0.0016)
        try:
            rest = sender.send([(fd, data) for fd in fds])
            is_whole = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        times += 1
    except BaseException:
        raise
    for _, far in pairs:
        try:
            came = far.recv(99)
        except BlockingIOError:
            came = b""
        assert came == data or (came == b"" and not is_whole), (n, came)
    if is_whole:
        assert rest == [], rest
assert times > 50, times
sender.close()
for pair in pairs:
    for each in pair:
        each.close()
print("right")
"""


@aio
def test_an_exception_in_the_middle():
    """A signal handler's ends a batch anywhere: the next one is as if it had not."""
    assert check_script(SIGNALS) == "right\n"


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
