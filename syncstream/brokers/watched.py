"""The names that a broker is asked to tell of: one set of them for all engines.

No lock: each change is one of a set's own, and so is each look; whoever looks while
others change it finds it as it was before or after.
"""

from __future__ import annotations

from .names import is_pattern, patterns_of

__all__ = ["Watched"]


class Watched:
    """Channels and patterns; ``channel in watched`` costs the same however many.

    Attributes:
        names: The channels.
        patterns: The patterns.
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
        # Not each pattern is tried: a channel has a few that match it.
        return channel in self.names or (
            bool(self.patterns) and not self.patterns.isdisjoint(patterns_of(channel))
        )

    def __bool__(self) -> bool:
        return bool(self.names or self.patterns)
