"""A timer wheel: many timers, rounded to a grain."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

from ..runtime.clock import time

__all__ = ["Wheel"]
GRAIN = 0.05  # seconds: the precision of timers


class Wheel:
    """Timers, one for each object, as exact as `GRAIN`; cheap to move and to drop."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, Any]] = {}
        self._heap: list[int] = []

    def add(self, item: Any, when: float) -> None:
        """Have an item's ``due`` called at this time; this replaces an earlier one."""
        self.remove(item)
        place = when / GRAIN
        if place > 1e15:  # infinity, or a million years
            return
        number = max(1, math.ceil(place))
        bucket = self._buckets.get(number)
        if bucket is None:
            # The number first: one without a bucket is skipped, but a bucket without
            # its number would never be found.
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
        """Return the seconds until the next timer, -1 if there is none."""
        while self._heap and not self._buckets.get(self._heap[0]):
            self._pop()
        if not self._heap:
            return -1.0
        return max(0.0, self._heap[0] * GRAIN - time.monotonic())

    def _pop(self) -> None:
        self._buckets.pop(self._heap[0], None)
        heapq.heappop(self._heap)

    def run(self, failed: Callable[[Any, BaseException], object]) -> None:
        """Call the ``due`` of all items whose time has come.

        Args:
            failed: Called with an item whose ``due`` has raised, and the exception.
        """
        now = time.monotonic()
        while self._heap and self._heap[0] * GRAIN <= now:
            # One by one: an exception leaves the other items in place.
            bucket = self._buckets.get(self._heap[0])
            while bucket:
                _, item = bucket.popitem()
                item.bucket = 0
                try:
                    item.due(now)
                except BaseException as error:
                    failed(item, error)
            self._pop()
