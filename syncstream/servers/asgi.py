"""ASGI servers' bridges to WSGI: a2wsgi, and those of uvicorn, Starlette, hypercorn.

They neither show the connection to the application nor tell it when the client has
left: the thread runs until the generator ends by itself (a2wsgi 1.10, uvicorn 0.54,
hypercorn 0.18).
"""

from __future__ import annotations

from .contract import Environ, Server, connection_reset

__all__ = ["SERVER"]


def _runs(environ: Environ) -> bool:
    if "asgi.scope" in environ:  # a2wsgi
        return True
    # The other bridges do not name themselves, but set SERVER_PORT to an int or None,
    # where PEP 3333 demands a str.
    return (
        "SERVER_SOFTWARE" not in environ
        and not isinstance(environ.get("SERVER_PORT", ""), str)
        and environ.get("wsgi.multithread") is True
        and environ.get("wsgi.multiprocess") is True
    )


SERVER = Server(
    "ASGI bridge",
    runs=_runs,
    raises=connection_reset,
    warnings=lambda environ: (
        "this ASGI server's WSGI bridge does not notice that a client has left: an "
        "endless stream keeps its thread for ever. Serve the application with a WSGI "
        "server, such as gunicorn -k gthread or -k gevent",
    ),
)
