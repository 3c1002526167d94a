"""Falcon, with our responses, and responders written by hand."""

import falcon

from syncstream import (
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
)
from syncstream.falcon import respond
from tests.apps.sources import SOURCES, as_sse


def source_of(req, name):
    return SOURCES[name](req.get_param("key"))


class Health:
    def on_get(self, req, resp):
        resp.text = "ok"


class Events:
    def on_get(self, req, resp, name):
        response = SSEResponse(source_of(req, name))
        response.set_cookie("cookie", "crumb")
        respond(req, resp, response)

    on_head = on_get


class NDJSON:
    def on_get(self, req, resp, name):
        respond(req, resp, NDJSONResponse(source_of(req, name)))


class Raw:
    def on_get(self, req, resp, name):
        respond(req, resp, StreamResponse(map(str, source_of(req, name))))


class Named:
    def on_get(self, req, resp):
        def named():
            yield type(current_stream()).__name__ + req.path

        respond(req, resp, SSEResponse(named(), end="reconnect"))


class Handwritten:
    def on_get(self, req, resp, name):
        resp.content_type = "text/event-stream"
        resp.stream = as_sse(source_of(req, name))


class After:
    def process_response(self, req, resp, resource, req_succeeded):
        resp.set_header("X-After", "after")


app = falcon.App(middleware=[After()])
app.add_route("/health", Health())
app.add_route("/sse/{name}", Events())
app.add_route("/ndjson/{name}", NDJSON())
app.add_route("/raw/{name}", Raw())
app.add_route("/stream", Named())
app.add_route("/handwritten/{name}", Handwritten())
wrapped = StreamMiddleware(app)
