"""Retry a failing source three times, with growing delays, then give up.

    gunicorn -k gevent examples.error_recovery:app
    curl -N http://127.0.0.1:8000/events

``curl -X POST http://127.0.0.1:8000/source/down`` breaks the source, ``…/source/up``
repairs it. The delays are 2 and 4 seconds; then the client gets an error event. For a
source that can resume, `syncstream.sources.retrying` does this, with random delays.
"""

import os
import time

from flask import Flask

from examples.shared.same_site import same_site_only
from syncstream import Event, sleep, sse

INTERVAL = float(os.environ.get("INTERVAL", 1))
BACKOFF = float(os.environ.get("BACKOFF", 1))
MAX_FAILURES = 3

app = Flask(__name__)
app.before_request(same_site_only)
source = {"state": "up"}


def fetch_data():
    if source["state"] != "up":
        raise ConnectionError("the source is down")
    return {"timestamp": time.time()}


@app.get("/events")
@sse(end="reconnect")
def events():
    failures = 0
    while True:
        try:
            data = fetch_data()
        except ConnectionError as error:
            failures += 1
            app.logger.error("Error fetching data: %s", error)
            if failures == MAX_FAILURES:
                problem = {"error": "Service temporarily unavailable"}
                yield Event(problem, event="error")
                return
            sleep(BACKOFF * 2**failures)
        else:
            failures = 0
            yield Event(data, event="update", retry=1000)
            sleep(INTERVAL)


@app.post("/source/<state>")
def switch(state):
    source["state"] = state
    return source
