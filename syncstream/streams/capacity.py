"""Limits on open streams, in total and for each client.

A stream holds its thread or greenlet unless it is handed over. When streams hold all of
them, ordinary requests wait, including the health check. The limits prevent that:
streams over a limit are refused at once, in a form that each client understands.
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

__all__ = ["Capacity", "Place"]

Environ = dict[str, Any]

MOMENT = 1.0
"""Seconds that a stream may wait for another stream to leave its thread."""


_UNIX = frozenset(("localhost", "<local>"))  # waitress' and Werkzeug's REMOTE_ADDR
_FORWARDED = frozenset(("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED", "HTTP_X_REAL_IP"))
_SEPARATORS = re.compile(r'[\s,;="\[\]]+')
_ADDRESS = (
    "use the address that your proxy reports, with Werkzeug's ProxyFix or as the last"
    " one of X-Forwarded-For (docs/proxies.md)"
)
_EMPTY = (
    "limit_by returned an empty key (REMOTE_ADDR is empty on a Unix socket), so"
    f" max_per_key limits no client: {_ADDRESS}"
)
_PROXY = (
    "max_per_key refused a stream whose key is the proxy's address, which is the same"
    f" for all clients behind the proxy: {_ADDRESS}"
)


class Capacity:
    """The limits, and the streams that count towards them.

    Args:
        max_streams: The maximum of open streams in this process; ``None`` for no limit.
        reserve_threads: The minimum of the server's threads that stay free of streams;
            ``None`` for no limit. Without effect on a server without a fixed number.
        limit_by: Returns the key for a request's environ; streams with the key ``None``
            are not limited by key.
        max_per_key: The maximum of open streams with the same key.
        warn: Called with one sentence of advice for the operator.

    Attributes:
        count: The number of streams that have a place.
        threads: The number of threads that they hold.
        leaving: The number of these threads that a hand-over is about to free.
        counts: The number of streams with each key, without those that have no key.
        waiters: The streams that wait for a thread.

    Raises:
        TypeError: A number is not an ``int``, or ``limit_by`` is not callable.
        ValueError: A number is below 1, or only one of ``limit_by`` and ``max_per_key``
            is given.
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
        # Reentrant: a garbage collection while it is held may close a stream.
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
        """Return a place for a stream, ``None`` if a limit is reached.

        Args:
            environ: The request's environ.
            threads: Returns the server's number of threads; called only if needed.
            leaves: The stream is about to be handed over and to leave its thread. If
                all threads are taken, and other streams are about to leave theirs, it
                waits for the first of them, for up to `MOMENT`. (Never on a server with
                one thread, where no other stream can be about to leave.)
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
            if _is_of_proxy(key, environ):
                self._warn(_PROXY)
            return None
        return Place(self, key, leaves=leaves)

    def _key(self, environ: Environ) -> Hashable:
        """Return the key of a request's stream, ``None`` if no key limits it."""
        key = self._limit_by(environ) if self._limit_by is not None else None
        if key is None:
            return None
        is_unix = key in _UNIX and key == environ.get("REMOTE_ADDR")
        if is_unix or (isinstance(key, (str, bytes, tuple)) and not key):
            # All clients would share this key, and one of them could take all places.
            self._warn(_EMPTY)
            return None
        return key

    def _await_thread(self, most: int) -> None:
        """Wait while all threads are taken and a stream is about to leave one."""
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
        """Free a place; `Place` calls this once."""
        with self._lock:
            self.count -= 1
            if key is not None:
                self.counts[key] -= 1
                if not self.counts[key]:
                    del self.counts[key]

    def leave_thread(self) -> None:
        """Free a thread; `Place` calls this once."""
        with self._lock:
            self.threads -= 1
        self._wake()

    def stay(self) -> None:
        """Count one stream less that is about to leave; `Place` calls this once."""
        with self._lock:
            self.leaving -= 1
        self._wake()

    def _wake(self) -> None:
        if self.waiters:
            with self._lock:
                waiters, self.waiters = self.waiters, []
            wake_all(waiters)


def _is_of_proxy(key: Hashable, environ: Environ) -> bool:
    """Tell whether a key is the address of a proxy.

    It is not if ProxyFix, for example, has put the client's address into REMOTE_ADDR.
    """
    reported = [environ[name] for name in _FORWARDED if name in environ]
    return (
        bool(reported)
        and key == environ.get("REMOTE_ADDR")
        and not any(key in _SEPARATORS.split(value) for value in reported)
    )


class Place:
    """A stream's place and thread; each is freed once, even if several threads try."""

    __slots__ = ("_keys", "_leaving", "_threads")

    def __init__(
        self, capacity: Capacity | None, key: Hashable, *, leaves: bool = False
    ) -> None:
        held = [] if capacity is None else [capacity]
        self._keys = [(capacity, key) for capacity in held]
        self._leaving = held[:] if leaves else []
        self._threads = held

    def leave_thread(self) -> None:
        """Free the thread: the stream goes on without it."""
        with suppress(IndexError):
            self._threads.pop().leave_thread()
        self.stay()

    def stay(self) -> None:
        """Say that the stream keeps its thread after all."""
        with suppress(IndexError):
            self._leaving.pop().stay()

    def release(self) -> None:
        """Free the place and the thread: the stream has ended."""
        self.leave_thread()
        with suppress(IndexError):
            capacity, key = self._keys.pop()
            capacity.leave(key)
