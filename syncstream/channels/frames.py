"""`Frames`: a subscription's chunks for a response."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..runtime.waiting import Scope
from .cursor import Item

if TYPE_CHECKING:
    from .subscription import Subscription

__all__ = ["Frames"]


class Frames:
    """A subscription's chunks for a response; each has all waiting events.

    It is not a generator, and no generator is around it: each would add to the C stack,
    which greenlets copy twice for every event.

    Args:
        subscription: The subscription.
        encode: Returns the bytes of an item.
        is_shared: Whether other subscriptions get the same bytes, see `Reading.poll`.
        scope: The response's stream.

    Attributes:
        events: The number of events in its chunks so far.
    """

    __slots__ = (
        *("_encode", "_is_registered", "_is_shared", "_scope", "_subscription"),
        "events",
    )

    def __init__(
        self,
        subscription: Subscription,
        encode: Callable[[Item], bytes],
        is_shared: bool,
        scope: Scope | None,
    ) -> None:
        self._subscription = subscription
        self._scope = scope
        self._is_registered = False  # whether new events wake its waiter
        self._encode = encode
        self._is_shared = is_shared
        self.events = 0

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> bytes:
        subscription = self._subscription
        while True:
            items = subscription.kept and subscription.take_kept()
            if not items and self._is_shared:
                chunk = self._shared(subscription)
                if chunk is not None:
                    return chunk
            items = items or subscription.await_items(None, once=self._is_shared)
            if items:
                self.events += len(items)
                return b"".join(map(self._encode, items))

    def _shared(self, subscription: Subscription) -> bytes | None:
        """Wait for new events; return them as bytes that other subscriptions share.

        This is the fast path; it returns ``None`` if the broker must be read.
        """
        reading = subscription.reading
        waiter: Any = subscription.waiter
        scope = self._scope
        if (
            waiter is None
            or scope is None
            or waiter.scope is not scope
            or waiter.runner != scope.runner
        ):
            waiter = subscription.own_waiter()
        # Under gevent, register at once: this takes the lock once for each event. (A
        # thread would run before all of a batch has come.)
        is_eager = waiter.gevent_hub is not None
        while True:
            if not self._is_registered:
                if reading is None or subscription.reason is not None:
                    return None
                found = reading.poll(waiter, is_eager=is_eager, is_delivery=True)
                if found is None:
                    return None
                chunk, count, self._is_registered = found
                if chunk:
                    self.events += count
                    return chunk
            self._is_registered = False
            try:
                waiter.wait(None)
            except BaseException:  # such as a time-out: it may be read again
                subscription.withdraw()
                raise
