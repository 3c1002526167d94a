"""gunicorn: hooks for a configuration file, for who would rather say it.

Nothing needs them: the worker is found at the first stream, and looked at 12 times a
second. With them it is told before any request, and streams end in the moment of a
SIGINT or SIGQUIT, after which gunicorn leaves them 0.1 s. In gunicorn.conf.py::

    from syncstream.gunicorn import post_worker_init, worker_int
"""

from __future__ import annotations

from typing import Any

from .process import process
from .servers.gunicorn import is_stopping

__all__ = ["post_worker_init", "worker_int"]


def post_worker_init(worker: Any) -> None:
    """Learn from a worker, which has just begun, when it is to stop."""
    stopping = is_stopping(worker)
    if stopping is not None:
        process().stop_when(stopping)


def worker_int(worker: Any) -> None:
    """End all streams of a worker that was told to quit."""
    process().stop()
