"""An asynchronous source, for the loop of `fanout`, which reads it without waiting."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from ..errors import Closed
from ..runtime.event_loop import event_loop
from ..runtime.journal import journal
from ..runtime.waiter import Wakeable
from .async_task import CLOSE_WAIT, SourceTask
from .iteration import Iteration
from .links import Link

__all__ = ["AsyncFeed"]

log = logging.getLogger("syncstream.stream")


class AsyncFeed:
    """The items of an asynchronous source, each encoded in the task that makes it.

    The task makes the next item when the one before was given out.

    Args:
        task: The source's task. Nobody else reads it any more.
        run: The stream's iteration. The stream lives as long as this: its source may
            ask for it by `current_stream`.

    Attributes:
        reader: The client that reads it, ``None`` before and after.
        is_whole: Whether all that was given out ends where words of ours may follow.
        reason, ask_again_at, announcement, has_user_code: What it has in common with a
            `Subscription`, as the loop sees that: it ends by itself, asks nobody, is
            announced to nobody, and calls no application code when it is read.
    """

    __slots__ = (
        *("_has_asked", "_links", "_run", "_task", "_waiter", "is_whole", "reader"),
    )

    reason: None = None
    ask_again_at = math.inf
    announcement: None = None
    has_user_code = False

    def __init__(self, task: SourceTask, run: Iteration) -> None:
        self._task: SourceTask | None = task
        self._run: Iteration | None = run
        self._waiter: Wakeable | None = None
        self._has_asked = False
        self._links: deque[Link] = deque()
        self.is_whole = run.parts.output.is_whole
        self.reader: Callable[[], object] | None = None

    def detach(self, waiter: Wakeable | None) -> None:
        """Have the items wake this waiter; ``None``: the task is another's.

        Raises:
            RuntimeError: No event loop can be started.
        """
        task, run = self._task, self._run
        if waiter is not None:
            event_loop()
            assert task is not None
            assert run is not None
            task.encode = self._encode
        else:
            if task is not None:
                task.encode = None
            self._task = self._run = None
        self._waiter = waiter

    def withdraw(self) -> None:
        """Stop new items from waking the waiter: there are none without `poll`."""

    def awaits(self, waiter: Wakeable) -> bool:
        """Have the first item wake a waiter; return whether it will."""
        assert self._task is not None
        self._has_asked = True
        self._task.ask(None, waiter)
        return True

    def count(self, events: int) -> None:
        """Count events as sent: only channels count them."""

    def _encode(self, item: Any) -> tuple[bytes, bool] | None:
        """Encode an item, in its task; tell whether words of ours may follow it."""
        assert self._run is not None
        output = self._run.parts.output
        chunk = output.encode(item)
        return None if chunk is None else (chunk, output.is_whole)

    @property
    def missing(self) -> bytes:
        """What completes the last event of a source that has ended by itself."""
        return b"" if self._run is None else self._run.parts.output.missing

    def poll(self) -> tuple[bytes, int, bool]:
        """Return the next item, without waiting.

        Returns:
            The bytes, their number of events, and whether the waiter will be woken for
            the next one.

        Raises:
            Closed: The source has finished.
            BaseException: What the source has raised.
        """
        task, waiter = self._task, self._waiter
        if task is None or waiter is None:
            return b"", 0, True
        if not self._has_asked:  # the client had to take its head first
            self.awaits(waiter)
        if not task.has_answered:
            return b"", 0, True
        try:
            chunk, self.is_whole = task.take()
        except BaseException as error:
            # A wake that comes now must not find a failed source finished: its last
            # words may take a moment.
            self._waiter = None
            if isinstance(error, StopIteration):
                if self._run is not None:
                    self._run.parts.output.end_source()
                raise Closed("finished") from None
            raise
        task.ask(None, waiter)
        return chunk, 1, True

    def cancel(self, done: Callable[[], object]) -> None:
        """Cancel the source, and end the reads of what it has linked.

        Args:
            done: Called once, from another thread, when the source has ended or has
                had its time for that, and its links are closed.
        """
        task, self._task, self._waiter = self._task, None, None
        if task is None or task.is_unstarted:
            done()
            return
        try:
            task.end(partial(self._ended, task, done), CLOSE_WAIT, self._links)
        except RuntimeError as problem:  # the loop has ended, with the process
            journal().later(log, logging.DEBUG, "%s: %s", task.name, problem)
            done()

    def link(self, link: Link) -> None:
        """Have a link's reads ended with the source, and the link closed."""
        self._links.append(link)
        if self._run is None:  # it has ended
            _close_all(self._links)

    def close(self) -> None:
        """Cancel the source, without waiting for its end."""
        self.cancel(lambda: None)

    def _ended(self, task: SourceTask, done: Callable[[], object]) -> None:
        error, run, self._run = task.take_late(), self._run, None
        if error is not None and run is not None:
            text = "the source of %s failed at its end (%s)"
            # What a link that was cut makes the source raise is not its fault.
            level = logging.DEBUG if self._links else logging.ERROR
            output, reason = run.parts.output, getattr(run.stream, "reason", None)
            journal().later(log, level, text, output.label, reason, error=error)
        if not self._links:
            done()
            return

        def close() -> None:
            _close_all(self._links)
            done()

        # Not in a lane: a close may wait for what the link reads from.
        thread = threading.Thread(target=close, name="syncstream-link", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there can be no more threads
            close()

    def describe(self, error: BaseException) -> str:
        """Return the log's message for the source's error."""
        assert self._run is not None
        return self._run.describe(error)

    def last_words(self, error: BaseException) -> tuple[bytes, bool]:
        """Return what to send after the source has failed; it may call ``on_error``.

        Returns:
            As `Iteration.last_words`.
        """
        return (b"", False) if self._run is None else self._run.last_words(error)

    @property
    def words_are_users(self) -> bool:
        """Whether `last_words` calls a function of the application."""
        return self._run is not None and self._run.has_on_error

    def __del__(self) -> None:
        task = self._task
        if task is not None and self._waiter is not None and task.has_begun:
            with suppress(RuntimeError):  # the loop has ended, with the process
                task.leave()


def _close_all(links: deque[Link]) -> None:
    """Close links, the last first."""
    while links:
        try:
            link = links.pop()
        except IndexError:  # another thread was faster
            return
        try:
            link.close()
        except Exception as error:
            text = "a linked object could not be closed: %r"
            journal().later(log, logging.DEBUG, text, error)
