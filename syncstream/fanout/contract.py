"""The loop as its clients and groups see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from ..channels.subscription import Subscription
from ..streams.async_feed import AsyncFeed
from .lanes import Doer
from .sender import Sender
from .wheel import Wheel

if TYPE_CHECKING:
    from .client import Client
    from .ends import Ends
    from .group import Group
    from .meeting import Meeting

__all__ = ["Feed", "Loop", "subscription_of"]

Feed = Subscription | AsyncFeed
"""What the loop serves: it reads both without waiting."""


def subscription_of(feed: Feed) -> Subscription:
    """Return a feed that is no `AsyncFeed`, as what it is."""
    return cast("Subscription", feed)


class Loop(Protocol):
    """The loop. `call` may be used from any thread, everything else in its thread.

    Attributes:
        ends: Ends clients.
        meeting: Where clients find others at their place.
        sender: Sends events.
        wheel: Keeps the times of clients and groups.
    """

    ends: Ends
    meeting: Meeting
    sender: Sender
    wheel: Wheel

    def call(self, function: Callable[[], object], owner: Client | Group) -> None:
        """Call this in the loop, soon."""

    def again(self, function: Callable[[], object], owner: Client | Group) -> None:
        """Call this in the next round."""

    def do(self, lane: Doer, job: Callable[[], object], owner: Client | Group) -> None:
        """Have a job done in a lane."""

    def guard(self, owner: Client | Group, function: Callable[[], object]) -> None:
        """Call this here; cut its owner if it fails."""

    def cut(self, owner: Client | Group, error: BaseException) -> None:
        """Cut the clients that a failure concerns."""

    def lag(self, client: Client, rest: memoryview) -> None:
        """Have a client continue alone, with the rest of a chunk first."""

    def replace_sender(self) -> None:
        """Use another sender: this one may be in the middle of a batch."""
