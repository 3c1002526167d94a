"""Time in which this process runs: `Clock`, for bounds that a busy machine keeps."""

from __future__ import annotations

import _thread
import time

from syncstream.runtime.sockets import native

__all__ = ["Clock"]

TICK = 0.01  # seconds


class Clock:
    """A native thread that counts hundredths of a second; call it for the seconds.

    It is never faster than time, whatever gevent has patched, and stands still while
    the process is stopped: what is slow by it is not so for want of a processor.
    """

    def __init__(self) -> None:
        self._ticks = 0
        self._is_over = False
        self._ended = native(_thread, "allocate_lock")()
        self._ended.acquire()
        native(_thread, "start_new_thread")(self._run, ())

    def _run(self) -> None:
        pause = native(time, "sleep")
        while not self._is_over:
            pause(TICK)
            self._ticks += 1
        self._ended.release()

    def __call__(self) -> float:
        return self._ticks * TICK

    def close(self) -> None:
        self._is_over = True
        self._ended.acquire()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
