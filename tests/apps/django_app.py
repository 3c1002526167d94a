"""Django in one file, with our responses, our decorators, and views written by hand."""

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from tests.apps.control import note
from tests.apps.sources import ASYNC_PUSHED, PUSHED, SOURCES, as_sse

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="tests",
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
        "tests.apps.django_app.after",
    ],
)
django.setup()

from syncstream import StreamMiddleware, current_stream  # noqa: E402 (after setup())
from syncstream.django import (  # noqa: E402 (after setup())
    NDJSONResponse,
    SSEResponse,
    StreamResponse,
    sse,
    with_sse,
)


def after(get_response):
    """Be a middleware, as applications have them."""

    def middleware(request):
        response = get_response(request)
        response["X-After"] = "after"
        return response

    return middleware


def events(request, name):
    key = request.GET["key"]
    response = SSEResponse(SOURCES[name](key))
    response.set_cookie("cookie", "crumb")
    response._resource_closers.append(lambda: note(f"{key}-closed", "closed"))
    return response


def ndjson(request, name):
    return NDJSONResponse(SOURCES[name](request.GET["key"]))


def raw(request, name):
    return StreamResponse(map(str, SOURCES[name](request.GET["key"])))


@sse
def decorated(request, name):
    yield from SOURCES[name](request.GET["key"])


@sse
async def async_decorated(request, name):
    async for item in SOURCES[name](request.GET["key"]):
        yield item


@with_sse
def pushed(request, sse, name):
    PUSHED[name](sse, request.GET["key"])


@with_sse
async def async_pushed(request, sse, name):
    await ASYNC_PUSHED[name](sse, request.GET["key"])


@sse(end="reconnect")
def stream(request):
    yield type(current_stream()).__name__ + request.path


def handwritten(request, name):
    source = as_sse(SOURCES[name](request.GET["key"]))
    return StreamingHttpResponse(source, content_type="text/event-stream")


urlpatterns = [
    path("health", lambda request: HttpResponse("ok")),
    path("sse/<name>", events),
    path("ndjson/<name>", ndjson),
    path("raw/<name>", raw),
    path("decorated/<name>", decorated),
    path("async-decorated/<name>", async_decorated),
    path("pushed/<name>", pushed),
    path("async-pushed/<name>", async_pushed),
    path("stream", stream),
    path("handwritten/<name>", handwritten),
]
app = get_wsgi_application()
wrapped = StreamMiddleware(app)
