"""Descriptors of connections that were taken: where they lie, how many there are."""

from __future__ import annotations

import _thread
import errno
import functools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..runtime.journal import report
from ..runtime.sockets import hold, native, release

if sys.platform != "win32":
    import fcntl
    import resource

__all__ = ["descriptor_limit", "duplicate", "none_left", "soft_limit"]

log = logging.getLogger("syncstream.servers.handover")

LOWEST = 4096
"""The lowest descriptor for taken connections, which stay open for long. They must not
use up those below 1024: select(2), which waitress uses, accepts no others."""

_RESERVE = 64  # descriptors that stay free for the server, and for everything else
_MOST_DESCRIPTORS = 1 << 20


def duplicate(fd: int) -> int:
    """Return another descriptor of a connection, at `LOWEST` or above.

    Raises:
        OSError: Only the descriptors that the server itself needs are left.
    """
    most = descriptor_limit()
    lowest = min(LOWEST, most // 4)
    with soft_limit.raised(most):
        duplicate = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    try:
        hold(duplicate)
    except BaseException:
        release(duplicate)
        raise
    # F_DUPFD takes the lowest free one, so its number shows how many are left.
    if duplicate >= most - min(_RESERVE, most // 8):
        release(duplicate)
        raise none_left(most)
    return duplicate


def none_left(limit: int) -> OSError:
    """Return the error for a limit that is used up."""
    return OSError(errno.EMFILE, f"no descriptor is left of {limit}")


class SoftLimit:
    """RLIMIT_NOFILE, raised only for the moments in which a connection is taken.

    The limit applies to new descriptors only; open ones stay. So programs started by
    the application inherit the original soft limit, usually 1024, which protects those
    that use select(2). (A program that another thread starts within these microseconds
    inherits the raised limit.)
    """

    def __init__(self) -> None:
        self._lock = native(_thread, "allocate_lock")()
        self._before: tuple[int, int] | None = None

    @contextmanager
    def raised(self, most: int) -> Iterator[None]:
        """Raise the soft limit for a block that neither waits nor forks."""
        with self._lock:
            soft, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft == resource.RLIM_INFINITY or soft >= most:
                yield
                return
            self._before = before
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                self._before = None

    def forked(self) -> None:
        """Restore a child's limit and lock, even if another thread held the lock."""
        self._lock = native(_thread, "allocate_lock")()
        before, self._before = self._before, None
        if before is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


soft_limit = SoftLimit()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=soft_limit.forked)


@functools.cache
def descriptor_limit() -> int:
    """Return the maximum number of descriptors, by the hard limit.

    At most a million; the soft limit where it cannot be raised.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    most = _MOST_DESCRIPTORS if hard == infinite else min(hard, _MOST_DESCRIPTORS)
    if soft == infinite or soft >= most:
        return _MOST_DESCRIPTORS if soft == infinite else soft
    try:
        with soft_limit.raised(most):
            return most
    except (OSError, ValueError) as error:
        report(log, logging.DEBUG, "RLIMIT_NOFILE stays at %d: %s", soft, error)
        return soft
