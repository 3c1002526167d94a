"""Interrupting a source in a thread that does not wait in a way that can be woken."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable

__all__ = ["throw_into"]


def throw_into(thread: int, is_due: Callable[[], bool]) -> None:
    """Raise GeneratorExit in a thread, when it next runs Python code.

    For the last seconds of a process only: it may hit a little later than meant, and
    is then taken by the stream's body, or by the server.
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
