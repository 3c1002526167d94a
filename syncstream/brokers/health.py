"""Tells a broker's sink once when the broker goes down, and once when it is back.

A broker works in several ways: publishing, reading and listening, each with one or more
servers. It is down while one of these ways fails. A failed way works again when an
operation succeeds that began after the failure was recorded: an answer or event that
was under way before proves nothing.
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
    """The state of a broker; all methods from any thread, without waiting.

    Each process has its own failures. Forked children know the state that the sink was
    told: if the parent's broker was down, a child reports when it is back.

    Args:
        log: The logger for a sink that fails.

    Attributes:
        sink: The sink, ``None`` before `Broker.attach`.
        is_well: Nothing fails, as the sink knows: then `works` does nothing.
    """

    def __init__(self, log: logging.Logger) -> None:
        self.sink: Sink | None = None
        self._log = log
        self._is_up = True  # as told to the sink, here or in the parent of a fork
        self.is_well = True
        self._noted = 0  # the number of failures so far
        self._parts: PerProcess[Health, _Failing] = PerProcess(self, lambda part: None)

    def moment(self) -> int:
        """Return the argument ``since`` for `works`; call it before the operation."""
        return self._noted

    def fails(self, way: str, reason: str, *, server: str = "") -> None:
        """Record that a way has failed.

        Args:
            way: "publish", "read", "listen", "connect" or "heads".
            reason: The cause, for the log.
            server: The server that failed, if the broker has several.
        """
        here = self._here()
        with here.lock:
            self.is_well = False
            self._noted += 1
            here.failures[way, server] = self._noted
            self._tell(False, reason)

    def works(self, *ways: str, since: int, server: str = "") -> None:
        """Record that an operation has succeeded, which shows that ways work.

        Args:
            ways: The ways, as given to `fails`.
            since: The `moment` before the operation began; later failures stay.
            server: The server, as given to `fails`.
        """
        if self.is_well:
            return
        here = self._here()
        with here.lock:
            for way in ways:
                if here.failures.get((way, server), since) <= since:
                    here.failures.pop((way, server), None)
            if not here.failures:
                self._tell(True, "no request fails any more")
                self.is_well = self._is_up

    def is_failing(self, way: str, *, server: str = "") -> bool:
        return not self.is_well and (way, server) in self._here().failures

    def _here(self) -> _Failing:
        return self._parts.get() or self._parts.begin(_Failing())

    def _tell(self, is_up: bool, reason: str) -> None:
        """Tell the sink of a change, under the lock."""
        if is_up == self._is_up or self.sink is None:
            return
        self._is_up = is_up
        try:
            self.sink.state(is_up, reason)
        except Exception as error:  # the broker must go on
            text = "the hub could not be told whether its broker is up"
            say(self._log, logging.ERROR, text, error=error)


class _Failing:
    """The failures of one process.

    Attributes:
        failures: The number of the last failure, by way and server.
    """

    def __init__(self) -> None:
        # Reentrant: a garbage collection while it is held may take it. Native: threads
        # with different gevent hubs share it.
        self.lock = native(_thread, "RLock")()
        self.failures: dict[tuple[str, str], int] = {}
