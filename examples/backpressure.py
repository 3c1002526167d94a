"""Slow readers skip to the newest events, so that nothing piles up.

    gunicorn -k gevent examples.backpressure:app
    curl -N http://127.0.0.1:8000/events

A source appends ten events a second to a deque of a hundred, which all clients share.
Each client gets the newest event, at most twice a second.
"""

import os
import threading
from collections import deque
from itertools import count

from flask import Flask

from syncstream import Event, sleep, sse

PRODUCE = float(os.environ.get("PRODUCE", 0.1))
THROTTLE = float(os.environ.get("THROTTLE", 0.5))

app = Flask(__name__)
produced = deque(maxlen=100)


def produce():
    for n in count(1):
        produced.append({"id": n, "data": f"event {n}"})
        sleep(PRODUCE)


# In each worker. With gunicorn --preload it would have to start after the fork.
threading.Thread(target=produce, daemon=True).start()


@app.get("/events")
@sse
def events():
    sent = 0
    while True:
        newest = produced[-1] if produced else {"id": 0}
        if newest["id"] > sent:
            skipped = newest["id"] - sent - 1
            data = {**newest, "skipped": skipped, "held": len(produced)}
            yield Event(data, id=newest["id"])
            sent = newest["id"]
        sleep(THROTTLE)
