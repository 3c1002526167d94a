"""The frameworks' test clients: not servers, though some claim to be.

Those of Django and Falcon set ``wsgi.multiprocess``, and Falcon's names gunicorn. The
others (Werkzeug's and therefore Flask's, WebTest) name no server: they count as unknown
servers.
"""

from __future__ import annotations

from .contract import Environ, Server, connection_reset

__all__ = ["SERVER"]


def _runs(environ: Environ) -> bool:
    # Nothing here comes from a client.
    if type(environ.get("wsgi.input")).__module__ == "django.test.client":
        return True
    software = environ.get("SERVER_SOFTWARE") or ""
    return software.startswith("gunicorn/") and "gunicorn.socket" not in environ


SERVER = Server(
    "a test client",
    runs=_runs,
    raises=connection_reset,
    logs_errors=False,
    is_known=False,
    is_test=True,
)
