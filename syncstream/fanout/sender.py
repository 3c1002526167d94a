"""Senders: one bytes object to many sockets, with the least CPU time.

The kernel's send(2) is nearly all that a fan-out costs: 4-5 µs a subscriber on
loopback. Who sends decides what is added, and how it bears a second thread that
computes (benchmarks/senders.py has the figures):

- `WriteSender`, "write": ``os.write`` in a tight loop. It gives the GIL up for each
  descriptor, and a thread that computes may keep it for 5 ms each time, so that one
  fan to 1,000 takes seconds (the *convoy*).
- `PydllSender`, "pydll": send(2) by ctypes, which keeps the GIL: no convoy.
- `UringSender`, "uring": Linux's io_uring(7) by ctypes. One system call, for which
  the GIL is given up once, sends to up to 1,024 descriptors, a third cheaper.
- `AdaptiveSender`, what `open_sender` chooses: a ring for many descriptors, where the
  kernel has one that works; else ``os.write``, and "pydll" while there is a convoy.

No sender ever waits for a peer, nor raises for a peer's sake. They are for
non-blocking sockets, and each for one thread. Nothing here is patched by gevent.
"""

from __future__ import annotations

import _socket
import _thread
import ctypes
import errno
import functools
import logging
import math
import mmap
import os
import platform
import socket
import struct
import sys
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing, suppress
from itertools import islice
from typing import Any, Protocol

from ..runtime.clock import time
from ..runtime.journal import journal
from ..runtime.sockets import native

__all__ = [
    "AdaptiveSender",
    "PydllSender",
    "Sender",
    "UringSender",
    "VARIABLE",
    "WriteSender",
    "open_sender",
]

log = logging.getLogger("syncstream.senders")

Rest = list[tuple[int, int]]

VARIABLE = "SYNCSTREAM_SENDER"
"""The environment variable that forces a sender: write, pydll or uring."""

# MSG_NOSIGNAL: macOS has none; there Python ignores SIGPIPE, as everywhere.
_FLAGS: int = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
# What one call of the kernel takes at most (MAX_RW_COUNT); the rest is a partial send.
_MAX_SIZE = 0x7FFFF000
# They mean "took nothing now", and no more.
_LATER = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)


class Sender(Protocol):
    """Sends; open one by `open_sender`, in the thread that will use it.

    Attributes:
        name: "write", "pydll", "uring" or "auto".
    """

    name: str

    def send(self, fds: Iterable[int], data: bytes) -> Rest:
        """Send the same bytes to each descriptor, without waiting for any.

        An exception, such as a signal handler's in the main thread, may end it halfway:
        then nobody knows who has got them.

        Args:
            fds: Of non-blocking stream sockets, in any order.
            data: Nobody is asked anything if it is empty.

        Returns:
            The descriptors that did not take all of it, in any order, each with how
            many bytes it took (0: it is full), or with a negative errno, such as
            ``-errno.EPIPE`` where the peer has gone or ``-errno.EBADF``.
        """

    def close(self) -> None:
        """Release what the kernel holds for it, and send no more.

        A second time does nothing. From any thread, but not during a `send`.
        """


def open_sender(name: str | None = None) -> Sender:
    """Open a sender, in the thread that will use it.

    Args:
        name: "write", "pydll" or "uring"; ``None`` for what the environment variable
            SYNCSTREAM_SENDER says, and without that for what is best here. That is
            no ring where a seccomp filter is in force, as in most containers: ask
            for "uring" if that lets it pass.

    Raises:
        ValueError: There is no such sender.
        OSError: It is not to be had here: the kernel is too old, or forbids it.
    """
    source = "name"
    if name is None:
        name, source = os.environ.get(VARIABLE) or None, VARIABLE
    if name is None:
        return _best()
    if name not in _SENDERS:
        raise ValueError(f"{source} must be write, pydll or uring, got {name!r}")
    return _SENDERS[name]()


def _best() -> Sender:
    ring = pydll = None
    with suppress(OSError):  # not on this system
        pydll = PydllSender()
    try:
        if _is_filtered():
            # It need not fail: a filter may kill the process (SIGSYS) for a system call
            # that it does not know, and nothing tells which one does.
            raise OSError(errno.EPERM, "system calls are filtered here (seccomp)")
        ring = UringSender()
    except OSError as error:
        journal().later(log, logging.DEBUG, "sending without a ring: %s", error)
    return AdaptiveSender(ring, pydll)


def _is_filtered() -> bool:
    """Tell whether a seccomp(2) filter sees what this thread asks of the kernel."""
    try:
        with open("/proc/thread-self/status", "rb") as status:
            modes = [line.split()[1] for line in status if line.startswith(b"Seccomp:")]
    except OSError:  # no Linux, or no /proc: the worst may be true
        return True
    return modes not in ([], [b"0"])  # proc_pid_status(5); none: a kernel without it


class WriteSender:
    """os.write in a tight loop.

    It takes no flags: the sockets must be non-blocking, and SIGPIPE must be ignored, as
    Python does from its start.
    """

    name = "write"

    def send(self, fds: Iterable[int], data: bytes) -> Rest:
        rest: Rest = []
        if not data:
            return rest
        size, write = len(data), os.write
        each, fd = iter(fds), -1
        while True:
            # Outside of the loop: to enter it anew, at the same place, is what an
            # error costs, and nothing else costs anything.
            try:
                for fd in each:
                    taken = write(fd, data)
                    if taken != size:
                        rest.append((fd, taken))
            except OSError as error:
                rest.append((fd, _outcome(-(error.errno or errno.EIO))))
            else:
                return rest

    def close(self) -> None:
        """Nothing is held."""


class PydllSender:
    """send(2) by ctypes.PyDLL, which does not give the GIL up.

    Python takes it away between two sends all the same, when another thread has asked
    for 5 ms: a fair share for both.

    Raises:
        OSError: There is no send(2) here that does it.
    """

    name = "pydll"

    def __init__(self) -> None:
        try:
            # Without argtypes: they cost 0.4 µs a call (measured), because each
            # argument is converted; these are converted once for all descriptors.
            self._send = ctypes.PyDLL(None, use_errno=True)["send"]
        except (TypeError, AttributeError, OSError) as error:  # Windows
            raise OSError(errno.ENOSYS, "no send(2) for ctypes here") from error
        self._send.restype = ctypes.c_ssize_t
        _test(self)

    def send(self, fds: Iterable[int], data: bytes) -> Rest:
        rest: Rest = []
        if not data:
            return rest
        size, send = len(data), self._send
        pointer, length = ctypes.c_char_p(data), ctypes.c_size_t(size)
        flags = ctypes.c_int(_FLAGS)
        for fd in fds:
            taken = send(fd, pointer, length, flags)
            if taken != size:
                rest.append((fd, taken if taken >= 0 else _outcome(-_errno())))
        return rest

    def close(self) -> None:
        """Nothing is held."""


_errno = ctypes.get_errno


def _outcome(result: int) -> int:
    """Return what a caller is told for bytes that were taken, or a negative errno."""
    return 0 if -result in _LATER else result


# io_uring(7), as linux/io_uring.h and io_uring_setup(2) define it.

_SYSTEMS = ("linux x86_64", "linux aarch64")  # whose system calls have these numbers
_SETUP, _ENTER = 425, 426
_GETEVENTS = 1
_QUEUES, _SUBMISSIONS = 0, 0x10000000  # what mmap maps, as its offset
_OP_SEND = 26
_SUBMISSION = struct.Struct("=BBHiQQIIQ24x")  # struct io_uring_sqe: 64 bytes
_COMPLETION = 16  # struct io_uring_cqe: u64 user_data, s32 result, u32 flags
_PARAMS = struct.Struct("=II12xI16x10I10I")  # struct io_uring_params: 120 bytes
_WORD = struct.Struct("=I")
_WRAP = 0xFFFFFFFF
# IORING_FEAT_NATIVE_WORKERS, of Linux 5.12: from there on a ring no longer counts
# towards RLIMIT_MEMLOCK, and all that is relied on here has long been there.
_FEATURE = 1 << 9
# SINGLE_ISSUER | DEFER_TASKRUN (Linux 6.1), COOP_TASKRUN (5.19), nothing.
_SETUPS = (1 << 12 | 1 << 13, 1 << 8, 0)
_ENTRIES = 1024


class UringSender:
    """Linux's io_uring: one system call sends to up to 1,024 descriptors.

    A batch is given to the kernel whole, and `send` returns when each of its sends has
    been answered: as they may not wait (MSG_DONTWAIT), they all have when the system
    call returns, so that the kernel never holds on to the bytes. The ring has room for
    twice as many answers: none is ever lost.

    It belongs to the thread that opened it, with which the kernel saves work
    (IORING_SETUP_SINGLE_ISSUER). A forked child would share its memory and could spoil
    the parent's batches: so it releases its copy at once.

    Attributes:
        failure: What the kernel said when it failed the ring; ``None`` so far.

    Raises:
        OSError: No Linux of 5.12 or later on x86_64 or aarch64, or io_uring is
            forbidden (containers' seccomp profiles, kernel.io_uring_disabled).
    """

    name = "uring"

    def __init__(self) -> None:
        self._release: weakref.finalize[..., Any] | None = None
        self._maps: list[mmap.mmap] = []
        self.failure: OSError | None = None
        self._pid = os.getpid()
        self._thread = native(_thread, "get_ident")()
        try:
            self._open()
            _test(self)
        except OSError as error:
            self.close()
            cause = self.failure or error
            text = f"io_uring is not to be had here: {cause.strerror}"
            raise OSError(cause.errno, text) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        system = f"{sys.platform} {platform.machine()}"
        if system not in _SYSTEMS:
            raise OSError(errno.ENOSYS, f"{system} has none that is known")
        self._syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
        self._syscall.restype = ctypes.c_long
        self._enter_number = ctypes.c_long(_ENTER)
        self._fd, params = self._set_up()
        self._ring = ctypes.c_long(self._fd)
        release = weakref.finalize(self, _release, self._fd, self._maps)
        release.atexit = False  # a daemon thread may be sending until the end
        _releases[self._fd] = self._release = release
        _release_after_fork()
        entries, answers, features, *offsets = _PARAMS.unpack(params)
        if not features & _FEATURE:
            raise OSError(errno.ENOSYS, "this kernel is older than Linux 5.12")
        self._head, self._tail, _, _, _, _, self._order = offsets[:7]
        self._answer_head, self._answer_tail, _, _, _, self._answers = offsets[10:16]
        self._entries, self._answer_count = entries, answers
        size = max(self._order + entries * 4, self._answers + answers * _COMPLETION)
        self._is_idle = False
        self._queues = self._map(_QUEUES, size)
        self._submissions = self._map(_SUBMISSIONS, entries * _SUBMISSION.size)
        # A batch is made here, by columns, and copied as a whole: no view of the
        # ring's own memory is ever held, which could keep it from being unmapped.
        self._batch = memoryview(
            bytearray().join(
                _SUBMISSION.pack(_OP_SEND, 0, 0, -1, 0, 0, 0, _FLAGS, slot)
                for slot in range(entries)
            )
        )
        self._fds = self._batch.cast("i")[1::16]
        self._addresses = self._batch.cast("Q")[2::8]
        self._sizes = self._batch.cast("I")[6::16]
        # The queue's next place moves on, a batch begins at slot 0: any `entries`
        # numbers in a row of these are the slots in the queue's order.
        self._slots = memoryview(array("I", range(entries)) * 2).cast("B")

    def _map(self, offset: int, length: int) -> mmap.mmap:
        # Shared, which is the default of mmap.
        self._maps.append(mmap.mmap(self._fd, length, offset=offset))
        return self._maps[-1]

    def _set_up(self) -> tuple[int, bytearray]:
        for flags in _SETUPS:
            params = bytearray(_PARAMS.size)
            _WORD.pack_into(params, 8, flags)
            buffer = (ctypes.c_char * len(params)).from_buffer(params)
            number = ctypes.c_long(_SETUP)
            fd: int = self._syscall(number, _ENTRIES, ctypes.byref(buffer))
            if fd >= 0:
                return fd, params
            if _errno() != errno.EINVAL:
                break
        raise OSError(_errno(), f"io_uring_setup: {os.strerror(_errno())}")

    @property
    def is_usable(self) -> bool:
        """Open, in the process that opened it, and the kernel has not failed it."""
        is_good = self._is_open and self.failure is None
        return is_good and self._pid == os.getpid()

    @property
    def _is_open(self) -> bool:
        return self._release is not None and self._release.alive

    def send(self, fds: Iterable[int], data: bytes) -> Rest:
        """Send the same bytes to each descriptor; see `Sender`.

        Raises:
            RuntimeError: This is not the process, or not the thread, that opened it.
            ValueError: It is closed.
            OSError: The kernel has failed the ring at an earlier send. Nothing has
                been sent. (That send has returned all that were not asked as full.)
        """
        self._check()
        rest: Rest = []
        if not data:
            return rest
        size = min(len(data), _MAX_SIZE)
        (address,) = struct.unpack("P", ctypes.c_char_p(data))
        each, filled = iter(fds), 0
        while batch := list(islice(each, self._entries)):
            if self.failure is not None:
                rest += [(fd, 0) for fd in batch]
                continue
            count = len(batch)
            if count > filled:  # once, but for an iterator that is shared
                self._addresses[:count] = memoryview(array("Q", [address]) * count)
                self._sizes[:count] = memoryview(array("I", [size]) * count)
                filled = count
            self._fds[:count] = memoryview(array("i", batch))
            answers = self._submit(count)
            results = memoryview(answers).cast("i")[2::4].tolist()
            if results.count(len(data)) == count:
                continue
            slots = memoryview(answers).cast("Q")[::2].tolist()
            rest += [
                (batch[slot], _outcome(result))
                for slot, result in zip(slots, results, strict=True)
                if result != len(data)
            ]
            if len(slots) < count:
                rest += self._unanswered(batch, slots)
        return rest

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(
                f"this io_uring sender is process {self._pid}'s, and this is process"
                f" {os.getpid()}: open another one after a fork"
            )
        if self._thread != native(_thread, "get_ident")():
            raise RuntimeError(
                "an io_uring sender is for the thread that has opened it, this is"
                " another one: open one in each thread"
            )
        if not self._is_open:
            raise ValueError("the sender is closed")
        if self.failure is not None:
            text = f"io_uring has failed: {self.failure.strerror}"
            raise OSError(self.failure.errno, text) from self.failure

    def _submit(self, count: int) -> bytes:
        """Give the first so many slots to the kernel; return its answers, in any order.

        They are fewer only if the ring, or the kernel's memory, fails.
        """
        queues = self._queues
        if not self._is_idle:
            # An exception, a signal handler's, has ended a batch halfway: go on from
            # the kernel's own place, and leave answers alone that nobody has read.
            (self._place,) = _WORD.unpack_from(queues, self._head)
            self._read()
        self._is_idle = False
        size = count * _SUBMISSION.size
        self._submissions[:size] = self._batch[:size]
        first = self._entries - self._place % self._entries
        order = self._slots[first * 4 : (first + self._entries) * 4]
        queues[self._order : self._order + len(order)] = order
        self._place = (self._place + count) & _WRAP
        _WORD.pack_into(queues, self._tail, self._place)
        self._unsubmitted, unanswered = count, count
        answers = b""
        try:
            while unanswered:
                taken = self._enter(self._unsubmitted, unanswered)
                self._unsubmitted -= taken
                read = self._read()
                if not taken and not read:
                    raise OSError(errno.EIO, "no progress")
                answers = answers + read if answers else read
                unanswered = count - len(answers) // _COMPLETION
        except OSError as error:
            # EAGAIN, EBUSY: out of memory for the moment, io_uring_enter(2).
            if error.errno not in (errno.EAGAIN, errno.EBUSY):
                self.failure = error
        else:
            self._is_idle = True
        return answers

    def _enter(self, submit: int, wait: int) -> int:
        while True:
            taken: int = self._syscall(
                self._enter_number, self._ring, submit, wait, _GETEVENTS, None, None
            )
            if taken >= 0:
                return taken
            if _errno() != errno.EINTR:
                raise OSError(_errno(), f"io_uring_enter: {os.strerror(_errno())}")

    def _read(self) -> bytes:
        """Take the answers that are there out of their queue."""
        queues = self._queues
        (head,) = _WORD.unpack_from(queues, self._answer_head)
        (tail,) = _WORD.unpack_from(queues, self._answer_tail)
        if head == tail:
            return b""
        first, last = head % self._answer_count, tail % self._answer_count
        start = self._answers + first * _COMPLETION
        end = self._answers + last * _COMPLETION
        if first < last:
            read = queues[start:end]
        else:  # around the corner
            corner = self._answers + self._answer_count * _COMPLETION
            read = queues[start:corner] + queues[self._answers : end]
        _WORD.pack_into(queues, self._answer_head, tail)
        return read

    def _unanswered(
        self, batch: list[int], slots: list[int]
    ) -> Iterator[tuple[int, int]]:
        """Tell apart what the kernel never saw from what it keeps silent about."""
        answered, seen = set(slots), len(batch) - self._unsubmitted
        for slot, fd in enumerate(batch):
            if slot not in answered:
                yield fd, 0 if slot >= seen else -errno.EIO

    def close(self) -> None:
        if self._release is not None:
            self._release()


# By descriptor. For the children: what a parent has open is theirs to release.
_releases: dict[int, weakref.finalize[..., Any]] = {}


def _release(fd: int, maps: list[mmap.mmap]) -> None:
    _releases.pop(fd, None)
    for each in maps:
        each.close()
    os.close(fd)


@functools.cache
def _release_after_fork() -> None:
    os.register_at_fork(after_in_child=_release_all)


def _release_all() -> None:
    for release in list(_releases.values()):
        release()


class AdaptiveSender:
    """What is cheapest, whatever else the process does.

    From `MANY` descriptors on the ring, if there is one. Else ``os.write``, and
    "pydll" while there is a convoy: that is when sends take much longer than they
    compute. To learn whether it is over, ``os.write`` is tried again after `HOLD`
    seconds, with few descriptors first; each time in vain doubles that.

    Args:
        ring: ``None`` for none. It is closed with this.
        pydll: ``None`` for none: then it is always ``os.write``.
    """

    MANY = 32  # measured: break-even is at 10 in bursts, at 60 with 20 fans a second
    HOLD, MAX_HOLD = 1.0, 30.0  # seconds
    RATIO = 3.0  # of the time that sends take, to the CPU time that they use
    LEAST = 0.002  # seconds; what is faster is no convoy, which costs 5 ms each time
    # Descriptors between two looks at the clock, powers of two. Each may cost 5 ms
    # before a convoy is known for one; to look after 8 adds 0.1 to 0.15 µs to a send.
    FEW, SLICE = 2, 8

    def __init__(self, ring: UringSender | None, pydll: PydllSender | None) -> None:
        self.name = "auto" if ring is None else "uring"
        self._ring = ring
        self._pydll = pydll
        self._write = WriteSender()
        self._slice = self.FEW
        self._hold = 0.0
        self._held_until = self._suspect_until = -math.inf

    def send(self, fds: Iterable[int], data: bytes) -> Rest:
        """Send the same bytes to each descriptor; see `Sender`."""
        if self._ring is not None:
            if not isinstance(fds, Sized):
                fds = list(fds)
            if len(fds) >= self.MANY:
                if self._ring.is_usable:
                    return self._ring.send(fds, data)
                self._drop_ring(self._ring)
        if self._pydll is None:
            return self._write.send(fds, data)
        rest: Rest = []
        each, now = iter(fds), time.monotonic()
        while now >= self._held_until:
            part = list(islice(each, self._slice))
            if not part:
                return rest
            # The thread's clock is a system call: it is read for a second after a send
            # that took long, and no others.
            cpu = time.thread_time() if now < self._suspect_until else None
            start = now
            rest += self._write.send(part, data)
            now = time.monotonic()
            if now - start >= self.LEAST:
                self._look_at(now, now - start, cpu)
            elif self._slice < self.SLICE:
                self._slice *= 2
        return rest + self._pydll.send(each, data)

    def _drop_ring(self, ring: UringSender) -> None:
        self._ring, self.name = None, "auto"
        ring.close()
        if ring.failure is not None:  # not after a fork, or a close
            text = "sending without io_uring: %s"
            journal().later(log, logging.WARNING, text, ring.failure.strerror)

    def _look_at(self, now: float, seconds: float, cpu: float | None) -> None:
        """Judge a send that took long; `cpu` is the thread's clock before it."""
        if cpu is None:
            self._suspect_until = now + self.HOLD
            self._slice = self.FEW
        elif seconds > self.RATIO * (time.thread_time() - cpu):
            self._hold_on(now)

    def _hold_on(self, now: float) -> None:
        was_in_vain = now - self._held_until < self._hold
        self._hold = min(self._hold * 2, self.MAX_HOLD) if was_in_vain else self.HOLD
        self._held_until = now + self._hold
        self._suspect_until = self._held_until + self._hold
        self._slice = self.FEW

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()


def _test(sender: Sender) -> None:
    """Raise `OSError` unless a sender does what it should, to a pair of sockets."""
    near, far = _socket.socketpair()  # gevent's sockets would wait in its hub
    with closing(near), closing(far):
        near.setblocking(False)
        far.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        fd, data = near.fileno(), bytes(range(256)) * 1024
        is_whole = not sender.send([fd], b"whole") and far.recv(8) == b"whole"
        taken = dict(sender.send([fd], data)).get(fd, 0)
        is_full = sender.send([fd], data) == [(fd, 0)]
        came = b""
        with suppress(BlockingIOError):
            while part := far.recv(len(data)):
                came += part
        is_partial = 0 < taken < len(data) and came == data[:taken]
        far.close()
        gone = {fd: -errno.EPIPE, -1: -errno.EBADF}
        is_gone = dict(sender.send([fd, -1], data)) == gone
    found = {"a": is_whole, "a partial": is_partial, "a full": is_full, "no": is_gone}
    for what, is_right in found.items():
        if not is_right:
            raise OSError(errno.EIO, f"a trial of {what} send went wrong")


_SENDERS: dict[str, Callable[[], Sender]] = {
    "write": WriteSender,
    "pydll": PydllSender,
    "uring": UringSender,
}
