"""The event loop of a process: one thread that runs all asynchronous sources.

It is asyncio's, in a native thread, started at the first use. Under gevent it is the
loop as gevent has patched it, in a native thread all the same, which gets a hub of its
own: an unpatched loop would wait for ever for what patched modules do in other threads
(a look-up of a host's address, ``to_thread``), and a loop in the server's hub would
break others' ``asyncio.run`` there. See `runtime.gevent_loop`.
"""

from __future__ import annotations

import _thread
import importlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any

from .ending import is_cut_short
from .forks import process_key
from .journal import journal
from .process import EXIT_WAIT, process
from .signals import unblock_sigpipe
from .sockets import native
from .waiting import is_patched
from .watch import native_lock

if TYPE_CHECKING:
    import asyncio

__all__ = ["EventLoop", "event_loop"]

log = logging.getLogger("syncstream.stream")

_START_WAIT = 10.0  # seconds in which a thread and its loop must have started


class EventLoop:
    """A running loop. Get it from `event_loop`; any thread may call its methods."""

    def __init__(self) -> None:
        # Here, so that `import syncstream` does not cost it; and not in the thread,
        # where it would wait for an import of this one.
        import asyncio

        self._new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
        if is_patched():
            from .gevent_loop import GeventLoop

            self._new_loop = GeventLoop
        self._set_loop = asyncio.set_event_loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._is_quitting = False
        self._process = process_key()
        self._thread = 0
        # The loop itself refers to its tasks only weakly.
        self._tasks: set[asyncio.Task[None]] = set()
        self._started, self._ended = native_lock(), native_lock()
        self._started.acquire()
        self._ended.acquire()
        native(_thread, "start_new_thread")(self._run, ())
        is_started = self._started.acquire(True, _START_WAIT)
        if not is_started or self._failure is not None:
            problem = self._failure or f"not within {_START_WAIT:g} s"
            raise RuntimeError(f"no event loop for asynchronous sources: {problem!r}")
        process().at_exit(self.quit)
        _drain_first()

    @property
    def is_here(self) -> bool:
        """Whether this is the loop's thread."""
        return bool(self._thread == native(_thread, "get_ident")())

    def call(self, function: Callable[[], object]) -> None:
        """Call a function in the loop's thread soon.

        Raises:
            RuntimeError: The loop has ended, with the process, or is a parent's.
        """
        if self._is_quitting or self._process is not process_key():
            raise RuntimeError("the event loop of asynchronous sources has ended")
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function)

    def start(self, coroutine: Coroutine[Any, Any, None], context: Context) -> None:
        """Run a coroutine as a task, in a copy of a context.

        Args:
            coroutine: It handles all of its exceptions.
            context: The context, which no other thread is in.

        Raises:
            RuntimeError: As from `call`.
        """
        try:
            self.call(lambda: context.run(self._begin, coroutine))
        except RuntimeError:
            coroutine.close()
            raise

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        self._tasks.add(task := self._loop.create_task(coroutine))
        task.add_done_callback(self._tasks.discard)

    def quit(self) -> None:
        """End the thread before the interpreter ends, and wait briefly for it."""
        loop = self._loop
        assert loop is not None
        self._is_quitting = True
        with suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(loop.stop)
        self._ended.acquire(True, EXIT_WAIT)
        end_threads = getattr(loop, "end_threads", None)  # gevent's loop has it
        if end_threads is not None:
            end_threads(EXIT_WAIT)

    def _run(self) -> None:
        unblock_sigpipe()
        threading.current_thread().name = "syncstream-asyncio"
        self._thread = native(_thread, "get_ident")()
        try:
            loop = self._loop = self._new_loop()
            self._set_loop(loop)
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.release()
        try:
            while not self._is_quitting:
                try:
                    loop.run_forever()
                except BaseException as error:
                    # A task of the application's has called sys.exit(), for one: the
                    # others go on.
                    text = "a task beside an asynchronous source failed"
                    journal().later(log, logging.ERROR, text, error=error)
        finally:
            self._ended.release()


_loops: dict[object, EventLoop] = {}  # by process; a child also has its parents'
_lock = native_lock()


def event_loop() -> EventLoop:
    """Return this process's loop; the first call starts it.

    Raises:
        RuntimeError: No thread can be started.
    """
    key = process_key()
    found = _loops.get(key)
    if found is None:
        if is_patched():
            from .gevent_loop import prepare

            prepare()  # it lets other greenlets run, which must not meet the lock
        with _lock:
            found = _loops.get(key)
            if found is None:
                found = _loops[key] = EventLoop()
    return found


def _drain_first() -> None:
    """Have the exit wait for finite work before it ends the threads of executors.

    Sources may need those to their ends. What was registered first is called last.
    """
    importlib.import_module("concurrent.futures.thread")
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with suppress(RuntimeError):  # the interpreter is ending
            register(_drain)


def _drain() -> None:
    record = process()  # a child that ends has its own
    if is_cut_short(record.drain):
        record.stop()


def _forked() -> None:
    global _lock
    _lock = native_lock()  # a thread that is not here may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
