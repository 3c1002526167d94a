"""The stream of an asynchronous source, as its task finds it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

__all__ = ["refuse_in_task", "task_scope"]

task_scope: ContextVar[Callable[[], Any] | None] = ContextVar(
    "syncstream_task_scope", default=None
)
"""A weak reference to the stream whose asynchronous source runs in this context."""


def refuse_in_task(cure: str) -> None:
    """Refuse a wait that would hold up all asynchronous sources.

    Args:
        cure: What to do instead.

    Raises:
        RuntimeError: An asynchronous source is running in this thread.
    """
    if task_scope.get() is None:
        return
    try:
        sys.modules["asyncio"].get_running_loop()
    except RuntimeError:  # a thread that the source has started
        return
    raise RuntimeError(f"an asynchronous source must not wait in this way: {cure}")
