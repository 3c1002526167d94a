"""`Worker`: a greenlet of a hub for callbacks that may wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

__all__ = ["Callback", "Worker"]

Callback = Callable[[], object]


class Worker:
    """Runs callbacks one after the other, in one greenlet of a hub.

    Args:
        do: Runs one callback. If it raises, the greenlet ends and a new one continues.
    """

    def __init__(self, do: Callable[[Callback], object]) -> None:
        self.jobs: deque[Callback] = deque()
        self._do = do
        self._is_working = False

    def begin(self) -> None:
        """Run the waiting callbacks soon."""
        if self._is_working or not self.jobs:
            return
        import gevent

        gevent.spawn(self._work)
        self._is_working = True

    def _work(self) -> None:
        try:
            while self.jobs:
                self._do(self.jobs.popleft())
        finally:
            self._is_working = False
            self.begin()  # the greenlet was killed before it ran all callbacks
