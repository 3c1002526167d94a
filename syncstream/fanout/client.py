"""A client of the loop: its connection, its unsent bytes, its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..channels import limits
from ..errors import Closed
from ..runtime.clock import time
from ..runtime.process import Process, Served
from ..runtime.sockets import GRACE, acknowledged, give_up_after, queued
from ..streams.async_feed import AsyncFeed
from ..streams.capacity import Place
from ..streams.links import Link
from ..streams.monitor import FROZEN
from .contract import Feed, Loop, subscription_of
from .lanes import Job, Lanes, run_safely

if TYPE_CHECKING:
    from .group import Group

__all__ = ["Client", "Terms"]


LastWords = tuple[bytes, bool]
"""As from `AsyncFeed.last_words`."""


class _Referable:
    """Has room for weak references: Python 3.10 makes none for a class with slots."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True)
class Terms(_Referable):
    """The settings that many clients share; equal ones are kept once.

    Attributes:
        lanes: The lanes for work that the loop must not do.
        process, served: The places where their streams are counted.
        keepalive, send_timeout: Seconds, ``None`` for no limit.
        retry: The minimum reconnection time, in milliseconds.
        comes_back: Whether they reconnect after a normal end, as EventSources do.
        reasons: The reasons for which an application may end a stream.
        before_wait: Hooks that release resources after application code has run.
        comment: The keepalive, in the form that these clients read.
        finish: The last bytes of a finished stream, unframed.
        drain: Seconds for which they may go on when their server is to stop.
    """

    lanes: Lanes
    process: Process
    served: Served
    keepalive: float | None
    send_timeout: float | None
    retry: int
    comes_back: bool
    reasons: frozenset[str]
    before_wait: tuple[Callable[[], object], ...] = ()
    comment: bytes = b": keepalive\n\n"
    finish: bytes = b""
    drain: float = 0.0

    def give_back(self) -> None:
        """Call the hooks; a failure of one does not affect the others."""
        for hook in self.before_wait:
            try:
                hook()
            except BaseException as error:
                text = "a before_wait hook failed: connections may stay occupied"
                self.lanes.say(logging.ERROR, text, error=error)


class Client:
    """One connection, and the feed that is sent to it.

    It takes the place of a waiting thread: new events, and the end of the feed, wake it
    (see `waiter.Wakeable`).

    Many methods: it is what the loop serves, and for those who have its stream it is
    that stream.

    Args:
        loop: The loop that will serve it.
        fd: The connection's descriptor, which the loop owns from now on.
        feed: A subscription that has begun, or an asynchronous source.
        terms: From `Fanout.prepare`.
        label: The method and path, for the log.
        is_chunked: Whether the response is chunked.
        began, deadline: The stream's beginning and maximum end, `time.monotonic`.
        callbacks: The application's callbacks for the end.
        place: The stream's place, which is freed at its end.
        events, bytes: The events and bytes sent so far, including those of the head.
    """

    __slots__ = (
        *("_loop", "_offer", "acknowledged", "answer_by", "began", "bucket"),
        *("bytes", "callbacks"),
        *("deadline", "early", "events", "fd", "feed", "group", "is_chunked", "label"),
        *("last", "place", "reason", "rest", "settles_at", "since", "terms"),
        "was_woken",
    )

    gevent_hub: None = None  # `wake_all` calls `wake`
    scope: None = None  # `Frames` compares it, and refuses a second reader

    def __init__(
        self,
        loop: Loop,
        fd: int,
        feed: Feed,
        terms: Terms,
        *,
        label: str,
        is_chunked: bool = False,
        began: float,
        deadline: float = math.inf,
        callbacks: tuple[Callable[[], object], ...] = (),
        place: Place | None = None,
        events: int = 0,
        bytes: int = 0,
    ) -> None:
        self._loop = loop
        self._offer = [loop]  # see `claim`
        self.fd = fd
        self.feed = feed
        self.terms = terms
        self.label = label
        self.is_chunked = is_chunked
        self.began = began
        self.deadline = deadline
        self.callbacks = callbacks
        self.place = place
        self.events, self.bytes = events, bytes  # without its group's: see Group
        self.reason: str | None = None
        self.early: str | None = None  # an end that came before the loop had it
        # After a failure: the last bytes, and whether the end is in order behind them.
        self.last: LastWords | None = None
        self.was_woken = False  # before the loop had it
        self.group: Group | None = None  # always, from `_add` to its end
        self.rest: memoryview | None = None  # the part of a chunk still to be written
        self.since = 0.0  # when it last accepted data, or was first seen not to
        self.acknowledged: int | None = None
        self.answer_by: float | None = None  # the deadline while `authorize` runs
        self.settles_at = math.inf  # when to set its send timeout in the kernel
        self.bucket = 0

    @property
    def is_given(self) -> bool:
        """Whether the loop owns its descriptor, or has owned it."""
        return self in self.terms.served.parked or self.reason is not None

    @property
    def has_news(self) -> bool:
        """Whether events or an end came before the loop had it."""
        return self.was_woken or self.early is not None

    def __call__(self) -> Client | None:
        """Return itself while it lives: it is the ``reader`` of its feed."""
        return self if self.reason is None else None

    def claim(self) -> bool:
        """Return ``True`` to one caller only: the loop, or code that failed to add it.

        It is one atomic step, so that the descriptor has one owner.
        """
        with suppress(IndexError):
            self._offer.pop()
            return True
        return False

    def wake(self) -> bool:
        if self.reason is None:
            self._loop.call(self.turn, self)
        return True

    def turn(self) -> None:
        """Look for an end or new events, in the loop."""
        if self.reason is not None:
            return
        reason = self.feed.reason
        if reason is not None:
            self._loop.ends.end(
                self, reason if reason in self.terms.reasons else "closed"
            )
        elif self.group is None:
            self.was_woken = True
        elif not self.group.is_shared:
            self.group.turn()

    def stop(self, reason: str = "closed") -> None:
        """End it, from any thread."""
        self._loop.call(partial(self._loop.ends.end, self, reason), self)

    def shut_down(self, since: float, until: float) -> None:
        """End it, or let finite work go on, as its server stops; from any thread.

        A client that takes nothing ends soon: its server must not wait for it.
        """
        now = time.monotonic()
        is_frozen = self.rest is not None and now - max(self.since, since) >= FROZEN
        if is_frozen or now >= min(until, since + self.terms.drain):
            self.stop("shutdown")

    def on_close(self, callback: Callable[[], object]) -> None:
        """Add a callback for its end; from any thread."""
        self._loop.call(partial(self._add_callback, callback), self)

    def link(self, link: Link) -> None:
        """Have a link closed at its end; from any thread."""
        if isinstance(self.feed, AsyncFeed):
            self.feed.link(link)
        else:
            self.on_close(link.close)

    @property
    def is_finishing(self) -> bool:
        """Whether it has ended, and its source has yet to."""
        return self.reason is not None and isinstance(self.feed, AsyncFeed)

    def _add_callback(self, callback: Callable[[], object]) -> None:
        if self.reason is None:
            self.callbacks = (*self.callbacks, callback)
        else:
            self.terms.lanes.users.do(callback)

    def is_stuck(self, now: float) -> bool:
        """Tell whether it lags, and has taken nothing for its send timeout."""
        limit = self.terms.send_timeout
        # A Unix socket acknowledges nothing: its queue, that we fill, is read.
        taken = acknowledged(self.fd) or queued(self.fd)
        if taken is not None and taken != self.acknowledged:
            if self.acknowledged is not None:
                self.since = now
            elif limit is not None:  # if it was long ago, we were stopped ourselves
                self.since = max(self.since, now - limit / 2)
            self.acknowledged = taken
        return limit is not None and now - self.since >= limit

    # Its times: see `Wheel`.

    def next_time(self) -> float:
        return min(self.deadline, self.feed.ask_again_at, self.settles_at)

    def due(self, now: float) -> None:
        if self.reason is not None:
            return
        if now >= self.settles_at:
            # Only now, when most of the short-lived clients have left.
            self.settles_at = math.inf
            give_up_after(self.fd, (self.terms.send_timeout or 0.0) + GRACE)
        if now >= self.deadline:
            self._loop.ends.end(self, "max_duration")
        elif self.answer_by is not None:
            if now >= self.answer_by:
                self._loop.ends.end(self, "denied")
                text = (
                    "authorize of %s has not answered within %g s: the client is denied"
                )
                self.terms.lanes.say(logging.WARNING, text, self.label, limits.ANSWER)
            else:  # its job waits behind others, which may never return
                self.terms.lanes.asks.hurry()
                again = min(self.answer_by, now + limits.ANSWER / 4)
                self._loop.wheel.add(self, min(self.deadline, again))
        elif now >= self.feed.ask_again_at:
            self.answer_by = now + limits.ANSWER
            self._loop.do(self.terms.lanes.asks, self._ask_again, self)
            self._loop.wheel.add(self, min(self.deadline, now + limits.ANSWER / 4))
        else:
            self._loop.wheel.add(self, self.next_time())

    def _ask_again(self) -> None:
        """Call ``authorize``; in the crew."""
        if self.reason is not None:  # it has ended meanwhile
            return
        try:
            subscription_of(self.feed).ask()
        except BaseException as error:  # a sys.exit() ends nobody else
            self._loop.call(partial(self.fail, error), self)
        else:
            self._loop.call(self._again, self)
        finally:
            self.terms.give_back()

    def _again(self) -> None:
        if self.reason is None:  # otherwise the answer came too late
            self.answer_by = None
            self._loop.wheel.add(self, self.next_time())
            self.turn()

    # Its end.

    def fail(self, error: BaseException) -> None:
        """End it because its feed has ended or failed; in the loop."""
        if not isinstance(self.feed, AsyncFeed) or isinstance(error, Closed):
            self._loop.ends.fail(self, error)
            return
        message = self.feed.describe(error)
        self.terms.lanes.say(logging.ERROR, message, self.label, error=error)
        if self.feed.words_are_users:
            words = partial(self._find_last_words, error)
            self._loop.do(self.terms.lanes.users, words, self)
        else:
            self._end_failed(self.feed.last_words(error))

    def _find_last_words(self, error: BaseException) -> None:
        """Call ``on_error``; in the lane of application code."""
        assert isinstance(self.feed, AsyncFeed)
        last = self.feed.last_words(error)
        self.terms.give_back()
        self._loop.call(partial(self._end_failed, last), self)

    def _end_failed(self, last: LastWords) -> None:
        self.last = last
        self._loop.ends.end(self, "error")

    def leave(self) -> None:
        """Free its place, count it, and leave its channels; in the loop.

        What calls the broker or the application is left to lanes.
        """
        reason, terms = str(self.reason), self.terms
        seconds = time.monotonic() - self.began
        if not isinstance(self.feed, AsyncFeed):  # its source still has it
            run_safely(self._leave_place)
        for step in (
            partial(terms.process.count, reason, seconds, self.events, self.bytes),
            partial(self._part, reason, seconds),
        ):
            run_safely(step)  # a failure must not prevent the other steps

    def _leave_place(self) -> None:
        if self.place is not None:
            self.place.release()

    def _part(self, reason: str, seconds: float) -> None:
        try:
            if isinstance(self.feed, AsyncFeed):  # all else comes after its end
                self.feed.cancel(partial(self._source_ended, reason, seconds))
                return
            if self.feed.announcement is None:
                self._close(reason, seconds, self.terms.lanes.ends.do)
            else:  # its "leave" is published by a broker, which may be slow
                close = partial(self._close, reason, seconds, lambda rest: rest())
                job = Job(close, lambda error: self._forget(seconds))
                self.terms.lanes.reads.do(job)
        except BaseException:  # otherwise it would count as open for ever
            self._forget(seconds)
            raise

    def _source_ended(self, reason: str, seconds: float) -> None:
        run_safely(self._leave_place)
        self._close(reason, seconds, self.terms.lanes.ends.do)

    def _close(
        self,
        reason: str,
        seconds: float,
        do: Callable[[Callable[[], object]], object],
    ) -> None:
        """Leave the channels.

        Args:
            reason, seconds: Why it has ended, and after how long.
            do: Does the broker's part.
        """
        is_left = True
        try:
            try:
                if not isinstance(self.feed, AsyncFeed):
                    rest = self.feed.part(reason)
                    if rest is not None:
                        do(rest)
            except BaseException as error:
                text = "the subscription of %s could not be closed, it may seem present"
                self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
            # Break the reference cycle, so that no garbage collection is needed.
            self.feed.detach(None)
            self.feed.reader = None
            if self.callbacks:
                finish = partial(self._finish, seconds)
                job = Job(finish, lambda error: self._forget(seconds))
                self.terms.lanes.users.do(job)
                is_left = False
        except BaseException as error:
            text = "the on_close callbacks of %s cannot be called"
            self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
        finally:
            if is_left:
                self._forget(seconds)

    def _finish(self, seconds: float) -> None:
        """Call the application's callbacks; in the lane of application code."""
        callbacks, self.callbacks = self.callbacks, ()
        try:
            for callback in callbacks:
                try:
                    callback()
                except BaseException as error:
                    text = "an on_close callback of %s failed"
                    self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
            self.terms.give_back()
        finally:
            self._forget(seconds)

    def _forget(self, seconds: float) -> None:
        self.terms.served.parked.discard(self)
        self.terms.lanes.say(  # the process's exit waits for this line
            logging.DEBUG,
            "%s ended: %s, %.3f s, %d events, %d bytes",
            *(self.label, self.reason, seconds, self.events, self.bytes),
        )
