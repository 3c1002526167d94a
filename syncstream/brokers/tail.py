"""The loop of a listener: it listens until that fails, pauses, and listens again.

The pauses, the log lines, the end and the wait for it are the same for all engines. The
engine's part is a `Source`.
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

BACKOFF = 0.05, 2.0  # seconds: the first pause after a failure, and the longest

# Not from `random`: the application may have seeded it, or forked with its state, and
# all workers would ask at the same moments.
jitter = SystemRandom().uniform


class Stopped(Exception):
    """The listener has been told to end."""


class Source(Protocol):
    """An engine's part of a listener, its `Listener`; the thread calls its methods."""

    def listen(self) -> None:
        """Connect, and announce new events to the sink, until that fails.

        Raises:
            Stopped: The listener has been told to end.
            BrokerError: The engine failed.
            Exception: The sink or our own code failed.
        """

    def lose(self) -> None:
        """Handle the lost connection: events are not announced from now on."""

    def rest(self, seconds: float) -> None:
        """Wait before the next attempt.

        Raises:
            Stopped: The listener has been told to end.
        """

    def leave(self) -> None:
        """Close everything, because the listener ends."""


class Tail:
    """The loop of one listener.

    Args:
        name: The name of the engine's server, schema or file, for log lines.
        health: Records whether the listener works.
        log: The logger for unexpected failures.
        server: As for `Health`.
    """

    def __init__(
        self, name: str, health: Health, log: logging.Logger, *, server: str = ""
    ) -> None:
        self._name = name
        self._health = health
        self._log = log
        self._server = server
        self._serves_since: float | None = None  # when this attempt first worked
        self._end = Mark()

    def run(self, source: Source) -> None:
        """Listen, until the source is stopped."""
        try:
            self._follow(source)
        except Stopped:
            pass
        except BaseException as error:  # such as `gevent.killall`: nothing listens now
            self._health.fails("listen", repr(error), server=self._server)
            raise
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
            except Exception as error:  # it can listen again all the same
                text = "%s: the listener could not clean up, and listens again"
                say(self._log, logging.ERROR, text, self._name, error=error)
            self._health.fails("listen", reason, server=self._server)
            if self._has_served(longest):  # a short pause is no burden after that long
                pause = first
            source.rest(jitter(pause / 2, pause))
            pause = min(2 * pause, longest)

    def _listen(self, source: Source) -> str:
        """Listen; return the reason why that has ended."""
        try:
            source.listen()
        except Stopped:
            raise
        except BrokerError as error:
            return str(error)
        except Exception as error:  # go on: without a listener no event is announced
            text = "%s: the listener failed, and listens again after a pause"
            say(self._log, logging.ERROR, text, self._name, error=error)
            return repr(error)
        raise AssertionError("a source ends by Stopped")

    def _has_served(self, seconds: float) -> bool:
        since = self._serves_since
        return since is not None and time.monotonic() - since >= seconds

    def serves(self, *others: str, since: int) -> None:
        """Record that the listener has caught up: all events so far were announced.

        Args:
            others: What works with that, besides listening; see `Health.works`.
            since: The `Health.moment` before the engine was asked for them.
        """
        if self._serves_since is None:
            self._serves_since = time.monotonic()
        self._health.works("listen", *others, since=since, server=self._server)

    def await_end(self, deadline: float | None) -> bool:
        """Wait for the listener's end, after its source was told to stop.

        Args:
            deadline: Until this `time.monotonic`, ``None`` for no limit.

        Returns:
            ``False`` if it did not end in time.
        """
        return self._end.wait(deadline)


class Mark:
    """An event that happens once, and its waiters; from any thread."""

    def __init__(self) -> None:
        self.is_set = False
        self._turns: list[Turn] = []

    def set(self) -> None:
        self.is_set = True
        turns, self._turns = self._turns, []
        for turn in turns:
            turn.end()

    def wait(self, deadline: float | None) -> bool:
        """Wait until it is set, or until a `time.monotonic`: ``False`` then."""
        if self.is_set:
            return True
        turn = Turn()
        self._turns.append(turn)
        # Check again: `set` may have run just before the append.
        return self.is_set or turn.wait(deadline)
