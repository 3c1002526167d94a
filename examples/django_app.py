"""Django in one file: a decorated generator, and a view that creates its response.

    gunicorn -k gevent examples.django_app:app
    curl -N http://127.0.0.1:8000/events

The view is at /countdown/3. A project only needs the import of syncstream.django.
"""

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.urls import path

from syncstream import Event, sleep
from syncstream.django import SSEResponse, sse

INTERVAL = float(os.environ.get("INTERVAL", 1))

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])


@sse
def events(request):
    yield {"path": request.path}
    for n in range(5):
        sleep(INTERVAL)
        yield Event(f"tick {n}", event="tick", id=n)


def countdown(request, start):
    def numbers():
        for n in range(start, -1, -1):
            yield {"data": n}
            sleep(INTERVAL)

    return SSEResponse(numbers(), headers={"X-Start": start})


urlpatterns = [path("events", events), path("countdown/<int:start>", countdown)]
app = get_wsgi_application()
