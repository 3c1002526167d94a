"""Clients at the same position of a channel, served by one read."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..channels.options import Failed, NotShared
from ..channels.subscription import Subscription
from ..errors import Unavailable
from ..runtime.clock import time
from ..streams.async_feed import AsyncFeed
from .connection import chunked
from .contract import Feed, Loop, subscription_of
from .lanes import Lane

if TYPE_CHECKING:
    from .client import Client

__all__ = ["Group"]
STUCK = 60.0  # seconds for one job of a lane; then the clients that wait are ended
RETRY_EVERY = 1.0  # seconds between two reads of a broker that is down


class Group:
    """The clients who are at one place, its leader's; or one that is by itself.

    Attributes:
        clients: By descriptor.
        key: Where others find it, ``None`` if nobody may join it.
        terms: Those of the first; in what matters here they are all the same.
        moved: When its clients got something last, `time.monotonic`.
        events, bytes: What each of them would have got that was there from the
            beginning.
    """

    __slots__ = (
        *("_loop", "asked", "bucket", "bytes", "clients", "events", "is_asking"),
        *("is_chunked", "is_shared", "is_woken", "key", "lane", "leader", "moved"),
        *("retry_at", "terms"),
    )

    gevent_hub: None = None

    def __init__(
        self,
        loop: Loop,
        leader: Feed,
        client: Client,
        key: Hashable = None,
        *,
        moved: float | None = None,
    ) -> None:
        self._loop = loop
        self.leader = leader
        self.key = key
        self.is_shared = key is not None
        self.terms, self.is_chunked = client.terms, client.is_chunked
        self.clients: dict[int, Client] = {}
        self.events = self.bytes = 0
        self.is_asking = False  # a lane reads for it
        self.is_woken = False  # meanwhile
        self.retry_at = 0.0  # not before; 0: at any time
        self.lane: Lane | None = None  # the one that reads for it, or was the last to
        self.asked = 0.0  # when it was asked to
        self.moved = time.monotonic() if moved is None else moved
        self.bucket = 0
        loop.wheel.add(self, self.next_time())

    def is_at(self, other: Subscription) -> bool:
        """Tell whether a plain subscription is at its clients' place for certain."""
        return self._may_send() and other.is_where(subscription_of(self.leader))

    @property
    def is_empty(self) -> bool:
        """Whether it has no clients, and no lane reads for it."""
        return not (self.clients or self.is_asking)

    def wake(self) -> bool:
        self._loop.call(self.turn, self)
        return True

    def add(self, client: Client) -> None:
        self.clients[client.fd] = client
        client.group = self
        client.events -= self.events
        client.bytes -= self.bytes

    def remove(self, client: Client) -> None:
        del self.clients[client.fd]
        self.left(client)

    def left(self, client: Client) -> None:
        """Handle that a client has been removed."""
        client.group = None
        client.events += self.events
        client.bytes += self.bytes
        if self.clients:
            return
        try:
            self._loop.meeting.forget(self)
        except BaseException:  # try twice: nothing else would forget it
            self._loop.meeting.forget(self)
            raise

    def let_go(self) -> None:
        """Stop new events from waking it."""
        if self.is_shared:
            self.leader.detach(None)
        else:
            self.leader.withdraw()

    def turn(self) -> None:
        """Send new events, or have a lane read them, or wait."""
        self.is_woken = True
        if not self._may_send() or time.monotonic() < self.retry_at:
            return
        leader = self.leader
        found: tuple[bytes, int, bool] | None = None
        if isinstance(leader, AsyncFeed):
            try:
                found = leader.poll()
            except BaseException as error:
                self._fail(error)
                return
        elif leader.is_plain:
            found = leader.poll()
        if found is None:
            lanes = self.terms.lanes
            lane = lanes.users if self.leader.has_user_code else lanes.reads
            self._loop.do(lane, self._ask, self)
            # The lane's result and later wakes reach the loop after these lines.
            self.is_asking, self.is_woken = True, False
            self.lane, self.asked = lane, time.monotonic()
            self._loop.wheel.add(self, self.next_time())
            return
        chunk, count, is_last = found
        if chunk:
            self.send(chunk, count)
            if not is_last:
                self._loop.again(self.turn, self)
        elif not self.is_shared:
            self._loop.meeting.join(self)

    def _may_send(self) -> bool:
        # While a lane reads, the leader is ahead of its clients.
        if self.is_asking:
            return False
        if self.is_shared:
            return bool(self.clients)
        # Its only client may have to accept the rest of a chunk first.
        return any(client.rest is None for client in self.clients.values())

    def _ask(self) -> None:
        """Read, which may call the broker and the application; in a lane."""
        told: Any
        try:
            told = subscription_of(self.leader).step()
        except BaseException as error:
            told = error
        if self.leader.has_user_code:
            self.terms.give_back()
        self._loop.call(partial(self._told, told), self)

    def _told(self, told: Any) -> None:
        self.is_asking = False
        if not self.clients:
            self.let_go()
            return
        if isinstance(told, Unavailable):
            self._retry(time.monotonic() + RETRY_EVERY)
            self.terms.lanes.say(
                logging.DEBUG, "a channel cannot be read yet: %s", told
            )
            return
        if isinstance(told, NotShared):
            for client in tuple(self.clients.values()):
                self._loop.guard(client, partial(self._leave_group, client))
            return
        if isinstance(told, Failed):
            told = told.error
        if isinstance(told, BaseException):
            self._fail(told)
            return
        chunk, count, when = told
        if chunk:
            self.send(chunk, count)
            self._loop.again(self.turn, self)
        elif when is not None:
            self._retry(when)
        elif self.is_woken:  # after the lane had read
            self.turn()
        elif not self.is_shared:
            self._loop.meeting.join(self)

    def _fail(self, error: BaseException) -> None:
        for client in tuple(self.clients.values()):
            self._loop.guard(client, partial(client.fail, error))

    def _leave_group(self, client: Client) -> None:
        alone = self._loop.meeting.part(client)
        self._loop.again(alone.turn, alone)

    def _retry(self, when: float) -> None:
        self.retry_at = when
        self._loop.wheel.add(self, self.next_time())

    def send(self, data: bytes, count: int = 0) -> None:
        """Send it to all; who cannot take all of it goes on by itself."""
        framed = chunked(data) if self.is_chunked else data
        self.moved = time.monotonic()
        self.events += count
        self.bytes += len(data)
        self.leader.count(count * len(self.clients))
        loop = self._loop
        try:
            rest = loop.sender.send_to_all(self.clients, framed)
        except BaseException as error:
            loop.cut(self, error)
            loop.replace_sender()
            return
        for fd, taken in rest:
            client = self.clients[fd]
            try:
                if taken >= 0:
                    loop.lag(client, memoryview(framed)[taken:])
                elif -taken in (errno.EAGAIN, errno.ENOBUFS):
                    loop.lag(client, memoryview(framed))
                else:
                    loop.ends.hung_up(client)
            except BaseException as error:
                loop.cut(client, error)

    # Its times: see `Wheel`.

    def _let_clients_go(self) -> None:
        """End all clients, which would only get keepalives; they may reconnect."""
        text = (
            "events for %d subscribers could not be read within %g s (a slow conflate,"
            " on_gap or broker?): their streams are ended, and they reconnect"
        )
        self.terms.lanes.say(logging.ERROR, text, len(self.clients), STUCK)
        for client in tuple(self.clients.values()):
            self._loop.guard(client, partial(self._loop.ends.end, client, "error"))

    def next_time(self) -> float:
        keepalive = self.terms.keepalive
        due = math.inf if keepalive is None else self.moved + keepalive
        return min(due, self._stuck_at(), self.retry_at or math.inf)

    def _stuck_at(self) -> float:
        """Return when its lane has been at one thing for too long; maybe never."""
        if self.lane is None or not self.is_asking:
            return math.inf
        return max(self.asked, self.lane.began) + STUCK

    def due(self, now: float) -> None:
        if not self.clients:
            return
        if now >= self._stuck_at():
            self._let_clients_go()
            return
        if self.retry_at and now >= self.retry_at:
            self.retry_at = 0.0
            self.turn()
        keepalive = self.terms.keepalive
        if keepalive is not None and now - self.moved >= keepalive:
            leader = self.leader
            is_whole = not isinstance(leader, AsyncFeed) or leader.is_whole
            if self._may_send() and is_whole:
                self.send(self.terms.comment)
            self.moved = now
        if self.clients:
            self._loop.wheel.add(self, self.next_time())
