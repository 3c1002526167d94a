"""`Authorization`: asks an application whether a subscription may be read."""

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
    """When a subscription's `authorize` was asked, and when it is to be.

    Args:
        function: Tells whether it may be read.
        every: Seconds after which it is asked again; ``None``: never.
    """

    __slots__ = ("_asked", "_every", "_function")

    def __init__(self, function: Authorize, every: float | None) -> None:
        self._function = function
        self._every = every
        self._asked: float | None = None  # `None`: it was not yet

    @property
    def ask_again_at(self) -> float:
        """When it is to be asked again, `time.monotonic`; maybe never."""
        if self._every is None or self._asked is None:
            return math.inf
        return self._asked + self._every

    def check(self, subscription: Subscription) -> None:
        """Ask here, if it is time; end the subscription where no answer comes in time.

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
        """Ask whether it may go on, and end it if it may not.

        If that raises, who asks may not read, and it is asked again.

        Raises:
            TypeError: It has returned something that has to be awaited, iterated or
                called.
        """
        now = time.monotonic()
        is_allowed: Any = self._function(subscription)
        # Those are true, whatever would come of them: what is to be awaited, a
        # generator, a method that was not called.
        if isinstance(is_allowed, (Awaitable, Iterator)) or callable(is_allowed):
            if isinstance(is_allowed, Coroutine):
                is_allowed.close()
            raise TypeError(
                f"authorize must be a plain function that returns bool, got"
                f" {self._function!r}, which has returned"
                f" {type(is_allowed).__name__}"
            )
        self._asked = now
        if not is_allowed:
            subscription.close("denied")


def _unanswered(
    reference: weakref.ref[Subscription], scope: Scope | None, watcher: Watch
) -> None:
    """End one whose `authorize` has not answered in time; in its watch."""
    subscription = reference()
    if subscription is None:
        return
    text = "authorize of %r has not answered in %g seconds: it is denied"
    say(log, logging.WARNING, text, subscription.channels, limits.ANSWER)
    # Elsewhere: who waits for the watch is not to wait for a broker.
    elsewhere(watcher, partial(subscription.close, "denied"))
    if scope is not None:
        scope.abandon("denied")
