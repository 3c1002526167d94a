"""Log lines about names that clients may choose: each once an hour, for a few names."""

from __future__ import annotations

import _thread
import logging
import math

from ..runtime.clock import time
from ..runtime.sockets import native
from ..runtime.waiting import say
from . import limits
from .control import CONTROL
from .presence import PRESENCE

__all__ = ["Said"]

log = logging.getLogger("syncstream.hub")


class Said:
    """The lines that a hub has logged about each name within the hour."""

    __slots__ = ("_at", "_lock")

    def __init__(self) -> None:
        # Reentrant: a garbage collection while it is held may run any code.
        self._lock = native(_thread, "RLock")()
        self._at: dict[tuple[str, str], float] = {}

    def once(self, name: str, level: int, text: str, *args: object) -> None:
        """Log a line about a name unless it was logged within the hour."""
        now = time.monotonic()
        with self._lock:
            if len(self._at) >= limits.MOST_SAID:
                self._at = {
                    key: at for key, at in self._at.items() if now - at < limits.SAID
                }
            at = self._at.get((name, text), -math.inf)
            # Many names of clients must not hide lines about the hub's own channels.
            is_full = len(self._at) >= limits.MOST_SAID and name not in (
                CONTROL,
                PRESENCE,
            )
            if now - at < limits.SAID or is_full:
                return
            self._at[name, text] = now
        say(log, level, text, *args)
