"""Bottle: `respond` turns a response of syncstream into one of Bottle's; decorators.

Without it, Bottle converts a foreign response and answers 500.
"""

from __future__ import annotations

from bottle import HTTPResponse, request

from .servers.connection import Connection
from .wsgi.decorator import decorator, push_decorator
from .wsgi.responses import NDJSONResponse, SSEResponse, StreamResponse
from .wsgi.streaming import streaming_decorator

__all__ = ["respond", "sse", "streaming", "with_sse"]


def respond(response: SSEResponse | NDJSONResponse | StreamResponse) -> HTTPResponse:
    """Return a response of syncstream as Bottle's; call it in the view of a request.

    >>> from bottle import route
    >>> from syncstream import SSEResponse
    >>> @route("/events")
    ... def events():
    ...     return respond(SSEResponse(["hello", "world"]))
    """
    body, status, headers = response.get_wsgi_response(request.environ)
    # Bottle takes the first item before it calls start_response, and answers an error
    # there with 500 without logging it.
    Connection.of(request.environ).hides_errors = True
    if request.method == "HEAD":
        # Bottle drops the body, but adds Content-Length: 0 to an empty one.
        body = iter((b"\n",))
    return HTTPResponse(body, status, headers)


sse = decorator(SSEResponse, finish=respond)
with_sse = push_decorator(SSEResponse, finish=respond)
streaming = streaming_decorator(
    StreamResponse, SSEResponse, finish=lambda response, args: respond(response)
)
