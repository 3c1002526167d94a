"""Frameworks, each below its name; their streams fail before their first item.

A path is ``/framework/kind/error``.
"""

import bottle
import falcon
import flask
from django.core.exceptions import PermissionDenied
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.http import Http404, StreamingHttpResponse
from pyramid.config import Configurator
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import syncstream
import syncstream.bottle
import syncstream.falcon
from tests.apps import rest_app  # it configures Django

# isort: split

from django.urls import path
from rest_framework.decorators import api_view

import syncstream.django

ERRORS = {
    "abort": (NotFound, 404),
    "http404": (Http404, 404),
    "denied": (PermissionDenied, 403),
    "falcon": (falcon.HTTPForbidden, 403),
    "bottle": (lambda: bottle.HTTPError(404), 404),
    "broken": (lambda: ValueError("x"), 500),
}
KINDS = ("ndjson", "raw", "streaming", "async-ndjson", "async-streaming")
KEPT = {"X-Other": "kept"}


def failing(error):
    yield None
    raise ERRORS[error][0]()


async def failing_later(error):
    yield None
    raise ERRORS[error][0]()


def answer(kind, error, module, streaming=None):
    """Return a view's response, by a framework's module of ours."""
    make = failing_later if kind.startswith("async-") else failing
    if kind.endswith("ndjson"):
        return module.NDJSONResponse(make(error), headers=KEPT)
    if kind == "raw":
        return module.StreamResponse(make(error), headers=KEPT)
    return 200, make(error), KEPT


def health(environ, start_response):
    start_response("200 OK", [("Content-Length", "0")])
    return [b""]


in_flask = flask.Flask(__name__)


@in_flask.get("/<kind>/<error>")
@syncstream.streaming
def flask_view(kind, error):
    return answer(kind, error, syncstream)


in_bottle = bottle.Bottle()


@in_bottle.get("/<kind>/<error>")
@syncstream.bottle.streaming
def bottle_view(kind, error):
    found = answer(kind, error, syncstream)
    return found if isinstance(found, tuple) else syncstream.bottle.respond(found)


class Resource:
    def on_get(self, req, resp, kind, error):
        found = answer(kind, error, syncstream)
        if isinstance(found, tuple):
            view = syncstream.falcon.streaming(lambda req, resp: found)
            view(req, resp)
        else:
            syncstream.falcon.respond(req, resp, found)


in_falcon = falcon.App()
in_falcon.add_route("/{kind}/{error}", Resource())


@syncstream.streaming
def pyramid_view(request):
    return answer(**request.matchdict, module=syncstream)


with Configurator() as config:
    config.include("syncstream.pyramid")
    config.add_route("view", "/{kind}/{error}")
    config.add_view(pyramid_view, route_name="view")
    in_pyramid = config.make_wsgi_app()


@syncstream.django.streaming
def django_view(request, kind, error):
    response = answer(kind, error, syncstream.django)
    if not isinstance(response, tuple):
        response.set_cookie("cookie", "crumb")
    return response


def rewrapped(request, kind, error):
    """As a middleware would return it that makes a response of its own."""
    response = django_view(request, kind=kind, error=error)
    return StreamingHttpResponse(response.streaming_content, headers=KEPT)


urlpatterns = [
    path("plain/<kind>/<error>", django_view),
    path("rest/<kind>/<error>", api_view(["GET"])(django_view)),
    path("rewrapped/<kind>/<error>", rewrapped),
]


class Request(WSGIRequest):
    urlconf = __name__


class Handler(WSGIHandler):
    request_class = Request


assert callable(rest_app.app)
in_django = Handler()
FRAMEWORKS = {
    "flask": in_flask,
    "bottle": in_bottle,
    "falcon": in_falcon,
    "pyramid": in_pyramid,
    "django": in_django,
}
app = DispatcherMiddleware(
    health, {f"/{name}": framework for name, framework in FRAMEWORKS.items()}
)
