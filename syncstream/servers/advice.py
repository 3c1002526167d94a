"""Advice for the operator in the log, each line once a process."""

from __future__ import annotations

import logging
from typing import Literal

from ..runtime.process import process
from .contract import Environ, Server

__all__ = ["advise", "log", "warn_of_compression"]

# The logger of `syncstream.wsgi`, as before this was a module of its own: applications
# may have configured it.
log = logging.getLogger("syncstream.wsgi")


def advise(
    server: Server, environ: Environ, kind: Literal["warnings", "stop_warnings"]
) -> tuple[str, ...]:
    """Log a server's advice of a kind; return it.

    Args:
        server: The request's server, of `safe`.
        environ: The request's environ.
        kind: The name of the server's function.
    """
    record = process()
    # The key contains nothing from the client but whether it speaks HTTP/2.
    is_http_2 = str(environ.get("SERVER_PROTOCOL")).startswith("HTTP/2")
    key = (kind, server.name, is_http_2)
    ask = getattr(server, kind)
    warnings: tuple[str, ...] = record.memo(key, lambda: tuple(ask(environ)))
    for warning in warnings:
        record.warn_once(log, warning)
    return warnings


def warn_of_compression() -> None:
    process().warn_once(
        log,
        "a middleware compresses streams, which holds back their events, perhaps to the"
        " end of the stream: exempt streams (Flask-Compress: COMPRESS_STREAMS = False),"
        " and let the proxy compress",
        "compressed",
    )
