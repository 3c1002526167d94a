"""`Exits`: exceptions that end the whole process, raised in a stream's source."""

from __future__ import annotations

import signal
import threading
import traceback

from .monitor import Monitor
from .output import Output

__all__ = ["Exits"]


class Exits:
    """Keeps one stream's exit until the stream has ended, then raises it.

    It is true while it keeps an exit.
    """

    def __init__(self, output: Output, monitor: Monitor) -> None:
        self._output = output
        self._monitor = monitor
        self._kept: list[BaseException] = []

    def __bool__(self) -> bool:
        return bool(self._kept)

    def is_exit(self, error: BaseException) -> bool:
        """Tell the end of the whole process from a source that calls sys.exit().

        Ctrl-C and exceptions of signal handlers in the main thread belong to a server
        that serves in that thread. Other servers must not get them: a SystemExit would
        end gevent's hub, or a thread of a pool, with all that runs there.
        """
        connection = self._output.connection
        return (
            isinstance(error, (KeyboardInterrupt, SystemExit))
            and not self._monitor.in_hub
            and threading.current_thread() is threading.main_thread()
            and (connection is None or connection.lets_exits_through)
            and (
                isinstance(error, KeyboardInterrupt)
                or self._monitor.until() is not None
                or _is_of_a_signal(error)
            )
        )

    def keep(self, error: BaseException | None) -> bool:
        """Keep an exit until the stream has ended; tell whether it is one."""
        if error is None or not self.is_exit(error):
            return False
        if not self._kept:
            self._kept.append(error)
        return True

    def raise_kept(self) -> None:
        """Raise the kept exit, if there is one."""
        if self._kept:
            raise self._kept.pop()


def _is_of_a_signal(error: BaseException) -> bool:
    """Tell whether an exception was raised by a signal's handler."""
    handlers = set()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        handlers.add(getattr(getattr(handler, "__func__", handler), "__code__", None))
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in handlers for frame, _ in frames)
