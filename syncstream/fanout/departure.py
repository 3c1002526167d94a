"""`Departure`: a client's way from its server to the loop.

A response whose source is a subscription, or asynchronous, needs no thread once its
head is sent. The connection is withheld from its server while the server writes the
head and the opening (or, in a format without one, the first chunk), which are read
back. Then the connection goes to the loop, with the links, the callbacks
and the place of its stream. If the connection is `Refused`, if the server has written
something else, or if there is no loop, the client stays, and is served in the thread or
greenlet of its request.

**Who owns what.** Until `Swap.take` succeeds, the server owns the connection. Then this
module owns it until the loop has the client: an exception in between, for example the
exit of a signal handler, ends the client here, with its links, callbacks and place.
"""

from __future__ import annotations

import logging

from ..channels.subscription import Subscription
from ..errors import ClientDisconnected
from ..runtime.journal import report
from ..runtime.sockets import release
from ..runtime.watch import native_epoll
from ..servers.connection import Full
from ..servers.swap import Swap, Taken
from ..streams.async_feed import AsyncFeed
from ..streams.ends import REASONS
from ..streams.iteration import Iteration
from ..streams.parts import Parts
from .client import Client
from .connection import chunked
from .contract import Feed
from .loop import Fanout, fanout

__all__ = ["Departure"]

log = logging.getLogger("syncstream.stream")


class Departure:
    """Takes one stream's client to the loop.

    Call its methods in the request's thread or greenlet.

    Args:
        parts: The stream's parts.

    Attributes:
        client: The loop's client, ``None`` before; its end is the stream's end.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._swap: Swap | None = None
        self.client: Client | None = None

    @property
    def is_possible(self) -> bool:
        """Whether the client may leave as soon as its head is sent.

        The loop serves no feed but a `Subscription`, and asynchronous sources. `begin`
        finds out whether the connection can leave its server: its method,
        ``syncstream.handover`` and many other facts may forbid it. Until then a stream
        that will stay counts as one that is about to leave, for the moment that other
        streams wait for a thread.
        """
        output, source = self._parts.output, self._parts.source
        if native_epoll() is None or output.connection is None:
            return False  # without epoll there is no loop
        is_opened = output.opening is not None
        if source.items is None:
            return isinstance(source.feed, Subscription) and is_opened
        # A source may use its request to its end.
        is_kept = not output.connection.server.clears_environ
        return is_kept and (is_opened or not (output.is_event_stream or output.tail))

    @property
    def is_begun(self) -> bool:
        """Whether there is something to `close`: a connection withheld, or taken."""
        return self._swap is not None

    def begin(self) -> None:
        """Withhold the connection from its server until the server has written.

        If that is impossible the client stays; if it must not stay, its stream's end is
        decided.
        """
        parts, connection = self._parts, self._parts.output.connection
        assert connection is not None
        # The descriptor's number will soon refer to another file.
        parts.monitor.leave_connection()
        try:
            self._swap = connection.swap()
        except Full as error:
            text = "%s was refused: %s"
            report(log, logging.DEBUG, text, parts.output.label, error)
            parts.outcome.decide("refused")
        except ClientDisconnected:
            parts.outcome.decide("disconnected")
        if self._swap is None:
            self._stay()

    def _stay(self) -> None:
        """Keep the client in its request's thread or greenlet, and watch it there."""
        place = self._parts.closing.place
        if place is not None:
            place.stay()
        self._parts.monitor.observe()

    def close(self) -> None:
        """Give a withheld connection back: the response is incomplete.

        If it was taken, close our end of the pair that the server has instead.
        """
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.close()

    def finish(
        self, run: Iteration, opening: bytes, first: bytes = b"", events: int = 0
    ) -> bool:
        """Take the connection for good; return whether the loop has the client.

        Args:
            run: The iteration of the source.
            opening: The bytes that were sent since `begin`.
            first: The unframed bytes after the opening; may be empty.
            events: The number of events in ``first``.
        """
        swap, parts, taken = self._swap, self._parts, None
        if swap is None:
            return False
        source = self._feed(run)
        ready = self._prepare(source, first, events)
        if parts.monitor.drain > 0 and parts.output.connection is not None:
            parts.output.connection.warn_of_stop()
        if ready is not None and not parts.outcome.ended:
            taken = swap.take(opening)
        if ready is None or taken is None:
            swap.undo()
            self._swap = None
            if ready is not None:
                source.detach(None)
            self._stay()
            return False
        self._give(*ready, source, taken, first)
        parts.closing.hand_on(ready[1])
        reason = parts.outcome.reason
        if reason is not None:  # the stream was ended meanwhile
            ready[1].stop(reason)
        return True

    def _feed(self, run: Iteration) -> Feed:
        """Return what the loop reads."""
        source = self._parts.source
        if isinstance(source.feed, Subscription):
            return source.feed
        assert source.items is not None
        assert source.items.task is not None
        return AsyncFeed(source.items.task, run)

    def _prepare(
        self, source: Feed, first: bytes, events: int
    ) -> tuple[Fanout, Client] | None:
        """Do all that may fail before the connection is taken; ``None`` if it fails."""
        parts, output = self._parts, self._parts.output
        connection, life = output.connection, parts.life
        process, served = parts.monitor.process, parts.monitor.served
        assert connection is not None
        assert process is not None
        assert served is not None
        try:
            loop = fanout()
            terms = loop.prepare(
                process,
                served,
                keepalive=life.keepalive,
                send_timeout=life.send_timeout,
                retry=output.retry,
                comes_back=output.comes_back,
                reasons=REASONS,
                before_wait=connection.hooks,
                comment=output.comment,
                finish=output.last_block("finished"),
                drain=parts.monitor.drain,
                has_broker=not isinstance(source, AsyncFeed),
            )
            client = Client(
                loop,
                -1,
                source,
                terms,
                label=process.shared_label(output.label),
                began=parts.monitor.began,
                deadline=parts.monitor.deadline,
                events=output.events + events,
                bytes=output.bytes + len(first),
            )
        except (OSError, RuntimeError, MemoryError) as error:
            text = (
                "subscribers cannot leave their server, and hold its threads or"
                f" greenlets: {error!r}"
            )
            process.warn_once(log, text, "no loop")
            return None
        try:
            source.detach(client)
        except RuntimeError as error:
            # Another response reads it. The stream stays, and its next read raises
            # the same error, which ends it.
            report(log, logging.DEBUG, "%s stays: %s", client.label, error)
            return None
        return loop, client

    def _give(
        self,
        loop: Fanout,
        client: Client,
        source: Feed,
        taken: Taken,
        first: bytes,
    ) -> None:
        """Give the client to the loop, with the links, the callbacks and the place."""
        closing, to_close = self._parts.closing, self._parts.source.to_close
        links, theirs = self._parts.outcome.links, closing.callbacks
        linked, told = tuple(links), tuple(theirs)
        # In the order of `Closing`: ``authorize`` may have linked something.
        callbacks = told
        if not isinstance(source, AsyncFeed):
            callbacks = (*(link.close for link in linked[::-1]), *told)
        try:
            client.fd, client.is_chunked = taken.fd, taken.is_chunked
            head = taken.head
            if first:
                head += chunked(first) if taken.is_chunked else first
            client.place, closing.place = closing.place, None
            if client.place is not None:
                client.place.leave_thread()
            client.callbacks = callbacks
            # Only those: others may come meanwhile, see `Closing.hand_on`.
            for link in linked:
                links.popleft()
                if isinstance(source, AsyncFeed):
                    source.link(link)
            for _ in told:
                theirs.popleft()
            self.client = source.reader = client
            to_close.clear()
            items, connection = self._parts.source.items, self._parts.output.connection
            if items is not None and connection is not None:
                items.part()
                # Its stream lives as long as the source, which may ask for it.
                closing.on_response_close(connection.forget_request)
            self._parts.source.forget()
            loop.add(client, head)
        except BaseException:  # for example, from a signal handler
            if not client.is_given:  # it ends here, with all that it had
                release(taken.fd)
                self.client = source.reader = None
                to_close[:] = [source]
                closing.place = closing.place or client.place
                links.clear()
                theirs.clear()
                theirs.extend(callbacks)
                self._parts.outcome.decide("error")
            raise
