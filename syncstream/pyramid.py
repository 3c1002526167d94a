"""Pyramid: ``config.include("syncstream.pyramid")`` lets views return our responses.

Without it, Pyramid refuses a foreign response with a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyramid.config import Configurator
from pyramid.response import Response
from pyramid.threadlocal import get_current_request

from .servers.connection import Connection
from .wsgi.responses import NDJSONResponse, SSEResponse, StreamResponse

__all__ = ["includeme"]


def includeme(config: Configurator) -> None:
    """Let views return `SSEResponse`, `NDJSONResponse` and `StreamResponse`."""
    for kind in (SSEResponse, NDJSONResponse, StreamResponse):
        config.add_response_adapter(_adapt, kind)


class _Response(Response):  # type: ignore[misc, unused-ignore]
    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        body: Iterable[bytes] = super().__call__(environ, start_response)
        Connection.of(environ).note_head(start_response, [*self.headerlist])
        return body


def _adapt(response: SSEResponse | NDJSONResponse | StreamResponse) -> Response:
    # Pyramid passes no request to an adapter, but calls it in the request's thread.
    environ = get_current_request().environ
    body, status, headers = response.get_wsgi_response(environ)
    return _Response(status=status, headerlist=headers, app_iter=body)
