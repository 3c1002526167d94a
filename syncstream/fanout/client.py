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
from ..channels.subscription import Subscription
from ..runtime.clock import time
from ..runtime.process import Process, Served
from ..runtime.sockets import GRACE, acknowledged, give_up_after, queued
from ..streams.capacity import Place
from .lanes import Job, Lanes, run_safely

if TYPE_CHECKING:
    from .contract import Loop
    from .group import Group

__all__ = ["Client", "Terms"]


class _Referable:
    """Has room for weak references: Python 3.10 makes none for a class with slots."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True)
class Terms(_Referable):
    """What many clients have in common; equal ones are kept once.

    Attributes:
        lanes: Do what the loop may not.
        process, served: Where their streams are counted.
        keepalive, send_timeout: Seconds, ``None`` for never.
        retry: Milliseconds, at least, after which they are to come back.
        comes_back: They take an end in good order for a break, as EventSources do.
        reasons: Why an application may end a stream.
        before_wait: What gives back, after code of the application has run, what
            should not be held.
        comment: The keepalive, in the form that these clients read.
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

    def give_back(self) -> None:
        """Call the hooks; one that fails keeps nobody waiting."""
        for hook in self.before_wait:
            try:
                hook()
            except BaseException as error:
                text = "a before_wait hook failed: connections may stay occupied"
                self.lanes.say(logging.ERROR, text, error=error)


class Client:
    """One connection, and the subscription that is sent to it.

    It stands where a thread would wait: a channel, or who ends the subscription,
    wakes it (see `waiting.Waiter`).

    Args:
        loop: The loop that is to have it.
        fd: The connection's descriptor, the loop's from now on.
        subscription: It has begun.
        terms: From `Fanout.terms`.
        label: For the log.
        is_chunked: The framing of its response.
        began, deadline: `time.monotonic`.
        callbacks: The application's; called when it has ended.
        place: Given back when it has ended, whatever the application does.
        events, bytes: What has been sent, or will be with its head.
    """

    __slots__ = (
        *("_loop", "_offer", "acknowledged", "answer_by", "began", "bucket"),
        *("bytes", "callbacks"),
        *("deadline", "early", "events", "fd", "group", "is_chunked", "label"),
        *("place", "reason", "rest", "settles_at", "since", "subscription", "terms"),
    )

    gevent_hub: None = None  # `wake_all` calls `wake`

    def __init__(
        self,
        loop: Loop,
        fd: int,
        subscription: Subscription,
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
        self.subscription = subscription
        self.terms = terms
        self.label = label
        self.is_chunked = is_chunked
        self.began = began
        self.deadline = deadline
        self.callbacks = callbacks
        self.place = place
        self.events, self.bytes = events, bytes  # less its group's: see Group
        self.reason: str | None = None
        self.early: str | None = None  # an end that came before the client itself
        self.group: Group | None = None  # always, from `_add` to its end
        self.rest: memoryview | None = None  # of a chunk that the kernel has not taken
        self.since = 0.0  # it took something then, or was seen to take nothing
        self.acknowledged: int | None = None
        self.answer_by: float | None = None  # the application's, while it is asked
        self.settles_at = math.inf  # the kernel is to be told of its send timeout then
        self.bucket = 0

    @property
    def is_given(self) -> bool:
        """Its descriptor is the loop's; or was."""
        return self in self.terms.served.parked or self.reason is not None

    def claim(self) -> bool:
        """Tell whether it is the caller's, once: the loop's, or who could not give it.

        One step, which is whole or not done: its descriptor has one owner.
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
        """Look what there is, in the loop."""
        if self.reason is not None:
            return
        reason = self.subscription.reason
        if reason is not None:
            self._loop.ends.end(
                self, reason if reason in self.terms.reasons else "closed"
            )
        elif self.group is not None and not self.group.is_shared:
            self.group.turn()

    def stop(self, reason: str = "closed") -> None:
        """End it, from any thread."""
        self._loop.call(partial(self._loop.ends.end, self, reason), self)

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call this, too, when it has ended; from any thread."""
        self._loop.call(partial(self._add_callback, callback), self)

    def _add_callback(self, callback: Callable[[], object]) -> None:
        if self.reason is None:
            self.callbacks = (*self.callbacks, callback)
        else:
            self.terms.lanes.users.do(callback)

    def is_stuck(self, now: float) -> bool:
        """Tell whether it lags, and has taken nothing for its send timeout."""
        limit = self.terms.send_timeout
        if limit is None:
            return False
        # A Unix socket acknowledges nothing: its queue, that we fill, is read.
        taken = acknowledged(self.fd) or queued(self.fd)
        if taken is not None and taken != self.acknowledged:
            if self.acknowledged is not None:
                self.since = now
            else:  # if it was long ago, we were stopped ourselves
                self.since = max(self.since, now - limit / 2)
            self.acknowledged = taken
        return now - self.since >= limit

    # Its times: see `Wheel`.

    def next_time(self) -> float:
        return min(self.deadline, self.subscription.ask_again_at, self.settles_at)

    def due(self, now: float) -> None:
        if self.reason is not None:
            return
        if now >= self.settles_at:
            # Not before: most of those who leave at once have left.
            self.settles_at = math.inf
            give_up_after(self.fd, (self.terms.send_timeout or 0.0) + GRACE)
        if now >= self.deadline:
            self._loop.ends.end(self, "max_duration")
        elif self.answer_by is not None:
            if now >= self.answer_by:
                self._loop.ends.end(self, "denied")
                text = "authorize of %s has not answered in %g seconds: it is denied"
                self.terms.lanes.say(logging.WARNING, text, self.label, limits.ANSWER)
            else:  # it waits for others, which may never come back
                self.terms.lanes.asks.hurry()
                again = min(self.answer_by, now + limits.ANSWER / 4)
                self._loop.wheel.add(self, min(self.deadline, again))
        elif now >= self.subscription.ask_again_at:
            self.answer_by = now + limits.ANSWER
            self._loop.do(self.terms.lanes.asks, self._ask_again, self)
            self._loop.wheel.add(self, min(self.deadline, now + limits.ANSWER / 4))
        else:
            self._loop.wheel.add(self, self.next_time())

    def _ask_again(self) -> None:
        """Ask the application whether it may go on; in the crew."""
        if self.reason is not None:  # since it was to be asked
            return
        try:
            self.subscription.ask()
        except BaseException as error:  # a sys.exit() ends nobody else
            self._loop.call(partial(self._loop.ends.fail, self, error), self)
        else:
            self._loop.call(self._again, self)
        finally:
            self.terms.give_back()

    def _again(self) -> None:
        if self.reason is None:  # or its answer came too late
            self.answer_by = None
            self._loop.wheel.add(self, self.next_time())
            self.turn()

    def leave(self) -> None:
        """Give back what it had of ours, and count it; in the lane of ends."""
        reason, terms = str(self.reason), self.terms
        seconds = time.monotonic() - self.began
        for step in (
            self._leave_place,
            partial(terms.process.count, reason, seconds, self.events, self.bytes),
            partial(self._part, reason, seconds),
        ):
            run_safely(step)  # one that fails keeps no other from it

    def _leave_place(self) -> None:
        if self.place is not None:
            self.place.release()

    def _part(self, reason: str, seconds: float) -> None:
        try:
            close = partial(self._close, reason, seconds)
            if self.subscription.announcement is None:
                close()
            else:  # others are told by a broker, who may take his time
                job = Job(close, lambda error: self._forget(seconds))
                self.terms.lanes.reads.do(job)
        except BaseException:  # or it would be counted for ever
            self._forget(seconds)
            raise

    def _close(self, reason: str, seconds: float) -> None:
        is_left = True
        try:
            try:
                self.subscription.close(reason)
            except BaseException as error:
                text = "the subscription of %s could not be closed"
                self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
            # It is freed as soon as nobody has it, without a garbage collection.
            self.subscription.detach(None)
            if self.callbacks:
                finish = partial(self._finish, seconds)
                job = Job(finish, lambda error: self._forget(seconds))
                self.terms.lanes.users.do(job)
                is_left = False
        except BaseException as error:
            text = "the callbacks at the end of %s cannot be called"
            self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
        finally:
            if is_left:
                self._forget(seconds)

    def _finish(self, seconds: float) -> None:
        """Call what the application wants to have called; in its lane."""
        callbacks, self.callbacks = self.callbacks, ()
        try:
            for callback in callbacks:
                try:
                    callback()
                except BaseException as error:
                    text = "a callback at the end of %s failed"
                    self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
            self.terms.give_back()
        finally:
            self._forget(seconds)

    def _forget(self, seconds: float) -> None:
        self.terms.served.parked.discard(self)
        self.terms.lanes.say(  # at the process's exit it is waited for
            logging.DEBUG,
            "%s ended: %s, %.3f s, %d events, %d bytes",
            *(self.label, self.reason, seconds, self.events, self.bytes),
        )
