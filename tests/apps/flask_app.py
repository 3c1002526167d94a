"""Flask, with our responses, ``@sse``, and views written by hand."""

import flask

from syncstream import (
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
    sse,
)
from tests.apps.control import note
from tests.apps.sources import SOURCES, as_sse


def make():
    app = flask.Flask(__name__)
    app.secret_key = "tests"

    @app.get("/health")
    def health():
        return "ok"

    @app.get("/sse/<name>")
    def events(name):
        key = flask.request.args["key"]

        @flask.after_this_request
        def cookie(response):
            response.set_cookie("cookie", "crumb")
            return response

        flask.session["user"] = "alice"
        response = SSEResponse(SOURCES[name](key))
        response.call_on_close(lambda: note(f"{key}-closed", "closed"))
        return response

    @app.get("/ndjson/<name>")
    def ndjson(name):
        return NDJSONResponse(SOURCES[name](flask.request.args["key"]))

    @app.get("/raw/<name>")
    def raw(name):
        return StreamResponse(map(str, SOURCES[name](flask.request.args["key"])))

    @app.get("/decorated/<name>")
    @sse
    def decorated(name):
        yield from SOURCES[name](flask.request.args["key"])

    @app.get("/async-decorated/<name>")
    @sse
    async def async_decorated(name):
        async for item in SOURCES[name](flask.request.args["key"]):
            yield item

    @app.get("/stream")
    @sse(end="reconnect")
    def stream():
        yield type(current_stream()).__name__ + flask.request.path

    @app.get("/handwritten/<name>")
    def handwritten(name):
        source = as_sse(SOURCES[name](flask.request.args["key"]))
        return flask.Response(source, mimetype="text/event-stream")

    @app.after_request
    def after(response):
        response.headers["X-After"] = "after"
        return response

    return app


app = make()
wrapped = make()
wrapped.wsgi_app = StreamMiddleware(wrapped.wsgi_app)
