"""Flask, with our responses, ``@sse``, ``@with_sse``, and views written by hand."""

import flask

from syncstream import (
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    current_stream,
    sse,
    with_sse,
)
from tests.apps.control import note
from tests.apps.sources import ASYNC_PUSHED, PUSHED, SOURCES, as_sse


def make():
    app = flask.Flask(__name__)
    app.secret_key = "tests"

    @app.get("/health")
    def health():
        return "ok"

    @app.route("/sse/<name>", methods=["GET", "POST"])
    def events(name):
        key = flask.request.args["key"]

        @flask.after_this_request
        def cookie(response):
            response.set_cookie("cookie", "crumb")
            return response

        flask.session["user"] = "alice"
        options = {}
        if "keepalive" in flask.request.args:
            options["keepalive"] = float(flask.request.args["keepalive"])
        if "tells" in flask.request.args:
            options["on_error"] = lambda error: f"told: {error}"
        response = SSEResponse(SOURCES[name](key), **options)
        response.call_on_close(lambda: note(f"{key}-closed", "closed"))
        return response

    @app.route("/ndjson/<name>", methods=["GET", "POST"])
    def ndjson(name):
        return NDJSONResponse(SOURCES[name](flask.request.args["key"]))

    @app.get("/raw/<name>")
    def raw(name):
        source = SOURCES[name](flask.request.args["key"])
        return StreamResponse(source if name == "async-text" else map(str, source))

    @app.get("/decorated/<name>")
    @sse
    def decorated(name):
        yield from SOURCES[name](flask.request.args["key"])

    @app.get("/async-decorated/<name>")
    @sse
    async def async_decorated(name):
        async for item in SOURCES[name](flask.request.args["key"]):
            yield item

    @app.get("/pushed/<name>")
    @with_sse
    def pushed(name, sse):
        PUSHED[name](sse, flask.request.args["key"])

    @app.get("/async-pushed/<name>")
    @with_sse
    async def async_pushed(name, sse):
        await ASYNC_PUSHED[name](sse, flask.request.args["key"])

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
single = make()
single.wsgi_app = StreamMiddleware(single.wsgi_app, max_streams=1)
