"""`Parts`: what one stream is made of."""

from __future__ import annotations

from dataclasses import dataclass

from .closing import Closing
from .contract import Life
from .monitor import Monitor
from .outcome import Outcome
from .output import Output
from .source import Source

__all__ = ["Parts"]


@dataclass(slots=True)  # not frozen: one is made for each stream
class Parts:
    """One stream's parts, for those who run it. None of them has the stream.

    Attributes:
        source: What it iterates.
        output: What its client has got, and gets.
        life: How long it waits, and lives.
        outcome: Why it has ended.
        monitor: Watches its client, its clock and its server.
        closing: Closes the source, and all else at its end.
    """

    source: Source
    output: Output
    life: Life
    outcome: Outcome
    monitor: Monitor
    closing: Closing
