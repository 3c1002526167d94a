"""One response's life: from a source of items to chunks of bytes, to one end.

A `Stream` iterates its source in the thread or greenlet of the request, encodes
what it yields, looks whether the client is still there, and closes the source
exactly once, for every cause of an end, in the thread or greenlet that iterates.

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
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    def gone(self) -> BaseException | None:
        """Return what the server takes quietly for "the client has gone"."""

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
        self._format = format
        self._end_mode = end
        self._retry = retry
        self._on_error = on_error
        self._opening = (
            Event(comment=_OPENING, retry=retry).encode() if format.is_events else None
        )
        self._connection: Connection | None = None
        self._to_close: list[Any] = [source]  # popped by whoever closes it
        self._ended: dict[str, str] = {}  # setdefault: the first reason wins
        self._callbacks: deque[Callable[[], object]] = deque()
        self.is_running = False  # inside the source; see waiting.py
        self._closing = False
        self._tail = b""
        self._body: Iterator[bytes] | None = self._chunks(source)

    # For whoever writes it to a client.

    def connect(
        self,
        connection: Connection,
        *,
        is_encoded: bool = False,
        is_opened: bool = False,
    ) -> None:
        """Say which connection the chunks go to, before the first is taken.

        Args:
            connection: The connection.
            is_encoded: The response has a Content-Encoding: the source's bytes are
                not events as they stand, and nothing may be added to them.
            is_opened: The opening has been written already.

        Raises:
            RuntimeError: It goes to another connection already, or has ended.
        """
        if self._connection not in (None, connection) or self._ended:
            raise RuntimeError(
                "a stream answers one request: make a new response for each"
            )
        self._connection = connection
        if is_opened and self._opening is not None:
            self._tail, self._opening = self._opening, None
        if is_encoded:
            self._opening = None
            self._format = Format(self._format.encode, lambda tail: False)

    def is_over_for(self, connection: Connection) -> bool:
        """Tell whether this client has been told to stop, and came back."""
        return self._end_mode == "stop" and connection.last_event_id == sse.END_ID

    def __iter__(self) -> Iterator[bytes]:
        return iter(()) if self._body is None else self._body

    def __next__(self) -> bytes:
        return next(iter(self))

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
        if self.is_running or self._body is None:
            return
        self._close_source()
        self._body = None  # it refers to us
        self._run_callbacks()
        log.debug("%s ended: %s", self._label, self.reason)

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
        if self._body is None or self.reason == "disconnected":
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
        """
        self._callbacks.append(callback)
        if self._body is None:
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
        if self._opening is not None and not self._ended:
            self._tail = self._opening
            yield self._opening
        if self._ended:
            return
        try:
            with entered(self):
                iterator = iter(source)
        except BaseException as error:
            yield from self._fail(error)
            return
        if iterator is not source:
            self._to_close.append(iterator)
        advance: Callable[[], Any] = iterator.__next__
        throw = getattr(iterator, "throw", None)
        encode, connection, ended = self._format.encode, self._connection, self._ended
        refused: BaseException | None = None  # why the last item cannot be encoded
        failure: BaseException | None = None
        monotonic, running, runner = time.monotonic, current.get, runner_function()
        looked = 0.0
        while True:
            # What entered(self) does, for the path of every event: the scope stays
            # ours after the step, unless it was another running stream's.
            outer = running()
            if outer is self:
                outer = None
            else:
                if outer is not None and not outer.is_running:
                    outer = None
                current.set(self)
            self.runner = runner()  # a copied context may have brought us elsewhere
            self.is_running = True
            try:
                if ended:
                    break
                if refused is None:
                    item = advance()
                else:
                    assert throw is not None
                    problem, refused = refused, None
                    item = throw(problem)
            except StopIteration:
                self._end("finished")
                break
            except ClientDisconnected:
                self._end("disconnected")
                break
            except BaseException as error:
                if is_greenlet_exit(error):
                    self._end("shutdown")
                    break
                failure = error
            finally:
                self.is_running = False
                if outer is not None:
                    current.set(outer)
            if ended:
                break
            chunk = None
            if failure is None:
                try:
                    chunk = encode(item)
                except BaseException as error:
                    if throw is None:
                        failure = error
                    else:
                        refused = error  # the user's line is in its traceback then
            if failure is not None:
                yield from self._fail(failure)
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
        elif self.reason == "disconnected":
            self._raise(connection.gone() if connection else None)

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

    def _fail(self, error: BaseException) -> Iterator[bytes]:
        """Log a source's error, say a last word to the client, cut the response."""
        self._end("error")
        self._log_error("the source of %s failed", error)
        self._close_source()
        last = self._last_words(error)
        if last:
            yield last
        connection = self._connection
        self._raise(connection.cut() if connection else None)

    def _last_words(self, error: BaseException) -> bytes:
        if not self._format.is_whole(self._tail):
            return b""
        words = b""
        if self._on_error is not None and isinstance(error, Exception):
            try:
                with entered(self):
                    words = self._format.encode(self._on_error(error)) or b""
            except BaseException as second:
                self._log_error("on_error of %s failed", second)
        if self._format.is_events and self._format.is_whole(words):
            # Jittered, or all the clients of a broken view return together.
            base = max(self._retry or 0, _ERROR_RETRY)
            words += Event(retry=round(base * random.uniform(1, 3))).encode()
        return words

    @staticmethod
    def _raise(error: BaseException | None) -> None:
        if error is not None:
            raise error

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
            close = getattr(closable, "close", None)
            if close is None:
                continue
            with entered(self):
                self._try_close(close)
        if current.get() is self:
            current.set(None)  # or this thread would keep us alive

    def _try_close(self, close: Callable[[], object]) -> None:
        for attempt in range(_CLOSE_TRIES):
            try:
                close()
            except BaseException as error:
                ignored = (
                    isinstance(error, RuntimeError)
                    and str(error) == "generator ignored GeneratorExit"
                )
                if not ignored or attempt == 0:
                    self._log_error("closing the source of %s failed", error)
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
                self._log_error("a callback at the end of %s failed", error)

    def _log_error(self, message: str, error: BaseException) -> None:
        log.error(message, self._label, exc_info=error)

    @property
    def _label(self) -> str:
        return self._connection.label if self._connection else "a stream"
