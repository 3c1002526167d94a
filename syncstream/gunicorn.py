"""gunicorn: a hook for a configuration file, for who would rather say it.

Nothing needs it: the worker is found at the first stream, and looked at 12 times a
second. With it the worker is known before any request. In gunicorn.conf.py::

    from syncstream.gunicorn import post_worker_init
"""

from __future__ import annotations

from typing import Any

from .runtime.process import process
from .servers.gunicorn import stopping

__all__ = ["post_worker_init"]


def post_worker_init(worker: Any) -> None:
    """Learn from a worker, which has just begun, when it is to stop."""
    stop = stopping(worker)
    if stop is not None:
        process().stop_when(stop)
