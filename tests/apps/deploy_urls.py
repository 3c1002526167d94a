"""The views of apps/deploy_django.py: see apps/deploy.py."""

from django.http import HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from syncstream.django import NDJSONResponse, SSEResponse, StreamResponse
from tests.apps import deploy


@csrf_exempt
def sse(request):
    query = request.GET
    return SSEResponse(deploy.rows(query), **deploy.life(query))


def ndjson(request):
    return NDJSONResponse(deploy.rows(request.GET))


def raw(request):
    query = request.GET
    return StreamResponse(deploy.lines(query), **deploy.life(query))


def events(request):
    query = request.GET
    return SSEResponse(deploy.subscription(query), **deploy.life(query))


def lines(request):
    return NDJSONResponse(deploy.subscription(request.GET))


urlpatterns = [
    path("health", lambda request: HttpResponse("ok")),
    path("facts", lambda request: JsonResponse(deploy.facts())),
    path("plain", lambda request: HttpResponse("".join(deploy.lines(request.GET)))),
    path("sse", sse),
    path("ndjson", ndjson),
    path("raw", raw),
    path("events", events),
    path("lines", lines),
]
