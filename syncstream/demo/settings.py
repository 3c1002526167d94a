"""gunicorn's settings for the demo; `syncstream.__main__` hands them over.

Given by name, so that a ``gunicorn.conf.py`` of the directory in which someone
tries the demo is not used. gunicorn leaves out what it does not know.
"""

from __future__ import annotations

import signal
from typing import Any

wsgi_app = "syncstream.demo:app"
worker_class = "gevent"
workers = 1
# Streams end at once, and so do connections between two requests: this is for clients
# that have stopped reading.
graceful_timeout = 3
keepalive = 0
# Its first lines would bury the URL, and each request shows on the page.
loglevel = "error"
control_socket_disable = True  # gunicorn 25 and later


def post_worker_init(worker: Any) -> None:
    """Let Ctrl-C reach the worker by the arbiter alone.

    gunicorn's gevent worker spawns a greenlet that calls ``sys.exit`` for the
    terminal's SIGINT and one for the arbiter's SIGQUIT, and the second prints a
    traceback (gunicorn 27.0.1).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
