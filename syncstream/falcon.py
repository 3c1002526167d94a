"""Falcon: `respond` copies a response of syncstream into Falcon's; ``@streaming``.

Falcon ignores the return values of responders.
"""

from __future__ import annotations

from typing import Any

from falcon import Request, Response

from .servers.connection import Connection
from .servers.contract import running
from .wsgi.responses import NDJSONResponse, SSEResponse, StreamResponse
from .wsgi.streaming import streaming_decorator

__all__ = ["respond", "streaming"]


def respond(
    req: Request,
    resp: Response,
    response: SSEResponse | NDJSONResponse | StreamResponse,
) -> None:
    """Answer a request with a response of syncstream.

    Falcon answers HEAD with 405 unless there is a responder: ``on_head = on_get``.

    >>> from syncstream import SSEResponse
    >>> class Events:
    ...     def on_get(self, req, resp):
    ...         respond(req, resp, SSEResponse(["hello", "world"]))
    """
    body, status, headers = response.get_wsgi_response(req.env)
    connection = Connection.of(req.env)
    is_answering = running("falcon.app", "keys", name="env") is req.env
    if is_answering and not connection.shows_errors:  # Falcon's own test client
        start_response = running("falcon.app", "__call__", name="start_response")
        connection.note_head(start_response, headers)
    resp.status = int(status[:3])  # Falcon accepts only its own status texts
    for name, value in headers:
        if name.lower() == "content-type":
            resp.content_type = value
        else:
            resp.append_header(name, value)
    stream: Any = body
    resp.stream = stream


def _finish(response: Any, args: tuple[Any, ...]) -> None:
    # A responder's arguments are (self, req, resp, …), a function's are (req, resp, …).
    req = next(arg for arg in args if isinstance(arg, Request))
    resp = next(arg for arg in args if isinstance(arg, Response))
    respond(req, resp, response)


streaming = streaming_decorator(StreamResponse, SSEResponse, finish=_finish)
