"""`Keepalive`: the comment that the watch writes while a stream's source is busy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..runtime.clock import time
from ..runtime.waiting import Scope, make_lock
from .outcome import Outcome
from .output import Output

__all__ = ["Keepalive"]


class Keepalive:
    """Breaks a stream's silence by the server's own ``write``.

    The source's side leaves ``is_running`` before it looks for `is_writing`; this side
    sets `is_writing` before it looks for ``is_running``: one of the two sees the other,
    so no comment lands in what the server writes.

    Args:
        scope: Returns the stream, ``None`` once it is gone.
        seconds: The silence before a keepalive; ``None`` for no keepalives.

    Attributes:
        is_writing: Whether the watch is writing, under the lock: see `await_writer`.
    """

    def __init__(
        self,
        scope: Callable[[], Scope | None],
        outcome: Outcome,
        output: Output,
        seconds: float | None,
    ) -> None:
        self._scope = scope
        self._outcome = outcome
        self._output = output
        self._seconds = seconds
        self._lock: Any = None
        self.is_writing = False

    def is_due(self, now: float) -> bool:
        """Tell whether a keepalive is due."""
        return (
            self._seconds is not None
            and self._output.format.is_events
            and now - self._output.moved >= self._seconds
        )

    def next_time(self, now: float) -> float | None:
        """Return when a keepalive is due next, `time.monotonic`; ``None`` for never."""
        if self._seconds is None or not self._output.format.is_events:
            return None
        due = self._output.moved + self._seconds
        # Due already: something is in its way, for a moment at least.
        return due if due > now else now + self._seconds / 4

    def write(self) -> None:
        """Write a keepalive, if that is possible now."""
        if self._lock is None:
            self._lock = make_lock()
        with self._lock:
            self.is_writing = True
            try:
                if self._may_write():
                    output = self._output
                    assert output.connection is not None
                    assert output.connection.write is not None
                    output.connection.write(output.comment)
                    output.bytes += len(output.comment)
                    output.moved = time.monotonic()
            except Exception as error:
                # The client has left: that is found out where it belongs.
                self._output.say(logging.DEBUG, "no keepalive for %s", error)
            finally:
                self.is_writing = False

    def _may_write(self) -> bool:
        scope, connection = self._scope(), self._output.connection
        return (
            scope is not None
            and scope.is_running
            and not self._outcome.ended
            and self.is_due(time.monotonic())
            # Not into the middle of an event.
            and self._output.is_whole
            and connection is not None
            and connection.write is not None
            and connection.has_got(self._output.bytes)
            and not connection.is_full()
            # Or the write would take the error that says why: see `Monitor.how_gone`.
            and not connection.is_hung_up()
        )

    def await_writer(self) -> None:
        """Wait until the keepalive is written; call it if `is_writing` is true."""
        with self._lock:
            pass
