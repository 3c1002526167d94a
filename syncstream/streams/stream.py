"""`Stream`: iterates a source, encodes its items, and ends once, for one reason.

A `Stream` iterates its source in the thread or greenlet of the request, encodes
what it yields, looks whether the client is still there, and closes the source
exactly once, for every cause of an end, in the thread or greenlet that iterates. A
client that has gone is an end like any other: what the server still writes fails, and
servers take that quietly.

Once a byte is out, nothing of the source's leaves ``next()``: an exception that leaks
there kills a gthread worker (GeneratorExit), writes a 500 page into the running
response (sync, gevent) or hangs the client (waitress). A source's error is logged
here, once, and then the response is cut without its terminator, so that the client can
tell a truncated stream from a finished one. What the cut takes differs from server to
server: the `Connection` knows.

While no byte is out (NDJSON and raw streams; an event stream's opening leaves before
its source begins) a source that fails is answered with 500: by start_response, which
may be called again with the error until then (PEP 3333), or where a framework has
called it for us, by letting the error leave, an `Exception` and nothing else.
"""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

from ..channels.frames import Frames
from ..channels.subscription import Subscription
from ..errors import ClientDisconnected, Closed, Unavailable
from ..fanout.client import Client
from ..fanout.loop import fanout
from ..protocol import sse
from ..protocol.json import dumps_or_default
from ..runtime.clock import time
from ..runtime.process import process
from ..runtime.sockets import (
    release,
)
from ..runtime.waiter import Waiter
from ..runtime.waiting import (
    ThreadWait,
    current,
    current_scope,
    entered,
    insist,
    is_greenlet_exit,
    refuse_eventlet,
    runner_function,
    sleep,
    wait,
)
from ..runtime.watch import native_epoll
from ..servers.swap import Swap
from .answers import Returned, checked_return, is_answer, status_of
from .capacity import Full, Place
from .contract import Connection, Format, Life
from .ends import REASONS
from .links import Link
from .monitor import CUT, Monitor
from .outcome import Once, Outcome
from .output import PIECE, Output
from .source import Source, check_source

__all__ = ["ANSWERED", "Stream", "current_stream", "warn_framed", "warn_unframed"]

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger("syncstream.stream")

LOOK_EVERY = 0.1
"""At most every so many seconds a busy stream looks for an end by itself."""
WATCHED_LOOK_EVERY = 1.0  # the same for what costs more, where it is watched

ANSWERED = "a stream answers one request: make a new response for each"
_TOO_LATE = (
    ": the response's head has left before the generator began, and the status with it."
    " Decide in a plain view, which returns SSEResponse(...) or another response"
)
_CLOSE_TRIES = 10


def current_stream() -> Stream | None:
    """Return the stream whose generator is running here.

    ``None`` outside of a stream's generator, and in threads and greenlets that the
    generator has started: pass them the stream.
    """
    return cast("Stream | None", current_scope())


def warn_unframed() -> None:
    """Say, once a process, that the stream which runs here sends bytes in vain."""
    _warn_of_framing(
        "bytes that no client takes for an event: bytes are sent as they are, so frame"
        " them (b'data: ...\\n\\n'), or yield the object itself instead of its JSON",
        "unframed",
    )


def warn_framed() -> None:
    """Say, once a process, that the stream which runs here frames its text twice."""
    _warn_of_framing(
        "text that is an event already ('data: ...\\n\\n'): a str is an event's data,"
        " so that clients read the word 'data:', too. Yield the data alone, or"
        " text.encode(): bytes are sent as they are",
        "framed",
    )


def _warn_of_framing(what: str, key: str) -> None:
    # Not `current_stream`: the generator has just yielded, and does not run.
    reference = current.get()
    stream = cast("Stream | None", reference() if reference is not None else None)
    # In a Content-Encoding of the application's no bytes are an event as they are.
    if stream is not None and stream._out.format.is_events:
        process().warn_once(log, f"{stream._out.label} yields {what}", key)


class Stream:
    """One response's life. In its generator, `current_stream` returns it.

    Applications get streams from the response classes; they do not make them.

    Attributes:
        reason: ``None`` while the stream lives, then why it ended: "finished",
            "disconnected", "send_timeout", "max_duration", "shutdown", "error",
            "closed", "kicked", "denied" or "refused".
    """

    def __init__(
        self,
        source: Iterable[Any],
        format: Format,
        *,
        life: Life | None = None,
        retry: int | None = None,
        end: str | None = "reconnect",
        handover: bool | None = None,
        on_error: Callable[[Exception], Any] | None = None,
    ) -> None:
        refuse_eventlet()
        check_source(source)
        if end is None:  # a subscription never ends by itself
            end = "reconnect" if isinstance(source, Subscription) else "stop"
        if end not in ("stop", "reconnect"):
            raise ValueError(f"end must be 'stop' or 'reconnect', got {end!r}")
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error must be callable, got {on_error!r}")
        if handover is not None and not isinstance(handover, bool):
            raise TypeError(f"handover must be True, False or None, got {handover!r}")
        if handover and not isinstance(source, Subscription):
            raise ValueError(
                "handover=True needs a Subscription as the source: others need the"
                f" thread of their request, got {type(source).__name__}"
            )
        self.runner: Any = None  # see waiting.py
        self.reference: Callable[[], Any] = weakref.ref(self)
        self.thread_wait: ThreadWait | Waiter | None = None
        self._out = Output(format, retry, end)
        self._life = life or Life()
        self._on_error = on_error
        self._source = Source(source)
        self._outcome = outcome = Outcome()
        self._monitor = Monitor(
            self.reference, outcome, self._out, self._source, self._life
        )
        self._counted = Once()
        self._callbacks: deque[Callable[[], object]] = deque()
        self.is_running = False  # inside the source; see waiting.py
        self.has_waited = False  # since the last look
        self.has_resumed = False  # a subscription has taken the Last-Event-ID
        self.was_told = False  # of its end, by an exception; see waiting.py
        self._exits: list[BaseException] = []  # the process's own, to be raised last
        self._is_dropped = False  # by who iterates, before its end
        self._is_to_cut = False  # when the server closes it
        self._is_closed = False
        self._frames: Frames | None = None  # their chunks may hold several events
        self._may_hand_over = handover is not False
        self._swap: Swap | None = None
        self._client: Client | None = None  # its connection is the loop's
        self._response_callbacks: deque[Callable[[], object]] = deque()
        self._place: Place | None = None
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
        if self._out.connection not in (None, connection) or self.reason:
            raise RuntimeError(ANSWERED)
        self._out.connect(connection, is_encoded=is_encoded, written=written)

    def leave(self) -> bool:
        """Leave a connection to which nothing has been written; tell whether it has."""
        if self._monitor.process is not None or self._outcome.ended:
            return False
        self._out.connection = None
        return True

    @property
    def has_connection(self) -> bool:
        """Whether it is known to whom its chunks go."""
        return self._out.connection is not None

    def is_new(self, *, is_events: bool) -> bool:
        """Tell whether it waits for a client, in a format of events or in another."""
        return (
            self._out.connection is None
            and not self._outcome.ended
            and self._monitor.process is None
            and self._out.is_event_stream == is_events
        )

    def is_over_for(self, connection: Connection) -> bool:
        """Tell whether this client has been told to stop, and came back.

        Whoever asks answers it with 204, so it may be told to stop.
        """
        return self._out.is_over_for(connection)

    def __iter__(self) -> Iterator[bytes]:
        source = self._source
        if self._body is None and source.given is not None:
            body = (
                self._chunks(source.given)
                if source.feed is None
                else self._subscribed(source.feed)
            )
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
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.close()
        if self._client is not None:  # it goes on, without this response
            self._settle_response()
            self._let_go()
            return
        if isinstance(sys.exc_info()[1], (KeyboardInterrupt, SystemExit)):
            # The exit came between two steps, or in the server, which sends no more.
            # The server's frame may have dropped the iterator already.
            is_partial = not self._outcome.ended or self._is_dropped
            self._is_to_cut |= is_partial and self._monitor.process is not None
        if not self._outcome.ended:
            gone = (
                self._out.connection is not None and self._out.connection.is_hung_up()
            )
            self._monitor.end(self._monitor.how_gone() if gone else "closed")
        # The other side sets is_running before it looks for an end: one of the two
        # sees the other, and whoever pops the source closes it.
        if self.is_running:
            return
        if self._is_to_cut and self._out.connection is not None:
            self._is_to_cut = False
            self._out.connection.cut()
        if self._is_closed:
            self._let_go()
            return
        self._close_source()
        self._settle()
        self._let_go()
        self._raise_exit()

    def __del__(self) -> None:
        # A server that does not close what it has read to the end.
        if getattr(self, "_swap", None) is not None:
            self.close()
        if (
            getattr(self, "_monitor", None) is not None
            and self._monitor.served is not None
        ):
            self._let_go()
        if getattr(self, "_place", None) is not None and self._client is None:
            self._leave_place()

    def stop(self, reason: str = "closed") -> None:
        """End the stream, from any thread or greenlet.

        A wait in its generator ends at once; a generator that is busy with something
        else is closed at its next yield. After "finished" and "closed" the client sees
        a whole response; a browser comes back, except after "finished" of a stream
        with ``end="stop"``. After the others an EventSource sees the same, and comes
        back later; for other clients, who would take it for a whole answer, the
        response is cut.

        Args:
            reason: "closed", "finished", "kicked", "denied" or "shutdown".

        Raises:
            ValueError: It is none of these.
        """
        if reason not in REASONS:
            raise ValueError(
                f"reason must be one of {', '.join(sorted(REASONS))}, got {reason!r}"
            )
        if self._client is not None:
            self._client.stop(reason)
            return
        self._monitor.end(reason)

    def abandon(self, reason: str) -> None:
        """End the stream, whose generator is busy with what may never come back.

        A greenlet is told. A thread cannot be, so its client is let go without it: the
        connection is cut, and the server finds that out when the thread goes on.

        Args:
            reason: As for `stop`.
        """
        self.stop(reason)
        self._monitor.cut_off()

    def shut_down(self, since: float, until: float) -> None:
        """End the stream, or let it finish: its server has been told to stop.

        Called again and again until it has ended, from any thread; from then on too,
        until its server is done with it.

        Args:
            since: When that was first seen, `time.monotonic`.
            until: When a generator may run no longer.
        """
        if self._client is not None:
            self._client.stop("shutdown")
            return
        self._monitor.shut_down(since, until)

    def refuse(self) -> None:
        """End it before it has begun: there is no place for it."""
        self._outcome.decide("refused")
        self.close()

    # For the generator.

    @property
    def reason(self) -> str | None:
        """Why the stream has ended, one word; ``None`` while it lives."""
        if self._client is not None:
            return self._client.reason
        return self._outcome.reason

    @property
    def connected(self) -> bool:
        """Whether the client is there: one look at the socket, now.

        ``True`` where the server hides its socket, ``False`` once the stream has
        been closed.
        """
        if self._is_closed or self.reason in ("disconnected", "send_timeout"):
            return False
        if self._out.connection is None or not self._out.connection.is_hung_up():
            return True
        if current_scope() is self:
            # Its generator knows now, and may clean up: it is not interrupted.
            self._outcome.decide(self._monitor.how_gone())
            self._outcome.is_closing = True
        return False

    @property
    def last_event_id(self) -> str | None:
        """The id of the last event that the client has, ``None`` if it says none.

        It comes from the client: expect any text.
        """
        if self._out.connection is None:
            return None
        id = self._out.connection.last_event_id
        return None if id in sse.RESERVED_IDS else id

    @property
    def is_multiprocess(self) -> bool:
        """Whether other processes of the server answer requests, too."""
        return self._out.connection is not None and self._out.connection.is_multiprocess

    def sleep(self, seconds: float) -> None:
        """Do as `syncstream.sleep`."""
        sleep(seconds)

    def wait(self, waitable: Any, timeout: float | None = None) -> Any:
        """Wait for a queue's next item, an event or a condition.

        It does what the waitable's own ``get(timeout=timeout)`` or ``wait(timeout)``
        does, and ends at once, as `sleep` does, when the stream ends. Nothing polls.

        Args:
            waitable: A ``queue.Queue`` or one of its kin, a ``threading.Event`` or
                ``threading.Condition`` (held by the caller); under gevent also
                gevent's own.
            timeout: Seconds, ``None`` for no limit.

        Returns:
            A queue's item; else whether it came before the time was over.

        Raises:
            queue.Empty: The time is over, and the queue has nothing.
            ClientDisconnected: The client has gone.
            GeneratorExit: The stream ends for another reason.
            TypeError: Nothing could wake such a wait (``queue.SimpleQueue`` in a
                thread, for one).
        """
        return wait(waitable, timeout)

    def link(self, closable: T) -> T:
        """Close this when the stream ends, and at once when the client leaves.

        For what a thread blocks on, and nothing else could wake. When the stream ends
        while its generator runs:

        - A socket is shut down, so that a read of it ends: also that of a response of
          requests, httpx (HTTP/1.1), urllib3 or ``http.client``, of a stream of the
          openai SDK, of a redis pubsub.
        - A database connection or cursor (psycopg, sqlite3) is cancelled. A
          connection that waits without a query, as in ``connection.notifies()``, is
          shut down.
        - A process (``subprocess.Popen``, ``multiprocessing.Process``) gets SIGTERM,
          and SIGKILL 2 s later, so that a read of its output ends. Processes that it
          has started are its own affair: ``exec`` in a shell's command.
        - Anything else is closed from another thread. If the generator still waits
          5 s later, the log says so.

        What that raises in the generator is not logged as an error. Under gevent the
        generator is interrupted anyway.

        Args:
            closable: It has a ``close()``, which the generator's own thread calls
                at the end of the stream, or is a process, which is then ended and
                waited for, and its pipes are closed.

        Returns:
            The same.

        Raises:
            TypeError: It has no ``close()``; or its ``close()`` would not end a read
                (a pipe, a generator, a ``requests.Session``, a session of
                SQLAlchemy's): the message names what to link instead.
        """
        self._outcome.links.append(Link(closable))
        if self.is_over():
            self._monitor.interrupt()
        return closable

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call this once, without arguments, when the stream has ended.

        Callbacks run after the source was closed, in the order they were given; an
        exception in one is logged. On a stream that has closed it runs at once.

        Raises:
            TypeError: It cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        if self._client is not None:
            self._client.on_close(callback)
            return
        self._callbacks.append(callback)
        if self._is_closed:
            self._run_callbacks(self._callbacks)

    def on_response_close(self, callback: Callable[[], object]) -> None:
        """Call this once when the server is done with the response.

        That is the stream's end, unless its client has been handed over.

        Raises:
            TypeError: It cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        self._response_callbacks.append(callback)
        if self._is_closed:
            self._settle_response()

    def hold(self, place: Place) -> None:
        """Take a place, to be released at the end, also if nobody closes it."""
        self._place = place
        if self._monitor.process is not None or not self.will_leave:
            place.stay()

    # For the waits.

    def is_over(self) -> bool:
        """Tell whether it has ended, and its source has not been told yet."""
        return bool(self._outcome.ended) and not self._outcome.is_closing

    def check(self) -> None:
        """Raise the end of the stream, once, if it is known by now.

        Again where the source has swallowed that, and goes on: it would never end.
        """
        if self._outcome.is_closing:
            if self.was_told and not _is_unwinding():
                self._monitor.name_source(
                    "swallows the end of its waits, and is ended there"
                )
                insist(self._outcome.error())
            return
        connection = self._out.connection
        if (
            not self._outcome.ended
            and connection is not None
            and connection.is_hung_up()
        ):
            self._outcome.decide(self._monitor.how_gone())
        if self._outcome.ended:
            self._outcome.is_closing = self.was_told = True
            raise self._outcome.error()

    def before_wait(self) -> None:
        """Give back what the application should not hold while the stream waits."""
        self.has_waited = True
        if self._out.connection is not None:
            self._out.connection.before_wait()

    # The life itself.

    def _chunks(self, source: Iterable[Any]) -> Iterator[bytes]:
        """Yield the response's chunks; the one place that runs the source."""
        try:
            self._monitor.begin(self)
            failed: list[BaseException] = []  # lists: a name here would keep an error
            refused: list[BaseException] = []  # alive by its own traceback
            if self._out.opening is not None and not self._outcome.ended:
                yield self._out.open()
            if self._outcome.ended:
                yield from self._finish()
                return
            self._out.warn()
            try:
                with entered(self):
                    self.before_wait()
                    iterator = self._source.iterate(source)
                    advance: Callable[[], Any] = iterator.__next__
                    throw = getattr(iterator, "throw", None)
            except BaseException as error:
                failed.append(error)
            if failed:
                yield from self._fail(failed)
                return
            out, monitor, ended = self._out, self._monitor, self._outcome.ended
            keepalive = monitor.keepalive
            encode = out.format.encode
            reference = self.reference
            monotonic, running, runner = time.monotonic, current.get, runner_function()
            look_at = 0.0
            while True:
                # What entered(self) does, for the path of every event: the scope
                # stays ours after the step, unless another running stream's was.
                outer = running()
                if outer is not reference:
                    current.set(reference)
                self.runner = runner()  # a copied context may have moved us
                self.is_running = True
                try:
                    if ended:
                        break
                    item = throw(refused.pop()) if refused and throw else advance()
                except StopIteration as stop:
                    if stop.value is not None and not ended:
                        returned = checked_return(stop.value)
                        if returned is not None:
                            failed.append(returned)
                            del returned
                    if not failed:
                        self._outcome.decide("finished")
                        break
                except BaseException as error:
                    if ended or self._is_end(error):
                        self._after_end(error)
                        break
                    failed.append(error)
                finally:
                    self.is_running = False
                    if keepalive.is_writing:
                        keepalive.await_writer()
                    if outer is not reference and _is_running(outer):
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
                now = monotonic()
                if now >= look_at:
                    look_at = now + LOOK_EVERY
                    self._monitor.look(now)
                    if ended:
                        break
                if chunk is not None:
                    # What begins with neither a colon nor a line end says by itself
                    # how it ends; most begin with a letter.
                    if chunk > b";" or (len(chunk) > 3 and chunk[0] != 58):
                        out.tail = chunk
                    else:
                        chunk = out.note(item, chunk)
                    out.moved = now
                    out.events += 1
                    if len(chunk) > PIECE:
                        yield from out.pieces(chunk, monitor.piece(len(chunk)))
                        continue
                    out.bytes += len(chunk)
                    yield chunk
                elif keepalive.is_due(now) and out.is_whole:
                    out.moved = now
                    out.bytes += len(out.comment)
                    yield out.comment
            yield from self._finish()
        except GeneratorExit:
            # Whoever wraps us by `yield from`, or just drops us, closes the stream.
            self._is_dropped = not self._outcome.ended
            self.close()
            if not self._monitor.thrown_at:
                raise
            # Ours, which has hit a moment too late: it would end the server's thread.
            raised = self._cut()
            if raised is not None:
                raise raised from None

    def _subscribed(self, source: Subscription) -> Iterator[bytes]:
        """Do the same for a subscription; until it is handed over, if it can be.

        No code of the application's runs in the steps, nor is there anything to
        encode: less is to be done for each of them.
        """
        try:
            self._monitor.begin(self, is_leaving=self._is_about_to_leave())
            failed: list[BaseException] = []
            # Before the client hears that it is open: it may publish then.
            first, events = b"", 0
            try:
                if not self._outcome.ended:
                    first, events = self._first_step(source)
            except BaseException as error:
                if not self._is_end(error):
                    failed.append(error)
            if self._out.opening is not None and not self._outcome.ended:
                if not failed:
                    self._begin_hand_over()
                yield self._out.open()
                if self._swap is not None and self._is_handed_over(first, events):
                    return
            if failed and not self._outcome.ended:
                yield from self._fail(failed)
                return
            ended, watched = self._outcome.ended, self._monitor.is_watching
            if not ended:
                self._out.warn()
                if first:
                    self._out.moved = time.monotonic()
                    self._out.events += events
                    yield from self._out.pieces(first, self._monitor.piece(len(first)))
            # What it sends is whole events, or lines, as no bytes at all are.
            out, monitor = self._out, self._monitor
            keepalive = monitor.keepalive
            out.tail = b"\n\n" if out.is_event_stream else b""
            dumps = dumps_or_default(out.format.dumps)
            self._frames = frames = source.frames(out.is_event_stream, dumps, self)
            advance, reference = frames.__next__, self.reference
            monotonic, running, runner = time.monotonic, current.get, runner_function()
            look_at = 0.0
            while not ended:
                outer = running()
                if outer is not reference:
                    current.set(reference)
                self.runner = runner()
                self.is_running = True
                try:
                    if ended:
                        break
                    chunk = advance()
                except BaseException as error:
                    if ended or self._is_end(error):
                        self._after_end(error)
                        break
                    failed.append(error)
                finally:
                    self.is_running = False
                    if keepalive.is_writing:
                        keepalive.await_writer()
                    if outer is not reference and _is_running(outer):
                        current.set(outer)
                if ended:
                    break
                if failed:
                    yield from self._fail(failed)
                    return
                out.moved = now = monotonic()
                if now >= look_at:
                    look_at = now + (WATCHED_LOOK_EVERY if watched else LOOK_EVERY)
                    self._monitor.look(now)
                    if ended:
                        break
                if len(chunk) > PIECE:
                    yield from out.pieces(chunk, monitor.piece(len(chunk)))
                    continue
                out.bytes += len(chunk)
                yield chunk
            yield from self._finish()
        except GeneratorExit:
            self._is_dropped = not self._outcome.ended
            self.close()
            raise

    # Without the server.

    def _is_to_hand_over(self) -> bool:
        return (
            self._may_hand_over
            and native_epoll() is not None  # without it there is no loop
            and self._out.is_event_stream
            and self._out.opening is not None
            and self._out.connection is not None
        )

    @property
    def will_leave(self) -> bool:
        """Whether its thread is to be given back as soon as its head is out."""
        return self._source.feed is not None and self._is_to_hand_over()

    def _is_about_to_leave(self) -> bool:
        """Tell whether its connection's number is to be another's in a moment.

        Not if the application's code runs before, which may take its time.
        """
        feed = self._source.feed
        is_quick = feed is not None and not feed.begins_with_user_code
        return is_quick and self._is_to_hand_over()

    def _first_step(self, source: Subscription) -> tuple[bytes, int]:
        """Begin; return what there is for a client that is to be handed over."""
        with entered(self):
            try:
                source.begin()
                if not self._is_to_hand_over():
                    return b"", 0
                self.before_wait()
                chunk, events, _ = source.step()
            except Unavailable:
                return b"", 0  # it waits for the broker, as those who are there do
            source.count(events)
        return chunk, events

    def _begin_hand_over(self) -> None:
        """Take the connection from its server, if it can be, until it has written."""
        if not self._is_to_hand_over():
            return
        assert self._out.connection is not None
        # Its number will soon be another's.
        self._monitor.leave_connection()
        try:
            self._swap = self._out.connection.swap()
        except Full as error:
            self._out.report(logging.DEBUG, f"%s is refused: {error}")
            self._outcome.decide("refused")
        except ClientDisconnected:
            self._outcome.decide("disconnected")
        if self._swap is None:
            self._stay()

    def _stay(self) -> None:
        """Stay in the thread or greenlet of the request, and be watched there."""
        if self._place is not None:
            self._place.stay()
        self._monitor.observe()

    def _is_handed_over(self, first: bytes, events: int) -> bool:
        """Take the connection for good, and let the loop go on with it."""
        connection, process, served = (
            self._out.connection,
            self._monitor.process,
            self._monitor.served,
        )
        source = self._source.feed
        assert source is not None
        assert connection is not None
        assert self._swap is not None
        assert self._out.opening is not None
        assert process is not None
        assert served is not None
        life, is_ready = self._life, False
        try:
            # All that may fail comes before the connection is taken.
            loop = fanout()
            terms = loop.prepare(
                process,
                served,
                keepalive=life.keepalive,
                send_timeout=life.send_timeout,
                retry=self._out.retry,
                comes_back=self._out.comes_back,
                reasons=REASONS,
                before_wait=connection.hooks,
                comment=self._out.comment,
            )
            client = Client(
                loop,
                -1,
                source,
                terms,
                label=process.shared_label(self._out.label),
                began=self._monitor.began,
                deadline=self._monitor.deadline,
                events=events,
                bytes=len(self._out.opening) + len(first),
            )
            source.detach(client)
            is_ready = True
        except (OSError, RuntimeError, MemoryError) as error:
            text = f"clients stay with their server: {error!r}"
            process.warn_once(log, text, "no loop")
        taken = None
        if is_ready and not self._outcome.ended:
            taken = self._swap.take(self._out.opening)
        if taken is None:
            self._swap.undo()
            self._swap = None
            if is_ready:
                source.detach(None)
            self._stay()
            return False
        callbacks = tuple(self._callbacks)
        try:
            client.fd, client.is_chunked = taken.fd, taken.is_chunked
            head = taken.head
            if first:
                chunk = b"%x\r\n%b\r\n" % (len(first), first)
                head += chunk if taken.is_chunked else first
            client.place, self._place = self._place, None
            if client.place is not None:
                client.place.leave_thread()
            self._client = client
            client.callbacks = callbacks
            self._callbacks.clear()
            self._source.to_close.clear()
            self._source.forget()
            loop.add(client, head)
        except BaseException:  # of a signal's handler, say
            if not client.is_given:  # it ends here, with all that it has
                release(taken.fd)
                self._client = None
                self._source.to_close[:] = [source]
                self._place = self._place or client.place
                if not self._callbacks:
                    self._callbacks.extend(callbacks)
                self._outcome.decide("error")
            raise
        reason = self._outcome.reason
        if reason is not None:  # it came while this was done
            client.stop(reason)
        return True

    def _is_end(self, error: BaseException) -> bool:
        """Tell an end of which we did not know yet from a failure."""
        if isinstance(error, ClientDisconnected) and not self.connected:
            self._outcome.decide("disconnected")
        elif isinstance(error, Closed):
            self._outcome.decide(error.reason if error.reason in REASONS else "closed")
        # gunicorn's handlers of SIGQUIT and SIGABRT exit, wherever that hits.
        elif self._is_exit(error) or (
            isinstance(error, SystemExit) and self._monitor.until() is not None
        ):
            self._outcome.decide("shutdown")
        return bool(self._outcome.ended)

    def _is_exit(self, error: BaseException) -> bool:
        """Tell the end of the whole process from a source that calls sys.exit().

        Ctrl-C in the main thread, and what a signal's handler raises there, belong to
        a server that serves in that thread. Anywhere else it must not get them: a
        SystemExit ends gevent's hub, or a thread of a pool, for everybody.
        """
        return (
            isinstance(error, (KeyboardInterrupt, SystemExit))
            and not self._monitor.in_hub
            and threading.current_thread() is threading.main_thread()
            and (
                self._out.connection is None or self._out.connection.lets_exits_through
            )
            and (
                isinstance(error, KeyboardInterrupt)
                or self._monitor.until() is not None
                or _is_of_a_signal(error)
            )
        )

    def _keep_exit(self, error: BaseException | None) -> bool:
        """Keep what ends the whole process until the stream has ended; tell if so."""
        if error is None or not self._is_exit(error):
            return False
        if not self._exits:
            self._exits.append(error)
        return True

    def _raise_exit(self) -> None:
        """Raise what ends the whole process, if anything does."""
        if self._exits:
            raise self._exits.pop()

    def _after_end(self, error: BaseException) -> None:
        """Take what left the source after the stream had ended."""
        # A ``finally`` that waits is told of the end instead.
        if self._keep_exit(error) or self._keep_exit(error.__context__):
            return
        if isinstance(error, (GeneratorExit, Closed)) or is_greenlet_exit(error):
            return
        # What a link that was cut makes the source raise is not its fault, nor is
        # the exit of a worker that stops.
        expected = bool(self._outcome.links) or not isinstance(error, Exception)
        level = logging.DEBUG if expected else logging.ERROR
        self._out.report(
            level, f"the source of %s failed at its end ({self.reason})", error
        )

    def _finish(self) -> Iterator[bytes]:
        """Close the source, say a last word to the client, or cut the response."""
        self._close_source()
        raised = None
        if self.reason in CUT and not self._out.comes_back:
            last = self._out.answer_unsent(str(self.reason))
            if not last:
                raised = self._cut()
        else:
            last = self._out.last_block(str(self.reason))
        if last:
            self._out.bytes += len(last)
            yield last
        # Not every server, and not every middleware, calls close().
        self._settle()
        self._raise_exit()
        if raised is not None:
            raise raised

    def _cut(self) -> BaseException | None:
        """Make truncation visible; return what to raise, ``None`` to just end.

        Beside an exit that is to get through, later: Werkzeug reads from its socket
        before it is done, and takes what that raises then instead of the exit.
        """
        if self._out.connection is None:
            return None
        if self._exits:
            self._is_to_cut = True
            return None
        return self._out.connection.cut()

    def _fail(self, failed: list[BaseException]) -> Iterator[bytes]:
        """Log a source's error, say a last word to the client, cut the response.

        After an event of ``on_error`` it ends in order: that event is the sign, and
        browsers' fetch loses what comes just before a cut (Chromium: 13 to 18 of 25).

        Args:
            failed: The error, alone; it is taken out.
        """
        if not self._out.is_out and not is_greenlet_exit(failed[0]):
            yield from self._fail_unsent(failed)
            return
        block = self._refusal(failed[0])
        last, is_told = self._bury(failed[0], block)
        if last:
            self._out.bytes += len(last)
            yield last
        if is_told or (block and last.endswith(block)):  # the end behind it is whole
            failed.clear()
            self._settle()
            self._raise_exit()
            return
        raised = self._cut()
        self._settle()
        self._raise_exit()
        if self._shows(failed[0]):
            raised = failed[0]
        failed.clear()
        if raised is not None:
            try:
                raise raised
            finally:
                raised = None  # its traceback has this frame

    def _shows(self, error: BaseException) -> bool:
        """Tell whether the source's error goes to who iterates: a test, say."""
        connection = self._out.connection
        is_exit = isinstance(error, GeneratorExit) or is_greenlet_exit(error)
        return not is_exit and (connection is None or connection.shows_errors)

    def _refusal(self, error: BaseException) -> bytes:
        """Return what keeps a browser away for good, if an error is to do that."""
        if not (is_answer(error) or isinstance(error, Returned)):
            return b""
        return self._out.refusal()

    def _fail_unsent(self, failed: list[BaseException]) -> Iterator[bytes]:
        """Answer with an error's status instead of a stream: no byte has left."""
        error, connection = failed.pop(), self._out.connection
        raised: BaseException | None = None
        try:
            self._outcome.decide("error")
            self._close_source()
            (words, is_told), status = self._last_words(error), status_of(error)
            body = None
            if connection is not None:
                body = connection.answer(error, status, words)
            if body is not None:
                level = logging.ERROR if status >= 500 else logging.DEBUG
                self._out.report(level, "the source of %s failed", error)
                self._out.bytes += len(body)
                yield body
            elif connection is None or words or not connection.answers_errors:
                self._out.report(logging.ERROR, "the source of %s failed", error)
                if words:
                    self._out.bytes += len(words)
                    yield words
                if not is_told:
                    raised = self._cut()
                if self._shows(error) and not is_told:
                    raised = error
            else:
                told = error if not connection.logs_errors else None
                message = "the source of %s failed before its first item"
                self._out.report(logging.ERROR, message, told)
                raised = error
                if not isinstance(error, Exception):  # GeneratorExit, for one
                    raised = RuntimeError(f"a source raised {type(error).__name__}")
                    raised.__cause__ = error
            self._settle()
            self._raise_exit()
            if raised is not None:
                raise raised
        finally:
            # Their tracebacks have this frame, and so what it names.
            error, raised, failed = RuntimeError(), None, []

    def _bury(self, error: BaseException, refusal: bytes = b"") -> tuple[bytes, bool]:
        """Log a source's error, close the source.

        Args:
            error: It.
            refusal: What comes last, instead of what asks a client to come back.

        Returns:
            The last words, and whether one of them is the application's own.
        """
        if is_greenlet_exit(error):
            # gevent ends this greenlet, or the source ends itself in that way.
            self._outcome.decide("shutdown")
            self._close_source()
            self._out.report(logging.WARNING, "the greenlet of %s was killed")
            return b"", False
        is_first = isinstance(error, Returned) and not self._out.events
        self._outcome.decide("refused" if is_first else "error")
        message = "the source of %s failed"
        if self._out.is_event_stream and (
            is_answer(error) or isinstance(error, Returned)
        ):
            message += _TOO_LATE
        self._close_source()
        self._out.report(logging.ERROR, message, error)
        return self._last_words(error, refusal)

    def _last_words(
        self, error: BaseException, refusal: bytes = b""
    ) -> tuple[bytes, bool]:
        if not self._out.is_whole:
            return b"", False
        words = b""
        if self._on_error is not None and isinstance(error, Exception):
            try:
                with entered(self):
                    words = self._out.format.encode(self._on_error(error)) or b""
            except BaseException as second:
                if not self._keep_exit(second):
                    self._out.report(logging.ERROR, "on_error of %s failed", second)
        is_told = bool(words)
        if self._out.format.is_events and self._out.format.is_whole(words):
            words += refusal or self._out.come_back("error")
        return words, is_told

    # Its ends.

    def _settle_response(self) -> None:
        self._run_callbacks(self._response_callbacks)

    def _leave_place(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            place.release()

    def _settle(self) -> None:
        """Finish: tell the callbacks, count it. The server may still be writing."""
        self._is_closed = True
        self._source.forget()
        self._pulled = None
        self._run_callbacks(self._callbacks)
        self._settle_response()
        self._leave_place()
        if self._counted.set("counted"):
            self._count()

    def _let_go(self) -> None:
        """Have the watch and the process forget it: the server is done with it."""
        self._monitor.forget(self)

    def _count(self) -> None:
        reason, record = str(self.reason), self._monitor.process
        if record is None and reason == "closed":  # HEAD, or never sent
            self._out.report(logging.DEBUG, "%s was closed before it began")
            return
        seconds = time.monotonic() - self._monitor.began if record is not None else 0.0
        if self._frames is not None:
            self._out.events += self._frames.events
            self._frames = None  # it has us as its scope, and the other way round
        (record or process()).count(reason, seconds, self._out.events, self._out.bytes)
        self._out.report(
            logging.DEBUG,
            f"%s ended: {reason}, {seconds:.3f} s, {self._out.events} events,"
            f" {self._out.bytes} bytes",
        )

    # Closing.

    def _close_source(self) -> None:
        """Close what has not been closed: the iterator, then what it came from."""
        self._outcome.is_closing = True
        # A link may have been closed by the source itself, with what it hangs on: a
        # sqlite3 cursor's close() fails after its connection's.
        ours = (
            (self._source.to_close, logging.ERROR),
            (self._outcome.links, logging.DEBUG),
        )
        for closables, level in ours:
            if closables is self._outcome.links:
                self.was_told = False  # the source has gone; these may wait
            while closables:
                try:
                    closable = closables.pop()
                except IndexError:  # another thread was faster
                    break
                with entered(self):
                    self._try_close(closable, level)

    def _try_close(self, closable: Any, level: int) -> None:
        for attempt in range(_CLOSE_TRIES):
            try:
                close = getattr(closable, "close", None)
                if close is not None:
                    self.was_told |= inspect.isgenerator(closable)
                    close()
            except BaseException as error:
                if self._keep_exit(error):
                    return
                ignored = type(error) is RuntimeError and error.args == (
                    "generator ignored GeneratorExit",
                )
                if not ignored or attempt == 0:
                    self._out.report(level, "closing the source of %s failed", error)
                if ignored:
                    continue  # it yielded while it was closed: drop that, go on
            return

    def _run_callbacks(self, callbacks: deque[Callable[[], object]]) -> None:
        while callbacks:
            try:
                callback = callbacks.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                callback()
            except BaseException as error:
                message = "a callback at the end of %s failed"
                if not self._keep_exit(error):
                    self._out.report(logging.ERROR, message, error)


def _is_unwinding() -> bool:
    """Tell whether what runs here does so because a generator is being ended.

    In a ``finally``, or in an ``except`` for the end, and in what these call, the
    exception is being handled; behind an ``except`` that has swallowed it, it is not.
    """
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, GeneratorExit) or is_greenlet_exit(error):
            return True
        error = error.__context__
    return False


def _is_of_a_signal(error: BaseException) -> bool:
    """Tell whether an exception was raised by a signal's handler."""
    handlers = set()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        handlers.add(getattr(getattr(handler, "__func__", handler), "__code__", None))
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in handlers for frame, _ in frames)


def _is_running(reference: Callable[[], Any] | None) -> bool:
    """Tell whether a stream, by its reference, is inside its source."""
    scope = reference() if reference is not None else None
    return scope is not None and scope.is_running
