"""Kernels that queue, as gVisor does: by a libc that makes the calls later."""

import contextlib
import ctypes
import errno
import gc
import os
from pathlib import Path

import pytest

from syncstream.fanout.sender import open_sender
from tests.fanout.sending import (
    CALLED,
    EBADF,
    EPIPE,
    NO_FD,
    aio,
    fill,
    socket_pairs,
    waiting,
)
from tests.support.pairs import check_script

pytestmark = pytest.mark.usefixtures("no_variable")


PYTHON = ctypes.PyDLL(None)  # before a test replaces it


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
