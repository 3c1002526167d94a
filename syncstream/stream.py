"""One response's life: from a source of items to chunks of bytes, to one end.

A `Stream` iterates its source in the thread or greenlet of the request, encodes
what it yields, looks whether the client is still there, and closes the source
exactly once, for every cause of an end, in the thread or greenlet that iterates. A
client that has gone is an end like any other: what the server still writes fails, and
servers take that quietly.

Nothing of the source's leaves ``next()``: an exception that leaks there kills a
gthread worker (GeneratorExit), writes a 500 page into the running response (sync,
gevent) or hangs the client (waitress). A source's error is logged here, once, and
then the response is cut without its terminator, so that the client can tell a
truncated stream from a finished one. What the cut takes differs from server to
server: the `Connection` knows.
"""

from __future__ import annotations

import inspect
import logging
import random
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

from .errors import ClientDisconnected
from .protocol import sse
from .protocol.sse import Event
from .waiting import (
    current,
    current_scope,
    entered,
    is_greenlet_exit,
    runner_function,
    sleep,
)

__all__ = ["Connection", "Format", "Stream", "current_stream"]

log = logging.getLogger(__name__)

LOOK_EVERY = 0.1
"""At most every so many seconds a busy stream looks for a hang-up (1.5 µs a look);
a stream that is busier than that learns it from the failing write anyway."""

_OPENING = "ok"
_ERROR_RETRY = 5000  # milliseconds; browsers' own 3 to 5 s would hammer a broken view
_CLOSE_TRIES = 10


@dataclass(frozen=True, slots=True)
class Format:
    """How items become chunks, and where one chunk may follow another.

    Attributes:
        encode: An item of the source to its chunk, ``None`` for a checkpoint.
        is_whole: Tells from the last bytes written (4 or more, or all there were)
            whether a new event or value may begin.
        is_events: Comments, ``retry:`` and ids exist in this format.
    """

    encode: Callable[[Any], bytes | None]
    is_whole: Callable[[bytes], bool]
    is_events: bool = False


class Connection(Protocol):
    """What a stream needs to know of the connection that it is written to."""

    @property
    def label(self) -> str:
        """Method and path, for the log."""

    @property
    def last_event_id(self) -> str | None:
        """The id after which the client wants to go on."""

    @property
    def is_event_source(self) -> bool:
        """The client asks as a browser's EventSource does, and obeys an end id."""

    def is_hung_up(self) -> bool:
        """Tell at once whether the client has gone; ``False`` where unknown."""

    def cut(self) -> BaseException | None:
        """Make truncation visible; return what to raise, ``None`` to just end."""


def current_stream() -> Stream | None:
    """Return the stream whose generator is running here.

    ``None`` outside of a stream's generator, and in threads and greenlets that the
    generator has started: pass them the stream.
    """
    return cast("Stream | None", current_scope())


def check_source(source: Any) -> None:
    """Refuse what cannot be the source of a stream, with the way to mend it.

    Raises:
        TypeError: Always for a reason that its message names.
    """
    problem = None
    if hasattr(source, "__aiter__") and not hasattr(source, "__iter__"):
        problem = "an asynchronous one cannot be iterated here: make it a `def`"
    elif hasattr(source, "__await__"):
        problem = "a coroutine is not awaited here: make it a generator"
    elif isinstance(source, type) or inspect.isroutine(source):
        problem = "it has not been called: add ()"
    elif isinstance(source, (str, bytes, bytearray, memoryview, Mapping, Event)):
        problem = "a single item is not a stream of them: put it in a list"
    elif not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        problem = "it cannot be iterated"
    if problem is not None:
        if inspect.iscoroutine(source):
            source.close()  # or Python warns that it was never awaited
        raise TypeError(
            f"source must be a generator or another iterable, got {source!r}: {problem}"
        )


class Stream:
    """One response's life. In its generator, `current_stream` returns it.

    Applications get streams from the response classes; they do not make them.

    Attributes:
        reason: ``None`` while the stream lives, then why it ended: "finished",
            "disconnected", "error", "closed" or "shutdown".
    """

    def __init__(
        self,
        source: Iterable[Any],
        format: Format,
        *,
        retry: int | None = None,
        end: str = "reconnect",
        on_error: Callable[[Exception], Any] | None = None,
    ) -> None:
        check_source(source)
        if end not in ("stop", "reconnect"):
            raise ValueError(f"end must be 'stop' or 'reconnect', got {end!r}")
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error must be callable, got {on_error!r}")
        self.runner: object = None  # see waiting.py
        self.reference: Callable[[], Any] = weakref.ref(self)
        self._format = format
        self._end_mode = end
        self._retry = retry
        self._on_error = on_error
        self._opening = (
            Event(comment=_OPENING, retry=retry).encode() if format.is_events else None
        )
        self._connection: Connection | None = None
        self._source: Iterable[Any] | None = source
        self._to_close: list[Any] = [source]  # popped by whoever closes it
        self._ended: dict[str, str] = {}  # setdefault: the first reason wins
        self._callbacks: deque[Callable[[], object]] = deque()
        self.is_running = False  # inside the source; see waiting.py
        self._closing = False
        self._is_closed = False
        self._tail = b""
        # Weak, for its frame refers to us: who drops both ends the stream.
        self._body: weakref.ref[Iterator[bytes]] | None = None
        self._pulled: Iterator[bytes] | None = None  # by __next__

    # For whoever writes it to a client.

    def connect(
        self,
        connection: Connection,
        *,
        is_encoded: bool = False,
        written: bytes = b"",
    ) -> None:
        """Say which connection the chunks go to, before the first is taken.

        Args:
            connection: The connection.
            is_encoded: The response has a Content-Encoding: the source's bytes are
                not events as they stand, and nothing may be added to them.
            written: What has been written already, or the last 4 bytes of it;
                then the opening is left out.

        Raises:
            RuntimeError: It goes to another connection already, or has ended.
        """
        if self._connection not in (None, connection) or self._ended:
            raise RuntimeError(
                "a stream answers one request: make a new response for each"
            )
        self._connection = connection
        if written:
            self._tail, self._opening = written, None
        if is_encoded:
            self._opening = None
            self._format = Format(self._format.encode, lambda tail: False)

    def is_over_for(self, connection: Connection) -> bool:
        """Tell whether this client has been told to stop, and came back."""
        return self._end_mode == "stop" and connection.last_event_id == sse.END_ID

    def __iter__(self) -> Iterator[bytes]:
        if self._body is None and self._source is not None:
            body = self._chunks(self._source)
            self._body = weakref.ref(body)
            return body
        running = self._body() if self._body is not None else None
        return iter(()) if running is None else running

    def __next__(self) -> bytes:
        if self._pulled is None:
            self._pulled = iter(self)
        return next(self._pulled)

    def close(self) -> None:
        """End the stream and close its source, exactly once.

        Called while the source is running, be it from another thread, this leaves
        the closing to the thread that runs it. Calling it again does nothing.
        """
        if not self._ended:
            gone = self._connection is not None and self._connection.is_hung_up()
            self._end("disconnected" if gone else "closed")
        # The other side sets is_running before it reads _ended: one of the two sees
        # the other, and whoever pops the source closes it.
        if self.is_running or self._is_closed:
            return
        self._close_source()
        self._is_closed = True
        self._source = self._pulled = None
        self._run_callbacks()
        self._log(logging.DEBUG, f"%s ended: {self.reason}")

    # For the generator.

    @property
    def reason(self) -> str | None:
        """Why the stream has ended, one word; ``None`` while it lives."""
        return self._ended.get("reason")

    @property
    def connected(self) -> bool:
        """Whether the client is there: one look at the socket, now.

        ``True`` where the server hides its socket, ``False`` once the stream has
        been closed.
        """
        if self._is_closed or self.reason == "disconnected":
            return False
        return self._connection is None or not self._connection.is_hung_up()

    @property
    def last_event_id(self) -> str | None:
        """The id of the last event that the client has, ``None`` if it says none.

        It comes from the client: expect any text.
        """
        if self._connection is None:
            return None
        id = self._connection.last_event_id
        return None if id == sse.END_ID else id

    def sleep(self, seconds: float) -> None:
        """Do as `syncstream.sleep`."""
        sleep(seconds)

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call this once, without arguments, when the stream has ended.

        Callbacks run after the source was closed, in the order they were given; an
        exception in one is logged. On a stream that has closed it runs at once.

        Raises:
            TypeError: It cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        self._callbacks.append(callback)
        if self._is_closed:
            self._run_callbacks()

    def before_wait(self) -> None:
        """Raise `ClientDisconnected`, once, if the client is known to have gone."""
        if not self._closing and not self.connected:
            self._closing = True
            self._end("disconnected")
            raise ClientDisconnected("the client has closed the connection")

    # The life itself.

    def _chunks(self, source: Iterable[Any]) -> Iterator[bytes]:
        """Yield the response's chunks; the one place that runs the source."""
        try:
            if self._opening is not None and not self._ended:
                self._tail = self._opening
                yield self._opening
            if self._ended:
                return
            failed: list[BaseException] = []  # lists: a name here would keep an error
            refused: list[BaseException] = []  # alive by its own traceback
            try:
                with entered(self):
                    iterator = iter(source)
                    if iterator is not source:
                        self._to_close.append(iterator)
                    advance: Callable[[], Any] = iterator.__next__
                    throw = getattr(iterator, "throw", None)
            except BaseException as error:
                failed.append(error)
            if failed:
                yield from self._fail(failed)
                return
            encode, ended = self._format.encode, self._ended
            connection, reference = self._connection, self.reference
            monotonic, running, runner = time.monotonic, current.get, runner_function()
            looked = 0.0
            while True:
                # What entered(self) does, for the path of every event: the scope
                # stays ours after the step, unless another running stream's was.
                outer = running()
                if outer is reference:
                    outer = None
                else:
                    scope = outer() if outer is not None else None
                    if scope is None or not scope.is_running:
                        outer = None
                    current.set(reference)
                self.runner = runner()  # a copied context may have moved us
                self.is_running = True
                try:
                    if ended:
                        break
                    item = throw(refused.pop()) if refused and throw else advance()
                except StopIteration:
                    self._end("finished")
                    break
                except BaseException as error:
                    # before_wait raises it once it has set the end; else it is the
                    # source's own.
                    if isinstance(error, ClientDisconnected) and (
                        ended or not self.connected
                    ):
                        self._end("disconnected")
                        break
                    failed.append(error)
                finally:
                    self.is_running = False
                    if outer is not None:
                        current.set(outer)
                if ended:
                    break
                chunk = None
                if not failed:
                    try:
                        chunk = encode(item)
                    except BaseException as error:
                        # Thrown at the yield, the user's line is in its traceback.
                        (failed if throw is None else refused).append(error)
                if failed:
                    yield from self._fail(failed)
                    return
                if connection is not None and monotonic() - looked >= LOOK_EVERY:
                    looked = monotonic()
                    if connection.is_hung_up():
                        self._end("disconnected")
                        break
                if chunk is not None:
                    self._tail = chunk if len(chunk) > 3 else (self._tail + chunk)[-4:]
                    yield chunk
            self._close_source()
            if self.reason == "finished":
                block = self._end_block()
                if block:
                    yield block
        except GeneratorExit:
            # Whoever wraps us by `yield from`, or just drops us, closes the stream.
            self.close()
            raise

    def _end_block(self) -> bytes:
        """Return the block after which a browser, coming back, gets 204."""
        if not (
            self._end_mode == "stop"
            and self._format.is_events
            and self._connection is not None
            and self._connection.is_event_source
            and self._format.is_whole(self._tail)
        ):
            return b""
        # The blank line puts the id in force; there is no data, so no event.
        return f"id: {sse.END_ID}\n\n".encode()

    def _fail(self, failed: list[BaseException]) -> Iterator[bytes]:
        """Log a source's error, say a last word to the client, cut the response.

        Args:
            failed: The error, alone; it is taken out.
        """
        last = self._bury(failed.pop())
        if last:
            yield last
        raised = self._connection.cut() if self._connection else None
        if raised is not None:
            raise raised

    def _bury(self, error: BaseException) -> bytes:
        """Log a source's error, close the source; return the last words."""
        if is_greenlet_exit(error):
            # gevent ends this greenlet, or the source ends itself in that way.
            self._end("shutdown")
            self._log(logging.WARNING, "the greenlet of %s was killed")
            self._close_source()
            return b""
        self._end("error")
        self._log(logging.ERROR, "the source of %s failed", error)
        self._close_source()
        return self._last_words(error)

    def _last_words(self, error: BaseException) -> bytes:
        if not self._format.is_whole(self._tail):
            return b""
        words = b""
        if self._on_error is not None and isinstance(error, Exception):
            try:
                with entered(self):
                    words = self._format.encode(self._on_error(error)) or b""
            except BaseException as second:
                self._log(logging.ERROR, "on_error of %s failed", second)
        if self._format.is_events and self._format.is_whole(words):
            # Jittered, or all the clients of a broken view return together.
            base = max(self._retry or 0, _ERROR_RETRY)
            words += Event(retry=round(base * random.uniform(1, 3))).encode()
        return words

    def _end(self, reason: str) -> None:
        self._ended.setdefault("reason", reason)

    def _close_source(self) -> None:
        """Close what has not been closed: the iterator, then what it came from."""
        self._closing = True
        while self._to_close:
            try:
                closable = self._to_close.pop()
            except IndexError:  # another thread was faster
                return
            with entered(self):
                self._try_close(closable)

    def _try_close(self, closable: Any) -> None:
        for attempt in range(_CLOSE_TRIES):
            try:
                close = getattr(closable, "close", None)
                if close is not None:
                    close()
            except BaseException as error:
                ignored = type(error) is RuntimeError and error.args == (
                    "generator ignored GeneratorExit",
                )
                if not ignored or attempt == 0:
                    self._log(logging.ERROR, "closing the source of %s failed", error)
                if ignored:
                    continue  # it yielded while it was closed: drop that, go on
            return

    def _run_callbacks(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                callback()
            except BaseException as error:
                message = "a callback at the end of %s failed"
                self._log(logging.ERROR, message, error)

    def _log(
        self, level: int, message: str, error: BaseException | None = None
    ) -> None:
        """Log a line; a handler that is broken does not break the stream."""
        # Not the error itself: logging asks whether it is true, and one with a
        # __len__ may say no.
        info = (type(error), error, error.__traceback__) if error is not None else None
        try:
            log.log(level, message, self._label, exc_info=info)
        except Exception as problem:
            self._print(message, error, problem)

    def _print(
        self, message: str, error: BaseException | None, problem: Exception
    ) -> None:
        """Print what could not be logged, without asking the exceptions anything."""
        if sys.stderr is None:
            return
        with suppress(OSError, ValueError):  # there is no third place to say it
            if error is not None:
                traceback.print_tb(error.__traceback__)
            names = [type(e).__name__ for e in (error, problem) if e is not None]
            print(
                f"syncstream: {message % self._label} (not logged: {', '.join(names)})",
                file=sys.stderr,
            )

    @property
    def _label(self) -> str:
        return self._connection.label if self._connection else "a stream"
