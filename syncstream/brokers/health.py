"""Whether a broker works, told to its sink: once that it is down, once that it is up.

A broker works in several ways: it is published to, read, listened to, each by a server
or more. It is down while one of them fails. A way that has failed works again when
something shows it that began after the failure was noted: an answer, or an event, that
was under way by then may be of a time before.
"""

from __future__ import annotations

import _thread
import logging

from ..runtime.sockets import native
from ..runtime.waiting import say
from .contract import Sink
from .process import PerProcess

__all__ = ["Health"]


class Health:
    """From any thread, without waiting; each process has failures of its own.

    What the sink was told is known to forked children, too: one whose parent was down
    says so when it works.

    Args:
        log: For a sink that fails.

    Attributes:
        sink: Who is told; ``None``: nobody yet, or any more.
    """

    def __init__(self, log: logging.Logger) -> None:
        self.sink: Sink | None = None
        self._log = log
        self._is_up = True  # as the sink was told, here or in the parent of a fork
        self._noted = 0  # failures so far
        self._parts: PerProcess[Health, _Failing] = PerProcess(self, lambda part: None)

    def moment(self) -> int:
        """Return now, for `works`; before that begins which is to show it."""
        return self._noted

    def fails(self, way: str, reason: str, *, server: str = "") -> None:
        """Take note that a way fails.

        Args:
            way: "publish", "read", "listen", "connect" …
            reason: For the log.
            server: The one that fails, if the broker has several.
        """
        here = self._here()
        with here.lock:
            self._noted += 1
            here.failures[way, server] = self._noted
            self._tell(False, reason)

    def works(self, *ways: str, since: int, server: str = "") -> None:
        """Take note that ways work.

        Args:
            ways: As given to `fails`.
            since: The `moment` before that began which shows it: what has failed later
                may fail yet.
            server: Likewise.
        """
        here = self._here()
        if self._is_up and not here.failures:
            return
        with here.lock:
            for way in ways:
                if here.failures.get((way, server), since) <= since:
                    here.failures.pop((way, server), None)
            if not here.failures:
                self._tell(True, "all that is asked for works")

    def is_failing(self, way: str, *, server: str = "") -> bool:
        return (way, server) in self._here().failures

    def _here(self) -> _Failing:
        return self._parts.get() or self._parts.begin(_Failing())

    def _tell(self, is_up: bool, reason: str) -> None:
        """Tell the sink, if it has not been told so; under the lock."""
        if is_up == self._is_up or self.sink is None:
            return
        self._is_up = is_up
        try:
            self.sink.state(is_up, reason)
        except Exception as error:  # ours goes on, whoever is told
            say(self._log, logging.ERROR, "the sink has failed", error=error)


class _Failing:
    """What fails in one process.

    Attributes:
        failures: The number of each one's last failure, by way and server.
    """

    def __init__(self) -> None:
        # Reentrant: a garbage collection may enter it. Native: threads of several
        # hubs meet in it.
        self.lock = native(_thread, "RLock")()
        self.failures: dict[tuple[str, str], int] = {}
