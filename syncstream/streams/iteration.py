"""`Iteration`: runs a stream's source step by step, and handles its exceptions.

Nothing else runs a source. The modules `items` and `feed` have the loop around the
steps, one for each kind of source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..errors import ClientDisconnected, Closed
from ..runtime.process import Attached
from ..runtime.waiting import (
    Scope,
    current,
    entered,
    is_greenlet_exit,
    runner_function,
)
from .answers import Returned, checked_return, is_answer, status_of
from .ends import CUT, REASONS
from .parts import Parts

__all__ = ["LOOK_EVERY", "Failure", "Iterated", "Iteration", "OnError"]

LOOK_EVERY = 0.1
"""At most every so many seconds a busy stream looks for an end by itself."""

OnError = Callable[[Exception], Any]

_TOO_LATE = (
    ": the response's head has left before the source began, and the status with it."
    " Decide in a plain view, which returns SSEResponse(...) or another response"
)


class Iterated(Scope, Attached, Protocol):
    """The stream that is iterated."""

    def close(self) -> None:
        """End it and close its source, exactly once."""


class Failure:
    """A source's error on its way to the code that reports it, which takes it out.

    A local variable with the error itself, in a frame of its traceback, would be a
    reference cycle, and keep all that those frames name until a garbage collection.
    """

    __slots__ = ("_errors",)

    def __init__(self, error: BaseException) -> None:
        self._errors = [error]

    def take(self) -> BaseException:
        """Return the error; once."""
        return self._errors.pop()

    @property
    def is_there(self) -> bool:
        """Whether nobody has taken it out yet."""
        return bool(self._errors)


class Iteration:
    """Runs one source; the bodies of all kinds of sources share it.

    Args:
        stream: The source's stream. It does not refer to this in turn, so a stream ends
            when both are dropped.
        parts: The stream's parts.
        on_error: Returns the item to send after a failure, ``None`` for nothing.
    """

    def __init__(
        self, stream: Iterated, parts: Parts, on_error: OnError | None
    ) -> None:
        self.stream = stream
        self.parts = parts
        self._on_error = on_error
        self._outcome, self._output = parts.outcome, parts.output
        self._monitor, self._closing = parts.monitor, parts.closing
        self._ended = parts.outcome.ended
        self._reference = stream.reference

    def stepper(self) -> Callable[[Callable[[], Any]], Any]:
        """Return the function that runs one step of the source, in its stream's scope.

        Its argument returns the source's next item; the function returns the item, or a
        `Failure`. Check ``outcome.ended`` first: after the end, `take_overtaken`.

        It is a closure because it is called for every event: a method would look up
        each of these names again, which is 80 ns an event.
        """
        stream, reference, ended = self.stream, self._reference, self._ended
        running, enter, runner = current.get, current.set, runner_function()
        keepalive, taken = self._monitor.keepalive, self._take_of_step

        def step(advance: Callable[[], Any]) -> Any:
            # What entered() does; but the scope stays ours after the step, unless
            # another running stream's was.
            outer = running()
            if outer is not reference:
                enter(reference)
            stream.runner = runner()  # a copied context may have moved us
            stream.is_running = True
            try:
                return None if ended else advance()
            except BaseException as error:
                return taken(error)
            finally:
                stream.is_running = False
                if keepalive.is_writing:
                    keepalive.await_writer()
                if outer is not reference and _is_running(outer):
                    enter(outer)

        return step

    def _take_of_step(self, error: BaseException) -> Failure | None:
        """Do as `take`, for a step: StopIteration means that the source is done."""
        if not isinstance(error, StopIteration):
            return self.take(error)
        value = None if self._ended else error.value
        returned = None if value is None else checked_return(value)
        if returned is not None:
            return Failure(returned)
        if not self._ended:
            self._output.end_source()
        self._outcome.decide("finished")
        return None

    def take(self, error: BaseException) -> Failure | None:
        """Handle an exception of the application's code.

        Args:
            error: The exception; an exit is kept until the stream has ended, and an
                error after the end is logged.

        Returns:
            The failure that it means; ``None`` for an end, which is decided now.
        """
        if not self._ended:
            reason = self._reason_in(error)
            if reason is not None:
                self._outcome.decide(reason)
            if not self._ended:
                return Failure(error)
        self._take_late(error)
        return None

    def _reason_in(self, error: BaseException) -> str | None:
        """Return the reason of an end that an exception means, or ``None``."""
        if isinstance(error, Closed):
            return error.reason if error.reason in REASONS else "closed"
        if isinstance(error, ClientDisconnected):
            connection = self._output.connection
            is_gone = connection is not None and connection.is_hung_up()
            return self._monitor.how_gone() if is_gone else None
        # gunicorn's handlers of SIGQUIT and SIGABRT exit, wherever that hits.
        is_exit = self._closing.exits.is_exit(error) or (
            isinstance(error, SystemExit) and self._monitor.until() is not None
        )
        return "shutdown" if is_exit else None

    def take_overtaken(self, item: object) -> None:
        """Handle what a step has returned if the stream has ended beside it.

        An item is void, but a failure is logged as one after the end.
        """
        if type(item) is Failure and item.is_there:
            self._take_late(item.take())

    def _take_late(self, error: BaseException) -> None:
        """Handle an exception of the source after the stream's end."""
        exits = self._closing.exits
        # A ``finally`` that waits is told of the end instead.
        if exits.keep(error) or exits.keep(error.__context__):
            return
        if isinstance(error, (GeneratorExit, Closed)) or is_greenlet_exit(error):
            return
        # What a link that was cut makes the source raise is not its fault, nor is
        # the exit of a worker that stops.
        expected = bool(self._outcome.links) or not isinstance(error, Exception)
        level = logging.DEBUG if expected else logging.ERROR
        message = f"the source of %s failed at its end ({self._outcome.reason})"
        self._output.report(level, message, error)

    def give_back(self) -> None:
        """Give back, at the beginning, what the application should not hold."""
        if self._output.connection is not None:
            self._output.connection.before_wait()

    # The last chunks.

    @property
    def has_on_error(self) -> bool:
        """Whether the application chooses what is sent after a failure."""
        return self._on_error is not None

    def describe(self, error: BaseException) -> str:
        """Return the log's message for a source's error."""
        message, output = "the source of %s failed", self._output
        if output.is_event_stream and (is_answer(error) or isinstance(error, Returned)):
            message += _TOO_LATE
        return message

    def last_words(self, error: BaseException) -> tuple[bytes, bool]:
        """Return the last bytes after a source's error; it may call ``on_error``.

        Returns:
            The bytes, and whether the response ends in order behind them: some are the
            application's own, or keep the client from coming back.
        """
        refusal = b""
        if is_answer(error) or isinstance(error, Returned):
            refusal = self._output.refusal()
        last, is_told = self._last_words(error, refusal)
        return last, is_told or bool(refusal and last.endswith(refusal))

    def finish(self) -> Iterator[bytes]:
        """Close the source; yield the last bytes, or cut the response."""
        self._closing.close_source(self.stream)
        raised, reason = None, str(self._outcome.reason)
        if reason in CUT and not self._output.comes_back:
            last = self._output.answer_unsent(reason)
            if not last:
                raised = self._closing.cut()
        else:
            last = self._output.last_block(reason)
        if last:
            self._output.bytes += len(last)
            yield last
        # Not every server, and not every middleware, calls close().
        self._settle()
        if raised is not None:
            raise raised

    def drop(self) -> None:
        """Close the stream, because its iterator is closed or dropped."""
        self._closing.is_dropped = not self._ended
        self.stream.close()

    def fail(self, failure: Failure) -> Iterator[bytes]:
        """Log a source's error; yield the last bytes, or cut the response.

        After an event of ``on_error`` the response ends in order: the event tells of
        the error, and fetch loses data just before a cut (Chromium: 13 to 18 of 25).
        """
        error: BaseException | None = failure.take()
        raised: BaseException | None = None
        assert error is not None
        try:
            if not self._output.is_out and not is_greenlet_exit(error):
                yield from self._fail_unsent(Failure(error))
                return
            last, is_told = self._bury(error)
            if last:
                self._output.bytes += len(last)
                yield last
            if not is_told:
                raised = self._closing.cut()
            else:
                error = None
            self._settle()
            if error is not None and self._shows(error):
                raised = error
            if raised is not None:
                raise raised
        finally:
            error = raised = None  # their tracebacks have this frame

    def _fail_unsent(self, failure: Failure) -> Iterator[bytes]:
        """Answer with an error's status instead of a stream: no byte has left."""
        error: BaseException | None = failure.take()
        raised: BaseException | None = None
        told: BaseException | None = None
        assert error is not None
        output, connection = self._output, self._output.connection
        try:
            self._outcome.decide("error")
            self._closing.close_source(self.stream)
            (words, is_told), status = self._last_words(error), status_of(error)
            body = None
            if connection is not None:
                body = connection.answer(error, status, words)
            if body is not None:
                level = logging.ERROR if status >= 500 else logging.DEBUG
                output.report(level, "the source of %s failed", error)
                output.bytes += len(body)
                yield body
            elif connection is None or words or not connection.answers_errors:
                output.report(logging.ERROR, "the source of %s failed", error)
                if words:
                    output.bytes += len(words)
                    yield words
                if not is_told:
                    raised = self._closing.cut()
                if self._shows(error) and not is_told:
                    raised = error
            else:
                told = error if not connection.logs_errors else None
                message = "the source of %s failed before its first item"
                output.report(logging.ERROR, message, told)
                raised = error
                if not isinstance(error, Exception):  # GeneratorExit, for one
                    raised = RuntimeError(f"a source raised {type(error).__name__}")
                    raised.__cause__ = error
            self._settle()
            if raised is not None:
                raise raised
        finally:
            # Their tracebacks have this frame, and so what it names.
            error = raised = told = None

    def _settle(self) -> None:
        self._closing.settle()
        self._closing.exits.raise_kept()

    def _shows(self, error: BaseException) -> bool:
        """Tell whether the source's error is raised to the caller, such as a test."""
        connection = self._output.connection
        is_exit = isinstance(error, GeneratorExit) or is_greenlet_exit(error)
        return not is_exit and (connection is None or connection.shows_errors)

    def _bury(self, error: BaseException) -> tuple[bytes, bool]:
        """Log a source's error, and close the source; return as `last_words`."""
        if is_greenlet_exit(error):
            # gevent ends this greenlet, or the source ends itself in that way.
            self._outcome.decide("shutdown")
            self._closing.close_source(self.stream)
            self._output.report(logging.WARNING, "the greenlet of %s was killed")
            return b"", False
        is_first = isinstance(error, Returned) and not self._output.events
        self._outcome.decide("refused" if is_first else "error")
        self._closing.close_source(self.stream)
        self._output.report(logging.ERROR, self.describe(error), error)
        return self.last_words(error)

    def _last_words(
        self, error: BaseException, refusal: bytes = b""
    ) -> tuple[bytes, bool]:
        output = self._output
        if not output.is_whole:
            return b"", False
        words = b""
        if self._on_error is not None and isinstance(error, Exception):
            try:
                with entered(self.stream):
                    words = output.format.encode(self._on_error(error)) or b""
            except BaseException as second:
                if not self._closing.exits.keep(second):
                    output.report(logging.ERROR, "on_error of %s failed", second)
        is_told = bool(words)
        words += output.complete(words)
        if output.format.is_events and output.format.is_whole(words):
            words += refusal or output.come_back("error")
        return words, is_told


def _is_running(reference: Callable[[], Any] | None) -> bool:
    """Tell whether a stream, by its reference, is inside its source."""
    scope = reference() if reference is not None else None
    return scope is not None and scope.is_running
