"""Waiting, and the one place that knows threads from gevent.

The *scope* is whatever is running in this thread or greenlet on behalf of one
stream. A contextvar holds it, so that nested applications and generators that
create generators each see their own; it counts only for the thread or greenlet
that entered it, because spawned greenlets (gevent copies the context) and, from
Python 3.14, threads inherit contextvars.

Everything is looked up when it is called: gevent may patch the standard library
after this module was imported.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

__all__ = [
    "Scope",
    "current",
    "current_scope",
    "entered",
    "hang_up",
    "is_greenlet_exit",
    "is_hung_up",
    "reset",
    "runner",
    "runner_function",
    "sleep",
]


class Scope(Protocol):
    """What waits need to know of the stream they wait in.

    Attributes:
        is_running: The stream is inside its source now.
        reference: A weak reference to it.
        runner: The thread or greenlet that runs it.
    """

    is_running: bool
    runner: object

    @property
    def reference(self) -> Reference: ...

    def before_wait(self) -> None:
        """Raise `ClientDisconnected` if there is nobody left to wait for."""


Reference = Callable[[], Any]

current: ContextVar[Reference | None] = ContextVar("syncstream_scope", default=None)
"""A weak reference to the scope last entered here; it may be running no more, or be
gone. Read `current_scope`."""


def runner() -> object:
    """Return what tells the running greenlet, else the running thread, from others."""
    return runner_function()()


def runner_function() -> Callable[[], object]:
    """Return the function that does what `runner` does, for many calls."""
    greenlet = sys.modules.get("greenlet")
    if greenlet is None:
        return threading.get_ident
    # Each thread has a main greenlet of its own, so this covers threads too.
    function: Callable[[], object] = greenlet.getcurrent
    return function


def current_scope() -> Scope | None:
    """Return the scope this thread or greenlet is in, ``None`` outside of any."""
    reference = current.get()
    scope: Scope | None = reference() if reference is not None else None
    if scope is None or not scope.is_running:
        return None
    # A thread's ident: greenlet has been imported since the scope was entered.
    if scope.runner not in (runner(), threading.get_ident()):
        return None
    return scope


@contextmanager
def entered(scope: Scope) -> Iterator[None]:
    """Run a block in a scope, in this thread or greenlet."""
    token = current.set(scope.reference)
    was_running = scope.is_running
    scope.runner = runner()
    scope.is_running = True
    try:
        yield
    finally:
        scope.is_running = was_running
        current.reset(token)


def is_greenlet_exit(error: BaseException) -> bool:
    """Tell whether an exception is gevent's way to end this greenlet."""
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(error, greenlet.GreenletExit)


def sleep(seconds: float) -> None:
    """Sleep without holding up others: in a gevent greenlet, let the others run.

    Inside a stream's generator it ends the generator when the client has gone, as
    far as that is known before and after the sleep. Elsewhere it is a plain sleep.

    Args:
        seconds: How long; 0 lets others run.

    Raises:
        ClientDisconnected: In a stream's generator: the client has gone.
        TypeError: ``seconds`` is not a number.
        ValueError: ``seconds`` is negative.
    """
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds must be a number, got {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more, got {seconds!r}")
    scope = current_scope()
    if scope is not None:
        scope.before_wait()
    _sleep(seconds)
    if scope is not None:
        scope.before_wait()


def _sleep(seconds: float) -> None:
    gevent = sys.modules.get("gevent")
    # Without monkey-patching time.sleep would hold up the whole hub. The hub's own
    # greenlet has no parent and cannot wait on itself.
    if gevent is not None and gevent.getcurrent().parent is not None:
        gevent.sleep(seconds)
    else:
        time.sleep(seconds)


def _native(module: Any, name: str) -> Any:
    """Return a function as it was before gevent patched it."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module.__name__, name)
    return getattr(module, name)


def is_hung_up(fd: int) -> bool:
    """Tell at once whether the peer of a socket has closed or reset it.

    Nothing is read: bytes that wait there do not matter, nor does TLS. (Measured:
    gevent's patched poll never reports POLLRDHUP, the original does. Where the
    platform has no POLLRDHUP, only a reset is seen.)
    """
    if fd < 0:
        return True
    poll = _native(select, "poll")()
    poll.register(fd, getattr(select, "POLLRDHUP", 0))
    return any(events for _, events in poll.poll(0))


def hang_up(fd: int) -> None:
    """Shut a socket down: what was sent still arrives, and nothing more is.

    By its descriptor, because ``SSLSocket.shutdown`` would forget the encryption.
    Writes then fail as if the peer had gone, reads show an end.
    """
    _libc().shutdown(fd, socket.SHUT_RDWR)


def reset(fd: int) -> bool:
    """Reset a TCP connection at once, and tell whether that could be done.

    connect(2) to AF_UNSPEC does it, on Linux, without a descriptor of its own. (The
    portable way, to close with SO_LINGER 0, is the server's to go, and servers shut
    down before they close: that is an end in good order.)
    """
    if not sys.platform.startswith("linux"):
        return False
    address = struct.pack("H14x", socket.AF_UNSPEC)
    done: int = _libc().connect(fd, address, len(address))
    return done == 0


def _libc() -> Any:
    return ctypes.CDLL(None)
