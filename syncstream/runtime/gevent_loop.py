"""The event loop under gevent: asyncio's, as gevent has patched it, with real threads.

In a patched process the threads of asyncio's executor would be greenlets of the loop's
own thread, so that a call that gevent does not know (of a C extension, or one that
computes) would hold up all asynchronous sources, which is what it was moved to a thread
for. What gevent has patched works in the threads here, too: each has a hub of its own,
which runs whenever the thread waits.
"""

from __future__ import annotations

import _thread
import asyncio
import importlib.util
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, NoReturn

from .clock import time
from .journal import journal
from .signals import unblock_sigpipe
from .sockets import native
from .waiter import Waiter

__all__ = ["GeventLoop", "prepare"]

log = logging.getLogger("syncstream.stream")

_CURE = "run gunicorn with -k gthread --threads N"


def prepare() -> None:
    """Import, in the request's hub, what the loop's thread could not import.

    httpx imports trio where that is installed, and trio starts a process, which only
    the first hub can.
    """
    if importlib.util.find_spec("trio") is None:
        return
    try:
        importlib.import_module("trio")
    except Exception as error:  # whoever needs it gets its own
        journal().later(log, logging.DEBUG, "trio cannot be imported: %r", error)


class GeventLoop(asyncio.SelectorEventLoop):
    """A loop whose executor, unless the application sets one, has real threads.

    Create it in its thread. Its methods are asyncio's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._threads = _Threads(self)
        self._has_executor = False

    def set_default_executor(self, executor: Any) -> None:
        super().set_default_executor(executor)
        self._has_executor = True

    # asyncio's own signatures differ with its versions.
    def run_in_executor(  # type: ignore[no-untyped-def, override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ):
        if executor is None and not self._has_executor:
            return self._threads.call(partial(func, *args))
        if _is_asgirefs(executor):
            raise RuntimeError(
                "sync_to_async, which Django's asynchronous ORM uses too, cannot run in"
                f" an asynchronous source under gevent: {_CURE}, or pass"
                " thread_sensitive=False if any thread will do"
            )
        return super().run_in_executor(executor, func, *args)

    async def subprocess_exec(self, *args: Any, **options: Any) -> NoReturn:
        _refuse_subprocess()

    async def subprocess_shell(self, *args: Any, **options: Any) -> NoReturn:
        _refuse_subprocess()

    def end_threads(self, limit: float) -> None:
        """End the executor's threads, from any thread, once the loop has stopped.

        Args:
            limit: Seconds to wait for them. A call that takes longer does not hold up
                the end of the process.
        """
        self._threads.end(limit)


def _refuse_subprocess() -> NoReturn:
    # gevent: "child watchers are only available on the default loop"
    raise RuntimeError(
        f"an asynchronous source cannot start a process under gevent: {_CURE}"
    )


def _is_asgirefs(executor: Executor | None) -> bool:
    """Tell whether it is the one thread of asgiref for all that is thread-sensitive.

    It is a greenlet of the first hub that has used it, maybe the server's, and fails or
    blocks when another hub does.
    """
    asgiref = sys.modules.get("asgiref.sync")
    shared = getattr(getattr(asgiref, "SyncToAsync", None), "single_thread_executor", 0)
    return executor is shared


class _Call:
    """A call in one of the threads, and the future of its result."""

    def __init__(self, function: Callable[[], Any], future: asyncio.Future[Any]):
        self.function: Callable[[], Any] | None = function
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        function, self.function = self.function, None
        assert function is not None
        try:
            self.result = function()
        except StopIteration as error:  # no future takes it
            self.error = RuntimeError(f"{function!r} raised StopIteration")
            self.error.__cause__ = error
        except BaseException as error:
            self.error = error

    def tell(self) -> None:
        """Set the future, in the loop's thread."""
        if self.future.done():  # cancelled
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class _Threads:
    """The executor's threads. All but `end` is called in the loop's thread."""

    def __init__(self, loop: GeventLoop) -> None:
        self._loop = loop
        self._most = min(32, (os.cpu_count() or 1) + 4)  # as concurrent.futures has
        self._all: list[_Thread] = []
        self._idle: list[_Thread] = []
        self._calls: deque[_Call] = deque()  # those for which there is no thread yet

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call a function in a thread.

        Raises:
            RuntimeError: There is no thread, and none can be started.
        """
        call = _Call(function, self._loop.create_future())
        if self._idle:
            self._idle.pop().give(call)
        elif len(self._all) == self._most or not self._start(call):
            self._calls.append(call)
        return call.future

    def _start(self, call: _Call) -> bool:
        try:
            self._all.append(_Thread(call, self._report))
        except (RuntimeError, MemoryError):
            if not self._all:
                raise
            return False
        return True

    def _report(self, thread: _Thread, call: _Call) -> None:
        self._loop.call_soon_threadsafe(self._done, thread, call)

    def _done(self, thread: _Thread, call: _Call) -> None:
        call.tell()
        while self._calls:
            following = self._calls.popleft()
            if not following.future.done():
                thread.give(following)
                return
        self._idle.append(thread)

    def end(self, limit: float) -> None:
        """End the threads; wait for them some seconds, from any thread."""
        deadline = time.monotonic() + limit
        for thread in self._all:
            thread.give(None)
        for thread in self._all:
            thread.join(max(0.0, deadline - time.monotonic()))


class _Thread:
    """One native thread, which makes one call after the other.

    Args:
        call: Its first call.
        report: Called with the thread and a call, once the call has been made.
    """

    def __init__(self, call: _Call, report: Callable[[_Thread, _Call], object]) -> None:
        self._calls: deque[_Call | None] = deque([call])  # None: it ends
        self._report = report
        self._news: Any = None  # gevent's watcher, which wakes the thread's hub
        self._ended = native(_thread, "allocate_lock")()
        self._ended.acquire()
        native(_thread, "start_new_thread")(self._run, ())

    def give(self, call: _Call | None) -> None:
        """Have a call made after the one that is being made; ``None``: end."""
        self._calls.append(call)
        # Without it the thread is only starting, and has not looked for calls yet.
        if self._news is not None:
            self._news.send()

    def join(self, limit: float) -> None:
        self._ended.acquire(True, limit)

    def _run(self) -> None:
        unblock_sigpipe()
        threading.current_thread().name = "syncstream-to-thread"
        waiter = Waiter()
        hub = waiter.gevent_hub
        # Greenlets that a call has left behind run in this hub while the thread is
        # idle. The watcher, which is referenced, keeps an empty hub from ending.
        self._news = hub.loop.async_()
        self._news.start(waiter.switch)
        try:
            while (call := self._next(waiter)) is not None:
                call.run()
                self._report(self, call)
                call = None
        finally:
            self._ended.release()

    def _next(self, waiter: Waiter) -> _Call | None:
        while not self._calls:
            waiter.wait(None)
        return self._calls.popleft()
