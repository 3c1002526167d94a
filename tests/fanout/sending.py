"""Pairs for the senders' tests, the senders to try, and the kernel's word on AIO."""

import contextlib
import ctypes
import errno
import os
import socket
import sys
from pathlib import Path

import pytest

from syncstream.fanout.sender import open_sender

MANY = 1500
NO_FD = 1_000_000  # beyond every limit: never open
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
CALLED = CALLS.get(os.uname().machine, (206, 207, 208, 209))

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


def contexts():
    """Return the process's AIO contexts, by their memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "[aio]" in line]


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
