"""One process's part of a broker: its threads, connections and sockets."""

from __future__ import annotations

import _thread
import logging
import os
import sqlite3
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import BrokerError, Unavailable, Uncertain
from ...runtime.clock import time
from ...runtime.journal import report
from ...runtime.sockets import native
from ...runtime.waiting import gevent_hub, say
from ..log import Page
from .database import APPLICATION, SUFFIXES, Database, Items
from .files import LOCK_TRY, Lock, said
from .listener import Listener, Peers
from .threads import Job, Thread

if TYPE_CHECKING:
    from .broker import LocalBroker

__all__ = ["Process", "paused", "processes", "spoilt"]

T = TypeVar("T")

log = logging.getLogger("syncstream.brokers.local")
_GROUP = 1 << 20  # bytes of several publishers' events in one transaction
_FRESHEN = 60.0  # seconds between two updates of the files' times
_CLOSE = 1.0  # seconds to wait for the lock when files are closed
processes: weakref.WeakSet[Process] = weakref.WeakSet()
spoilt: list[Process] = []
paused: list[Process] = []


class Process:
    """One process's part of a broker: threads, connections, sockets."""

    def __init__(self, broker: LocalBroker) -> None:
        self.pid = os.getpid()
        self._broker = weakref.ref(broker)  # `drop` is called when it is gone
        self.path = broker.path
        self._is_private = broker.is_private
        self._timeout = broker.timeout
        self._bounds = broker.bounds
        self.health = broker.health
        self._locks = [Lock(broker.path, broker.is_private) for _ in range(3)]
        self._log, self._history, self._news = (Database(broker.path) for _ in range(3))
        self._peers = Peers(broker.path)
        self._writing = native(_thread, "allocate_lock")()
        self._writer = Thread(self._write, self._leave)
        self._reader = Thread(self._answer)
        self._reading = native(_thread, "allocate_lock")()
        self._listener: Listener | None = None
        self._begins = native(_thread, "allocate_lock")()
        self._is_closed = False
        self._freshened = -inf
        processes.add(self)

    # Writing.

    def publish(self, items: Items) -> list[str]:
        with self._judged("publish"):
            return self._publish(items)

    def _publish(self, items: Items) -> list[str]:
        job = Job(items)
        if not self._write_here(job):
            self._await(job, self._writer)
        if job.error is not None:
            # Several publishers may share this error: each raises its own copy.
            raise type(job.error)(*job.error.args) from job.error.__cause__
        ids: list[str] = job.result
        return ids

    def try_to_store(self, database: Database) -> None:
        """If publishing has failed, test whether it works again; with the guard."""
        if not self.health.is_failing("publish"):
            return
        began = self.health.moment()
        lock = self._locks[2]
        lock.open()
        if not lock.try_acquire():
            return
        try:
            disk = os.statvfs(self.path)
            if disk.f_bavail * disk.f_frsize < _GROUP or not database.is_current():
                return
            execute = database.connection.execute
            execute("BEGIN IMMEDIATE")
            try:
                # Not an UPDATE to the present values, for which SQLite writes nothing.
                execute(f"PRAGMA application_id={APPLICATION}")
                execute("COMMIT")
            finally:
                database.connection.rollback()
        except (sqlite3.Error, OSError):
            return  # it still fails
        finally:
            lock.release()
        self.health.works("publish", since=began)

    def freshen(self, *others: str) -> None:
        """Keep the files' times fresh: cleaners take old files for unused ones."""
        now = time.monotonic()
        if now - self._freshened < _FRESHEN:
            return
        self._freshened = now
        files = [f"log.db{suffix}" for suffix in SUFFIXES]
        paths = [f"{self.path}/{name}" for name in (*files, "lock", "wake")]
        if self._is_private:
            paths.append(os.path.dirname(self.path))
        # "/.", as the folder's name may be a link. Links inside are not followed: a
        # member of the group may have put them there.
        for path in (f"{self.path}/.", *paths, *others):
            with suppress(OSError):  # another user's file, or a missing one
                os.utime(path, follow_symlinks=False)

    def _write_here(self, job: Job) -> bool:
        """Store a job in this thread, if it is a thread and no other one writes."""
        # Waiting jobs go first.
        if self._writer.jobs or gevent_hub() is not None or self._is_closed:
            return False
        if not self._writing.acquire(False):
            return False
        lock, database = self._locks[0], self._log
        try:
            if not lock.try_acquire():
                return False
            try:
                with database.guard:
                    if not database.is_current():
                        return False
                    database.connection.execute("BEGIN IMMEDIATE")
                    self._store([job])
            finally:
                lock.release()
        except (sqlite3.Error, OSError):
            return False  # nothing is stored: the writer will raise the error
        finally:
            self._writing.release()
        return True

    def _await(self, job: Job, thread: Thread) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        turn = thread.add(job)
        try:
            is_done = turn.wait(deadline)
        except BaseException:  # such as gevent.Timeout
            thread.give_up(job)
            raise
        if is_done:
            return
        message = f"{self.path} was not available within {self._timeout} s"
        if thread.give_up(job) or job.call is not None:
            raise Unavailable(message)
        raise Uncertain(f"{message}: the events may be stored")

    def _write(self) -> None:
        """Store all waiting jobs; in the writer's thread."""
        while self._writer.jobs:
            try:
                self._write_some()
            except Exception as error:
                if _is_busy(error):
                    # Try again: publishers take their jobs back at their time-outs.
                    native(time, "sleep")(LOCK_TRY)
                    continue
                failed = Unavailable(said(self.path, error))
                failed.__cause__ = error
                while (job := self._writer.take()) is not None:
                    job.end(error=error if isinstance(error, BrokerError) else failed)

    def _write_some(self) -> None:
        """Store waiting jobs in one transaction.

        Raises:
            Exception: It failed before a job was taken.
        """
        lock, database = self._locks[0], self._log
        with self._writing:
            lock.acquire()
            try:
                if not database.is_current():
                    database.open()
                with database.guard:
                    database.connection.execute("BEGIN IMMEDIATE")
                    jobs: list[Job] = []
                    size = 0
                    while size < _GROUP and (job := self._writer.take()) is not None:
                        jobs.append(job)
                        size += sum(1000 + len(payload) for _, payload in job.items)
                    self._store(jobs)
            finally:
                lock.release()

    def _store(self, jobs: list[Job]) -> None:
        """Store jobs, commit, and wake the listeners; or end the jobs with an error."""
        database = self._log
        has_ended = False
        try:
            ids = database.store([i for job in jobs for i in job.items], self._bounds)
            has_ended = True
            database.connection.execute("COMMIT")
            if not database.is_current():
                raise OSError("the files were removed or replaced meanwhile")
        except Exception as error:
            # On a full disk the last frame, which is the commit, is incomplete. After
            # other errors it may be complete.
            is_stored = has_ended and "is full" not in str(error)
            kind = Uncertain if is_stored else Unavailable
            failed = kind(said(self.path, error))
            failed.__cause__ = error
            for job in jobs:
                job.end(error=failed)
            return
        finally:
            # After an interrupt, too.
            self._roll_back()
        self._peers.wake()
        self.freshen()
        for job in jobs:
            job.end(ids[: len(job.items)])
            ids = ids[len(job.items) :]
        try:
            database.checkpoint()
        except (sqlite3.Error, OSError) as error:
            # Stored events are not lost, and the next publish tries again.
            text = "%s: a checkpoint failed, so its WAL grows until one succeeds: %s"
            say(log, logging.WARNING, text, self.path, error)

    def _roll_back(self) -> None:
        database = self._log
        if not database.connection.in_transaction:
            return
        try:
            database.connection.rollback()
        except sqlite3.Error:
            database.close()

    # Reading.

    def _call(self, call: Callable[[], T]) -> T:
        """Make a call that may block; under gevent, in the reader's thread."""
        if gevent_hub() is None:
            return call()
        job = Job(call=call)
        self._await(job, self._reader)
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
        def page(database: Database) -> Page:
            return database.page(channel, after, limit, self._bounds)

        return self._call(lambda: self._ask(page))

    def edge(self, channel: str, count: int) -> tuple[str, str]:
        capacity, max_age, _ = self._bounds
        read = partial(Database.edge, name=channel, count=count)
        read = partial(read, capacity=capacity, max_age=max_age)
        return self._call(lambda: self._ask(read))

    def _ask(self, read: Callable[[Database], T]) -> T:
        self._acquire(self._reading, self._timeout)
        try:
            if self._is_closed:
                raise Unavailable("local: is closed")
            with self._judged("read"), self._opened(self._history, self._locks[1]):
                try:
                    return read(self._history)
                except (TypeError, ValueError) as error:
                    failure = error  # of one channel: others can be read
            raise Unavailable(
                f"{self.path}: a row has foreign types, and must be removed: {failure}"
            ) from failure
        finally:
            self._reading.release()

    @contextmanager
    def _judged(self, way: str) -> Iterator[None]:
        """Record whether a block succeeds; raise its errors as `BrokerError`."""
        began = self.health.moment()
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            failed = Unavailable(said(self.path, error))
            self.health.fails(way, str(failed))
            raise failed from error
        except BrokerError as error:
            self.health.fails(way, str(error))
            raise
        self.health.works(way, since=began)

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
            with self._judged("listen"), self.news() as (news, _):
                listener = Listener(self, broker.watched, broker.is_heir)
                listener.start(news)
            self._listener = listener

    @contextmanager
    def news(self) -> Iterator[tuple[Database, bool]]:
        """Open the listener's database; yield it, and whether it was opened now."""
        with self._opened(self._news, self._locks[2]) as is_new:
            yield self._news, is_new

    def finish_news(self) -> None:
        """Close the listener's database, at the end of the listener's thread."""
        self._news.finish(self._locks[2], _CLOSE)

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
        if not (self._writer.close(deadline) and is_done):
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
                self._news.finish(self._locks[2], _CLOSE)
        with self._reading:
            self._history.finish(self._locks[1], _CLOSE)
        if listener is not None:
            listener.end()
        self._reader.end()
        self._writer.end()

    def _stop(self, timeout: float) -> Listener | None:
        """Close the databases for reading; return the listener, which is the last."""
        self._acquire(self._begins, timeout)
        try:
            listener = self._listener
            if listener is None:
                self._news.finish(self._locks[2], _CLOSE)
        finally:
            self._begins.release()
        self._acquire(self._reading, timeout)
        try:
            self._history.finish(self._locks[1], _CLOSE)
        finally:
            self._reading.release()
        return listener

    def _acquire(self, lock: Any, timeout: float | None) -> None:
        if not lock.acquire(True, -1.0 if timeout is None else timeout):
            raise Unavailable(f"{self.path} was not available within {timeout} s")

    def _leave(self) -> None:
        with self._writing:
            self._log.finish(self._locks[0], _CLOSE)
            self._peers.close()

    # Forks.

    def pause(self) -> None:
        """Close the files when no thread uses them, and keep them closed."""
        databases = self._log, self._history, self._news
        # A lock of its own: our threads may be waiting for the others.
        lock = Lock(self.path, self._is_private)
        is_held = False
        if self.has_files:
            with suppress(OSError, Unavailable):  # close without it, as `finish` does
                lock.open()
                is_held = lock.hold(_CLOSE)
        try:
            for database in databases:
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
        for database in (self._log, self._history, self._news):
            with suppress(RuntimeError):  # `pause` was interrupted before this guard
                database.guard.release()

    @property
    def has_files(self) -> bool:
        """Whether SQLite has some of the files open."""
        return any(d.is_open for d in (self._log, self._history, self._news))

    def let_go(self) -> None:
        """Close all descriptors but SQLite's."""
        for lock in self._locks:
            lock.close()
        self._peers.close()
        if self._listener is not None:
            self._listener.let_go()


def _is_busy(error: Exception) -> bool:
    # `sqlite_errorcode` came with Python 3.11.
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
