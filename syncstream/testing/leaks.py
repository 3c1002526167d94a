"""Streams that a test has left open: `assert_no_open_streams`."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from contextvars import ContextVar

from ..runtime.process import Attached, Parked, process
from ..streams.stream import Stream
from .limit import place_of_test
from .reader import TIMEOUT, check_timeout

__all__ = [
    "assert_no_open_streams",
    "assert_none_is_left",
    "open_streams",
    "opened_at",
    "remember_places",
]

opened_at: ContextVar[str] = ContextVar("opened_at")
"""Where the test has sent the request that this thread serves."""

_LOOK_EVERY = 0.01  # seconds

_places: weakref.WeakKeyDictionary[Attached, str] = weakref.WeakKeyDictionary()


def assert_no_open_streams(*, timeout: float = TIMEOUT) -> None:
    """Fail if this process has streams that have begun and have not been closed.

    Args:
        timeout: Seconds that they may still take to end.

    Raises:
        AssertionError: Some are open; the message has the paths of their requests.
    """
    check_timeout(timeout)
    assert_none_is_left(set(), timeout)


def assert_none_is_left(before: set[int], timeout: float = TIMEOUT) -> None:
    """Do as `assert_no_open_streams`, but for those with an `id` that is given."""
    if not (open_streams().keys() - before):
        return
    gc.collect()  # a response that is part of a cycle is not open for that
    deadline = time.monotonic() + timeout
    while left := open_streams().keys() - before:
        if time.monotonic() > deadline:
            found = open_streams()
            lines = sorted(_said(found[key]) for key in left if key in found)
            raise AssertionError(
                f"{len(lines)} open stream{'s'[: len(lines) - 1]}: read to the end,"
                " or close the response (with …:)\n  " + "\n  ".join(lines)
            )
        time.sleep(_LOOK_EVERY)


def open_streams() -> dict[int, Attached | Parked]:
    """Return this process's open streams, by their `id`."""
    record = process()
    return {id(one): one for one in (*record.attached(), *record.parked())}


def remember_places() -> None:
    """From now on remember where streams are opened, for the message."""
    process().on_open = _remember


def _remember(stream: Attached) -> None:
    _places[stream] = opened_at.get("") or place_of_test(sys._getframe())


def _said(stream: Attached | Parked) -> str:
    # A client that has left its server is known by its request alone.
    place = _places.get(stream, "") if isinstance(stream, Stream) else ""
    return f"{stream.label}, opened at {place}" if place else stream.label
