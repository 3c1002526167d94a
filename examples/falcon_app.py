"""Falcon: `respond` puts the stream into its response.

    gunicorn -k gevent examples.falcon_app:app
    curl -N http://127.0.0.1:8000/events

Falcon ignores the return value of a responder.
"""

import os

import falcon

from syncstream import Event, SSEResponse, sleep
from syncstream.falcon import respond

INTERVAL = float(os.environ.get("INTERVAL", 1))


class Events:
    def on_get(self, req, resp):
        respond(req, resp, SSEResponse(self.ticks()))

    def ticks(self):
        for n in range(5):
            yield Event(f"tick {n}", event="tick", id=n)
            sleep(INTERVAL)


app = falcon.App()
app.add_route("/events", Events())
