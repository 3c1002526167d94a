"""`SendTimeout`: tells a client that accepts no data from one that is slow."""

from __future__ import annotations

from ..runtime.sockets import acknowledged, queued
from ..servers.connection import Connection
from .output import Output

__all__ = ["LOOKS", "Progress", "SendTimeout", "progress_of"]

LOOKS = 4
"""The number of looks at a client in one time-out. A client is dropped late by one of
these intervals at most."""

Progress = tuple[int | None, int]
"""A value that changes, and one that grows, when a client accepts data."""


def progress_of(connection: Connection, fd: int, sent: int) -> Progress:
    """Return a client's progress, to be compared with an earlier one.

    TCP reports the acknowledged bytes. Elsewhere (Unix sockets, other systems) those
    that the server's socket has accepted count: nobody is dropped by a guess.

    Args:
        fd: The connection's descriptor.
        sent: The number of bytes passed to the server.
    """
    taken = acknowledged(fd)
    if taken:  # 0: nothing yet, or a kernel that does not count (gVisor)
        return taken, 0
    return queued(fd), sent - connection.unsent()


class SendTimeout:
    """Notices a client that has accepted no data for too long.

    Args:
        output: The bytes sent to the client.
        seconds: How long the client may accept nothing.
    """

    def __init__(self, output: Output, seconds: float) -> None:
        self._output = output
        self._seconds = seconds
        self._full_since = 0.0  # it takes nothing; 0: it does
        self._looked_at = 0.0  # the last time
        self._progress: Progress | None = None  # at that time
        self._all_sent = -1  # bytes sent when all of them had gone

    def look(self, now: float, fd: int, *, is_running: bool) -> bool:
        """Look at the client; tell whether the time-out is over.

        Args:
            now: `time.monotonic`.
            fd: The connection's descriptor.
            is_running: Whether the source is running, so that no more data is ready.
        """
        output, sent = self._output, self._output.bytes
        connection = output.connection
        if connection is None or (is_running and sent == self._all_sent):
            return False  # idle: all had gone when we looked last, and there is no more
        progress = progress_of(connection, fd, sent)
        before, self._progress = self._progress, progress
        if not connection.is_full():
            self._full_since = 0.0
            self._all_sent = sent if is_running else -1
        elif before is None or progress[0] != before[0] or progress[1] > before[1]:
            self._full_since = now
        elif not self._full_since:
            # Nothing was taken since the last look, nor before the last chunk. If that
            # was long ago we were stopped ourselves, and the client is not to blame.
            earliest = now - self._seconds / 2
            self._full_since = max(output.moved, self._looked_at, earliest)
        self._looked_at = now
        if self._full_since and now - self._full_since >= self._seconds:
            self._full_since = 0.0  # if its end has no effect, once more after a while
            return True
        return False

    def next_time(self, now: float) -> float:
        """Return the time of the next look, `time.monotonic`."""
        tick = now + self._seconds / LOOKS
        if self._full_since:
            tick = min(tick, max(now + 0.01, self._full_since + self._seconds))
        return tick
