"""Bottle, with our responses, ``@sse``, and views written by hand."""

import bottle

from syncstream import (
    Hub,
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
)
from syncstream.bottle import respond, sse
from syncstream.runtime.process import process
from tests.apps.control import note
from tests.apps.sources import SOURCES, as_sse

app = bottle.Bottle()
hub = Hub()


@app.get("/health")
def health():
    return "ok"


@app.get("/sse/<name>")
def events(name):
    response = SSEResponse(SOURCES[name](bottle.request.query.key))
    response.set_cookie("cookie", "crumb")
    return respond(response)


# `request.params` puts a wsgi.input of Bottle's own into the environ.


@app.get("/params/<name>")
def params(name):
    return respond(SSEResponse(SOURCES[name](bottle.request.params.key)))


@app.get("/byhand/<name>")
def by_hand(name):
    key = bottle.request.params.key
    bottle.response.content_type = "text/event-stream"
    return as_sse(SOURCES[name](key))


@app.get("/subscribe")
def subscribe():
    assert bottle.request.params.key
    return respond(SSEResponse(hub.subscribe("news")))


@app.get("/note")
def noted():
    note(bottle.request.params.key, "run")
    return "noted"


@app.get("/parked")
def parked():
    return str(process().parked_streams)


@app.get("/ndjson/<name>")
def ndjson(name):
    return respond(NDJSONResponse(SOURCES[name](bottle.request.query.key)))


@app.get("/raw/<name>")
def raw(name):
    return respond(StreamResponse(map(str, SOURCES[name](bottle.request.query.key))))


@app.get("/decorated/<name>")
@sse
def decorated(name):
    yield from SOURCES[name](bottle.request.query.key)


@app.get("/stream")
@sse(end="reconnect")
def stream():
    yield type(current_stream()).__name__ + bottle.request.path


@app.get("/handwritten/<name>")
def handwritten(name):
    bottle.response.content_type = "text/event-stream"
    return as_sse(SOURCES[name](bottle.request.query.key))


@app.hook("after_request")
def after():
    bottle.response.headers["X-After"] = "after"


wrapped = StreamMiddleware(app)
