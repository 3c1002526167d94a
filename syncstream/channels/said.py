"""Log lines about names that clients may choose: each once an hour, and not many."""

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
    """What a hub has logged of each name within the hour."""

    __slots__ = ("_at", "_lock")

    def __init__(self) -> None:
        # Reentrant: a garbage collection in here may run anybody's code.
        self._lock = native(_thread, "RLock")()
        self._at: dict[tuple[str, str], float] = {}

    def once(self, name: str, level: int, text: str, *args: object) -> None:
        """Log a line of a name, unless that was done within the hour."""
        now = time.monotonic()
        with self._lock:
            if len(self._at) >= limits.MOST_SAID:
                self._at = {
                    key: at for key, at in self._at.items() if now - at < limits.SAID
                }
            at = self._at.get((name, text), -math.inf)
            # Clients' names hide no line of the hub's own channels.
            is_full = len(self._at) >= limits.MOST_SAID and name not in (
                CONTROL,
                PRESENCE,
            )
            if now - at < limits.SAID or is_full:
                return
            self._at[name, text] = now
        say(log, level, text, *args)
