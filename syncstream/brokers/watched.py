"""The set of watched names, channels and patterns, as all brokers keep it.

It needs no lock: each change and each test is one atomic operation of a set.
"""

from __future__ import annotations

from .names import is_pattern, patterns_of

__all__ = ["Watched"]


class Watched:
    """Channels and patterns; ``channel in watched`` costs the same, however many.

    Attributes:
        names: The watched channels.
        patterns: The watched patterns.
    """

    __slots__ = ("names", "patterns")

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.patterns: set[str] = set()

    def add(self, name: str) -> None:
        (self.patterns if is_pattern(name) else self.names).add(name)

    def discard(self, name: str) -> None:
        (self.patterns if is_pattern(name) else self.names).discard(name)

    def __contains__(self, channel: str) -> bool:
        # Look up the few patterns that match the channel, instead of trying all.
        return channel in self.names or (
            bool(self.patterns) and not self.patterns.isdisjoint(patterns_of(channel))
        )

    def __bool__(self) -> bool:
        return bool(self.names or self.patterns)
