"""The numbers from 1 to 5 as events, and then a final end.

    gunicorn -k gevent examples.sse_numbers:app
    curl -N http://127.0.0.1:8000/

A browser's EventSource would reconnect and get them again, for ever, so it is told to
stay away. ``end="reconnect"`` lets it reconnect.
"""

import os

from flask import Flask

from syncstream import SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.9))

app = Flask(__name__)


def numbers(minimum, maximum):
    for i in range(minimum, maximum + 1):
        sleep(INTERVAL)
        yield {"data": i}


@app.get("/")
def events():
    return SSEResponse(numbers(1, 5))
