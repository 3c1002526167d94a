"""A counter that announces its end, and notices the departure of its client.

    gunicorn -k gevent examples.counter:app
    curl -N http://127.0.0.1:8000/events

Interrupt curl: within a second the server prints "Client disconnected!".
"""

import os

from flask import Flask

from syncstream import Event, sleep, sse

INTERVAL = float(os.environ.get("INTERVAL", 1))

app = Flask(__name__)


@app.get("/events")
@sse
def events():
    try:
        for i in range(10):
            sleep(INTERVAL)
            yield {"counter": i}  # unnamed event
        yield Event("bye", event="end")  # named event
    except GeneratorExit:
        print("Client disconnected!")
        raise
