"""What a user's own tests see: the test clients of Werkzeug, Flask, Django, Falcon."""

import falcon
import falcon.testing
import flask
import pytest
from django.test import Client as DjangoClient
from django.test import override_settings
from django.urls import path
from werkzeug.test import Client

import syncstream.falcon
from syncstream import (
    Hub,
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    sse,
)
from syncstream import django as in_django
from syncstream.runtime.journal import journal
from tests.apps import django_app

assert callable(django_app.app)  # it configures Django


class Broken(Exception):
    pass


def failing(n=1):
    yield from range(n)
    raise Broken("in a source")


def subscribed():
    hub = Hub()
    hub.publish("news", "one")
    return hub.subscribe("news", after="start")


def finite():
    for event in subscribed():
        yield event
        return


urlpatterns = [
    path("failing", lambda request: in_django.SSEResponse(failing())),
    path("finite", lambda request: in_django.SSEResponse(finite())),
    path("SSEResponse", lambda request: SSEResponse(finite())),
    path("NDJSONResponse", lambda request: NDJSONResponse(finite())),
    path("StreamResponse", lambda request: StreamResponse(["a"])),
    path("sse", sse(lambda request: (n for n in range(3)))),
    path("method/<int:number>", sse(lambda request, number: (n for n in range(3)))),
]


def joined(make):
    return b"".join(make().response)


def joined_in_django(make):
    return b"".join(in_django.SSEResponse(failing()))


def by_werkzeug(make):
    return Client(StreamMiddleware(make())).get("/").data


def by_flask(make):
    app = flask.Flask(__name__)
    app.testing = True
    app.get("/")(make)
    return app.test_client().get("/").data


def by_django(make):
    with override_settings(ROOT_URLCONF=__name__):
        return DjangoClient().get("/failing").getvalue()


def by_falcon(make):
    class Resource:
        def on_get(self, req, resp):
            syncstream.falcon.respond(req, resp, make())

    app = falcon.App()
    app.add_route("/", Resource())
    return falcon.testing.TestClient(app).get("/").content


CLIENTS = (joined, joined_in_django, by_werkzeug, by_flask, by_django, by_falcon)


@pytest.mark.parametrize("get", CLIENTS)
def test_a_failing_source_raises_its_own_error(get, caplog):
    """A test sees what is wrong; the log has it, as it has on a server."""
    with pytest.raises(Broken, match="in a source"):
        get(lambda: SSEResponse(failing()))
    records = [r for r in caplog.records if r.name == "syncstream.stream"]
    assert [r.levelname for r in records if "failed" in r.message] == ["ERROR"]


@pytest.mark.parametrize("get", [joined, by_werkzeug, by_flask, by_falcon])
@pytest.mark.parametrize("n", [0, 1])
def test_a_failing_source_of_lines_raises_its_own_error(get, n):
    """Before its first item, and after it."""
    with pytest.raises(Broken):
        get(lambda: NDJSONResponse(failing(n)))


@pytest.mark.usefixtures("own_record")
def test_a_hub_in_a_test_is_not_warned_of_processes(caplog):
    """Django's and Falcon's clients claim ``wsgi.multiprocess``: there is no server."""
    with override_settings(ROOT_URLCONF=__name__):
        body = DjangoClient().get("/finite").getvalue()
    assert b"data: one\n\n" in body
    assert b"data: one\n\n" in by_falcon(lambda: SSEResponse(finite()))
    journal().flush()
    assert "the server runs several" not in caplog.text


@pytest.mark.usefixtures("own_record")
def test_a_hub_on_an_unknown_server_is(caplog):
    """One that has several processes, and says so."""
    environ = {"wsgi.multiprocess": True}
    assert b"data: one\n\n" in (
        Client(SSEResponse(finite())).get("/", environ_overrides=environ).data
    )
    journal().flush()
    assert "the server runs several" in caplog.text


MIDDLEWARE = {
    "none": [],
    "startproject": [
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ],
    "security": ["django.middleware.security.SecurityMiddleware"],
    "common": ["django.middleware.common.CommonMiddleware"],
    "session": ["django.contrib.sessions.middleware.SessionMiddleware"],
    "csrf": ["django.middleware.csrf.CsrfViewMiddleware"],
    "conditional": ["django.middleware.http.ConditionalGetMiddleware"],
    "gzip": ["django.middleware.gzip.GZipMiddleware"],
    "locale": ["django.middleware.locale.LocaleMiddleware"],
    "cache": ["django.middleware.cache.UpdateCacheMiddleware"],
}


@pytest.mark.parametrize("middleware", MIDDLEWARE)
@pytest.mark.parametrize("name", ["SSEResponse", "NDJSONResponse", "StreamResponse"])
def test_a_response_that_is_not_djangos(name, middleware):
    """The error names the module that has Django's, whoever looks at it first."""
    error = rf"from syncstream\.django import {name}"
    with (
        override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE[middleware]),
        pytest.raises((AttributeError, TypeError), match=error),
    ):
        DjangoClient().get(f"/{name}")


@pytest.mark.parametrize("url", ["/sse", "/method/1"])
def test_a_decorator_that_is_not_djangos(url):
    """The view does not even run."""
    with (
        override_settings(ROOT_URLCONF=__name__),
        pytest.raises(TypeError, match=r"from syncstream\.django import sse"),
    ):
        DjangoClient().get(url)


def test_a_response_has_no_more_attributes_than_before():
    """Others ask whether it has some, and are told that it has not."""
    response = SSEResponse([])
    assert not hasattr(response, "cookies")
    assert getattr(response, "items", None) is None
    with pytest.raises(
        AttributeError, match="'SSEResponse' object has no attribute 'x'"
    ):
        response.x  # noqa: B018
    with pytest.raises(TypeError, match="not iterable"):
        iter(response)
