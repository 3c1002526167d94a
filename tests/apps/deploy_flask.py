"""Flask, with each kind of response: see apps/deploy.py."""

import os

from flask import Flask, jsonify, request

from syncstream import (
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
)
from tests.apps import deploy

if os.environ.get("AGENT") == "sentry":
    import sentry_sdk
    from sentry_sdk.integrations.flask import FlaskIntegration
    from sentry_sdk.transport import Transport

    class Nowhere(Transport):
        """Keeps nothing, and sends nothing."""

        def capture_envelope(self, envelope):
            pass

    sentry_sdk.init(
        "http://public@127.0.0.1:9/1",
        transport=Nowhere,
        traces_sample_rate=1.0,
        # Or it imports each library that it knows of and finds here.
        integrations=[FlaskIntegration()],
        auto_enabling_integrations=False,
    )

app = Flask(__name__)


@app.get("/health")
def health():
    return "ok"


@app.get("/facts")
def facts():
    return jsonify(deploy.facts())


@app.route("/sse", methods=["GET", "POST"])
def sse():
    query = request.args
    return SSEResponse(deploy.rows(query), **deploy.life(query))


@app.get("/ndjson")
def ndjson():
    return NDJSONResponse(deploy.rows(request.args))


@app.get("/raw")
def raw():
    query = request.args
    return StreamResponse(deploy.lines(query), **deploy.life(query))


@app.get("/events")
def events():
    query = request.args
    return SSEResponse(deploy.subscription(query), **deploy.life(query))


@app.get("/lines")
def lines():
    return NDJSONResponse(deploy.subscription(request.args))


@app.get("/plain")
def plain():
    """An ordinary view that takes its time."""
    return "".join(deploy.lines(request.args))


if os.environ.get("MIDDLEWARE"):
    app.wsgi_app = StreamMiddleware(app.wsgi_app)
