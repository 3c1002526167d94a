"""Views that send, in each framework: their arguments, and what they find there."""

import asyncio
import contextlib
import warnings

import bottle
import falcon
import flask
import pytest
import werkzeug
from django.http import HttpResponse
from django.test import Client as DjangoClient
from django.test import override_settings
from django.urls import path, re_path
from django.utils import translation
from django.utils.decorators import method_decorator
from werkzeug.test import Client

import syncstream.bottle
import syncstream.django
import syncstream.falcon
from syncstream import current_stream, sleep, sse, with_sse
from syncstream.runtime.journal import journal
from tests.apps import django_app
from tests.support.pairs import check_script

SENT = b": ok\n\ndata: a\n\ndata: /events/a\n\n"


@pytest.fixture(scope="module", autouse=True)
def _django():
    """The application under test has configured Django."""
    assert callable(django_app.app)


def views(decorate, name_of, path_of):
    """Return two views of the same body, a plain one and a coroutine.

    They are called ``(request, sse, …)`` where the framework passes a request.
    """

    def plain(*args, sse, **kwargs):
        sse.send(name_of(*args, **kwargs))
        sse.send(path_of(*args))

    async def coroutine(*args, sse, **kwargs):
        await sse.send(name_of(*args, **kwargs))
        await asyncio.sleep(0)
        await sse.send(path_of(*args))

    return {"plain": decorate(plain), "coroutine": decorate(coroutine)}


def in_flask(kind):
    app = flask.Flask(__name__)
    found = views(with_sse, lambda name: name, lambda: flask.request.path)
    app.add_url_rule("/events/<name>", "events", found[kind])
    return Client(app).get("/events/a").data


def in_bottle(kind):
    app = bottle.Bottle()
    decorate = syncstream.bottle.with_sse

    def path_of():  # Bottle's request is a thread's, not a task's
        return bottle.request.path if kind == "plain" else "/events/a"

    app.get("/events/<name>")(views(decorate, lambda name: name, path_of)[kind])
    return Client(app).get("/events/a").data


def in_django(kind):
    decorate = syncstream.django.with_sse
    found = views(decorate, lambda request, name: name, lambda request: request.path)
    urls = (path("events/<name>", found[kind]),)
    with override_settings(ROOT_URLCONF=urls):
        response = DjangoClient().get("/events/a")
        return b"".join(response.streaming_content)


def in_pyramid(kind):
    def plain(request, sse):
        sse.send(request.matchdict["name"])
        sse.send(request.path)

    async def coroutine(request, sse):
        await sse.send(request.matchdict["name"])
        await sse.send(request.path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its use of pkg_resources is deprecated
        from pyramid.config import Configurator
    with Configurator() as config:
        config.include("syncstream.pyramid")
        config.add_route("events", "/events/{name}")
        view = with_sse({"plain": plain, "coroutine": coroutine}[kind])
        config.add_view(view, route_name="events")
        return Client(config.make_wsgi_app()).get("/events/a").data


def in_falcon(kind):
    found = views(with_sse, lambda req, name: name, lambda req, *_: req.path)

    class Events:
        def on_get(self, req, resp, name):
            syncstream.falcon.respond(req, resp, found[kind](req, name))

    app = falcon.App()
    app.add_route("/events/{name}", Events())
    return Client(app).get("/events/a").data


def in_bare_wsgi(kind):
    found = views(with_sse, lambda request: "a", lambda request: request.path)

    def app(environ, start_response):
        request = werkzeug.Request(environ)
        return found[kind](request)(environ, start_response)

    return Client(app).get("/events/a").data


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
@pytest.mark.parametrize(
    "framework",
    [in_flask, in_bottle, in_django, in_pyramid, in_falcon, in_bare_wsgi],
    ids=lambda framework: framework.__name__,
)
def test_a_view_finds_its_request_and_its_arguments(framework, kind):
    """As the framework passes them, with the sender besides."""
    assert framework(kind) == SENT


@pytest.mark.parametrize("kind", ["flask", "django"])
def test_a_method_may_be_a_view(kind):
    """Of a class-based view."""
    if kind == "flask":
        from flask.views import MethodView as View
    else:
        from django.views import View
    decorate = with_sse if kind == "flask" else syncstream.django.with_sse

    class Events(View):
        @decorate
        def get(self, *args, sse):
            sse.send(type(self).__name__)

    if kind == "flask":
        app = flask.Flask(__name__)
        app.add_url_rule("/", view_func=Events.as_view("events"))
        assert Client(app).get("/").data == b": ok\n\ndata: Events\n\n"
        return
    urls = (path("", Events.as_view()),)
    with override_settings(ROOT_URLCONF=urls):
        response = DjangoClient().get("/")
        assert b"".join(response) == b": ok\n\ndata: Events\n\n"


def test_djangos_decorators_of_methods():
    """``method_decorator`` calls it with a bound method, and groups are positional."""
    from django.views import View

    class Events(View):
        def get(self, request, sse, name):
            sse.send([request.path, name])

    decorate = method_decorator(syncstream.django.with_sse, name="get")
    view = decorate(Events).as_view()
    urls = (re_path(r"^pos/(\w+)$", view), re_path(r"^named/(?P<name>\w+)$", view))
    for url in ("/pos/a", "/named/a"):
        with override_settings(ROOT_URLCONF=urls):
            response = DjangoClient().get(url)
            sent = f': ok\n\ndata: ["{url}","a"]\n\n'.encode()
            assert b"".join(response) == sent


def test_flasks_contexts_are_the_requests():
    """``g`` and the session, too; the teardown comes after the view."""
    app, story = flask.Flask(__name__), []
    app.secret_key = "tests"

    @app.before_request
    def before():
        flask.g.user = flask.session.get("user", "ann")

    @app.teardown_request
    def teardown(error):
        story.append("teardown")

    @app.get("/")
    @with_sse
    def events(sse):
        sse.send(flask.g.user)
        flask.g.user = "bob"
        sse.send(flask.g.user)
        sse.send(flask.current_app.name)
        story.append("returns")

    body = Client(app).get("/").data
    assert body == f": ok\n\ndata: ann\n\ndata: bob\n\ndata: {__name__}\n\n".encode()
    assert story[-2:] == ["returns", "teardown"]


@pytest.mark.parametrize("decorate", [with_sse, sse])
def test_flasks_wrapper_is_not_named(decorate, caplog):
    """The log names the view, or its generator."""
    app = flask.Flask(__name__)

    def loop():
        current_stream().stop("closed")
        while True:
            with contextlib.suppress(GeneratorExit):
                sleep(0)

    def sends(sse):
        sse.send("a")
        loop()

    def yields():
        yield "a"
        loop()

    view = sends if decorate is with_sse else yields
    app.add_url_rule("/", view_func=decorate(view))
    response = Client(app).get("/", buffered=False)
    chunks = iter(response.response)
    assert next(chunks) + next(chunks) == b": ok\n\ndata: a\n\n"
    list(chunks)
    response.close()
    assert journal().flush()
    line = view.__code__.co_firstlineno
    assert f"{view.__qualname__} ({__file__}:{line}) of GET '/' swallows" in caplog.text


def test_an_abort_comes_too_late(caplog):
    """The head has left; the log says what to do."""
    app = flask.Flask(__name__)

    @app.get("/")
    @with_sse
    def events(sse):
        flask.abort(404)

    response = Client(app).get("/", buffered=False)
    assert response.status_code == 200
    with pytest.raises(werkzeug.exceptions.NotFound):
        list(response.response)
    assert "the response's head has left" in caplog.text


def test_djangos_locals_are_the_requests():
    """The active language is one of a context."""

    @syncstream.django.with_sse
    def events(request, sse):
        sse.send(translation.get_language())
        with translation.override("fr"):
            sse.send(translation.get_language())

    def german(request):
        with translation.override("de"):
            return b"".join(events(request))

    urls = (path("", lambda request: HttpResponse(german(request))),)
    with override_settings(ROOT_URLCONF=urls):
        body = DjangoClient().get("/").content
    assert body == b": ok\n\ndata: de\n\ndata: fr\n\n"


def test_the_door_of_django_is_named():
    """The top-level decorator does not work there."""
    from django.test import RequestFactory

    @with_sse
    def events(request, sse):
        sse.send("a")

    with pytest.raises(TypeError, match="use the one of syncstream"):
        events(RequestFactory().get("/"))


def test_database_connections_of_a_view_are_closed_under_gevent(tmp_path):
    """They are of the view's greenlet, where Django never looks for them."""
    script = f"""
from gevent import monkey; monkey.patch_all()
import gevent, django
from django.conf import settings
settings.configure(
    ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], SECRET_KEY="tests",
    DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3",
                          "NAME": {str(tmp_path / "db")!r}, "CONN_MAX_AGE": None}}}},
)
django.setup()
from django.core.wsgi import get_wsgi_application
from django.db import connection
from django.db.backends.signals import connection_created
from django.urls import path
from werkzeug.test import Client
from syncstream import sleep
from syncstream.django import with_sse

opened = []
def note(connection, **_): opened.append(connection)
connection_created.connect(note)

@with_sse
def events(request, sse):
    for wait in (True, False):
        with connection.cursor() as cursor:
            sse.send(cursor.execute("select 1").fetchone()[0])
        if wait:
            sleep(0.001)
            sse.send(opened[0].connection is None)

urlpatterns = [path("", events)]
app = get_wsgi_application()

def read():
    response = Client(app).get("/", buffered=False)
    body = b"".join(response.response)
    print(body.decode().split()[3::2], len(opened), opened[0].connection)
    response.close()

gevent.spawn(read).get()
"""
    assert check_script(script) == "['1', 'true', '1'] 2 None\n"
