"""Interrupting a source, also where it does not wait in a way that can be woken."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable

from ..runtime.waiting import is_greenlet_exit

__all__ = ["MOST_REMINDERS", "is_unwinding", "throw_into"]

MOST_REMINDERS = 10
"""So often a source that has swallowed its end, and goes on, is told again.

Its cleanup may wait and send in ``try`` blocks of its own, but a loop of them must end.
"""


def throw_into(thread: int, is_due: Callable[[], bool]) -> None:
    """Raise GeneratorExit in a thread, when it next runs Python code.

    For the last seconds of a process only: it may hit a little later than meant, and
    is then taken by the stream's body, or by the server. Before Python 3.12 it hits a
    thread that this one has just started instead, if that has not run yet: until then
    that has the ident of this one.
    """
    if is_due():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(GeneratorExit)
        )
        _run_handler_in(thread)


def _run_handler_in(thread: int) -> None:
    """Have the main thread run Python code now, though it is in a system call.

    By a signal for which it has a handler that does nothing: gunicorn's workers log
    that they ignore SIGWINCH. No other thread runs any.
    """
    number = getattr(signal, "SIGWINCH", None)
    if number is None or thread != threading.main_thread().ident:
        return
    if callable(signal.getsignal(number)):
        signal.pthread_kill(thread, number)


def is_unwinding() -> bool:
    """Tell whether what runs here does so because a generator is being ended.

    In a ``finally``, or in an ``except`` for the end, and in what these call, the
    exception is being handled; behind an ``except`` that has swallowed it, it is not.
    """
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, GeneratorExit) or is_greenlet_exit(error):
            return True
        error = error.__context__
    return False
