"""Flask with SQLAlchemy's pool, counted; and its teardowns.

/APP/KIND/SOURCE?key=KEY, as in db_django.py; APP may be "hasty", too, whose pool lets
nobody wait for long. KIND is "sse" for a response, "context" for one with Flask's
context, "decorated" for ``@sse``, "hand" and "hand-context" for
Flask's Response; or "own", a stream that queries by sessions of its own, "scoped",
one with Flask-SQLAlchemy's, "removed", which removes that before it waits, and
"before", whose view alone queries by it.
"""

import os
import tempfile

import flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
from sqlalchemy.orm import Session

from syncstream import SSEResponse, StreamMiddleware, sleep, sse
from tests.apps.control import note
from tests.apps.mounted import mounted
from tests.apps.sources import SOURCES, as_sse

db = SQLAlchemy()


def make(**options):
    app = flask.Flask(__name__)
    path = os.path.join(tempfile.mkdtemp(), "db.sqlite3")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{path}"
    pool = {"pool_size": 2, "max_overflow": 0, **options}
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = pool
    db.init_app(app)

    def source(name):
        return SOURCES[name](flask.request.args["key"])

    def hand(items):
        return flask.Response(as_sse(items), mimetype="text/event-stream")

    @app.get("/health")
    def health():
        return "ok"

    @app.get("/sse/<name>")
    def events(name):
        return SSEResponse(source(name))

    @app.get("/context/<name>")
    def context(name):
        return SSEResponse(flask.stream_with_context(source(name)))

    @app.get("/decorated/<name>")
    @sse
    def decorated(name):
        yield from source(name)

    @app.get("/hand/<name>")
    def by_hand(name):
        return hand(source(name))

    @app.get("/hand-context/<name>")
    def by_hand_with_context(name):
        return hand(flask.stream_with_context(source(name)))

    @app.get("/own")
    @sse
    def own():
        while True:
            with Session(db.engine) as session:
                value = session.scalar(text("SELECT 1"))
            yield value
            sleep(0.05)

    @app.get("/scoped")
    @sse
    def scoped():
        while True:
            yield db.session.scalar(text("SELECT 1"))
            sleep(0.05)

    @app.get("/removed")
    @sse
    def removed():
        while True:
            value = db.session.scalar(text("SELECT 1"))
            db.session.remove()
            yield value
            sleep(0.05)

    @app.get("/before")
    def before():
        value = db.session.scalar(text("SELECT 1"))

        def source():
            while True:
                yield value
                sleep(0.05)

        return SSEResponse(source())

    @app.get("/pool")
    def pool():
        return {"checked_out": db.engine.pool.checkedout()}

    @app.before_request
    def begin():
        flask.g.key = flask.request.args.get("key")

    @app.teardown_request
    def request_is_over(error):
        tell("request")

    @app.teardown_appcontext
    def context_is_over(error):
        tell("context")

    def tell(what):
        if flask.g.get("key"):
            note(f"{flask.g.key}-calls", what)

    return app


plain = make()
wrapped = make()
wrapped.wsgi_app = StreamMiddleware(wrapped.wsgi_app)
limited = make()
limited.wsgi_app = StreamMiddleware(limited.wsgi_app, max_streams=1)
hasty = make(pool_timeout=1)
APPS = {"app": plain, "wrapped": wrapped, "limited": limited, "hasty": hasty}
app = mounted(APPS)
