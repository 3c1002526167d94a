"""Pyramid: with its ``include``, views return streams.

    gunicorn -k gevent examples.pyramid_app:app
    curl -N http://127.0.0.1:8000/events

Without it Pyramid refuses responses of other packages.
"""

import os

from pyramid.config import Configurator

from syncstream import Event, SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 1))


def events(request):
    def ticks():
        for n in range(5):
            yield Event(f"tick {n}", event="tick", id=n)
            sleep(INTERVAL)

    return SSEResponse(ticks())


with Configurator() as config:
    config.include("syncstream.pyramid")
    config.add_route("events", "/events")
    config.add_view(events, route_name="events")
    app = config.make_wsgi_app()
