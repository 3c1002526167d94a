"""Where one process stores: in the publisher's thread, or in one for all who wait.

Whoever finds nobody else writing stores at once. The others wait for the writer's
thread, which stores what has come by then in one transaction.
"""

from __future__ import annotations

import _thread
import logging
import os
import sqlite3

from ...errors import BrokerError, Unavailable, Uncertain
from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiting import gevent_hub, say
from ..health import Health
from .append import Appender
from .database import APPLICATION, Bounds, Database, Items, judged
from .files import LOCK_TRY, FileTimes, Lock, said
from .peers import Peers
from .threads import Job, Thread

__all__ = ["CLOSE", "Writer", "try_to_store"]

log = logging.getLogger("syncstream.brokers.local")
_GROUP = 1 << 20  # bytes of several publishers' events in one transaction
CLOSE = 1.0  # seconds to wait for the lock when files are closed


class Writer:
    """From any thread or greenlet.

    Args:
        lock: Of its own: its connection's.
        health: Is told whether one can publish.
        times: Are kept fresh.

    Attributes:
        database: Its connection.
        timeout: Seconds until a publish gives up; ``None`` for no limit.
    """

    def __init__(
        self,
        path: str,
        lock: Lock,
        bounds: Bounds,
        health: Health,
        times: FileTimes,
        timeout: float | None,
    ) -> None:
        self.database = Database(path)
        self.timeout = timeout
        self._path = path
        self._lock = lock
        self._appender = Appender(self.database, bounds)
        self._health = health
        self._times = times
        self._peers = Peers(path)
        self._writing = native(_thread, "allocate_lock")()
        self._thread = Thread(path, self._write, self._leave)

    @property
    def waiting(self) -> int:
        """How many publishes wait for the thread."""
        return len(self._thread.jobs)

    def publish(self, items: Items) -> list[str]:
        """Store events; return their ids.

        Raises:
            Unavailable: Nothing was stored.
            Uncertain: They may have been stored.
        """
        with judged(self._health, "publish", self._path):
            job = Job(items)
            if not self._write_here(job):
                self._thread.do(job, self.timeout)
            if job.error is not None:
                # Several publishers may share this error: each raises its own copy.
                raise type(job.error)(*job.error.args) from job.error.__cause__
            ids: list[str] = job.result
            return ids

    def _write_here(self, job: Job) -> bool:
        """Store a job in this thread, if it is a thread and no other one writes."""
        # Waiting jobs go first.
        if self._thread.jobs or gevent_hub() is not None:
            return False
        if not self._writing.acquire(False):
            return False
        lock, database = self._lock, self.database
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

    # Its thread.

    def _write(self) -> None:
        """Store all waiting jobs."""
        while self._thread.jobs:
            try:
                self._write_some()
            except Exception as error:
                if _is_busy(error):
                    # Try again: publishers take their jobs back at their time-outs.
                    native(time, "sleep")(LOCK_TRY)
                    continue
                failed = Unavailable(said(self._path, error))
                failed.__cause__ = error
                while (job := self._thread.take()) is not None:
                    job.end(error=error if isinstance(error, BrokerError) else failed)

    def _write_some(self) -> None:
        """Store waiting jobs in one transaction.

        Raises:
            Exception: It failed before a job was taken.
        """
        lock, database = self._lock, self.database
        with self._writing:
            lock.acquire()
            try:
                if not database.is_current():
                    database.open()
                with database.guard:
                    database.connection.execute("BEGIN IMMEDIATE")
                    jobs: list[Job] = []
                    size = 0
                    while size < _GROUP and (job := self._thread.take()) is not None:
                        jobs.append(job)
                        size += sum(1000 + len(payload) for _, payload in job.items)
                    self._store(jobs)
            finally:
                lock.release()

    def _store(self, jobs: list[Job]) -> None:
        """Store jobs, commit, and wake the listeners; or end the jobs with an error."""
        database = self.database
        has_ended = False
        try:
            ids = self._appender.store([item for job in jobs for item in job.items])
            has_ended = True
            database.connection.execute("COMMIT")
            if not database.is_current():
                raise OSError("the files were removed or replaced meanwhile")
        except Exception as error:
            # On a full disk the last frame, which is the commit, is incomplete. After
            # other errors it may be complete.
            is_stored = has_ended and "is full" not in str(error)
            kind = Uncertain if is_stored else Unavailable
            failed = kind(said(self._path, error))
            failed.__cause__ = error
            for job in jobs:
                job.end(error=failed)
            return
        finally:
            # After an interrupt, too.
            self._roll_back()
        self._peers.wake()
        self._times.freshen()
        for job in jobs:
            job.end(ids[: len(job.items)])
            ids = ids[len(job.items) :]
        try:
            self._appender.checkpoint()
        except (sqlite3.Error, OSError) as error:
            # Stored events are not lost, and the next publish tries again.
            text = "%s: a checkpoint failed, so its WAL grows until one succeeds: %s"
            say(log, logging.WARNING, text, self._path, error)

    def _roll_back(self) -> None:
        database = self.database
        if not database.connection.in_transaction:
            return
        try:
            database.connection.rollback()
        except sqlite3.Error:
            database.close()

    # Its end.

    def end(self) -> None:
        """Have the thread end, some time soon, once it has stored what is there."""
        self._thread.end()

    def close(self, deadline: float) -> bool:
        """Store what is there, and end; ``False``: not within this time."""
        return self._thread.close(deadline)

    def let_go(self) -> None:
        """Close all descriptors but SQLite's; in a forked child."""
        self._lock.close()
        self._peers.close()

    def _leave(self) -> None:
        with self._writing:
            self.database.finish(self._lock, CLOSE)
            self._peers.close()


def try_to_store(path: str, lock: Lock, database: Database) -> bool:
    """See whether one could store, and store nothing; with the guard.

    Args:
        lock: Of the database's connection.
    """
    lock.open()
    if not lock.try_acquire():
        return False
    try:
        disk = os.statvfs(path)
        if disk.f_bavail * disk.f_frsize < _GROUP or not database.is_current():
            return False
        execute = database.connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            # Not an UPDATE to the present values, for which SQLite writes nothing.
            execute(f"PRAGMA application_id={APPLICATION}")
            execute("COMMIT")
        finally:
            database.connection.rollback()
    except (sqlite3.Error, OSError):
        return False  # it still fails
    finally:
        lock.release()
    return True


def _is_busy(error: Exception) -> bool:
    # `sqlite_errorcode` came with Python 3.11.
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
