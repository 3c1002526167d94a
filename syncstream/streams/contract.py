"""The contract of a stream: its format, its life's options, feeds, departures."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from ..protocol.json import Dumps
from ..runtime.waiter import Wakeable
from ..runtime.waiting import Scope

if TYPE_CHECKING:
    from .iteration import Iteration
    from .links import Link

__all__ = [
    "FRAMED",
    "Departed",
    "Departure",
    "Feed",
    "Format",
    "Frames",
    "Life",
    "is_feed",
    "life_of",
]

log = logging.getLogger("syncstream.stream")


FRAMED = (bytes, bytearray, memoryview)
"""The types whose items are sent as they are, in every format."""


# Functions have no equals. Not frozen: one is made for each stream.
@dataclass(slots=True, eq=False)
class Format:
    """The way items become chunks, and the places where a new chunk may begin.

    Attributes:
        encode: Turns an item of the source into its chunk, or ``None`` for a
            checkpoint.
        framed: The types of the items that are the application's own bytes or text,
            and are sent as they are.
        dumps: The JSON encoder for a subscription's lines, in a format without events.
        is_whole: Tells from the last bytes written (4 or more, or all if there were
            fewer) whether a new event or value may begin.
        is_events: Whether this format has comments, ``retry:`` and ids.
        completion: Returns what completes the last item of a source that has ended,
            from the same bytes as for ``is_whole``. Most formats add nothing.
    """

    encode: Callable[[Any], bytes | None]
    is_whole: Callable[[bytes], bool]
    is_events: bool = False
    framed: tuple[type, ...] = FRAMED
    dumps: Dumps | None = None
    completion: Callable[[bytes], bytes] = lambda tail: b""


@dataclass(frozen=True, slots=True)
class Life:
    """A stream's durations in seconds; ``None`` for no limit.

    Attributes:
        keepalive: The silence after which a comment is sent.
        send_timeout: The time after which a client that accepts no data is dropped.
        max_duration: The time after which the stream ends and the client reconnects.
        drain: The time for which a generator continues after its server was told to
            stop; 0 for none. ``None``: as long as the server allows, but not at all
            for a client that reconnects.
        soonest: The shortest of the first three; infinity without any.

    Raises:
        TypeError: A duration is not a number.
        ValueError: A duration is not above 0 (``drain``: is negative), or not finite.
    """

    keepalive: float | None = 15.0
    send_timeout: float | None = 30.0
    max_duration: float | None = None
    drain: float | None = None
    soonest: float = field(init=False)

    def __post_init__(self) -> None:
        for name in ("keepalive", "send_timeout", "max_duration", "drain"):
            value = getattr(self, name)
            if value is None or (type(value) is float and 0 < value < math.inf):
                continue  # most are
            if name == "drain" and value == 0:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be seconds or None, got {value!r}")
            try:
                seconds = float(value)
            except OverflowError:  # an int beyond all floats
                seconds = math.inf
            if not 0 < seconds < math.inf:
                least = "0 seconds or more" if name == "drain" else "above 0 seconds"
                raise ValueError(f"{name} must be {least}, or None, got {value!r}")
        limits = (self.keepalive, self.send_timeout, self.max_duration)
        soonest = min(
            (limit for limit in limits if limit is not None), default=math.inf
        )
        object.__setattr__(self, "soonest", soonest)  # it is frozen


_checked_life = functools.lru_cache(maxsize=64, typed=True)(Life)


def life_of(
    keepalive: float | None,
    send_timeout: float | None,
    max_duration: float | None,
    drain: float | None,
) -> Life:
    """Return the `Life` of these durations; equal ones are checked once.

    Raises:
        TypeError, ValueError: As `Life` does.
    """
    try:
        return _checked_life(keepalive, send_timeout, max_duration, drain)
    except TypeError:  # perhaps one has no hash: its own error names it
        return Life(keepalive, send_timeout, max_duration, drain)


class Frames(Protocol):
    """A feed's chunks, each of all events that are ready; they end by `Closed`.

    Attributes:
        events: The number of events in the chunks so far.
    """

    @property
    def events(self) -> int: ...

    def __next__(self) -> bytes:
        """Return the next chunk; wait for it in the stream's scope."""


class Feed(Protocol):
    """A source that needs no thread: it returns what is ready, and wakes for more.

    It is an iterable of its items, too. `Subscription` is one; see `is_feed`.

    Attributes:
        reader: A weak reference to the stream that sends it, ``None`` before.
    """

    reader: Callable[[], object] | None

    @property
    def begins_with_user_code(self) -> bool:
        """Whether `begin` may call functions of the application."""

    def begin(self) -> None:
        """Fix the position, before the first read.

        Raises:
            Closed: The feed has ended.
            Unavailable: The position is not available now; the first read tries again.
        """

    def step(self) -> tuple[bytes, int, float | None]:
        """Return the bytes that are ready, without waiting.

        Returns:
            The bytes, their number of events, and without bytes the time of the next
            call (`time.monotonic`), or ``None`` if the waiter will be woken.
        """

    def frames(self, is_events: bool, dumps: Dumps, scope: Scope | None) -> Frames:
        """Return the chunks for a response.

        Args:
            is_events: Whether they are an event stream; else they are lines of JSON.
            dumps: Encodes the lines.
            scope: The response's stream.
        """

    def detach(self, waiter: Wakeable | None) -> None:
        """Wake this waiter for new events, instead of the thread that has read."""

    def count(self, events: int) -> None:
        """Count events of `step` as sent."""

    def __iter__(self) -> Iterator[Any]: ...


def is_feed(source: object) -> TypeGuard[Feed]:
    """Tell a `Feed` by the name that nothing else has.

    Not by ``isinstance``, which takes some 25 calls for a Protocol.
    """
    return hasattr(type(source), "begins_with_user_code")


class Departed(Protocol):
    """A client that goes on without its server and without the response.

    Attributes:
        reason: Why its stream has ended, ``None`` while it lives.
    """

    @property
    def reason(self) -> str | None: ...

    def stop(self, reason: str = ...) -> None:
        """End its stream, from any thread."""

    def shut_down(self, since: float, until: float) -> None:
        """End it, or let finite work go on: see `process.Attached`."""

    def on_close(self, callback: Callable[[], object]) -> None:
        """Register a callback for its end, from any thread."""

    def link(self, link: Link) -> None:
        """Have a link closed at its end, from any thread."""


class Departure(Protocol):
    """Takes a client from its server, so that it holds no thread.

    Attributes:
        client: The client once it has left, ``None`` before.
    """

    @property
    def client(self) -> Departed | None: ...

    @property
    def is_possible(self) -> bool:
        """Whether the client may leave as soon as its head and a chunk are sent."""

    @property
    def is_begun(self) -> bool:
        """Whether there is something to `close`: a connection withheld, or taken."""

    def begin(self) -> None:
        """Withhold the connection from its server until the server has written.

        If that is impossible the client stays, or its stream's end is decided.
        """

    def finish(
        self, run: Iteration, opening: bytes, first: bytes = b"", events: int = 0
    ) -> bool:
        """Take the connection for good; tell whether it goes on elsewhere.

        Args:
            run: The iteration of the source.
            opening: The bytes that were sent since `begin`.
            first: The unframed bytes after the opening; may be empty.
            events: The number of events in ``first``.
        """

    def close(self) -> None:
        """Give a withheld connection back, or end the server's part of a taken one."""
