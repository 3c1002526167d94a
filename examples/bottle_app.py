"""Bottle: a decorated generator, and a response made by hand.

    gunicorn -k gevent examples.bottle_app:app
    curl -N http://127.0.0.1:8000/events

/rows is the other: Bottle wants a response of its own, which `respond` makes.
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
