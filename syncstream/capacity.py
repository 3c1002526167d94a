"""How many streams a process takes, in all and for each client.

A stream holds its thread, or its greenlet, unless it is handed over. Where all of
them are held, ordinary requests wait, and so does the health check. So there are
limits; what is beyond them is refused at once, in the way in which each client
understands it.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from .sockets import native

__all__ = ["Capacity", "Full", "Place"]

Environ = dict[str, Any]


class Full(Exception):
    """There is no room for a stream, whatever the limits say; its text says why."""


class Capacity:
    """The limits, and who counts towards them.

    Args:
        max_streams: So many at once in this process; ``None`` for no limit.
        reserve_threads: So many of the server's threads stay free of streams;
            ``None`` for none. No limit where the server has none.
        limit_by: Returns, for an environ, whose stream this is; ``None``: nobody's
            in particular.
        max_per_key: So many at once for each.

    Raises:
        TypeError, ValueError: A number is no whole number of 1 or more; one of
            ``limit_by`` and ``max_per_key`` is given without the other.
    """

    def __init__(
        self,
        max_streams: int | None,
        reserve_threads: int | None,
        limit_by: Callable[[Environ], Hashable] | None,
        max_per_key: int | None,
    ) -> None:
        numbers = {
            "max_streams": max_streams,
            "reserve_threads": reserve_threads,
            "max_per_key": max_per_key,
        }
        for name, number in numbers.items():
            if number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name} must be int or None, got {number!r}")
            if number < 1:
                raise ValueError(f"{name} must be 1 or more, or None, got {number!r}")
        if limit_by is not None and not callable(limit_by):
            raise TypeError(f"limit_by must be callable, got {limit_by!r}")
        if (limit_by is None) != (max_per_key is None):
            raise ValueError(
                "limit_by and max_per_key must be given together,"
                f" got {limit_by!r} and {max_per_key!r}"
            )
        self._max_streams = max_streams
        self._reserve_threads = reserve_threads
        self._limit_by = limit_by
        self._max_per_key = max_per_key
        self._is_limited = any(number is not None for number in numbers.values())
        # Reentrant: a garbage collection in here may close a stream.
        self._lock = native(_thread, "RLock")()
        self._count = self._threads = 0
        self._counts: dict[Hashable, int] = {}

    def admit(
        self, environ: Environ, threads: Callable[[], int | None]
    ) -> Place | None:
        """Take a stream on; return its place, ``None`` if there is none.

        Args:
            environ: The request's.
            threads: How many the server has; asked only if it matters.
        """
        if not self._is_limited:
            return Place(None, None)
        most = None
        if self._reserve_threads is not None:
            number = threads()
            if number is not None:
                most = max(0, number - self._reserve_threads)
        key = self._limit_by(environ) if self._limit_by is not None else None
        with self._lock:
            if self._max_streams is not None and self._count >= self._max_streams:
                return None
            if most is not None and self._threads >= most:
                return None
            if key is not None:
                assert self._max_per_key is not None
                held = self._counts.get(key, 0)
                if held >= self._max_per_key:
                    return None
                self._counts[key] = held + 1
            self._count += 1
            self._threads += 1
        return Place(self, key)

    def leave(self, key: Hashable) -> None:
        """Give a place back: by `Place`, once."""
        with self._lock:
            self._count -= 1
            if key is not None:
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]

    def leave_thread(self) -> None:
        """Give a thread back: by `Place`, once."""
        with self._lock:
            self._threads -= 1


class Place:
    """A stream's place, and its thread's; each is given back once, by whom ever."""

    __slots__ = ("_keys", "_threads")

    def __init__(self, capacity: Capacity | None, key: Hashable) -> None:
        held = [] if capacity is None else [capacity]
        self._keys = [(capacity, key) for capacity in held]
        self._threads = held

    def leave_thread(self) -> None:
        """The stream goes on without its thread."""
        with suppress(IndexError):
            self._threads.pop().leave_thread()

    def release(self) -> None:
        """The stream has ended."""
        self.leave_thread()
        with suppress(IndexError):
            capacity, key = self._keys.pop()
            capacity.leave(key)
