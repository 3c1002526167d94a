"""The WSGI servers, one file each: where it keeps the socket, how a stream ends.

An open set: to add a server, add a file here and a line below. Measured with gunicorn
27.0, gevent 26.9, Werkzeug 3.1, waitress 3.0, cheroot 11.1, uWSGI 2.0.30 and Django 4.2
and 6.1 (wsgiref). Streams work on other servers, too, but without access to their
sockets: a hang-up shows only at the next write.
"""

from __future__ import annotations

from . import (
    asgi,
    cheroot,
    gunicorn,
    pywsgi,
    testing,
    uwsgi,
    waitress,
    werkzeug,
    wsgiref,
)
from .contract import Environ, Server, connection_reset
from .guard import guarded, say_failed

__all__ = ["safe", "server_of"]

SERVERS = (
    gunicorn.SERVER,
    werkzeug.SERVER,
    waitress.SERVER,
    uwsgi.SERVER,
    pywsgi.SERVER,
    cheroot.SERVER,
    wsgiref.SERVER,
    asgi.SERVER,
    testing.IN_PROCESS,
    testing.SERVER,
)
OTHER = Server(
    "another server",
    runs=lambda environ: True,
    raises=connection_reset,
    logs_errors=False,
    is_known=False,
    lets_exits_through=True,
)


def server_of(environ: Environ) -> Server:
    """Return the server that made an environ."""
    for server in SERVERS:
        try:
            if server.runs(environ):
                return server
        except Exception as error:
            say_failed(server, error)
    return OTHER


_SAFE = {id(server): guarded(server, OTHER) for server in (*SERVERS, OTHER)}


def safe(server: Server) -> Server:
    """Return a server of `server_of` with functions that do not fail."""
    return _SAFE[id(server)]
