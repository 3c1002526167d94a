"""gunicorn's settings for the demo, passed to it by `syncstream.__main__`.

Passing this file keeps gunicorn from reading a ``gunicorn.conf.py`` in the working
directory. gunicorn ignores settings that it does not know.
"""

from __future__ import annotations

import signal
from typing import Any

wsgi_app = "syncstream.demo:app"
worker_class = "gevent"
workers = 1
# Streams end at once, and idle connections, too: the time is for clients that have
# stopped reading.
graceful_timeout = 3
keepalive = 0
# gunicorn's first lines would bury the URL, and the page shows each request.
loglevel = "error"
control_socket_disable = True  # gunicorn 25 and later


def post_worker_init(worker: Any) -> None:
    """Let only the arbiter stop the worker at Ctrl-C.

    gunicorn's gevent worker spawns a greenlet that calls ``sys.exit`` for the
    terminal's SIGINT, and another for the arbiter's SIGQUIT; the second prints a
    traceback (gunicorn 27.0.1).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
