"""The head of a response that is not out: how it began, and an error's in its place."""

from __future__ import annotations

import re
from typing import Any

from werkzeug.http import HTTP_STATUS_CODES

from .contract import Environ, Server

__all__ = ["error_head", "find_head"]

Pairs = list[tuple[str, str]]

# By name: Content-Security-Policy protects every answer.
_DESCRIBES_BODY = re.compile(
    r"(content-(type|length|encoding|disposition|range|language|location|digest|md5)"
    r"|(repr-)?digest|x-accel-.*|etag|last-modified|expires|cache-control"
    r"|accept-ranges)$",
    re.I,
)


def find_head(server: Server, environ: Environ) -> tuple[Any, Pairs]:
    """Find in the server's frames how the running request's response began.

    Returns:
        The server's start_response and the headers; ``None`` and none if it has not
        begun: Bottle takes the first item before.
    """
    write = server.own_write(environ)
    headers = [*((server.headers(write) if write is not None else None) or ())]
    return server.start_response(environ) if headers else None, headers


def error_head(status: int, headers: Pairs, body: bytes) -> tuple[str, Pairs, bytes]:
    """Return an error's status line, headers and body.

    Args:
        status: 400 to 599.
        headers: Those of the response that it replaces: what is not about its body is
            kept.
        body: Of that response's own type; ``b""`` for plain text.
    """
    line = f"{status} {HTTP_STATUS_CODES.get(status, 'Error')}"
    kinds = [value for name, value in headers if name.lower() == "content-type"]
    if not (body and kinds):
        body, kinds = f"{line}\n".encode(), ["text/plain; charset=utf-8"]
    headers = [pair for pair in headers if not _DESCRIBES_BODY.match(pair[0])]
    headers += [
        ("Content-Type", kinds[0]),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    ]
    return line, headers, body
