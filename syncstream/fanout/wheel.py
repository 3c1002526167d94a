"""A timer wheel: many timers, rounded to a grain."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

from ..runtime.clock import time

__all__ = ["Wheel"]
GRAIN = 0.05  # seconds: timers are as exact as that


class Wheel:
    """Timers, one for each object, as exact as `GRAIN`; cheap to move and to drop."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, Any]] = {}
        self._heap: list[int] = []

    def add(self, item: Any, when: float) -> None:
        """Have its ``due`` called at a time, and at no other."""
        self.remove(item)
        place = when / GRAIN
        if place > 1e15:  # never, or in a million years
            return
        number = max(1, math.ceil(place))
        bucket = self._buckets.get(number)
        if bucket is None:
            # First: a number without a bucket is passed over, a bucket without its
            # number would never be found.
            heapq.heappush(self._heap, number)
            bucket = self._buckets[number] = {}
        bucket[id(item)] = item
        item.bucket = number

    def remove(self, item: Any) -> None:
        bucket = self._buckets.get(item.bucket)
        if bucket is not None:
            bucket.pop(id(item), None)
        item.bucket = 0

    def left(self) -> float:
        """Return the seconds until the next one; -1 if there is none."""
        while self._heap and not self._buckets.get(self._heap[0]):
            self._pop()
        if not self._heap:
            return -1.0
        return max(0.0, self._heap[0] * GRAIN - time.monotonic())

    def _pop(self) -> None:
        self._buckets.pop(self._heap[0], None)
        heapq.heappop(self._heap)

    def run(self, failed: Callable[[Any, BaseException], object]) -> None:
        """Call what is due.

        Args:
            failed: Is told of one whose ``due`` has raised, and what that was.
        """
        now = time.monotonic()
        while self._heap and self._heap[0] * GRAIN <= now:
            # One by one: what ends this leaves the others where they are.
            bucket = self._buckets.get(self._heap[0])
            while bucket:
                _, item = bucket.popitem()
                item.bucket = 0
                try:
                    item.due(now)
                except BaseException as error:
                    failed(item, error)
            self._pop()
