"""`advance`: lets time pass for streams, without waiting.

Importing this puts a clock that can be advanced in the place of `runtime.clock`'s.
"""

from __future__ import annotations

import math
import threading

from ..runtime.clock import time
from ..runtime.process import process
from ..runtime.waiting import gevent_hub
from ..runtime.watch import watch
from ..streams.stream import Stream

__all__ = ["advance"]

_SETTLES = 2.0  # seconds that sources get at most to begin their waits
_LOOK_EVERY = 0.001  # seconds


class _Clock:
    def __init__(self) -> None:
        self._real = time.monotonic
        self._ahead = 0.0  # seconds

    def __call__(self) -> float:
        return self._real() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


# Here, for a stream looks its clock up once, when it begins.
_clock = _Clock()
time.monotonic = _clock


def advance(seconds: float) -> None:
    """Let time pass for the streams of this process: what falls due comes at once.

    That is keepalives, ``max_duration`` and the time-outs of streams, and the waits of
    their sources: `syncstream.sleep`, ``stream.sleep``, ``stream.wait`` and those of
    subscriptions. The clock stays ahead. It is none of ``time.sleep``, ``asyncio`` and
    databases, nor that by which a hub's events age.

    Args:
        seconds: How many.

    Raises:
        ValueError: They are not positive.
        RuntimeError: This is a greenlet, whose waits the loop of gevent times.
    """
    if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, got {seconds!r}")
    if gevent_hub() is not None:
        raise RuntimeError("advance() works with threads only: gevent times its waits")
    sources = [
        one
        for one in process().attached()
        # One that the test itself reads waits for the test.
        if isinstance(one, Stream) and one.runner != threading.get_ident()
    ]
    # The wait that a source is about to begin shall be over, too.
    until = time.monotonic() + _SETTLES
    while any(map(_is_busy, sources)) and time.monotonic() < until:
        time.sleep(_LOOK_EVERY)
    _clock.advance(seconds)
    # By a timer before all others, which has the watch look at its clock again.
    watch().call_at(0.0, lambda: None)
    for stream in sources:
        _wake(stream)


def _is_busy(stream: Stream) -> bool:
    return stream.reason is None and stream.thread_wait is None


def _wake(stream: Stream) -> None:
    """Have a source look at the clock again, and wait until it has."""
    place = stream.thread_wait
    stream.has_waited = False  # a subscription's wait sets it at its end
    while place is not None and place is stream.thread_wait and not place.wake():
        time.sleep(_LOOK_EVERY)  # somebody holds its condition
    until = time.monotonic() + _SETTLES
    while place is not None and place is stream.thread_wait and not stream.has_waited:
        if time.monotonic() > until:
            return
        time.sleep(_LOOK_EVERY)
