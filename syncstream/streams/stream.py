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

import sys
import weakref
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from ..channels.options import ONE_READER
from ..protocol import sse
from ..runtime.process import process
from ..runtime.tasks import task_scope
from ..runtime.waiter import Waiter
from ..runtime.waiting import (
    ThreadWait,
    current,
    current_scope,
    insist,
    refuse_eventlet,
    sleep,
    wait,
)
from ..servers.connection import Connection
from .calls import nothing, run
from .capacity import Place
from .closing import Closing
from .contract import Departed, Departure, Format, Life
from .ends import REASONS, End
from .feed import chunks_of_feed
from .interrupt import is_unwinding
from .items import chunks_of_items
from .iteration import Iteration
from .links import Link
from .monitor import Monitor
from .outcome import Outcome
from .output import Output, log
from .parts import Parts
from .source import Source, check_source

__all__ = ["ANSWERED", "Stream", "current_stream", "warn_framed", "warn_unframed"]

P = ParamSpec("P")
T = TypeVar("T")

ANSWERED = "a stream answers one request: make a new response for each"


def current_stream() -> Stream | None:
    """Return the stream whose generator is running here.

    ``None`` outside of a stream's generator, and in threads and greenlets that the
    generator has started: pass them the stream. In an asynchronous source, and in the
    tasks that it starts, it is that source's.
    """
    scope = current_scope()
    if scope is None and (reference := task_scope.get()) is not None:
        scope = reference()
    return cast("Stream | None", scope)


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
        " so that clients read the word 'data:', too. Yield the data alone, or give"
        " the response framed=True, which sends text as it is",
        "framed",
    )


def _warn_of_framing(what: str, key: str) -> None:
    # Not `current_stream`: the generator has just yielded, and does not run.
    reference = current.get() or task_scope.get()
    stream = cast("Stream | None", reference() if reference is not None else None)
    # In a Content-Encoding of the application's no bytes are an event as they are.
    if stream is not None and stream._out.format.is_events:
        process().warn_once(log, f"{stream._out.label} yields {what}", key)


class Stream:
    """One response's life. In its generator, `current_stream` returns it.

    Applications get streams from the response classes; they do not make them.

    Args:
        source: A generator, another iterable, an asynchronous one, or a `Feed`.
        format: How items become chunks.
        life: The durations; ``None`` for the defaults.
        retry: The client's reconnection time in milliseconds; ``None`` sends none.
        end: "stop" or "reconnect": what the client does after a normal end; or the
            item to send last, then as "stop". ``None``: "stop", for a feed "reconnect".
        handover: ``False``: the client keeps its thread. ``True``: the source must be
            a feed or asynchronous. ``None``: such a source's client leaves if it can.
        on_error: Returns the item to send after a failure, ``None`` for nothing.
        departure: Makes what takes a client to the loop; ``None``: it stays.

    Many methods: it has a side for each of those who use it, the generator, the waits
    inside the generator, the response and the process. Each method does little: the
    work is that of its `Parts`, and of the bodies in `items` and `feed`.

    Attributes:
        reason: ``None`` while the stream lives, then why it ended: "finished",
            "disconnected", "send_timeout", "max_duration", "shutdown", "error",
            "closed", "kicked", "denied" or "refused".
    """

    def __init__(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        format: Format,
        *,
        life: Life | None = None,
        retry: int | None = None,
        end: Any = "reconnect",
        handover: bool | None = None,
        on_error: Callable[[Exception], Any] | None = None,
        departure: Callable[[Parts], Departure] | None = None,
    ) -> None:
        refuse_eventlet()
        check_source(source)
        made = Source(source)
        if end is None:  # a feed never ends by itself
            end = "stop" if made.feed is None else "reconnect"
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error must be callable, got {on_error!r}")
        if handover is not None and not isinstance(handover, bool):
            raise TypeError(f"handover must be True, False or None, got {handover!r}")
        needs_thread = made.feed is None and made.items is None
        if handover and needs_thread:
            raise ValueError(
                "handover=True needs a Subscription or an asynchronous source: others"
                f" need the thread of their request, got {type(source).__name__}"
            )
        self.runner: Any = None  # see waiting.py
        self.reference: Callable[[], Any] = weakref.ref(self)
        self.thread_wait: ThreadWait | Waiter | None = None
        self.is_running = False  # inside the source; see waiting.py
        self.has_waited = False  # since the last look
        self.has_resumed = False  # a subscription has taken the Last-Event-ID
        self.was_told = False  # of its end, by an exception; see waiting.py
        if made.items is not None and made.items.task is not None:
            made.items.task.run_for(self.reference)
        self._source = made
        self._out = Output(format, retry, End.of(end, format.encode))
        self._outcome, life = Outcome(), life or Life()
        self.ending = self._outcome.error  # see waiting.py
        self._monitor = Monitor(self.reference, self._outcome, self._out, made, life)
        self._closing = Closing(self._outcome, self._out, self._monitor, made)
        self._parts = Parts(
            made, self._out, life, self._outcome, self._monitor, self._closing
        )
        self._on_error = on_error
        self._departure: Departure | None = None
        if departure is not None and not needs_thread and handover is not False:
            self._departure = departure(self._parts)
        # Weak, for its frame refers to us: who drops both ends the stream.
        self._body: weakref.ref[Iterator[bytes]] | None = None
        self._pulled: Iterator[bytes] | None = None  # by __next__

    @property
    def _client(self) -> Departed | None:
        """Who goes on with its connection, without this response; mostly nobody."""
        return None if self._departure is None else self._departure.client

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
            RuntimeError: It goes to another connection already, or has ended, or
                another response has its source.
        """
        if self._out.connection not in (None, connection) or self.reason:
            raise RuntimeError(ANSWERED)
        if not self._source.claim(self.reference):
            raise RuntimeError(ONE_READER)
        self._out.connect(connection, is_encoded=is_encoded, written=written)

    def leave(self) -> bool:
        """Leave its connection, if nothing has been sent; tell whether it has left."""
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

    def ask_if_over(self, connection: Connection) -> bool:
        """Ask whether this client has been told to stop, and came back.

        Whoever asks answers it with 204: the stream notes that it was asked, and may
        tell this client to stop.
        """
        return self._out.ask_if_over(connection)

    @property
    def may_leave(self) -> bool:
        """Whether its thread may be given back as soon as its head is out."""
        # Without an opening, the head waits for the source's first item.
        has_opening, departure = self._out.opening is not None, self._departure
        return has_opening and departure is not None and departure.is_possible

    def __iter__(self) -> Iterator[bytes]:
        given, feed = self._source.given, self._source.feed
        if self._body is None and given is not None:
            run = Iteration(self, self._parts, self._on_error)
            if feed is None:
                body = chunks_of_items(run, given, self._departure)
            else:
                body = chunks_of_feed(run, feed, self._departure)
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

        For the server and for whoever else iterates: all supported servers call it in
        the thread or greenlet that iterates. Others call `stop`, which leaves the
        closing to that thread.

        Called while the source is running, be it from another thread, this leaves
        the closing to the thread that runs it. Called between two steps, it closes the
        source here, in whatever thread: no other thread may ever iterate again. So a
        generator never gets a second caller, but its ``finally`` may run in a thread
        that lacks its thread-locals. Calling it again does nothing.
        """
        closing = self._closing
        if self._departure is not None:
            self._departure.close()
            if self._departure.client is not None:  # it goes on, without this response
                closing.settle_response()
                self._monitor.forget(self)
                closing.exits.raise_kept()
                return
        if isinstance(sys.exc_info()[1], (KeyboardInterrupt, SystemExit)):
            # The exit came between two steps, or in the server, which sends no more.
            # The server's frame may have dropped the iterator already.
            is_partial = not self._outcome.ended or closing.is_dropped
            closing.is_to_cut |= is_partial and self._monitor.process is not None
        if not self._outcome.ended:
            is_gone = self._out.is_hung_up
            self._monitor.end(self._monitor.how_gone() if is_gone else "closed")
        # The other side sets is_running before it looks for an end: one of the two
        # sees the other, and whoever pops the source closes it.
        if self.is_running:
            return
        closing.cut_late()
        if closing.is_closed:
            self._monitor.forget(self)
            return
        closing.close_source(self)
        self._pulled = None
        closing.settle()
        self._monitor.forget(self)
        closing.exits.raise_kept()

    def __del__(self) -> None:
        if not hasattr(self, "_pulled"):  # it could not be made
            return
        # A server that does not close what it has read to the end.
        if self._departure is not None and self._departure.is_begun:
            self.close()
        self._monitor.forget(self)
        if self._client is None:
            self._closing.leave_place()

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
        client = self._client
        if client is None:
            self._monitor.end(reason)
            client = self._client  # it may have left before it could see that end
        if client is not None:
            client.stop(reason)

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
            self._client.shut_down(since, until)
            return
        self._monitor.shut_down(since, until)

    def refuse(self) -> None:
        """End it before it has begun: there is no place for it."""
        self._outcome.decide("refused")
        self.close()

    # For the generator.

    @property
    def label(self) -> str:
        """Method and path of its request, for messages: ``GET '/events'``."""
        return self._out.label

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
        been closed. ``False`` tells the stream's own generator of its end, as a wait
        does by an exception: it may clean up then, and waits do not interrupt it.
        After a hand-over it tells whether the stream lives, without a look.
        """
        if self._client is not None:  # its server's descriptor is another's by now
            return self._client.reason is None
        if self._closing.is_closed:
            return False
        if not (self._outcome.is_gone or self._out.is_hung_up):
            return True
        if current_scope() is self:
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
        """Do as `syncstream.sleep`: in a helper's thread, the end does not wake it."""
        sleep(seconds)

    def wait(self, waitable: Any, timeout: float | None = None) -> Any:
        """Wait for a queue's next item, an event or a condition.

        It does what the waitable's own ``get(timeout=timeout)`` or ``wait(timeout)``
        does, and ends at once, as `sleep` does, when the stream ends. Nothing polls.
        In a helper's thread, the stream's end does not wake it.

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

    def run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call that blocks, and wait for it as `wait` does; return its result.

        It runs in a thread of its own, in a copy of the context. A stream that ends
        does not wait for it: what it returns later is closed, if it has a ``close()``,
        and what it raises is logged at level DEBUG. Under gevent it runs in the
        stream's greenlet, and is interrupted.

        Raises:
            ClientDisconnected, GeneratorExit: As from `wait`.
            BaseException: What the call raises.
        """
        connection = self._out.connection
        release = connection.before_wait if connection is not None else nothing
        return run(partial(call, *args, **kwargs), release)

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
                waited for, and its pipes are closed. After a hand-over the thread of
                the callbacks does this.

        Returns:
            The same.

        Raises:
            TypeError: It has no ``close()``; or its ``close()`` would not end a read
                (a pipe, a generator, a ``requests.Session``, a session of
                SQLAlchemy's): the message names what to link instead.
        """
        link = Link(closable)
        self._monitor.settle()
        if self._client is not None:
            self._client.link(link)
            return closable
        self._outcome.links.append(link)
        self._hand_on()
        if self.is_over():
            self._monitor.wake()  # not from here, which may be a helper's greenlet
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
        self._closing.on_close(callback)
        self._hand_on()

    def _hand_on(self) -> None:
        """Give its client, if it has left just now, what was registered here."""
        client = self._client
        if client is not None:
            self._closing.hand_on(client)

    def on_response_close(self, callback: Callable[[], object]) -> None:
        """Call this once when the server is done with the response.

        That is the stream's end, unless its client has been handed over.

        Raises:
            TypeError: It cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        self._closing.on_response_close(callback)

    def hold(self, place: Place) -> None:
        """Take a place, to be released at the end, also if nobody closes it."""
        self._closing.place = place
        if self._monitor.process is not None or not self.may_leave:
            place.stay()

    # For the waits.

    def is_over(self) -> bool:
        """Tell whether it has ended, and its source has not been told yet."""
        return bool(self._outcome.ended) and not self._outcome.is_closing

    def check(self) -> None:
        """Raise the stream's end, if it is known by now; see `Scope.check`."""
        if self._outcome.is_closing:
            if self.was_told and not is_unwinding():
                if self._outcome.remind():
                    raise self._outcome.error()
                said = "swallows the end of its waits, and is ended there"
                self._monitor.name_source(said)
                insist(self._outcome.error())
            return
        if not self._outcome.ended and self._out.is_hung_up:
            self._outcome.decide(self._monitor.how_gone())
        if self._outcome.ended:
            self._outcome.is_closing = self.was_told = True
            raise self._outcome.error()

    def before_wait(self) -> None:
        """Give back what the application should not hold while the stream waits."""
        self.has_waited = True
        self._monitor.settle()
        if self._out.connection is not None:
            self._out.connection.before_wait()
