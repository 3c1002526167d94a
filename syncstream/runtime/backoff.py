"""`Backoff`: how long to wait before the next attempt."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["Backoff", "checked_seconds", "checked_waits"]

_MOST_DOUBLINGS = 60  # a larger power overflows a float, some day
_JITTER = 1.25  # of a wait that does not grow, so that clients do not come in step


class Backoff:
    """The waits between attempts: the reconnection time, doubled with each failure.

    Args:
        first: Seconds; the reconnection time until the server sets another.
        longest: Seconds up to which failures double the wait. A longer reconnection
            time of the server's is kept.

    Attributes:
        reconnection_time: Seconds, as the server's last ``retry:`` says.
    """

    def __init__(self, first: float, longest: float) -> None:
        self.reconnection_time = first
        self._first = first
        self._longest = longest
        self._failures = 0

    def fail(self) -> None:
        """Note an attempt that brought nothing."""
        self._failures += 1

    def reset(self) -> None:
        """Note that an attempt has brought something."""
        self._failures = 0

    def seconds(self) -> float:
        """Return how long to wait now, at least the reconnection time."""
        longest = self.reconnection_time * _JITTER
        if self._failures:
            doublings = min(self._failures - 1, _MOST_DOUBLINGS)
            grown = max(self.reconnection_time, self._first) * 2.0**doublings
            longest = max(longest, min(grown, self._longest))
        return random.uniform(max(self.reconnection_time, longest / 2), longest)


def checked_seconds(name: str, seconds: Any) -> float:
    """Return a positive number of seconds; refuse another value, by its name."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"{name} must be positive, got {seconds!r}")
    return float(seconds)


def checked_waits(backoff: tuple[float, float]) -> tuple[float, float]:
    """Return the first and the longest wait, in seconds; refuse other values."""
    if not isinstance(backoff, (tuple, list)) or len(backoff) != 2:
        raise TypeError(
            f"backoff must be (first wait, longest wait) in seconds, got {backoff!r}"
        )
    first, longest = (checked_seconds("a wait of backoff", wait) for wait in backoff)
    if first > longest:
        raise ValueError(f"backoff must be (first wait, longest wait), got {backoff!r}")
    return first, longest
