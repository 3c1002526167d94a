"""The views of `fresh_django`: each notes when and why its stream has ended."""

from django.db import connection
from django.http import HttpResponse
from django.urls import path

from syncstream import Hub, current_stream, sleep
from syncstream.django import SSEResponse
from syncstream.runtime.process import process, stats
from tests.apps.control import note

hub = Hub()


def waiting(key):
    stream = current_stream()
    stream.on_close(lambda: note(f"{key}-ended", stream.reason))
    note(f"{key}-started", stream.last_event_id)
    yield "waiting"
    while True:
        sleep(30)


def rows(key):
    with connection.cursor() as cursor:
        cursor.execute(
            "with recursive n(i) as (select 1 union all"
            " select i + 1 from n where i < 300) select i from n"
        )
        while found := cursor.fetchone():
            yield found[0]
            yield None
            sleep(0.0001)


def wait(request):
    key = request.GET["key"]
    source = {"/wait": waiting, "/rows": rows}[request.path](key)
    return SSEResponse(source, keepalive=0.2)


def subscribe(request):
    return SSEResponse(hub.subscribe("x"))


def streams(request):
    return HttpResponse(repr({**stats(), "parked": process().parked_streams}))


urlpatterns = [
    path("wait", wait),
    path("rows", wait),
    path("subscribe", subscribe),
    path("stats", streams),
]
