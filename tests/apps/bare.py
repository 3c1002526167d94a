"""A WSGI application without a framework, with our responses and by hand."""

from urllib.parse import parse_qs

from werkzeug.debug import DebuggedApplication

from syncstream import (
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
)
from tests.apps.sources import SOURCES, as_sse

EVENTS = [("Content-Type", "text/event-stream"), ("Connection", "keep-alive")]
LINES = [("Content-Type", "application/x-ndjson"), ("X-Other", "kept")]


def app(environ, start_response):
    """/KIND/SOURCE?key=KEY"""
    query = parse_qs(environ["QUERY_STRING"])
    _, kind, *rest = environ["PATH_INFO"].split("/")
    if kind == "health":
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    source = SOURCES[rest[0]](query["key"][0])
    if kind == "sse":
        response = SSEResponse(source)
    elif kind == "error":
        response = SSEResponse(source, on_error=lambda e: {"error": str(e)})
    elif kind == "refused":
        response = SSEResponse(source, 204)
    elif kind == "told":
        response = NDJSONResponse(source, on_error=lambda e: {"error": str(e)})
    elif kind == "ndjson":
        response = NDJSONResponse(source)
    elif kind == "raw":
        response = StreamResponse(map(str, source))
    elif kind == "sized":
        response = StreamResponse(map(str, source), headers={"Content-Length": "99"})
    elif kind == "handwritten":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return as_sse(source)
    elif kind == "lines":
        start_response("200 OK", LINES)
        return as_sse(source)
    elif kind == "lazy":
        return lazy(source, start_response)
    elif kind == "bad-header":
        return lazy(source, start_response, [("X-Bad", "a\nb: c")])
    elif kind == "lazy-lines":
        return lazy(source, start_response, LINES)
    else:
        raise LookupError(kind)
    return response(environ, start_response)


def lazy(source, start_response, headers=EVENTS):
    """Call start_response in the first step, as generator applications do."""
    start_response("200 OK", headers)
    yield from as_sse(source)


wrapped = StreamMiddleware(app)
debugged = DebuggedApplication(app)
