"""Senders: bytes to many sockets, with the least CPU time.

The kernel's send(2) is nearly all that a fan-out costs: 4-5 µs a subscriber on
loopback. The sender decides what is added to that, and how long a busy thread can delay
it (benchmarks/senders.py has the figures):

- `WriteSender`, "write": ``os.write`` in a tight loop. It releases the GIL for each
  descriptor, and a busy thread may keep it for 5 ms each time, so that one event takes
  seconds to reach 1,000 clients (the *convoy*).
- `AioSender`, "aio": Linux's AIO, io_submit(2), by ctypes. One system call writes to up
  to 256 descriptors, a tenth cheaper. For a few descriptors io_submit(2) costs more
  than write(2), which is then called by ctypes. Both keep the GIL, for at most half a
  millisecond at a time; a larger batch releases it once: no convoy. Unlike io_uring, it
  is allowed by most container runtimes.

No sender ever waits for a peer, or raises because of one. Each needs sockets with
O_NONBLOCK, and a thread in which SIGPIPE is ignored (Python's default) or blocked:
neither write(2) nor AIO has a flag for that. gevent patches nothing here.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import logging
import os
import socket
import struct
import sys
import weakref
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing, suppress
from itertools import islice
from typing import Any, Protocol

from ..runtime.forks import process_key
from ..runtime.journal import journal
from ..runtime.sockets import native

__all__ = ["VARIABLE", "AioSender", "Sender", "WriteSender", "open_sender"]

log = logging.getLogger("syncstream.senders")

Pair = tuple[int, bytes]
Rest = list[tuple[int, int]]

VARIABLE = "SYNCSTREAM_SENDER"
"""The environment variable that forces a sender: write or aio."""

# These only mean that nothing was accepted now.
_LATER = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)


class Sender(Protocol):
    """Sends; open one by `open_sender`, in the thread that will use it.

    Attributes:
        name: "write" or "aio".
    """

    name: str

    def send_to_all(self, fds: Collection[int], data: bytes) -> Rest:
        """Send all descriptors the same bytes, as `send` does; this is cheaper.

        Args:
            fds: Descriptors as for `send`. They must not change meanwhile.
            data: The bytes.

        Returns:
            As `send`.
        """

    def send(self, pairs: Iterable[Pair]) -> Rest:
        """Send each descriptor its bytes, without waiting for any peer.

        An exception, such as a signal handler's in the main thread, may end it halfway;
        it is then unknown which peers got their bytes.

        Args:
            pairs: Descriptors of stream sockets with O_NONBLOCK, each with its bytes.
                Two pairs of one descriptor may be sent in either order.

        Returns:
            The descriptors that did not accept all of their bytes, in any order, each
            with the number that it accepted (0: it is full), or with a negative errno,
            such as ``-errno.EPIPE`` if the peer has gone, or ``-errno.EBADF``.
        """

    def close(self) -> None:
        """Release what the kernel holds for it; it cannot send any more.

        Closing it again does nothing. Any thread may call this, but not during a
        `send`.
        """


def open_sender(name: str | None = None) -> Sender:
    """Open a sender, in the thread that will use it.

    Args:
        name: "write" or "aio"; ``None`` for the value of the environment variable
            SYNCSTREAM_SENDER or, if it is not set, for "aio" where that works, and
            "write" elsewhere.

    Raises:
        ValueError: There is no such sender.
        OSError: It is not available: this is not Linux, or the kernel forbids it or
            has no context left (fs.aio-max-nr).
    """
    source = "name"
    if name is None:
        name, source = os.environ.get(VARIABLE) or None, VARIABLE
    if name is None:
        try:
            return AioSender()
        except OSError as error:
            journal().later(log, logging.DEBUG, "sending by os.write: %s", error)
            return WriteSender()
    if name not in _SENDERS:
        raise ValueError(f"{source} must be write or aio, got {name!r}")
    return _SENDERS[name]()


def _outcome(result: int) -> int:
    """Return a write's result as `Sender.send` returns it."""
    return 0 if -result in _LATER else result


class WriteSender:
    """os.write in a tight loop."""

    name = "write"

    def send_to_all(self, fds: Collection[int], data: bytes) -> Rest:
        rest: Rest = []
        each, fd, write, length = iter(fds), -1, os.write, len(data)
        while True:
            # Outside of the inner loop, so that only an error costs something: the loop
            # is entered again, and continues where it stopped.
            try:
                for fd in each:
                    taken = write(fd, data)
                    if taken != length:
                        rest.append((fd, taken))
            except OSError as error:
                rest.append((fd, _outcome(-(error.errno or errno.EIO))))
            else:
                return rest

    def send(self, pairs: Iterable[Pair]) -> Rest:
        rest: Rest = []
        each, fd, write = iter(pairs), -1, os.write
        while True:
            try:
                for fd, data in each:
                    taken = write(fd, data)
                    if taken != len(data):
                        rest.append((fd, taken))
            except OSError as error:
                rest.append((fd, _outcome(-(error.errno or errno.EIO))))
            else:
                return rest

    def close(self) -> None:
        """Do nothing: the kernel holds nothing for it."""


# Linux AIO: io_setup(2), io_submit(2), io_getevents(2), linux/aio_abi.h.

# io_setup, io_destroy, io_getevents, io_submit. Elsewhere these numbers are other
# calls: 1 is exit(2), and 206 setgroups32(2) for a 32-bit Python on x86_64.
_NUMBERS = {
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
    "riscv64": (0, 1, 4, 2),
}
_ENTRIES = 256  # as fast as 1,024, of which fs.aio-max-nr allows 63 contexts on a host
# For fewer, write(2) is cheaper: io_submit(2) takes some 10 µs to begin with,
# and write(2) by ctypes 1 µs more than os.write (8 sockets: 14.5 µs a send, 7.5 and 6).
_FEW = 32
_HELD = 128  # descriptors, at most, for which io_submit(2) keeps the GIL: 0.5 ms
_IOCB = struct.Struct("=QIIHhIQQqQII")  # struct iocb: 64 bytes
_PWRITE = 1  # IOCB_CMD_PWRITE, which is write(2) for a socket
_EVENT = 32  # bytes of struct io_event: u64 data, u64 iocb, s64 result, s64 result2
_CONTENT = bytes.__basicsize__ - 1  # the offset of the bytes in a bytes object
_CLONE_FILES = 0x400
_WALL = 0x40000000  # __WALL: wait for children that end without SIGCHLD, too
_NO_TIME = (ctypes.c_long * 2)(0, 0)  # struct timespec

_errno = ctypes.get_errno


class AioSender:
    """Linux AIO: one system call writes to up to 256 descriptors.

    `send` returns when each write has a result. For a socket with O_NONBLOCK Linux has
    it within io_submit(2); gVisor queues the writes, so the bytes are kept until the
    last result has come. For fewer than 32 descriptors write(2) is called instead.

    If io_submit(2) refuses a descriptor (it stops at a closed one), os.write is called
    for it, which tells why, and the submission continues after it. In a forked child,
    to which the context does not belong, os.write is called for all.

    Attributes:
        refusal: The last error of io_submit(2), ``None`` if there was none.

    Raises:
        OSError: This is not 64-bit little-endian Linux on x86_64, aarch64 or riscv64,
            or a trial failed: the kernel has no AIO, forbids it, or has no context
            left.
    """

    name = "aio"

    def __init__(self) -> None:
        self._numbers = _numbers()
        _check_filter(self._numbers)
        setup, _, getevents, submit = map(ctypes.c_long, self._numbers)
        self._setup, self._getevents, self._submit = setup, getevents, submit
        self._syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
        self._syscall.restype = ctypes.c_long
        # PyDLL keeps the GIL: for calls that do not wait, and take less time than it
        # may take to get a released GIL back (5 ms).
        self._quick_syscall = ctypes.PyDLL(None, use_errno=True)["syscall"]
        self._quick_syscall.restype = ctypes.c_long
        self._quick_write = ctypes.PyDLL(None)["write"]
        self._quick_write.restype = ctypes.c_ssize_t
        self._write = WriteSender()
        iocbs = bytearray().join(
            _IOCB.pack(slot, 0, 0, _PWRITE, 0, 0, 0, 0, 0, 0, 0, 0)
            for slot in range(_ENTRIES)
        )
        view = memoryview(iocbs)
        self._fds = view.cast("i")[5::16]
        self._addresses = view.cast("Q")[3::8]
        self._sizes = view.cast("Q")[4::8]
        start = ctypes.addressof((ctypes.c_char * len(iocbs)).from_buffer(iocbs))
        self._pointers = (ctypes.c_ulong * _ENTRIES)(
            *range(start, start + len(iocbs), _IOCB.size)
        )
        self._events = (ctypes.c_char * (_EVENT * _ENTRIES))()
        self._results = memoryview(self._events).cast("B").cast("q")[2::4]
        self._slots = memoryview(self._events).cast("B").cast("Q")[::4]
        self._kept: Sequence[bytes] = ()  # until each write has a result
        self.refusal: OSError | None = None
        self._state = "idle"
        self._open()
        try:
            _test(self)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        context = ctypes.c_ulong(0)
        if self._syscall(self._setup, _ENTRIES, ctypes.byref(context)) != 0:
            raise _error("io_setup")
        self._context = context
        release = weakref.finalize(
            self, _destroy, self._syscall, self._numbers[1], context, process_key()
        )
        release.atexit = False  # a daemon thread may be sending until the end
        self._release = release

    def send_to_all(self, fds: Collection[int], data: bytes) -> Rest:
        """Send all descriptors the same bytes; see `Sender`.

        Raises:
            ValueError, OSError: As `send`.
        """
        if self._state != "idle":
            self._recover()
        rest: Rest = []
        length = len(data)
        if len(fds) < _FEW:
            write = self._quick_write
            for fd in fds:
                taken = write(fd, data, length)
                if taken != length:
                    rest += self._told(fd, data, taken)
            return rest
        each, item = iter(fds), (data,)
        address, size = array("Q", (id(data) + _CONTENT,)), array("Q", (length,))
        while batch := tuple(islice(each, _ENTRIES)):
            count = len(batch)
            if count < _FEW:
                return rest + self.send_to_all(batch, data)
            rest += self._send(batch, item * count, address * count, size * count)
        return rest

    def send(self, pairs: Iterable[Pair]) -> Rest:
        """Send each descriptor its bytes; see `Sender`.

        Raises:
            ValueError: It is closed.
            OSError: The kernel gives no results any more; it is unknown which peers got
                their bytes.
        """
        if self._state != "idle":
            self._recover()
        rest: Rest = []
        each = iter(pairs)
        while batch := tuple(islice(each, _ENTRIES)):
            if len(batch) < _FEW:
                rest += self._send_to_few(batch)
            else:
                fds, chunks = zip(*batch, strict=True)
                addresses = array("Q", [id(chunk) + _CONTENT for chunk in chunks])
                rest += self._send(fds, chunks, addresses, array("Q", map(len, chunks)))
        return rest

    def _send_to_few(self, pairs: Sequence[Pair]) -> Rest:
        rest, write = Rest(), self._quick_write
        for fd, chunk in pairs:
            length = len(chunk)
            taken = write(fd, chunk, length)
            if taken != length:
                rest += self._told(fd, chunk, taken)
        return rest

    def _told(self, fd: int, chunk: bytes, taken: int) -> Rest:
        """Return what is said of a write by ctypes; os.write tells why it failed."""
        return [(fd, taken)] if taken >= 0 else self._write.send([(fd, chunk)])

    def _recover(self) -> None:
        if self._state == "closed":
            raise ValueError("the sender is closed")
        # An exception, such as a signal handler's, has ended a batch halfway. To
        # destroy its context waits for its last results, and drops them.
        self._release()
        self._open()
        self._state = "idle"

    def _send(
        self,
        fds: tuple[int, ...],
        chunks: tuple[bytes, ...],
        addresses: array[int],
        sizes: array[int],
    ) -> Rest:
        count = len(fds)
        self._fds[:count] = memoryview(array("i", fds))
        self._addresses[:count] = memoryview(addresses)
        self._sizes[:count] = memoryview(sizes)
        self._kept, self._state = chunks, "sending"
        rest: Rest = []
        number = ctypes.c_long(count)
        submit = self._quick_syscall if count <= _HELD else self._syscall
        accepted: int = submit(self._submit, self._context, number, self._pointers)
        if accepted != count:
            accepted, rest = self._submit_rest(fds, chunks, max(0, accepted))
            number = ctypes.c_long(accepted)
        came: int = self._quick_syscall(
            self._getevents, self._context, number, number, self._events, _NO_TIME
        )
        if came != accepted:
            self._await(accepted, max(0, came))
        self._kept, self._state = (), "idle"
        # Mostly all bytes are accepted, and the results in order: compare the memory.
        if self._results[:accepted].tobytes() == sizes.tobytes():
            return rest
        slots = self._slots[:accepted].tolist()
        results = self._results[:accepted].tolist()
        for slot, result in zip(slots, results, strict=True):
            if result != sizes[slot]:
                rest.append((fds[slot], _outcome(result)))
        return rest

    def _submit_rest(
        self, fds: Sequence[int], chunks: Sequence[bytes], place: int
    ) -> tuple[int, Rest]:
        """Continue a submission at the place where the kernel has stopped.

        Returns:
            The number of writes that it has accepted in all; the results of the others.
        """
        accepted, rest = place, Rest()
        while place < len(fds):
            left = ctypes.c_long(len(fds) - place)
            pointers = ctypes.byref(self._pointers, place * 8)
            taken = self._syscall(self._submit, self._context, left, pointers)
            if taken > 0:
                accepted += taken
                place += taken
            else:
                self.refusal = _error("io_submit")
                rest += self._write.send([(fds[place], chunks[place])])
                place += 1
        return accepted, rest

    def _await(self, count: int, came: int) -> None:
        """Wait for a number of results, of which some are here."""
        while came < count:
            number = ctypes.c_long(count - came)
            events = ctypes.byref(self._events, came * _EVENT)
            taken = self._syscall(
                self._getevents, self._context, number, number, events, None
            )
            if taken >= 0:
                came += taken
            elif _errno() != errno.EINTR:
                raise _error("io_getevents")

    def close(self) -> None:
        self._state = "closed"
        self._release()


def _error(call: str) -> OSError:
    return OSError(_errno(), f"{call}: {os.strerror(_errno())}")


def _destroy(syscall: Any, number: int, context: Any, process: object) -> None:
    if process is process_key():  # a child's contexts are its own
        syscall(ctypes.c_long(number), context)


def _numbers() -> tuple[int, int, int, int]:
    machine = os.uname().machine if sys.platform == "linux" else ""
    # A 32-bit Python on x86_64 has other system calls than the machine's name says.
    bits = 8 * struct.calcsize("P")
    if machine not in _NUMBERS or bits != 64 or sys.byteorder != "little":
        system = f"{sys.platform} {machine} ({bits} bits, {sys.byteorder} endian)"
        raise OSError(errno.ENOSYS, f"the system calls of {system} are not known")
    return _NUMBERS[machine]


def _check_filter(numbers: Iterable[int]) -> None:
    """Raise `OSError` if a seccomp(2) filter kills the callers of these system calls.

    Only a trial shows what a filter does, so a child makes it: it calls libc's
    ``syscall`` with arguments that do nothing. Neither Python nor a fork's hook runs in
    it, and its end sends no SIGCHLD.
    """
    if not _is_filtered():
        return
    libc = ctypes.PyDLL(None, use_errno=True)
    stack = ctypes.create_string_buffer(1 << 16)
    top = (ctypes.addressof(stack) + len(stack)) & ~15
    for number in numbers:
        pid = libc.clone(
            *(libc.syscall, ctypes.c_void_p(top), _CLONE_FILES),
            *(ctypes.c_void_p(number), None, None, None),
        )
        if pid < 0:
            raise _error("clone")
        _, status = native(os, "waitpid")(pid, _WALL)
        if os.WIFSIGNALED(status):
            text = f"system call {number} is forbidden here (seccomp), on pain of death"
            raise OSError(errno.EPERM, text)


def _is_filtered() -> bool:
    """Tell whether a seccomp(2) filter checks this thread's system calls."""
    try:
        with open("/proc/thread-self/status", "rb") as status:
            modes = [line.split()[1] for line in status if line.startswith(b"Seccomp:")]
    except OSError:  # no /proc: assume the worst
        return True
    return modes not in ([], [b"0"])  # proc_pid_status(5); none: a kernel without it


def _test(sender: AioSender) -> None:
    """Raise `OSError` unless the sender works with a pair of sockets."""
    near, far = _socket.socketpair()  # gevent's sockets would wait in its hub
    with closing(near), closing(far):
        near.setblocking(False)
        far.setblocking(False)
        fd, data = near.fileno(), bytes(range(256)) * 1024
        bad = [(-1, data)] * _FEW  # so many that io_submit(2) is called
        rest = sender.send([(fd, b"whole")] * _FEW)
        if sender.refusal is not None:
            raise sender.refusal
        is_whole = not rest and far.recv(999) == b"whole" * _FEW
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        taken = dict(sender.send([*bad, (fd, data)])).get(fd, 0)
        is_full = dict(sender.send([*bad, (fd, data)])).get(fd) == 0
        came = b""
        with suppress(BlockingIOError):
            while part := far.recv(len(data)):
                came += part
        is_partial = 0 < taken < len(data) and came == data[:taken]
        far.close()
        gone = {fd: -errno.EPIPE, -1: -errno.EBADF}
        is_gone = dict(sender.send([(fd, data), *bad])) == gone
    found = {"a": is_whole, "a partial": is_partial, "a full": is_full, "no": is_gone}
    for what, is_right in found.items():
        if not is_right:
            raise OSError(errno.EIO, f"a trial of {what} send went wrong")


_SENDERS: dict[str, Callable[[], Sender]] = {"write": WriteSender, "aio": AioSender}
