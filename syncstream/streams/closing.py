"""`Closing`: closes a stream's source, tells its callbacks, gives back its place."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from types import GeneratorType
from typing import Any

from ..runtime.clock import time
from ..runtime.journal import is_enabled
from ..runtime.process import process
from ..runtime.waiting import Scope, entered
from .capacity import Place
from .contract import Departed
from .exits import Exits
from .links import Link
from .monitor import Monitor
from .outcome import Once, Outcome
from .output import Output, log
from .source import Source

__all__ = ["Closing"]

CLOSE_TRIES = 10  # for a generator that yields while it is closed

Callback = Callable[[], object]


class Closing:
    """Does the last things of one stream, each of them once.

    Call its methods in the thread or greenlet that iterates, or in the server's close
    of the response, but never while the source runs.

    Args:
        outcome, output, monitor, source: The stream's parts.

    Attributes:
        exits: The process's exits that the source, its close or a callback has raised.
        callbacks: The application's callbacks for the stream's end.
        place: The stream's place; ``None`` without limits, and once it is released.
        is_closed: Whether the source is closed, and the callbacks have been called.
        is_dropped: Whether the iterator was dropped before the stream's end.
        is_to_cut: Whether the response must be cut when the server closes it.
    """

    def __init__(
        self, outcome: Outcome, output: Output, monitor: Monitor, source: Source
    ) -> None:
        self._outcome = outcome
        self._output = output
        self._monitor = monitor
        self._source = source
        self.exits = Exits(output, monitor)
        self.callbacks: deque[Callback] = deque()
        self._response_callbacks: deque[Callback] = deque()
        self.place: Place | None = None
        self.is_closed = False
        self.is_dropped = False
        self.is_to_cut = False
        self._counted = Once()

    def on_close(self, callback: Callback) -> None:
        """Register a callback for the stream's end; call it now if that is over."""
        self.callbacks.append(callback)
        if self.is_closed:
            self._run(self.callbacks)

    def on_response_close(self, callback: Callback) -> None:
        """Register a callback for the response's end; call it now if that is over."""
        self._response_callbacks.append(callback)
        if self.is_closed:
            self.settle_response()

    def hand_on(self, client: Departed) -> None:
        """Give a client that has left what was registered while it did.

        Called by who registers something and then finds that it has left, and by its
        departure: one of the two sees the other.
        """
        for rest in (self._outcome.links, self.callbacks):
            while rest:
                try:
                    given = rest.popleft()
                except IndexError:  # another thread was faster
                    break
                if isinstance(given, Link):
                    client.link(given)
                else:
                    client.on_close(given)

    # The source.

    def close_source(self, scope: Scope) -> None:
        """Close the iterator, the source and the links, as far as they are still open.

        Args:
            scope: The stream, whose scope the closes run in.
        """
        self._outcome.is_closing = True
        self._source.claim(scope.reference)  # not another response's
        # A link may have been closed by the source itself, with what it hangs on: a
        # sqlite3 cursor's close() fails after its connection's.
        links = self._outcome.links
        ours = (self._source.to_close, logging.ERROR), (links, logging.DEBUG)
        for closables, level in ours:
            if closables is links:
                scope.was_told = False  # the source has gone; these may wait
            while closables:
                try:
                    closable = closables.pop()
                except IndexError:  # another thread was faster
                    break
                with entered(scope):
                    self._try_close(scope, closable, level)

    def _try_close(self, scope: Scope, closable: Any, level: int) -> None:
        for attempt in range(CLOSE_TRIES):
            try:
                close = getattr(closable, "close", None)
                if close is not None:
                    scope.was_told |= isinstance(closable, GeneratorType)
                    close()
            except BaseException as error:
                if self.exits.keep(error):
                    return
                ignored = type(error) is RuntimeError and error.args == (
                    "generator ignored GeneratorExit",
                )
                if not ignored or attempt == 0:
                    message = "closing the source of %s failed"
                    self._output.report(level, message, error)
                if ignored:
                    continue  # it yielded while it was closed: drop that, go on
            return

    # Its response.

    def cut(self) -> BaseException | None:
        """Make truncation visible; return the exception to raise, ``None`` to just end.

        If an exit is kept, the cut is put off: Werkzeug reads from its socket before it
        is done, and would raise the error of that instead of the exit.
        """
        connection = self._output.connection
        if connection is None:
            return None
        if self.exits:
            self.is_to_cut = True
            return None
        return connection.cut()

    def cut_late(self) -> None:
        """Make truncation visible if that was put off; in the server's close."""
        if self.is_to_cut and self._output.connection is not None:
            self.is_to_cut = False
            self._output.connection.cut()

    # The rest.

    def settle(self) -> None:
        """Call the callbacks, and count the stream. The server may still be writing."""
        self.is_closed = True
        self._source.forget()
        self._run(self.callbacks)
        self.settle_response()
        self.leave_place()
        if self._counted.set("counted"):
            self._count()

    def settle_response(self) -> None:
        """Call the callbacks for the response's end."""
        self._run(self._response_callbacks)

    def leave_place(self) -> None:
        """Release the place."""
        place, self.place = self.place, None
        if place is not None:
            place.release()

    def _run(self, callbacks: deque[Callback]) -> None:
        while callbacks:
            try:
                callback = callbacks.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                callback()
            except BaseException as error:
                message = "a callback at the end of %s failed"
                if not self.exits.keep(error):
                    self._output.report(logging.ERROR, message, error)

    def _count(self) -> None:
        reason, record = str(self._outcome.reason), self._monitor.process
        output = self._output
        if record is None and reason == "closed":  # HEAD, or never sent
            output.report(logging.DEBUG, "%s was closed before it began")
            return
        seconds = 0.0
        if record is not None:
            seconds = time.monotonic() - self._monitor.began
        (record or process()).count(reason, seconds, output.events, output.bytes)
        if is_enabled(log, logging.DEBUG):  # before the line is put together
            output.report(
                logging.DEBUG,
                f"%s ended: {reason}, {seconds:.3f} s, {output.events} events,"
                f" {output.bytes} bytes",
            )
