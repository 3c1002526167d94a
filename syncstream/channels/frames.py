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
    """A subscription's chunks for a response: all that is there makes one.

    Not a generator, and none around it: each would be a piece of the C stack, which
    greenlets copy twice for every event.

    Args:
        subscription: It is read.
        encode: Returns the bytes of an item.
        is_shared: Others get the same bytes at the same time, see `Reading.poll`.
        scope: The response's stream.

    Attributes:
        events: How many have been in its chunks.
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
        self._is_registered = False  # its waiter, where it was at the end
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
        """Wait for what is new; return it as bytes that others share.

        The path of each event: ``None`` where it takes more than that.
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
        # Under gevent it takes the lock once for each event. (Threads may run before
        # all of a batch has come.)
        is_eager = waiter.gevent_hub is not None
        while True:
            if not self._is_registered:
                if reading is None or subscription.reason is not None:
                    return None
                found = reading.poll(waiter, is_eager=is_eager)
                if found is None:
                    return None
                chunk, count, self._is_registered = found
                if chunk:
                    self.events += count
                    reading.windows.delivered += count
                    return chunk
            self._is_registered = False
            try:
                waiter.wait(None)
            except BaseException:  # a time-out's, say: it may be read again
                subscription.withdraw()
                raise
