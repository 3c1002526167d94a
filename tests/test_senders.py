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
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs import TIMEOUT, check_script, leave, tcp_pair
from programs import lack
from syncstream.fanout import sender as senders
from syncstream.fanout.sender import AdaptiveSender, PydllSender, open_sender
from syncstream.runtime.journal import journal

MANY = 1500
NO_FD = 1_000_000  # beyond every limit: never open
EPIPE, EBADF = -errno.EPIPE, -errno.EBADF

OPENERS = {
    "write": lambda: open_sender("write"),
    "pydll": lambda: open_sender("pydll"),
    "uring": lambda: open_sender("uring"),
    "auto": lambda: AdaptiveSender(None, PydllSender()),
    "chosen": lambda: open_sender(None),
}

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's")


def forbidden():
    """Return why the kernel has no ring for us, by its own word; "" if it has."""
    if sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"):
        return "io_uring is Linux's, on x86_64 and aarch64"
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    fd = libc.syscall(ctypes.c_long(425), 8, params)
    if fd < 0:
        return f"io_uring_setup: {os.strerror(ctypes.get_errno())}"
    os.close(fd)
    features = int.from_bytes(params.raw[20:24], sys.byteorder)
    return "" if features & 1 << 9 else "the kernel is older than Linux 5.12"


# Not a failure in CI: no package brings it. But a skip only where the kernel says so.
FORBIDDEN = forbidden()
ring = pytest.mark.skipif(bool(FORBIDDEN), reason=FORBIDDEN)
NAMES = [pytest.param(n, marks=ring) if n == "uring" else n for n in OPENERS]


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


def open_fds():
    return sorted(os.readlink(f"/proc/self/fd/{n}") for n in fd_numbers())


def fd_numbers():
    numbers = os.listdir("/proc/self/fd")
    return [n for n in numbers if os.path.lexists(f"/proc/self/fd/{n}")]


# What is sent.


def test_all_bytes_in_order_to_many(sender, room):
    """1,500 descriptors, more than a batch has: each gets each send whole, in order."""
    sent = [b"event %d;" % n for n in range(5)]
    with socket_pairs(MANY) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        for data in sent:
            assert sender.send(fds, data) == []
        assert {waiting(far) for _, far in pairs} == {b"".join(sent)}


@pytest.mark.parametrize("kind", [list, tuple, dict.fromkeys, iter, set])
def test_any_iterable_will_do(sender, kind):
    """A list, a dictionary's keys, an iterator."""
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        assert sorted(sender.send(kind([*fds, NO_FD]), b"a")) == [(NO_FD, EBADF)]
        assert {waiting(far) for _, far in pairs} == {b"a"}


def test_nothing_to_send(sender):
    """No descriptors, or no bytes: nothing happens, not even to those that are bad."""
    with socket_pairs(1) as [(near, far)]:
        assert sender.send([], b"data") == []
        assert sender.send([near.fileno(), NO_FD] * 40, b"") == []
        assert waiting(far) == b""


def test_each_size_of_a_batch(sender, room):
    """Around the ring's 1,024, and around its corner, none is left out or doubled."""
    sizes = (1, 2, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 3, 700, 700, 1500, 1)
    with socket_pairs(MANY) as pairs:
        for size in sizes:
            data = b"%d" % size
            some = pairs[-size:]
            fds = [near.fileno() for near, _ in some]
            assert sender.send([*fds, NO_FD], data) == [(NO_FD, EBADF)]
            assert {waiting(far) for _, far in some} == {data}
        assert {waiting(far) for _, far in pairs} == {b""}


def test_a_descriptor_twice(sender):
    """It gets the bytes twice: nobody looks whether they are distinct."""
    with socket_pairs(1) as [(near, far)]:
        assert sender.send([near.fileno()] * 40, b"ab") == []
        assert waiting(far) == b"ab" * 40


def test_large_data(sender):
    """1 MiB: what each took is told, and is its beginning; the rest can follow."""
    data = os.urandom(1 << 20)
    with socket_pairs(40, size=50_000) as pairs:
        fds = {near.fileno(): far for near, far in pairs}
        taken = dict(sender.send(fds, data))
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
            [(_, taken)] = sender.send([near.fileno()], rest) or [(0, len(rest))]
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


def test_full_ones_are_told(sender):
    """A full buffer: 0 bytes; one with some room: as many as went in."""
    data = b"x" * 100_000
    with socket_pairs(40, size=20_000) as pairs:
        full = {near.fileno(): fill(near) for near, _ in pairs[::2]}
        rest = dict(sender.send([near.fileno() for near, _ in pairs], data))
        for near, far in pairs:
            taken = rest[near.fileno()]
            before = full.get(near.fileno())
            if before is None:
                assert 0 < taken < len(data)
            else:
                assert taken == 0
            assert len(waiting(far)) == (before or 0) + taken


def test_closed_and_gone_ones_are_told(sender):
    """EBADF and EPIPE, ENOTSOCK or EBADF for what is no socket to send to."""
    with socket_pairs(40) as pairs:
        for _, far in pairs[::4]:
            far.close()
        fds = [near.fileno() for near, _ in pairs]
        gone = [(fd, EPIPE) for fd in fds[::4]]
        bad = [(-1, EBADF), (NO_FD, EBADF)]
        rest = sender.send([-1, *fds, NO_FD], b"bytes")
        assert sorted(rest) == sorted(gone + bad)
        alive = [far for _, far in pairs if far.fileno() >= 0]
        assert [waiting(far) for far in alive] == [b"bytes"] * 30


@pytest.mark.parametrize("how", ["RST", "FIN"])
def test_reset_peers(sender, how):
    """A reset is told at once, then EPIPE; a plain end once its reset has come back."""
    with tcp_pair() as (near, client):
        near.setblocking(False)
        fds = [near.fileno()] * 40  # so many that a ring is used
        leave(client, how)
        poll = select.poll()
        poll.register(near, select.POLLRDHUP)
        assert poll.poll(TIMEOUT * 1000)
        if how == "FIN":
            sender.send([near.fileno()], b"bytes")
            poll.register(near, 0)
            assert poll.poll(TIMEOUT * 1000)  # POLLERR, POLLHUP
        results = [result for _, result in sender.send(fds, b"bytes")]
        first = -errno.ECONNRESET if how == "RST" else EPIPE
        assert results == [first] + [EPIPE] * 39


STATES = st.sampled_from(["ready", "full", "some", "gone", "bad"])
STEPS = st.tuples(st.integers(1, 40_000), st.booleans())  # bytes; all read after it


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
        for size, reads in steps:
            data = os.urandom(size)
            rest = sender.send(fds, data)
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
    before = open_fds()
    for _ in range(50):
        sender = OPENERS[name]()
        sender.send([NO_FD] * 40, b"data")
        sender.close()
        sender.close()
    assert open_fds() == before
    sender = OPENERS[name]()
    del sender
    assert open_fds() == before


@linux
def test_memory_is_stable(sender):
    """100,000 sends of different bytes leave nothing, without a garbage collection."""
    with socket_pairs(50) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        bad = [*fds, NO_FD]

        def fans(count):
            for n in range(count):
                data = b"%d" % n * 500
                assert sender.send(bad, data) == [(NO_FD, EBADF)]
                if not n % 20:
                    for _, far in pairs:
                        waiting(far)

        fans(100)
        gc.collect()
        gc.disable()
        try:
            tracemalloc.start()
            fans(40)
            size, pages = tracemalloc.get_traced_memory()[0], mapped()
            tracemalloc.reset_peak()
            fans(2_000)
            grown = tracemalloc.get_traced_memory()[0] - size
            assert grown < 20_000
            assert mapped() - pages < 256  # of 4 KiB
        finally:
            tracemalloc.stop()
            gc.enable()


def mapped():
    return int(Path("/proc/self/statm").read_text().split()[0])


@ring
def test_a_closed_ring_says_so():
    """It does not send to whoever has its descriptor now."""
    sender = open_sender("uring")
    sender.close()
    with pytest.raises(ValueError, match="the sender is closed"):
        sender.send([0], b"data")


# Threads, processes.


@ring
def test_a_ring_is_for_one_thread():
    """Opened in a thread, it works there, and elsewhere it says what is wrong."""
    with socket_pairs(1) as [(near, far)]:
        opened, ends, found = threading.Event(), threading.Event(), []

        def run():
            found.append(open_sender("uring"))
            found.append(found[0].send([near.fileno()], b"a"))
            opened.set()
            assert ends.wait(TIMEOUT)
            found.append(found[0].send([near.fileno()], b"b"))
            found[0].close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert opened.wait(TIMEOUT)
            with pytest.raises(RuntimeError, match="is for the thread that has opened"):
                found[0].send([near.fileno()], b"never")
        finally:
            ends.set()
            thread.join(TIMEOUT)
        assert found[1:] == [[], []]
        assert waiting(far) == b"ab"


FORK = """
import os, socket, sys, threading, warnings
from syncstream.fanout.sender import AdaptiveSender, PydllSender, open_sender

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads and fork
name, how = sys.argv[1:]
openers = {"auto": lambda: AdaptiveSender(None, PydllSender()), "chosen": open_sender}
open_one = openers.get(name) or (lambda: open_sender(name))
pairs = [socket.socketpair() for _ in range(40)]
for near, far in pairs:
    near.setblocking(False)
    far.settimeout(10)
fds = [near.fileno() for near, _ in pairs]

def send(sender, data):
    assert sender.send(fds, data) == []
    assert {far.recv(9) for _, far in pairs} == {data}

def rings():
    links = [os.path.join("/proc/self/fd", n) for n in os.listdir("/proc/self/fd")]
    found = [os.readlink(link) for link in links if os.path.lexists(link)]
    with open("/proc/self/maps") as maps:
        return [f for f in [*found, *maps] if "io_uring" in f]

def child(sender):
    assert rings() == [], rings()
    if name == "uring":
        try:
            sender.send(fds, b"never")
        except RuntimeError as error:
            assert "open another one after a fork" in str(error)
        else:
            raise AssertionError("sent by the parent's ring")
    else:
        send(sender, b"old")
    sender.close()
    sender = open_one()
    send(sender, b"new")
    sender.close()
    assert rings() == []

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
            assert senders[0].send(other_fds, b"%d," % count) == []
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
assert rings() == []
for pair in [*pairs, *(others if how == "thread" else [])]:
    for each in pair:
        each.close()
print("right")
"""


@linux
@pytest.mark.parametrize("how", ["same", "thread"])
@pytest.mark.parametrize("name", NAMES)
def test_forks(name, how):
    """Parent and child are both right; the child has nothing of the parent's ring.

    Forked by the thread that sends, and by another one in the middle of sends.
    """
    assert check_script(FORK, name, how) == "right\n"


GEVENT = """
import sys
name = sys.argv[1]
if sys.argv[2] == "before":
    from gevent import monkey
    monkey.patch_all()
from syncstream.fanout.sender import AdaptiveSender, PydllSender, open_sender
from gevent import monkey
monkey.patch_all()
import gevent, os, socket, _socket
assert not monkey.is_object_patched("os", "write")
openers = {"auto": lambda: AdaptiveSender(None, PydllSender()), "chosen": open_sender}
pairs = [_socket.socketpair() for _ in range(40)]
for near, far in pairs:
    near.setblocking(False)
fds = [near.fileno() for near, _ in pairs]
turns = []
def other():
    turns.append("other")

def use():
    sender = (openers.get(name) or (lambda: open_sender(name)))()
    for n in range(50):
        assert sender.send([*fds, 10**6], b"%d" % n) == [(10**6, -9)]
        assert {far.recv(9) for _, far in pairs} == {b"%d" % n}
    turns.append("used")
    return sender

gevent.spawn(other)  # in the main thread: a send never lets another greenlet run
sender = use()
assert turns == ["used"], turns
gevent.sleep(0)
assert turns == ["used", "other"], turns
gevent.spawn(lambda: sender.send(fds, b"x")).get()  # another greenlet, no other thread
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


@ring
@linux
def test_the_ring_is_chosen():
    """Where it works, for many; os.write serves the few."""
    with contextlib.closing(open_sender()) as sender:
        assert sender.name == "uring"


@pytest.mark.parametrize("name", ["write", "pydll", pytest.param("uring", marks=ring)])
def test_the_variable_forces_one(monkeypatch, name):
    """SYNCSTREAM_SENDER, unless the caller names one."""
    monkeypatch.setenv("SYNCSTREAM_SENDER", name)
    for sender in (open_sender(), open_sender(None)):
        assert type(sender) is type(open_sender(name))
        assert sender.name == name
        sender.close()
    assert open_sender("write").name == "write"


def test_wrong_names(monkeypatch):
    """They are refused, and the three are named."""
    for name in ("epoll", "auto", "", "URING"):
        text = f"name must be write, pydll or uring, got {name!r}"
        with pytest.raises(ValueError, match=re.escape(text)):
            open_sender(name)
    monkeypatch.setenv("SYNCSTREAM_SENDER", "fast")
    text = "SYNCSTREAM_SENDER must be write, pydll or uring, got 'fast'"
    with pytest.raises(ValueError, match=text):
        open_sender()
    monkeypatch.setenv("SYNCSTREAM_SENDER", "")  # as if it were not there
    open_sender().close()


FORBID = """
import ctypes, struct

def forbid(call, error, submit=None):
    # seccomp(2), as containers do: this system call fails, all others are let through;
    # with `submit`, io_uring_enter for just so many sends. Without an error it kills.
    LOAD, IS, RETURN, ALLOW = 0x20, 0x15, 6, 0x7FFF0000
    FAIL = 0x50000 | error if error else 0x80000000  # SECCOMP_RET_KILL_PROCESS
    steps = [(LOAD, 0, 0, 0), (IS, 0, 3, call), (LOAD, 0, 0, 24)]
    steps += [(IS, 0, 1, submit)] if submit else [(LOAD, 0, 0, 0)]
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
    open_sender("uring")
except OSError as found:
    assert found.errno == error, found
    print(found.strerror)
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s")
sender = open_sender()
assert sorted(os.listdir("/proc/self/fd")) == before
near, far = socket.socketpair()
with near, far:
    assert sender.send([near.fileno()] * 20, b"a") == []
    assert far.recv(99) == b"a" * 20
from syncstream.runtime.journal import journal

journal().flush()
print(sender.name)
"""


@ring
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
@pytest.mark.parametrize("number", [425, 426], ids=["setup", "enter"])
def test_a_kernel_that_forbids_it(number, error):
    """Asked for, it is an OSError that says so; else there is another, silently."""
    call = {425: "io_uring_setup", 426: "io_uring_enter"}[number]
    text = f"io_uring is not to be had here: {call}: {os.strerror(error)}"
    out = check_script(FORBID + FORBIDDING, str(number), str(error))
    assert out.splitlines() == [text, "DEBUG", "auto"]


KILLING = """
import logging, signal, socket, sys
from subprocess import Popen
from syncstream.fanout.loop import fanout

forbid(425, 0)
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
loop = fanout()
started = socket.socketpair()
loop.call(started[0].close)
assert started[1].recv(1) == b""
from syncstream.runtime.journal import journal

journal().flush()
print(loop.sender.name)
started[1].close()
child = Popen([sys.executable, "-c", "from syncstream.fanout import sender;"
    "sender.UringSender()"])
assert child.wait() == -signal.SIGSYS
"""


@ring
def test_a_filter_that_kills():
    """seccomp may kill for a system call that it does not know: nothing is tried."""
    out = check_script(FORBID + KILLING)
    text = "[Errno 1] system calls are filtered here (seccomp)"
    assert out == f"sending without a ring: {text}\nauto\n"


SHORT = """
import errno, socket
from syncstream.fanout.sender import open_sender

sender = open_sender("uring")
forbid(426, errno.EAGAIN, submit=13)
pairs = [socket.socketpair() for _ in range(1100)]
fds = [near.fileno() for near, _ in pairs]
for pair in pairs:
    for each in pair:
        each.setblocking(False)
for n in range(300):
    count = (13, 1, 20, 13, 13, 700, 1024, 1037)[n % 8]
    full = range(1024, 1037) if count == 1037 else range(13) if count == 13 else []
    rest = sender.send(fds[:count], b"%d," % n)
    assert rest == [(fds[n], 0) for n in full], (n, rest)
    for index, (_, far) in enumerate(pairs):
        if index < count and index not in full:
            assert far.recv(99) == b"%d," % n
assert sender.is_usable
for near, far in pairs:
    near.close()
    assert far.recv(99) == b""  # nothing came late
    far.close()
sender.close()
print("right")
"""


@ring
def test_a_kernel_short_of_memory(room):
    """EAGAIN for a batch: all are told as full, sent nothing later, and it goes on."""
    assert check_script(FORBID + SHORT) == "right\n"


@ring
def test_what_was_not_answered():
    """What the kernel has not seen is full; what it took and kept silent on, lost."""
    with contextlib.closing(open_sender("uring")) as sender:
        sender._unsubmitted = 2
        rest = list(sender._unanswered([50, 51, 52, 53, 54], [1]))
    assert rest == [(50, -errno.EIO), (52, -errno.EIO), (53, 0), (54, 0)]


@ring
@pytest.mark.parametrize("flags", [(1 << 31, 1 << 8, 0), (1 << 31, 0), (0,)])
def test_older_kernels_flags(monkeypatch, flags):
    """A flag that the kernel does not know is left out: the ring works without."""
    monkeypatch.setattr(senders, "_SETUPS", flags)
    with contextlib.closing(open_sender("uring")) as sender, socket_pairs(30) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        assert sender.send([*fds, NO_FD], b"data") == [(NO_FD, EBADF)]
        assert {waiting(far) for _, far in pairs} == {b"data"}


@ring
def test_no_descriptor_for_a_ring():
    """Too many open files: an OSError for who asked for it, and nothing is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used, fillers, found = max(int(n) for n in fd_numbers()), [], []
    before = open_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(4):  # for none of its descriptors, for one, and so on
            with pytest.raises(OSError, match="io_uring is not to be had") as raised:
                open_sender("uring")
            found.append(raised.value.errno)
            os.close(fillers.pop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    assert found == [errno.EMFILE] * 4
    assert open_fds() == before


def ring_numbers():
    return {
        int(n) for n in fd_numbers() if "io_uring" in os.readlink(f"/proc/self/fd/{n}")
    }


@ring
@pytest.mark.parametrize("name", ["uring", "chosen"])
def test_a_ring_that_fails(name, caplog):
    """Its descriptor is taken away: nobody is asked twice, and nobody forgotten."""
    before = ring_numbers()
    sender = OPENERS[name]()
    with contextlib.closing(sender), socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        null = os.open("/dev/null", os.O_RDWR)
        for number in ring_numbers() - before:
            os.dup2(null, number, inheritable=False)
        os.close(null)
        assert sorted(sender.send(fds, b"first")) == [(fd, 0) for fd in sorted(fds)]
        if name == "uring":
            with pytest.raises(OSError, match="io_uring has failed: io_uring_enter"):
                sender.send(fds, b"second")
        else:
            assert sender.send(fds, b"second") == []
            assert sender.name == "auto"
            assert journal().flush()
            [text] = caplog.messages
            assert text.startswith("sending without io_uring: io_uring_enter: ")
        came = b"" if name == "uring" else b"second"
        assert {waiting(far) for _, far in pairs} == {came}


SIGNALS = """
import os, signal, socket, sys
from syncstream.fanout.sender import open_sender

sender = open_sender("uring")
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
            rest = sender.send(fds, data)
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


@ring
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


@pytest.mark.skipif(not has_gil(), reason="without a GIL there is no convoy")
def test_a_convoy_is_noticed_and_left():
    """Beside a thread that computes the GIL is held; without it no longer."""
    sender = AdaptiveSender(None, PydllSender())
    with socket_pairs(200) as pairs:
        fds = [near.fileno() for near, _ in pairs]

        def until(is_so):
            deadline = time.monotonic() + TIMEOUT
            while not is_so():
                assert time.monotonic() < deadline
                assert sender.send(fds, b"data") == []
                assert {waiting(far) for _, far in pairs} == {b"data"}

        with computing():
            until(lambda: sender._held_until > 0)  # it may be over when we look
        until(lambda: time.monotonic() >= sender._held_until)


def test_a_convoy_that_lasts_is_looked_for_less_often():
    """Each look in vain doubles the time to the next, up to half a minute."""
    sender = AdaptiveSender(None, PydllSender())
    now, holds = 1000.0, []
    for _ in range(8):
        sender._hold_on(now)
        holds.append(sender._held_until - now)
        now = sender._held_until + 0.1
    assert holds == [1, 2, 4, 8, 16, 30, 30, 30]
    now += 60
    sender._hold_on(now)
    assert sender._held_until == now + 1
