"""The loop, as far as its clients and groups need to know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .lanes import Doer
from .sender import Sender
from .wheel import Wheel

if TYPE_CHECKING:
    from .client import Client
    from .ends import Ends
    from .group import Group
    from .meeting import Meeting

__all__ = ["Loop"]


class Loop(Protocol):
    """What serves the clients. `call` may be used from any thread, all else in it.

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
        """Have this done in a lane."""

    def guard(self, owner: Client | Group, function: Callable[[], object]) -> None:
        """Call this here; cut its owner if it fails."""

    def cut(self, owner: Client | Group, error: BaseException) -> None:
        """Cut those whom a failure concerns."""

    def lag(self, client: Client, rest: memoryview) -> None:
        """Let a client go on by itself, with the rest of a chunk first."""

    def replace_sender(self) -> None:
        """Send by another sender: this one may be in the middle of a batch."""
