"""Links: ending a blocked read when a stream's client leaves.

Closing the object that a thread reads from does not end the read: ``close(2)`` wakes no
reader, and a buffered reader cannot be closed during a read. So each kind of object has
its own way:

- A socket is shut down, wherever it is found: in a response of requests, httpx,
  urllib3 or ``http.client``, in a stream of the openai SDK, in a pubsub of redis-py.
- A database connection, or its cursor, is cancelled (``cancel()``, ``interrupt()``). A
  connection that runs no query, but waits for a notification, is also shut down.
- A process is terminated, which ends a read of its output.
- Any other object with a ``close()`` is closed from another thread. If that is known to
  have no effect, the link is refused; if it turns out so, the log says it.

A proxy for a different object in each thread (Django's ``connection``, Werkzeug's
``LocalProxy``) stands for the object of the thread that links it.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import selectors
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from ..runtime.clock import time
from ..runtime.journal import report
from ..runtime.sockets import hang_up, is_socket
from ..runtime.waiting import say, sleep
from .push import run_view

__all__ = ["AGAIN", "USELESS", "Link", "place_of", "unblock"]

log = logging.getLogger("syncstream.links")

AGAIN = (
    0.25  # seconds until another try: a client that was connecting has a socket then
)
KILL_AFTER = 2.0  # seconds between terminating and killing a process
UNANSWERED = 4.0  # seconds after which a server counts as lost that answers no cancel
USELESS = 5.0  # seconds after which a link counts as without effect

# Attributes that lead from responses, streams and connections to their socket, in
# requests, urllib3 and http.client; redis-py and PyMySQL; the openai and anthropic
# SDKs; httpx, its clients, and httpcore's pool.
_INSIDE = (
    *("raw", "fp", "_fp", "sock", "_sock", "socket"),
    *("response", "http_response", "_response", "_raw_stream", "_client"),
    *("_transport", "_pool", "_connection", "_network_stream"),
)
_DEPTH = 7  # attributes between a client of the openai SDK and its socket
_MOST = 1000  # objects to look at: a mock has every attribute


class Link:
    """One object that a generator may block on.

    Args:
        closable: An object with a ``close()``, or a process.

    Raises:
        TypeError: Nothing could end a read of it; the message says why.
    """

    def __init__(self, closable: Any) -> None:
        problem, self._is_process = None, False
        try:
            closable = _of_this_thread(closable)
            problem, self._is_process = _problem(closable), _is_process(closable)
        except Exception as error:  # one of its attributes raises
            text = "a linked object could not be inspected: %r"
            report(log, logging.DEBUG, text, error)
        if problem is not None:
            raise TypeError(f"closable must {problem}, got {closable!r}")
        self.closable = closable
        self.thread_id = threading.get_ident()
        self._thread: threading.Thread | None = None
        self._since = 0.0  # the time of the first try to unblock it
        self._is_spared = False  # its connection is cancelled, but not shut down
        self._retries: list[tuple[Any, int]] = []

    def unblock(
        self, is_there: Callable[[], bool] = lambda: True, *, is_waiting: bool = False
    ) -> None:
        """End a call that a thread makes on the object; from another thread.

        Args:
            is_there: Tells whether that thread is still where it is to be unblocked.
            is_waiting: The thread is in one of our waits, which ends anyway.
        """
        is_first = not self._since
        now = time.monotonic()
        self._since = self._since or now
        if self._is_process:
            self._end_process(kill=now - self._since >= KILL_AFTER)
        elif (cancelable := _cancelable(self.closable)) is not None:
            target, method = cancelable
            if is_first:
                self._is_spared = is_waiting or _runs_query(target)
            is_mute = self._is_busy and now - self._since >= UNANSWERED
            # In a thread: cancelling may connect to the server, which takes time.
            self._in_a_thread(partial(_cancel, target, method, is_there))
            # A shutdown would leave no connection to a ``finally``: only if a cancel
            # has not been answered for long, so that no query would be, either.
            self._is_spared = self._is_spared or _is_idle(target)
            if not is_waiting and (is_mute or not self._is_spared):
                self._hang_up(target)
        elif not self._hang_up(self.closable) and is_first:
            self._in_a_thread(self.closable.close)

    def close(self) -> None:
        """Close the object, in the generator's thread or greenlet."""
        for retry, number in self._retries:
            retry.update_retries(number)  # the connection goes back to a pool
        if self._is_process:
            self._close_process()
            return
        close = getattr(self.closable, "close", None)
        if close is not None:
            close()

    def _hang_up(self, target: Any) -> bool:
        """Shut the object's sockets down; return whether there was any."""
        found = False
        for fd, holder in _sockets(target):
            retry: Any = getattr(holder, "retry", None)
            if callable(getattr(retry, "update_retries", None)):
                # Otherwise redis-py would connect and wait again.
                if not any(retry is other for other, _ in self._retries):
                    self._retries.append((retry, retry.get_retries()))
                retry.update_retries(0)
            hang_up(fd)
            found = True
        return found

    @property
    def _is_busy(self) -> bool:
        """Whether the last call in a thread has not returned."""
        return self._thread is not None and self._thread.is_alive()

    def _in_a_thread(self, function: Callable[[], object]) -> None:
        if self._is_busy:
            return

        def run() -> None:
            try:
                function()
            except Exception as error:
                text = "a linked object could not be unblocked: %r"
                report(log, logging.DEBUG, text, error)

        self._thread = threading.Thread(target=run, name="syncstream-link", daemon=True)
        self._thread.start()

    def _end_process(self, *, kill: bool) -> None:
        process = self.closable
        with suppress(ProcessLookupError):  # it has ended already
            process.kill() if kill else process.terminate()

    def _close_process(self) -> None:
        """End the process, wait for it, to leave no zombie, and close its pipes."""
        process = self.closable
        is_popen = hasattr(process, "poll")

        def runs() -> bool:
            return process.poll() is None if is_popen else process.is_alive()

        if runs():
            self._end_process(kill=False)
            until = (self._since or time.monotonic()) + KILL_AFTER
            while runs() and time.monotonic() < until:
                sleep(0.01)  # in a hub, let others run
            if runs():
                self._end_process(kill=True)
        if not is_popen:
            process.join()
            process.close()
            return
        process.wait()
        for name in ("stdin", "stdout", "stderr"):
            pipe = getattr(process, name, None)
            if pipe is not None:
                with suppress(BrokenPipeError):  # input that it has not read
                    pipe.close()


def _cancel(
    target: Any, cancel: Callable[[], object], is_there: Callable[[], bool]
) -> None:
    """Cancel a connection's query, but none that the generator's end has begun.

    A cancel means a connection, not a query. So hold up psycopg's next query first,
    then look where the generator is: the cancel can meet only the query that it is
    for, or nothing. (The server has signalled its process before ``cancel`` returns,
    and drops a signal that finds no query.) Other drivers cannot be held up.
    """
    with _held_up(target) as is_ours:
        if is_ours and is_there():
            cancel()


_held: dict[Any, object] = {}  # connections that a cancel holds up, and its claim


@contextmanager
def _held_up(connection: Any) -> Iterator[bool]:
    """Let a connection of psycopg begin no query.

    Yields:
        Whether to cancel it: false while another link of the connection does so.
    """
    if not _is_psycopg(connection):
        yield True
        return
    claim = object()
    if _held.setdefault(connection, claim) is not claim:  # one step: no lock is needed
        yield False
        return
    lock = connection.lock  # held by each query; whoever holds it releases this one
    gate = connection.lock = _Gate(lock)
    try:
        yield True
    finally:
        connection.lock = lock
        del _held[connection]
        gate.is_open.set()


class _Gate:
    """A lock that nobody gets before the gate is open, or a time limit has passed."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._until = time.monotonic() + UNANSWERED
        self.is_open = threading.Event()

    def __enter__(self) -> None:
        # Whatever waits for an answer to the cancel: the application does not.
        self.is_open.wait(max(0.0, self._until - time.monotonic()))
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return bool(self._lock.locked())


def unblock(
    links: Sequence[Link], is_there: Callable[[], bool], *, is_waiting: bool
) -> None:
    """End a thread's read, whichever of its links it reads from.

    Args:
        links: The links of its generator.
        is_there, is_waiting: As for `Link.unblock`.
    """
    for link in links:
        try:
            link.unblock(is_there, is_waiting=is_waiting)
        except Exception as error:  # the other links and the wait must end, too
            say(log, logging.DEBUG, "a linked object could not be unblocked: %r", error)


def place_of(links: Sequence[Link]) -> tuple[object, ...]:
    """Return the positions of the links' threads in their generators and views.

    A position stays the same while a statement of a generator runs, and differs in a
    ``finally``, whose use of the links must not be disturbed: its own, and that of a
    function below, which handles an exception then. Views that send are the same as
    generators.
    """
    frames = sys._current_frames()
    packages = {_package_of(type(link.closable).__module__) for link in links}
    place: list[tuple[int, ...]] = []
    for thread_id in {link.thread_id for link in links}:
        frame = frames.get(thread_id)
        while frame is not None:
            caller = frame.f_back
            is_view = caller is not None and caller.f_code is run_view.__code__
            if is_view or frame.f_code.co_flags & inspect.CO_GENERATOR:
                place.append((thread_id, id(frame), frame.f_lasti))
            frame = caller
        place += _handlers(thread_id, packages)
    return tuple(place)


def _handlers(thread_id: int, packages: set[str]) -> Iterator[tuple[int, int]]:
    """Yield which functions of a thread handle an exception now, and which exception.

    Args:
        thread_id: The thread's ident.
        packages: Those of the linked objects, which may wait in handlers of their own.
    """
    found: Any = sys._current_exceptions().get(thread_id)
    error = found[1] if isinstance(found, tuple) else found  # before Python 3.12
    for _ in range(_MOST):  # an application may have made a circle of them
        if error is None:
            return
        trace = error.__traceback__
        if trace is not None:  # its first frame is the one that handles it
            module = str(trace.tb_frame.f_globals.get("__name__"))
            if _package_of(module) not in packages:
                yield id(trace.tb_frame), id(error)
        error = error.__context__


def _package_of(module: str) -> str:
    return module.partition(".")[0]


def _of_this_thread(closable: Any) -> Any:
    """Return the object behind a proxy, which would differ in the watch's thread."""
    kind = type(closable)
    if hasattr(kind, "_get_current_object"):  # Werkzeug's
        return closable._get_current_object()
    django = sys.modules.get("django.utils.connection")
    if django is not None and issubclass(kind, django.ConnectionProxy):
        return closable._connections[closable._alias]
    return closable


def _problem(closable: Any) -> str | None:
    """Return the error of a link, continuing "closable must"; ``None`` for none."""
    if _is_process(closable):
        return None
    close = getattr(closable, "close", None)
    if not callable(close):
        if hasattr(closable, "__enter__"):
            return "have a close(): enter it with `with`, and link the result"
        return "have a close(), or be a process"
    if inspect.iscoroutinefunction(close):
        return "be synchronous: its close() would not be awaited"
    if inspect.isgenerator(closable):
        return (
            "not be a generator, which cannot be closed while it runs: link the object"
            " that it reads from"
        )
    return _shared(closable) or _closed_in_vain(closable)


def _shared(closable: Any) -> str | None:
    """Return an error for objects whose connections are hidden, or used by others."""
    names = {
        f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        for cls in type(closable).__mro__
    }
    if names & {"requests.Session", "urllib3.HTTPConnectionPool"}:
        return "not be a pool, which closes idle connections only: link the response"
    is_redis = hasattr(closable, "connection_pool") and hasattr(closable, "pubsub")
    if is_redis and getattr(closable, "connection", closable) is None:
        return (
            "not be a client of many connections: link its pubsub(), or one made"
            " with single_connection_client=True"
        )
    if inspect.ismethod(getattr(closable, "connection", None)):
        # SQLAlchemy's Session and db.session, peewee's Database, psycopg's pools.
        return (
            "not be a session or a pool, which takes connections as it needs them: link"
            " the connection itself (session.connection())"
        )
    response = closable
    for name in ("response", "_response", "http_response"):
        response = getattr(response, name, response)
    version = getattr(response, "http_version", None)
    if isinstance(version, str) and version.startswith("HTTP/2"):
        return (
            "not be a response over HTTP/2, whose connection other requests use: use a"
            " client without http2=True"
        )
    return None


def _closed_in_vain(closable: Any) -> str | None:
    """Return an error for objects whose close() does not end a read or a wait."""
    pools = sys.modules.get("multiprocessing.pool")
    if pools is not None and isinstance(closable, pools.Pool):
        return (
            "not be a pool, whose close() lets its work go on: link the object that its"
            " work reads from"
        )
    queues = sys.modules.get("multiprocessing.queues")
    if queues is not None and isinstance(closable, queues.Queue):
        return "not be a queue of processes, whose get() does not end: link the process"
    pipes = sys.modules.get("multiprocessing.connection")
    is_pipe = pipes is not None and isinstance(closable, pipes._ConnectionBase)
    is_file = isinstance(closable, io.IOBase) or (
        # Such as gevent's. (pexpect's terminal is a process.)
        hasattr(closable, "read") and not hasattr(closable, "terminate")
    )
    is_selector = isinstance(closable, selectors.BaseSelector) or hasattr(
        closable, "modify"
    )
    if not (is_pipe or is_file or is_selector):
        return None
    fd = _fd(closable)
    if fd is None or is_socket(fd):
        return None
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_ISBLK(kind):
        return None  # a read of these does not wait for another process
    if stat.S_ISFIFO(kind):
        return (
            "not be a pipe, whose close() ends no read of it: link the process that"
            " writes to it (a subprocess.Popen)"
        )
    return (
        "be an object that another thread can close with effect, but a read or wait of"
        " this one would go on"
    )


def _is_process(closable: Any) -> bool:
    # Without importing a module: if nothing has imported it, no object of it exists.
    kinds = (("multiprocessing.process", "BaseProcess"), ("psutil", "Popen"))
    classes = [getattr(sys.modules.get(module), name, None) for module, name in kinds]
    known = [subprocess.Popen, *(cls for cls in classes if cls is not None)]
    return isinstance(closable, tuple(known))


def _cancelable(closable: Any) -> tuple[Any, Callable[[], object]] | None:
    """Return the object to cancel, and its method: a connection, or a call."""
    target = closable
    for _ in range(3):  # SQLAlchemy's result, its connection, the driver's connection
        # SQLAlchemy's pool lends a connection that passes `cancel` on.
        target = getattr(target, "driver_connection", None) or target
        for name in ("cancel", "interrupt"):
            method = getattr(target, name, None)
            if callable(method):
                return target, _cancel_safe(target) or method
        target = _connection_of(target)
    return None


def _cancel_safe(connection: Any) -> Callable[[], object] | None:
    """Return the cancel of psycopg 3.2 during which other threads run, if it has it.

    Its ``cancel()`` keeps the interpreter's lock until the server has answered.
    """
    if not _is_psycopg(connection):
        return None
    capabilities = getattr(sys.modules["psycopg"], "capabilities", None)
    if capabilities is None or not capabilities.has_cancel_safe():
        return None
    return partial(connection.cancel_safe, timeout=UNANSWERED)


def _is_psycopg(connection: Any) -> bool:
    psycopg = sys.modules.get("psycopg")
    return psycopg is not None and isinstance(connection, psycopg.Connection)


def _connection_of(target: Any) -> Any:
    # The connections of SQLAlchemy's pool deprecate their `connection`.
    is_pooled = hasattr(type(target), "driver_connection")
    name = "driver_connection" if is_pooled else "connection"
    return getattr(target, name, None)


def _runs_query(connection: Any) -> bool:
    """Tell whether a connection of psycopg runs a query that can be cancelled."""
    status = getattr(getattr(connection, "info", None), "transaction_status", None)
    return status is not None and status == 1  # PQTRANS_ACTIVE


def _is_idle(connection: Any) -> bool:
    """Tell whether nobody is in a call of a connection of psycopg."""
    return _is_psycopg(connection) and not connection.lock.locked()


def _sockets(target: Any) -> list[tuple[int, Any]]:
    """Return the sockets that an object reads: descriptors, each with its holder.

    Only the nearest ones: sockets further away may belong to other objects.
    """
    level, seen, found = [(target, None)], {id(target)}, []
    for _ in range(_DEPTH + 1):
        inner = []
        for thing, holder in level:
            fd = _fd(thing)
            if fd is not None and (is_socket(fd) or _is_unconnected(fd)):
                found.append((fd, holder))
                continue
            for part in _inside(thing):
                if part is not None and id(part) not in seen:
                    seen.add(id(part))
                    inner.append((part, thing))
        if found or len(seen) > _MOST:
            break
        level = inner
    return found


def _inside(target: Any) -> Iterator[Any]:
    extensions = getattr(target, "extensions", None)  # httpx, a response's
    if isinstance(extensions, dict):
        yield _socket_of(extensions.get("network_stream"))
    yield _socket_of(target)  # a network stream itself
    yield _connection_of(target)
    for name in _INSIDE:
        yield getattr(target, name, None)
    mounts = getattr(target, "_mounts", None)  # httpx, a client's
    if isinstance(mounts, dict):
        yield from mounts.values()
    connections = getattr(target, "connections", None)  # httpcore, a pool's
    if isinstance(connections, (list, tuple)):
        yield from connections


def _is_unconnected(fd: int) -> bool:
    """Tell whether a socket has no peer: it listens, or waits for datagrams.

    On Linux its shutdown fails, but ends a wait all the same.
    """
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:  # closed, or Windows, where sockets are no descriptors
        return False


def _socket_of(stream: Any) -> Any:
    """Return the socket of httpcore's network stream."""
    extra = getattr(stream, "get_extra_info", None)
    return extra("socket") if callable(extra) else None


def _fd(target: Any) -> int | None:
    fileno = getattr(target, "fileno", None)
    if not callable(fileno):
        return None
    try:
        fd = fileno()
    except Exception:  # each library raises its own error for a closed object
        return None
    return fd if isinstance(fd, int) and fd >= 0 else None
