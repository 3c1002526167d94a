"""`LiveServer`: an application on a real server, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Literal

from .reader import check_timeout

__all__ = ["LiveServer"]

_WORKERS = {
    "sync": ["-k", "sync"],
    "gthread": ["-k", "gthread", "--threads", "8"],
    "gevent": ["-k", "gevent"],
}
_WERKZEUG = (
    "import sys, importlib; from werkzeug.serving import run_simple;"
    " name, _, app = sys.argv[1].partition(':');"
    " app = getattr(importlib.import_module(name), app or 'app');"
    " run_simple('127.0.0.1', int(sys.argv[2]), app, threaded=True)"
)
_LOOK_EVERY = 0.02  # seconds
_STOPS = 5.0  # seconds that a server gets to stop


class LiveServer:
    """A server of one worker, at a free port of 127.0.0.1. A context manager.

    ::

        with LiveServer("shop.wsgi:app", worker="gevent") as server:
            response = requests.get(f"{server.url}/events", stream=True)

    It ends at the end of the ``with``. It finds modules where the test does.

    Args:
        app: The WSGI application, ``"package.module:name"``.
        server: "gunicorn", which has to be installed, or "werkzeug".
        worker: The kind of gunicorn's worker: "sync", "gthread" (8 threads) or
            "gevent", which has to be installed.
        env: More environment variables.
        timeout: Seconds in which it must be ready.

    Attributes:
        url: Where it listens, without a slash at its end.

    Raises:
        RuntimeError: It has not started; the message has its log.
        ValueError: An argument is wrong.
    """

    def __init__(
        self,
        app: str,
        *,
        server: Literal["gunicorn", "werkzeug"] = "gunicorn",
        worker: Literal["sync", "gthread", "gevent"] = "gthread",
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> None:
        if not isinstance(app, str) or not app.partition(":")[2]:
            raise ValueError(f'app must be text like "package.module:app", got {app!r}')
        if server not in ("gunicorn", "werkzeug"):
            raise ValueError(f'server must be "gunicorn" or "werkzeug", got {server!r}')
        if worker not in _WORKERS:
            raise ValueError(f"worker must be one of {[*_WORKERS]}, got {worker!r}")
        check_timeout(timeout)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", _WERKZEUG, app, str(port)]
        if server == "gunicorn":
            bind = f"127.0.0.1:{port}"
            options = [*_WORKERS[worker], "-b", bind, "--graceful-timeout", "2"]
            command = [sys.executable, "-m", "gunicorn", *options, app]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close())
        path = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
        try:
            self._process = subprocess.Popen(
                command,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, **(env or {})},
                start_new_session=True,
            )
        except BaseException:
            self._log.close()
            raise
        try:
            self._await_ready(port, time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def _await_ready(self, port: int, until: float) -> None:
        while True:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server has not started:\n{self.log()}")
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as probe:
                    probe.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
                    if probe.recv(1):
                        return
            except OSError:
                pass  # it does not listen yet
            time.sleep(_LOOK_EVERY)

    def log(self) -> str:
        """Return what the server has written so far."""
        # The server writes at the same file position: to seek would move it.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def close(self) -> None:
        """Stop the server, and wait until it has ended. Again, it does nothing."""
        if self._log.closed:
            return
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_STOPS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._signal(signal.SIGKILL)  # workers that were left behind
        self._log.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
