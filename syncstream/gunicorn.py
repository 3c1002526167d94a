"""gunicorn: an optional hook for its configuration file.

Without the hook, the first stream finds its worker, and the worker's stop is checked 12
times a second. With it, the worker is known before any request. In gunicorn.conf.py::

    from syncstream.gunicorn import post_worker_init
"""

from __future__ import annotations

from typing import Any

from .runtime.process import process
from .servers.gunicorn import stopping

__all__ = ["post_worker_init"]


def post_worker_init(worker: Any) -> None:
    """Have this process's streams end when its gunicorn worker stops."""
    stop = stopping(worker)
    if stop is not None:
        process().stop_when(stop)
