"""Bottle: `respond` turns a response of ours into one of Bottle's; ``@sse``.

Bottle would convert a foreign response, and answer 500.
"""

from __future__ import annotations

from bottle import HTTPResponse, request

from .servers.connection import Connection
from .wsgi.decorator import decorator
from .wsgi.responses import NDJSONResponse, SSEResponse, StreamResponse

__all__ = ["respond", "sse"]


def respond(response: SSEResponse | NDJSONResponse | StreamResponse) -> HTTPResponse:
    """Return a response of ours as Bottle's, from the view that handles a request.

    >>> from bottle import route
    >>> from syncstream import SSEResponse
    >>> @route("/events")
    ... def events():
    ...     return respond(SSEResponse(["hello", "world"]))
    """
    body, status, headers = response.get_wsgi_response(request.environ)
    # It takes the first item before it begins, and makes a 500 of an error there.
    Connection.of(request.environ).hides_errors = True
    if request.method == "HEAD":
        # Bottle drops it. For an empty body it would say Content-Length: 0.
        body = iter((b"\n",))
    return HTTPResponse(body, status, headers)


sse = decorator(SSEResponse, finish=respond)
