"""`Parts`: the objects that one stream consists of."""

from __future__ import annotations

from .closing import Closing
from .contract import Life
from .monitor import Monitor
from .outcome import Outcome
from .output import Output
from .source import Source

__all__ = ["Parts"]


class Parts:
    """One stream's parts. None of them refers to the stream, but weakly.

    Attributes:
        source: The iterable.
        output: The bytes that the client gets.
        life: The time limits.
        outcome: The reason of the end.
        monitor: Watches the client, the clock and the server.
        closing: Closes the source, and finishes the stream.
    """

    __slots__ = ("closing", "life", "monitor", "outcome", "output", "source")

    def __init__(
        self,
        source: Source,
        output: Output,
        life: Life,
        outcome: Outcome,
        monitor: Monitor,
        closing: Closing,
    ) -> None:
        self.source = source
        self.output = output
        self.life = life
        self.outcome = outcome
        self.monitor = monitor
        self.closing = closing
