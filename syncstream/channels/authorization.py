"""`Authorization`: calls ``authorize``, at the beginning and at intervals."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Awaitable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ..runtime.clock import time
from ..runtime.waiting import Scope, current_scope, say
from ..runtime.watch import Watch, elsewhere, watch
from . import limits

if TYPE_CHECKING:
    from .options import Authorize
    from .subscription import Subscription

__all__ = ["Authorization"]

log = logging.getLogger("syncstream.hub")


class Authorization:
    """The calls of a subscription's ``authorize``.

    Args:
        function: Returns whether the subscription may be read.
        every: The seconds between two calls; ``None``: it is called once.
    """

    __slots__ = ("_asked", "_every", "_function")

    def __init__(self, function: Authorize, every: float | None) -> None:
        self._function = function
        self._every = every
        self._asked: float | None = None  # the last call's time, ``None`` before it

    @property
    def ask_again_at(self) -> float:
        """The time of the next call, `time.monotonic`; infinite for none."""
        if self._every is None or self._asked is None:
            return math.inf
        return self._asked + self._every

    def check(self, subscription: Subscription) -> None:
        """Call it here if it is time; without an answer in time, end the subscription.

        Raises: Whatever the application raises.
        """
        if self._asked is not None and time.monotonic() < self.ask_again_at:
            return
        watcher = watch()
        denied = partial(
            _unanswered, weakref.ref(subscription), current_scope(), watcher
        )
        timer = watcher.call_at(time.monotonic() + limits.ANSWER, denied)
        try:
            self.ask(subscription)
        finally:
            watcher.cancel(timer)

    def ask(self, subscription: Subscription) -> None:
        """Call it, and end the subscription unless it returns true.

        If it raises, the subscription must not be read until another call succeeds.

        Raises:
            TypeError: Its result would have to be awaited, iterated or called.
        """
        now = time.monotonic()
        is_allowed: Any = self._function(subscription)
        # Such results are always true, by mistake: a coroutine, a generator, a method
        # that was not called.
        if isinstance(is_allowed, (Awaitable, Iterator)) or callable(is_allowed):
            if isinstance(is_allowed, Coroutine):
                is_allowed.close()
            raise TypeError(
                f"authorize must be a plain function that returns bool, got"
                f" {self._function!r}, which returned a {type(is_allowed).__name__}"
            )
        self._asked = now
        if not is_allowed:
            subscription.close("denied")


def _unanswered(
    reference: weakref.ref[Subscription], scope: Scope | None, watcher: Watch
) -> None:
    """End a subscription whose ``authorize`` has not answered in time; in its watch."""
    subscription = reference()
    if subscription is None:
        return
    text = "authorize of %r has not answered within %g seconds: the client is denied"
    say(log, logging.WARNING, text, subscription.channels, limits.ANSWER)
    # Elsewhere: the watch must not wait for a broker.
    elsewhere(watcher, partial(subscription.close, "denied"))
    if scope is not None:
        scope.abandon("denied")
