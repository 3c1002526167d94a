"""Limits on open streams, in total and per client.

A stream holds its thread, or its greenlet, unless it is handed over. Where all of
them are held, ordinary requests wait, and so does the health check. So there are
limits; what is beyond them is refused at once, in the way in which each client
understands it.
"""

from __future__ import annotations

import _thread
import re
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from ..runtime.clock import time
from ..runtime.sockets import native
from ..runtime.waiter import Waiter, wake_all

__all__ = ["Capacity", "Full", "Place"]

Environ = dict[str, Any]

MOMENT = 1.0
"""Seconds that a stream may wait for a thread that another one is about to leave."""


_UNIX = frozenset(("localhost", "<local>"))  # waitress' and Werkzeug's REMOTE_ADDR
_FORWARDED = frozenset(("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED", "HTTP_X_REAL_IP"))
_SEPARATORS = re.compile(r'[\s,;="\[\]]+')
_ADDRESS = (
    "take the address that your proxy reports, by Werkzeug's ProxyFix or as the last of"
    " X-Forwarded-For (docs/proxies.md)"
)
_EMPTY = (
    "limit_by returned no address or an empty key, as REMOTE_ADDR is on a Unix socket:"
    f" max_per_key limits nobody; {_ADDRESS}"
)
_PROXY = (
    "max_per_key refused a stream whose key is REMOTE_ADDR and whose request was"
    " forwarded: behind a proxy that is the proxy's, the same for all of its clients;"
    f" {_ADDRESS}"
)


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
        warn: Called with what an operator should change, in one sentence.

    Attributes:
        count: The streams that have a place.
        threads: The threads that they hold.
        leaving: How many of these are about to be left by a hand-over.
        counts: The streams by key; those of no key are not among them.
        waiters: Who waits for a thread.

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
        warn: Callable[[str], object] = lambda text: None,
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
        self._warn = warn
        self._is_limited = any(number is not None for number in numbers.values())
        # Reentrant: a garbage collection in here may close a stream.
        self._lock = native(_thread, "RLock")()
        self.count = self.threads = 0
        self.leaving = 0
        self.waiters: list[Waiter] = []
        self.counts: dict[Hashable, int] = {}

    def admit(
        self,
        environ: Environ,
        threads: Callable[[], int | None],
        *,
        leaves: bool = False,
    ) -> Place | None:
        """Take a stream on; return its place, ``None`` if there is none.

        Args:
            environ: The request's.
            threads: How many the server has; asked only if it matters.
            leaves: It gives its thread back in a moment: it is to be handed over.
                Where others are about to do so, too, it waits for the first of them,
                for up to `MOMENT`. (So never on a server of one thread: the others
                are there to go.)
        """
        if not self._is_limited:
            return Place(None, None)
        most = None
        if self._reserve_threads is not None:
            number = threads()
            if number is not None:
                most = max(0, number - self._reserve_threads)
        key = self._key(environ)
        if leaves and most is not None:
            self._await_thread(most)
        with self._lock:
            if self._max_streams is not None and self.count >= self._max_streams:
                return None
            if most is not None and self.threads >= most:
                return None
            if key is not None:
                assert self._max_per_key is not None
                held = self.counts.get(key, 0)
                is_theirs = held >= self._max_per_key
                if not is_theirs:
                    self.counts[key] = held + 1
            else:
                is_theirs = False
            if not is_theirs:
                self.count += 1
                self.threads += 1
                self.leaving += leaves
        if is_theirs:
            if _is_proxy_s(key, environ):
                self._warn(_PROXY)
            return None
        return Place(self, key, leaves=leaves)

    def _key(self, environ: Environ) -> Hashable:
        """Return whose stream this is, ``None`` for nobody's."""
        key = self._limit_by(environ) if self._limit_by is not None else None
        if key is None:
            return None
        is_unix = key in _UNIX and key == environ.get("REMOTE_ADDR")
        if is_unix or (isinstance(key, (str, bytes, tuple)) and not key):
            # It would be one client's for all: who has all of its places locks out
            # everybody.
            self._warn(_EMPTY)
            return None
        return key

    def _await_thread(self, most: int) -> None:
        """Wait while all threads are held, and one is about to be left."""
        until = time.monotonic() + MOMENT
        while True:
            with self._lock:
                left = until - time.monotonic()
                if self.threads < most or not self.leaving or left <= 0:
                    return
                waiter = Waiter()
                self.waiters.append(waiter)
            waiter.wait(left)

    def leave(self, key: Hashable) -> None:
        """Give a place back: by `Place`, once."""
        with self._lock:
            self.count -= 1
            if key is not None:
                self.counts[key] -= 1
                if not self.counts[key]:
                    del self.counts[key]

    def leave_thread(self) -> None:
        """Give a thread back: by `Place`, once."""
        with self._lock:
            self.threads -= 1
        self._wake()

    def stay(self) -> None:
        """One that was about to leave its thread is so no more: by `Place`, once."""
        with self._lock:
            self.leaving -= 1
        self._wake()

    def _wake(self) -> None:
        if self.waiters:
            with self._lock:
                waiters, self.waiters = self.waiters, []
            wake_all(waiters)


def _is_proxy_s(key: Hashable, environ: Environ) -> bool:
    """Tell whether a key is the address of a proxy.

    It is not where ProxyFix, say, has put what the proxy reports into REMOTE_ADDR.
    """
    reported = [environ[name] for name in _FORWARDED if name in environ]
    return (
        bool(reported)
        and key == environ.get("REMOTE_ADDR")
        and not any(key in _SEPARATORS.split(value) for value in reported)
    )


class Place:
    """A stream's place, and its thread's; each is given back once, by whom ever."""

    __slots__ = ("_keys", "_leaving", "_threads")

    def __init__(
        self, capacity: Capacity | None, key: Hashable, *, leaves: bool = False
    ) -> None:
        held = [] if capacity is None else [capacity]
        self._keys = [(capacity, key) for capacity in held]
        self._leaving = held[:] if leaves else []
        self._threads = held

    def leave_thread(self) -> None:
        """The stream goes on without its thread."""
        with suppress(IndexError):
            self._threads.pop().leave_thread()
        self.stay()

    def stay(self) -> None:
        """The stream does not leave its thread, though it was to."""
        with suppress(IndexError):
            self._leaving.pop().stay()

    def release(self) -> None:
        """The stream has ended."""
        self.leave_thread()
        with suppress(IndexError):
            capacity, key = self._keys.pop()
            capacity.leave(key)
