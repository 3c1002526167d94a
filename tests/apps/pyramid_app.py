"""Pyramid, with our responses, and views written by hand."""

from pyramid.config import Configurator
from pyramid.events import NewResponse
from pyramid.response import Response

from syncstream import (
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
)
from tests.apps.sources import SOURCES, as_sse


def source_of(request):
    return SOURCES[request.matchdict["name"]](request.GET["key"])


def events(request):
    response = SSEResponse(source_of(request))
    response.set_cookie("cookie", "crumb")
    return response


def handwritten(request):
    return Response(
        app_iter=as_sse(source_of(request)), content_type="text/event-stream"
    )


def named():
    yield type(current_stream()).__name__ + "/stream"


VIEWS = {
    "/health": lambda request: Response("ok"),
    "/sse/{name}": events,
    "/ndjson/{name}": lambda request: NDJSONResponse(source_of(request)),
    "/raw/{name}": lambda request: StreamResponse(map(str, source_of(request))),
    "/stream": lambda request: SSEResponse(named(), end="reconnect"),
    "/handwritten/{name}": handwritten,
}

with Configurator() as config:
    config.include("syncstream.pyramid")
    for path, view in VIEWS.items():
        config.add_route(path, path)
        config.add_view(view, route_name=path)
    config.add_subscriber(
        lambda event: event.response.headers.update({"X-After": "after"}), NewResponse
    )
    app = config.make_wsgi_app()
wrapped = StreamMiddleware(app)
