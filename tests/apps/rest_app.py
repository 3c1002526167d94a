"""Django REST framework's views, with our responses and renderers."""

import pathlib
import threading

from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path

from syncstream import sleep
from syncstream.django import NDJSONResponse, SSEResponse, sse
from tests.apps import django_app
from tests.apps.control import note

assert callable(django_app.app)  # it configures Django
settings.REST_FRAMEWORK = {
    "UNAUTHENTICATED_USER": None,
    "DEFAULT_AUTHENTICATION_CLASSES": [],
}

# isort: split

import rest_framework  # noqa: E402
from rest_framework.decorators import (  # noqa: E402 (after the settings)
    action,
    api_view,
    permission_classes,
    renderer_classes,
    throttle_classes,
)
from rest_framework.exceptions import PermissionDenied  # noqa: E402
from rest_framework.permissions import BasePermission  # noqa: E402
from rest_framework.renderers import (  # noqa: E402
    BrowsableAPIRenderer,
    JSONRenderer,
)
from rest_framework.response import Response  # noqa: E402
from rest_framework.throttling import BaseThrottle  # noqa: E402
from rest_framework.views import APIView  # noqa: E402
from rest_framework.viewsets import ViewSet  # noqa: E402

from syncstream.rest_framework import (  # noqa: E402
    EventStreamRenderer,
    NDJSONRenderer,
)

TAGS = "rest_framework.templatetags"
RENDERERS = [JSONRenderer, EventStreamRenderer, NDJSONRenderer]
started = []


def items(word):
    started.append(word)
    yield {"word": word}


class HasWord(BasePermission):
    def has_permission(self, request, view):
        return "word" in request.query_params


class Twice(BaseThrottle):
    """Allows two requests of each word."""

    seen: dict[str, int] = {}  # noqa: RUF012
    lock = threading.Lock()

    def allow_request(self, request, view):
        word = request.query_params["word"]
        with self.lock:
            self.seen[word] = self.seen.get(word, 0) + 1
            return self.seen[word] <= 2

    def wait(self):
        return 7


def templates():
    """Return a context in which REST framework finds the templates of its pages."""
    path = pathlib.Path(rest_framework.__file__).parent / "templates"
    options = {"libraries": {"rest_framework": f"{TAGS}.rest_framework"}}
    engine = {"BACKEND": "django.template.backends.django.DjangoTemplates"}
    engine |= {"DIRS": [path], "OPTIONS": options}
    return override_settings(TEMPLATES=[engine], STATIC_URL="/static/")


class Browsable(APIView):
    renderer_classes = [EventStreamRenderer, BrowsableAPIRenderer]  # noqa: RUF012

    def get(self, request):
        if "forbidden" in request.query_params:
            raise PermissionDenied
        return Response({"word": "hello"})


class PageFirst(Browsable):
    renderer_classes = [BrowsableAPIRenderer, EventStreamRenderer]  # noqa: RUF012


class Class(APIView):
    renderer_classes = RENDERERS
    permission_classes = [HasWord]  # noqa: RUF012
    throttle_classes = [Twice]  # noqa: RUF012

    def get(self, request):
        word = request.query_params["word"]
        if word == "forbidden":
            raise PermissionDenied
        if request.accepted_renderer.format == "ndjson":
            return NDJSONResponse(items(word))
        return SSEResponse(items(word))

    def post(self, request):
        return NDJSONResponse(items(request.data["said"]))


@api_view(["GET"])
@renderer_classes(RENDERERS)
@permission_classes([HasWord])
@throttle_classes([Twice])
@sse
def function(request):
    yield from items(request.query_params["word"])


class Set(ViewSet):
    renderer_classes = RENDERERS
    permission_classes = [HasWord]  # noqa: RUF012
    throttle_classes = [Twice]  # noqa: RUF012

    def list(self, request):
        return Response([{"word": request.query_params["word"]}])

    @action(detail=False)
    def follow(self, request):
        return SSEResponse(items(request.query_params["word"]))

    @action(detail=False, url_path="decorated")
    @sse
    def decorated(self, request):
        yield from items(request.query_params["word"])


class Waiting(APIView):
    renderer_classes = RENDERERS

    def get(self, request):
        key = request.query_params["key"]

        def source():
            try:
                while True:
                    yield {"word": "first"}
                    sleep(60)
            finally:
                note(f"{key}-left", request.query_params["key"])

        return SSEResponse(source())


@api_view(["GET"])
@renderer_classes(RENDERERS)
def typed(request):
    return Response({"title": "a"}, content_type="application/problem+json")


@api_view(["GET"])
@sse
def without_renderer(request):
    yield "hello"


urlpatterns = [
    path("events-first", Browsable.as_view()),
    path("page-first", PageFirst.as_view()),
    path("health", lambda request: HttpResponse("ok")),
    path("class", Class.as_view()),
    path("function", function),
    path("set", Set.as_view({"get": "list"})),
    path("action", Set.as_view({"get": "follow"})),
    path("decorated-action", Set.as_view({"get": "decorated"})),
    path("waiting", Waiting.as_view()),
    path("typed", typed),
    path("without", without_renderer),
]


class Request(WSGIRequest):
    urlconf = __name__


class Handler(WSGIHandler):
    request_class = Request


app = Handler()
