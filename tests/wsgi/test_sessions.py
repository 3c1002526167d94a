"""A write to a session in a generator comes too late: said once, with the cure."""

import flask
import pytest
from django.contrib.sessions.backends.file import SessionStore
from django.test import Client as DjangoClient
from django.test import override_settings
from django.urls import path
from flask.sessions import SessionInterface, SessionMixin

from syncstream import SSEResponse, StreamMiddleware, sse
from syncstream import django as in_django
from tests.apps import django_app

assert callable(django_app.app)  # it configures Django


pytestmark = pytest.mark.usefixtures("own_record")


def write(session, how):
    if how == "new":
        session["a"] = 1
    elif how == "changed":
        session["seen"] = 2
    elif how == "removed":
        del session["seen"]
    elif how == "nested":
        session["list"].append(1)
        session.modified = True
    elif how == "saved":
        session["a"] = 1
        session.save()
    else:
        assert session["seen"] == 1


def flask_app(how):
    app = flask.Flask(__name__)
    app.secret_key = "x"
    app.wsgi_app = StreamMiddleware(app.wsgi_app)

    @app.before_request
    def see():
        if "seen" not in flask.session:
            flask.session.update(seen=1, list=[])

    def source():
        yield "a"
        write(flask.session, how)
        yield "b"

    app.get("/decorated")(sse(source))

    @app.get("/response")
    def response():
        return SSEResponse(flask.stream_with_context(source()))

    @app.get("/by hand")
    def by_hand():
        chunks = (f"data: {item}\n\n" for item in source())
        body = flask.stream_with_context(chunks)
        return flask.Response(body, mimetype="text/event-stream")

    return app


@pytest.mark.parametrize("how", ["new", "changed", "removed", "nested", "read"])
@pytest.mark.parametrize("view", ["decorated", "response", "by hand"])
def test_flasks_session(view, how, caplog):
    """By `@sse`, by a response, and by hand; what the view writes is kept."""
    client = flask_app(how).test_client()
    for _ in range(2):
        response = client.get(f"/{view}")
        assert b"data: b\n\n" in response.data
        response.close()
        with client.session_transaction() as session:
            assert session == {"seen": 1, "list": []}
    said = caplog.text.count("has written to flask.session, and that is lost")
    assert said == (how != "read")


def events(request, how):
    request.session.update({"seen": 1, "list": []})

    def source():
        yield "a"
        write(request.session, how)
        yield "b"

    return in_django.SSEResponse(source())


urlpatterns = [path("<how>", events)]


@pytest.mark.parametrize(
    "how", ["new", "changed", "removed", "nested", "read", "saved"]
)
def test_djangos_session(how, caplog, tmp_path):
    """Likewise; a generator may save it, and then nothing is lost."""
    with override_settings(
        ROOT_URLCONF=__name__,
        MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
        SESSION_ENGINE="django.contrib.sessions.backends.file",
        SESSION_FILE_PATH=str(tmp_path),
    ):
        client = DjangoClient()
        assert b"data: b\n\n" in client.get(f"/{how}").getvalue()
        stored = SessionStore(client.cookies["sessionid"].value)
        kept = {"seen": 1, "list": []} | ({"a": 1} if how == "saved" else {})
        assert dict(stored.items()) == kept
    said = caplog.text.count("has written to request.session, and that is lost")
    assert said == (how not in ("read", "saved"))


def test_a_session_that_cannot_be_read_closes_the_source():
    """No server does, as it has got no body."""

    class Away(dict, SessionMixin):
        def __iter__(self):
            raise ConnectionError("no sessions")

        keys = __iter__

    class Sessions(SessionInterface):
        def open_session(self, app, request):
            return Away()

        def save_session(self, app, session, response):
            pass

    class Source:
        is_closed = False

        def __iter__(self):
            return iter(())

        def close(self):
            self.is_closed = True

    app, source = flask.Flask(__name__), Source()
    app.session_interface, app.testing = Sessions(), True
    response = SSEResponse(source)  # referred to: it is not collected
    app.get("/")(lambda: response)
    with pytest.raises(ConnectionError):
        app.test_client().get("/")
    assert source.is_closed
