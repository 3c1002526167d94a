"""The contract between a broker and the hub: methods, guarantees, bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from .log import Entry, Page

__all__ = ["Broker", "Sink"]


class Sink(Protocol):
    """Who is told: the hub. It may be called from any thread, and does not block."""

    def deliver(self, channel: str, entry: Entry) -> None:
        """Take an entry; those of a channel come in their order."""

    def resync(self, channels: Iterable[str] | None) -> None:
        """Read these channels (``None``: all that are watched): some may be lost."""

    def state(self, is_up: bool, reason: str) -> None:
        """Take note that the broker can be reached, or cannot."""

    def deny(self, name: str, reason: str) -> None:
        """End those who subscribe to this name: the engine refuses to tell of it.

        Args:
            name: A channel, or a pattern, as it was given to `Broker.watch`.
            reason: For the log.
        """


class Broker(Protocol):
    """Six methods. They may be called from any thread, and block.

    One may have a seventh, ``newest(channel, count)``, which returns two ids: the one
    before so many of a channel's newest events, or before all that are kept, if they
    are fewer (without any the head's), and the head's. It raises as `read` does.
    Without it all that is kept is read for ``after=20``.

    Attributes:
        scope: Who shares it: this "process", this "machine", or a "cluster".
    """

    @property
    def scope(self) -> Literal["process", "machine", "cluster"]: ...

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """Store events, channel and payload each, in this order; return their ids.

        Returns when the engine has acknowledged them.

        Args:
            items: As `hub.Hub` makes them.
            connection: A database's, in whose transaction to store them; then the
                ids are ``None``. A ``ValueError`` where the engine has no such.

        Raises:
            Unavailable: Nothing was stored.
            Uncertain: They may have been stored.
            PayloadTooLarge: One is larger than the broker takes; nothing was stored.
        """

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """Read what follows an id.

        Args:
            channel: Its name.
            after: An id, of any provenance; "0" for the oldest that is kept;
                ``None`` for the head alone.
            limit: So many entries at most.

        Returns:
            If the id is known, what follows it, and ``complete``; else all that is
            kept, from the oldest on. After one that is kept, but whose next was
            removed, it is what follows, and not ``complete``. It may be less than
            there is, but not nothing: a page should end with the entry by which its
            payloads have `log.JOIN` bytes, for nobody takes more of it than that.

        Raises:
            Unavailable: The engine does not answer.
            Denied: It refuses this name.
        """

    def attach(self, sink: Sink) -> None:
        """Begin to tell what is new; once a process."""

    def watch(self, channel: str) -> None:
        """Tell of a channel, or of all that match a pattern.

        Returns when what is stored from now on will be told.

        Raises:
            Unavailable: The engine does not answer.
            Denied: It refuses this name; `Sink.deny` may say so later, too.
        """

    def unwatch(self, channel: str) -> None:
        """Tell of it no more."""

    def close(self, timeout: float = 5.0) -> None:
        """Stop, and leave no thread, descriptor or file behind."""


def refuse_connection(scheme: str, connection: Any) -> None:
    """Refuse a transaction to an engine that has none.

    It would store at once what the transaction may roll back.

    Args:
        scheme: The broker's, as in its URL.
        connection: As given to `Broker.publish`.

    Raises:
        ValueError: There is one.
    """
    if connection is not None:
        raise ValueError(f"connection must be None: {scheme}: has no transactions")


def check_bounds(capacity: int, max_age: float | None) -> None:
    """Check what a broker is to keep of each channel.

    Raises:
        TypeError: One is no number, or a capacity is no whole one.
        ValueError: Engines cannot count so, or would keep nothing.
    """
    if not isinstance(capacity, int) or isinstance(capacity, bool):
        raise TypeError(f"capacity must be int, got {capacity!r}")
    if not 1 <= capacity <= MOST_KEPT:
        raise ValueError(f"capacity must be 1 to {MOST_KEPT}, got {capacity!r}")
    if max_age is None:
        return
    if not isinstance(max_age, (int, float)) or isinstance(max_age, bool):
        raise TypeError(f"max_age must be seconds or None, got {max_age!r}")
    if not 0 < max_age <= LONGEST_KEPT:  # NaN is not, either
        raise ValueError(
            f"max_age must be above 0, and {LONGEST_KEPT:.0f} seconds at most, or None"
            f" for no limit, got {max_age!r}"
        )


MOST_KEPT = 1_000_000_000  # events of a channel: what any engine can count
LONGEST_KEPT = 1e9  # seconds, thirty years
