"""Bottle: a decorated generator, and a view that creates its response.

    gunicorn -k gevent examples.bottle_app:app
    curl -N http://127.0.0.1:8000/events

The view is at /rows: `respond` converts the response into one of Bottle's.
"""

import os

import bottle

from syncstream import Event, NDJSONResponse, sleep
from syncstream.bottle import respond, sse

INTERVAL = float(os.environ.get("INTERVAL", 1))

app = bottle.Bottle()


@app.get("/events")
@sse
def events():
    for n in range(5):
        yield Event(f"tick {n}", event="tick", id=n)
        sleep(INTERVAL)


@app.get("/rows")
def rows():
    return respond(NDJSONResponse({"row": n} for n in range(3)))
