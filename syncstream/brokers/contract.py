"""The contract between a broker and the hub: methods, guarantees, bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from .log import Entry, Page

__all__ = ["Broker", "Sink"]


class Sink(Protocol):
    """The receiver of a broker's announcements: the hub.

    Its methods may be called from any thread, and do not block.
    """

    def deliver(self, channel: str, entry: Entry) -> None:
        """Take a new entry; call this in the order of the channel's entries."""

    def resync(self, channels: Iterable[str] | None) -> None:
        """Have the hub read these channels, because announcements may have been lost.

        Args:
            channels: Channel names; ``None`` for all that are watched.
        """

    def state(self, is_up: bool, reason: str) -> None:
        """Report that the engine can be reached, or cannot.

        Args:
            is_up: Whether it can.
            reason: The cause, for the log.
        """

    def deny(self, name: str, reason: str) -> None:
        """End the subscriptions to this name, because the engine denies access to it.

        Args:
            name: A channel or a pattern, as given to `Broker.watch`.
            reason: The cause, for the log.
        """


class Broker(Protocol):
    """Six methods, which may be called from any thread and may block.

    A broker may have a seventh, ``newest(channel, count)``, for ``after=20``. It
    returns two ids: the id before the newest ``count`` events of the channel, or before
    all kept events if there are fewer (the head's id if there are none), and the head's
    id. It raises the same errors as `read`. Without this method the hub reads all kept
    events.

    Attributes:
        scope: The processes that share the broker's events: this "process", this
            "machine", or a "cluster".
    """

    @property
    def scope(self) -> Literal["process", "machine", "cluster"]: ...

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """Store events, channel and payload each, in this order; return their ids.

        Returns when the engine has acknowledged them.

        Args:
            items: The channel and the payload of each event, as `Hub` makes them.
            connection: A database connection, in whose transaction the events are
                stored; then the ids are ``None``. An engine without transactions
                raises ``ValueError``.

        Raises:
            Unavailable: Nothing was stored.
            Uncertain: They may have been stored.
            PayloadTooLarge: An event is larger than the broker accepts; nothing was
                stored.
        """

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """Read the events after an id.

        Args:
            channel: The channel's name.
            after: An id from any source, perhaps a foreign one; "0" for the oldest
                kept event; ``None`` for the head only.
            limit: The maximum of entries.

        Returns:
            If the id is known, the events after it, as ``complete``; else all kept
            events, from the oldest on. If the id is kept, but the next event was
            removed, the later events, as not ``complete``. A page may have fewer events
            than there are, but at least one if there are any: end it with the entry by
            which its payloads have `log.JOIN` bytes, as the hub uses no more.

        Raises:
            Unavailable: The engine does not answer.
            Denied: The engine denies access to this channel.
        """

    def attach(self, sink: Sink) -> None:
        """Begin to announce new events to this sink; called once in each process."""

    def watch(self, channel: str) -> None:
        """Announce the events of a channel, or of all channels that match a pattern.

        Returns when all events stored from now on will be announced.

        Raises:
            Unavailable: The engine does not answer.
            Denied: The engine denies access to this name; `Sink.deny` may report that
                later, too.
        """

    def unwatch(self, channel: str) -> None:
        """Stop announcing a channel's or a pattern's events."""

    def close(self, timeout: float = 5.0) -> None:
        """Stop, and leave no thread, descriptor or file behind.

        Args:
            timeout: The maximum of seconds to wait for its threads.
        """


def refuse_connection(scheme: str, connection: Any) -> None:
    """Refuse ``connection=`` for an engine without transactions.

    The engine would store the events at once, even if the transaction rolls back.

    Args:
        scheme: The broker's scheme, as in its URL.
        connection: As given to `Broker.publish`.

    Raises:
        ValueError: ``connection`` is not ``None``.
    """
    if connection is not None:
        raise ValueError(
            f"connection must be None, as {scheme}: has no transactions, got"
            f" {type(connection)!r}"
        )


def check_bounds(capacity: int, max_age: float | None) -> None:
    """Check the bounds of the events that a broker keeps of each channel.

    Raises:
        TypeError: ``capacity`` is not an ``int``, or ``max_age`` is not a number.
        ValueError: A bound is not above 0, or is larger than engines can count.
    """
    if not isinstance(capacity, int) or isinstance(capacity, bool):
        raise TypeError(f"capacity must be int, got {capacity!r}")
    if not 1 <= capacity <= MOST_KEPT:
        raise ValueError(f"capacity must be 1 to {MOST_KEPT}, got {capacity!r}")
    if max_age is None:
        return
    if not isinstance(max_age, (int, float)) or isinstance(max_age, bool):
        raise TypeError(f"max_age must be seconds or None, got {max_age!r}")
    if not 0 < max_age <= LONGEST_KEPT:  # False for NaN, too
        raise ValueError(
            f"max_age must be above 0, and {LONGEST_KEPT:.0f} seconds at most, or None"
            f" for no limit, got {max_age!r}"
        )


MOST_KEPT = 1_000_000_000  # events of a channel: every engine can count these
LONGEST_KEPT = 1e9  # seconds, thirty years
