"""One process's part of a broker: its threads, connections and sockets."""

from __future__ import annotations

import _thread
import logging
import sqlite3
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import Unavailable
from ...runtime.clock import time
from ...runtime.forks import process_key
from ...runtime.journal import report
from ...runtime.living import Living
from ...runtime.sockets import native
from ...runtime.waiting import gevent_hub
from ..log import Page
from .database import Database, Items, judged
from .files import FileTimes, Lock
from .listener import Listener
from .read import edge, page
from .threads import Job, Thread
from .writer import CLOSE, Writer, try_to_store

if TYPE_CHECKING:
    from .broker import LocalBroker

__all__ = ["Process", "paused", "processes", "spoilt"]

T = TypeVar("T")

log = logging.getLogger("syncstream.brokers.local")
processes: Living[Process] = Living()
spoilt: list[Process] = []
paused: list[Process] = []


class Process:
    """One process's part of a broker: threads, connections, sockets."""

    def __init__(self, broker: LocalBroker) -> None:
        self.key = process_key()
        self._broker = weakref.ref(broker)  # `drop` is called when it is gone
        self.path = broker.path
        self._is_private = broker.is_private
        self._timeout = broker.timeout
        self._bounds = broker.bounds
        self.health = broker.health
        self.times = FileTimes(broker.path, broker.is_private)
        # A connection to write, to read, to hear what is new; and its lock each.
        own, *self._locks = (Lock(broker.path, broker.is_private) for _ in range(3))
        self.writer = Writer(
            *(broker.path, own, broker.bounds, broker.health, self.times),
            broker.timeout,
        )
        self._history, self._news = Database(broker.path), Database(broker.path)
        self._reader = Thread(broker.path, self._answer)
        self._reading = native(_thread, "allocate_lock")()
        self._listener: Listener | None = None
        self._begins = native(_thread, "allocate_lock")()
        self._is_closed = False
        processes.add(self)

    # Writing.

    def publish(self, items: Items) -> list[str]:
        return self.writer.publish(items)

    def try_to_store(self, database: Database) -> None:
        """If publishing has failed, test whether it works again; with the guard."""
        if self.health.is_failing("publish"):
            began = self.health.moment()
            if try_to_store(self.path, self._locks[1], database):
                self.health.works("publish", since=began)

    # Reading.

    def _call(self, call: Callable[[], T]) -> T:
        """Make a call that may block; under gevent, in the reader's thread."""
        if gevent_hub() is None:
            return call()
        job = Job(call=call)
        self._reader.do(job, self._timeout)
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result

    def _answer(self) -> None:
        while (job := self._reader.take()) is not None:
            assert job.call is not None
            try:
                result = job.call()
            except Exception as error:
                job.end(error=error)
            else:
                job.end(result)

    def read(self, channel: str, after: str | None, limit: int) -> Page:
        ask = partial(page, name=channel, after=after, limit=limit, bounds=self._bounds)
        return self._call(lambda: self._ask(ask))

    def edge(self, channel: str, count: int) -> tuple[str, str]:
        ask = partial(edge, name=channel, count=count, bounds=self._bounds)
        return self._call(lambda: self._ask(ask))

    def _ask(self, read: Callable[[sqlite3.Connection], T]) -> T:
        self._acquire(self._reading, self._timeout)
        try:
            if self._is_closed:
                raise Unavailable("local: is closed")
            with (
                judged(self.health, "read", self.path),
                self._opened(self._history, self._locks[0]),
            ):
                try:
                    return read(self._history.connection)
                except (TypeError, ValueError) as error:
                    failure = error  # of one channel: others can be read
            raise Unavailable(
                f"{self.path}: a row has foreign types, and must be removed: {failure}"
            ) from failure
        finally:
            self._reading.release()

    @contextmanager
    def _opened(self, database: Database, lock: Lock) -> Iterator[bool]:
        """Open a database unless it is current already; yield whether it was opened."""
        is_new = False
        while True:
            with database.guard:
                is_there = database.is_current()
                if not is_there:
                    is_new = True
                    lock.open()
                    is_there = database.open_to_read()
                if is_there:
                    yield is_new
                    return
            lock.acquire(self._timeout)
            try:
                # It may be back: another process moves it aside for a moment.
                if not database.is_current():
                    database.open()
            finally:
                lock.release()

    # Listening.

    @property
    def is_listening(self) -> bool:
        return self._listener is not None

    def listen(self) -> None:
        """Begin to announce new events, unless that has begun already."""
        if self._listener is None:
            self._call(self._listen)

    def _listen(self) -> None:
        with self._begins:
            if self._is_closed:
                raise Unavailable("local: is closed")
            if self._listener is not None:
                return
            broker = self._broker()
            if broker is None:
                return
            with judged(self.health, "listen", self.path), self.news() as (news, _):
                listener = Listener(self, broker.watched, broker.is_heir)
                listener.start(news)
            self._listener = listener

    @contextmanager
    def news(self) -> Iterator[tuple[Database, bool]]:
        """Open the listener's database; yield it, and whether it was opened now."""
        with self._opened(self._news, self._locks[1]) as is_new:
            yield self._news, is_new

    def finish_news(self) -> None:
        """Close the listener's database, at the end of the listener's thread."""
        self._news.finish(self._locks[1], CLOSE)

    # Its end.

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._is_closed = True
        try:
            listener = self._call(lambda: self._stop(timeout))
        except Unavailable:
            listener, is_done = None, False
        else:
            is_done = listener is None or listener.close(deadline)
        is_done = self._reader.close(deadline) and is_done
        if not (self.writer.close(deadline) and is_done):
            text = "%s was not closed within %s s: its threads end later"
            report(log, logging.WARNING, text, self.path, timeout)

    def drop(self) -> None:
        """Have all threads end and all files closed soon; without waiting."""
        self._is_closed = True
        if sys.is_finalizing():
            return
        # In a thread: this may be a garbage collection under any lock. If no thread can
        # be started, the process is most likely ending.
        with suppress(RuntimeError):
            native(_thread, "start_new_thread")(self._drop, ())

    def _drop(self) -> None:
        with self._begins:
            listener = self._listener
            if listener is None:
                self._news.finish(self._locks[1], CLOSE)
        with self._reading:
            self._history.finish(self._locks[0], CLOSE)
        if listener is not None:
            listener.end()
        self._reader.end()
        self.writer.end()

    def _stop(self, timeout: float) -> Listener | None:
        """Close the databases for reading; return the listener, which is the last."""
        self._acquire(self._begins, timeout)
        try:
            listener = self._listener
            if listener is None:
                self._news.finish(self._locks[1], CLOSE)
        finally:
            self._begins.release()
        self._acquire(self._reading, timeout)
        try:
            self._history.finish(self._locks[0], CLOSE)
        finally:
            self._reading.release()
        return listener

    def _acquire(self, lock: Any, timeout: float | None) -> None:
        if not lock.acquire(True, -1.0 if timeout is None else timeout):
            raise Unavailable(f"{self.path} was not available within {timeout} s")

    # Forks.

    def pause(self) -> None:
        """Close the files when no thread uses them, and keep them closed."""
        # A lock of its own: our threads may be waiting for the others.
        lock = Lock(self.path, self._is_private)
        is_held = False
        if self.has_files:
            with suppress(OSError, Unavailable):  # close without it, as `finish` does
                lock.open()
                is_held = lock.hold(CLOSE)
        try:
            for database in self._databases:
                database.guard.acquire()
                try:
                    database.close()
                except sqlite3.Error as error:
                    text = (
                        "%s could not be closed before a fork: the child cannot use it"
                    )
                    report(log, logging.ERROR, text, self.path, error=error)
        finally:
            if is_held:
                lock.release()
            lock.close()

    def resume(self) -> None:
        """Let the files be opened again, in the thread that called `pause`."""
        for database in self._databases:
            with suppress(RuntimeError):  # `pause` was interrupted before this guard
                database.guard.release()

    @property
    def _databases(self) -> tuple[Database, ...]:
        return self.writer.database, self._history, self._news

    @property
    def has_files(self) -> bool:
        """Whether SQLite has some of the files open."""
        return any(database.is_open for database in self._databases)

    def let_go(self) -> None:
        """Close all descriptors but SQLite's."""
        for lock in self._locks:
            lock.close()
        self.writer.let_go()
        if self._listener is not None:
            self._listener.let_go()
