"""The loop of a listener: it listens until that fails, pauses, and listens anew.

It is the same for every engine: how long the pauses are, what is said of a failure, how
it ends, and who waits for that. What the engine does of it is a `Source`.
"""

from __future__ import annotations

import logging
from random import SystemRandom
from typing import Protocol

from ..errors import BrokerError
from ..runtime.clock import time
from ..runtime.waiter import Turn
from ..runtime.waiting import say
from .health import Health

__all__ = ["Mark", "Source", "Stopped", "Tail", "jitter"]

BACKOFF = 0.05, 2.0  # seconds: the pause after a failure, and the longest of a row

# Neither the application's random numbers, which it may have seeded, nor those of the
# process that forked: workers of one seed would all ask at the same moments.
jitter = SystemRandom().uniform


class Stopped(Exception):
    """The listener is to end."""


class Source(Protocol):
    """An engine's part of a listener: all but the last are called by its thread."""

    def listen(self) -> None:
        """Connect, and tell the sink what comes, until that fails.

        Raises:
            Stopped: It is to end.
            BrokerError: The engine fails.
            Exception: The sink does, or we.
        """

    def lose(self) -> None:
        """Let go of what was connected: what comes now is not told."""

    def rest(self, seconds: float) -> None:
        """Wait.

        Raises:
            Stopped: It is to end.
        """

    def leave(self) -> None:
        """Close all that it has: it ends."""


class Tail:
    """The loop of one listener, and those who wait for its end.

    Args:
        name: Of what it listens to, for log lines.
        health: Is told whether it listens.
        log: For what fails unexpectedly.
        server: As for `Health`.
    """

    def __init__(
        self, name: str, health: Health, log: logging.Logger, *, server: str = ""
    ) -> None:
        self._name = name
        self._health = health
        self._log = log
        self._server = server
        self._serves_since: float | None = None  # in this attempt
        self._end = Mark()

    def run(self, source: Source) -> None:
        """Listen, until the source is stopped."""
        try:
            self._follow(source)
        except Stopped:
            pass
        finally:
            try:
                source.leave()
            finally:
                self._end.set()

    def _follow(self, source: Source) -> None:
        first, longest = BACKOFF
        pause = first
        while True:
            self._serves_since = None
            reason = self._listen(source)
            try:
                source.lose()
            except Exception as error:  # it listens anew without that, too
                text = "%s: the listener could not let go"
                say(self._log, logging.ERROR, text, self._name, error=error)
            self._health.fails("listen", reason, server=self._server)
            if self._has_served(longest):  # then it asks no more often than without
                pause = first
            source.rest(jitter(pause / 2, pause))
            pause = min(2 * pause, longest)

    def _listen(self, source: Source) -> str:
        """Listen; return why it does not any more."""
        try:
            source.listen()
        except Stopped:
            raise
        except BrokerError as error:
            return str(error)
        except Exception as error:  # or it would be the end of all news
            text = "%s: the listener has failed, and begins anew"
            say(self._log, logging.ERROR, text, self._name, error=error)
            return repr(error)
        raise AssertionError("a source ends by Stopped")

    def _has_served(self, seconds: float) -> bool:
        since = self._serves_since
        return since is not None and time.monotonic() - since >= seconds

    def serves(self, since: int) -> None:
        """Take note that all that has come was told.

        Args:
            since: The `Health.moment` before it was looked for.
        """
        if self._serves_since is None:
            self._serves_since = time.monotonic()
        self._health.works("listen", since=since, server=self._server)

    def await_end(self, deadline: float | None) -> bool:
        """Wait for its end, of a source that was told to; ``False``: not in time."""
        return self._end.wait(deadline)


class Mark:
    """A point that is reached once, and whoever waits for that; from any thread."""

    def __init__(self) -> None:
        self.is_set = False
        self._turns: list[Turn] = []

    def set(self) -> None:
        self.is_set = True
        turns, self._turns = self._turns, []
        for turn in turns:
            turn.end()

    def wait(self, deadline: float | None) -> bool:
        """Wait, until a time of `time.monotonic`; ``False``: it was not reached."""
        if self.is_set:
            return True
        turn = Turn()
        self._turns.append(turn)
        # Looked at after that: it ends those who wait after it is set.
        return self.is_set or turn.wait(deadline)
