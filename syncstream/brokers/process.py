"""The part of a broker that belongs to one process: connections, threads, sockets.

It is made at its first use, after gevent has patched and gunicorn has forked. The rule:
connections opened before a fork are not used after it. Python reports most forks as
they happen; a fork that it does not see, such as uWSGI's, is noticed at the next use.
"""

from __future__ import annotations

import _thread
import os
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..errors import Unavailable
from ..runtime.forks import process_key
from ..runtime.living import Living
from ..runtime.sockets import native

__all__ = ["PerProcess", "start_thread"]
P = TypeVar("P")  # the part
B = TypeVar("B")  # the broker


class PerProcess(Generic[B, P]):
    """The parts of a broker, one for each process; all methods from any thread.

    No method waits.

    Args:
        broker: The broker, or its `Health`: the owner of the parts, which must keep no
            reference to it or to ``forget``.
        drop: Called with this process's part when the broker is garbage-collected, at
            any moment: it must neither wait nor raise.
        forget: Called in a forked child with the broker and the parent's part, or
            ``None`` if the parent had none. Without it, the parent's part is kept
            untouched.
    """

    def __init__(
        self,
        broker: B,
        drop: Callable[[P], object],
        forget: Callable[[B, P | None], object] | None = None,
    ) -> None:
        self._broker = weakref.ref(broker)
        self._forget = forget
        self._parts: dict[object, P] = {}
        if forget is not None:
            _all.add(self)
        weakref.finalize(broker, _drop, self._parts, drop).atexit = False

    def get(self) -> P | None:
        """Return this process's part, ``None`` if there is none yet."""
        part = self._parts.get(process_key())
        if part is None and self._parts:
            self.leave_to_parent()
        return part

    def begin(self, part: P) -> P:
        """Set this process's part unless it has one; return the part that it has."""
        return self._parts.setdefault(process_key(), part)

    def end(self) -> P | None:
        """Remove this process's part and return it, ``None`` if there is none."""
        part = self.get()
        return None if part is None else self._parts.pop(process_key(), None)

    def leave_to_parent(self) -> None:
        """Forget the parts of other processes; in a forked child."""
        here, broker = process_key(), self._broker()
        if self._forget is None or broker is None:
            return
        for key in list(self._parts):
            part = self._parts.pop(key, None) if key is not here else None
            if part is not None:  # no other thread was faster
                self._forget(broker, part)

    def forked(self) -> None:
        """Handle a fork, in the child."""
        broker = self._broker()
        if self._parts:
            self.leave_to_parent()
        elif self._forget is not None and broker is not None:
            self._forget(broker, None)


def start_thread(scheme: str, run: Callable[[], None]) -> None:
    """Start a native thread.

    Args:
        scheme: The broker's, for the error.

    Raises:
        Unavailable: No thread can be started.
    """
    try:
        native(_thread, "start_new_thread")(run, ())
    except (RuntimeError, MemoryError) as error:
        raise Unavailable(f"{scheme} cannot start a thread: {error}") from error


def _drop(parts: dict[object, P], drop: Callable[[P], object]) -> None:
    part = parts.pop(process_key(), None)
    if part is not None:
        drop(part)


_all: Living[PerProcess[Any, Any]] = Living()


def _forked() -> None:
    for one in _all.all():
        one.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
