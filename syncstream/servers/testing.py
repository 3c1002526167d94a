"""Clients of tests: not servers, though some of the frameworks' own claim to be.

Those of Django and Falcon set ``wsgi.multiprocess``, and Falcon's names gunicorn. The
others (Werkzeug's and therefore Flask's, WebTest) name no server: they count as unknown
servers. `syncstream.testing.Client` serves each request in a thread, over a socket of
its own, and puts its side of that into the environ.
"""

from __future__ import annotations

from .contract import Environ, Server, Write, connection_reset, running

__all__ = ["EXCHANGE", "IN_PROCESS", "SERVER"]

EXCHANGE = "syncstream.testing.exchange"
"""The environ key of the server's side of a request by `syncstream.testing.Client`."""

_MODULE = "syncstream.testing.exchange"


def _runs(environ: Environ) -> bool:
    # Nothing here comes from a client.
    if type(environ.get("wsgi.input")).__module__ == "django.test.client":
        return True
    software = environ.get("SERVER_SOFTWARE") or ""
    return software.startswith("gunicorn/") and "gunicorn.socket" not in environ


def _own_write(environ: Environ) -> Write | None:
    write: Write | None = getattr(running(_MODULE, "write"), "write", None)
    return write


SERVER = Server(
    "a test client",
    runs=_runs,
    raises=connection_reset,
    logs_errors=False,
    is_known=False,
    is_test=True,
)

IN_PROCESS = Server(
    "syncstream.testing",
    runs=lambda environ: EXCHANGE in environ,
    socket=lambda environ: environ[EXCHANGE].socket,
    marks_end=lambda environ: True,
    write_module=_MODULE,
    headers=lambda write: write.__self__.headers,  # type: ignore[attr-defined]
    own_write=_own_write,
    sent=lambda write: write.__self__.sent,  # type: ignore[attr-defined]
    stays=lambda environ: "a test reads it",
    logs_errors=False,
    is_known=False,
    is_test=True,
)
