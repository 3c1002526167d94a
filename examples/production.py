"""Everything together: resumable, kept alive, and the same on every worker.

    gunicorn -k gevent -w 2 examples.production:app
    curl -N -H 'Last-Event-ID: 0' http://127.0.0.1:8000/events

Events are rows of a table; ``curl -X POST http://127.0.0.1:8000/events/hi`` adds one.
"""

import os
import sqlite3
from contextlib import closing

from flask import Flask, request

from examples.shared.same_site import same_site_only
from syncstream import Event, current_stream, sleep, sse

DATABASE = os.environ.get("DATABASE", "events.sqlite3")
INTERVAL = float(os.environ.get("INTERVAL", 1))
KEEPALIVE = float(os.environ.get("KEEPALIVE", 15))

app = Flask(__name__)
app.before_request(same_site_only)
app.logger.setLevel("INFO")
with closing(sqlite3.connect(DATABASE)) as db:
    db.execute("CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, data)")


def fetch(db, last):
    query = "SELECT id, data FROM events WHERE id > ? ORDER BY id LIMIT 100"
    try:
        return [Event(d, id=n, event="update") for n, d in db.execute(query, (last,))]
    except sqlite3.Error as error:
        app.logger.error("Error fetching data: %s", error)
        return [Event({"error": "Temporary error, retrying"}, event="error")]


@app.get("/events")
@sse(retry=3000, end="reconnect", keepalive=KEEPALIVE, max_duration=3600)
def events():
    stream = current_stream()
    # From outside, and for a log: no control character, of a terminal's or of C1.
    client = ascii(request.headers.get("X-Client-ID", "unknown")[:100])[1:-1]
    id = stream.last_event_id or "0"
    last = int(id) if id.isdecimal() and len(id) < 19 else 0
    app.logger.info("Client %s connected after event %d", client, last)
    stream.on_close(lambda: app.logger.info("Client %s: %s", client, stream.reason))
    with closing(sqlite3.connect(DATABASE)) as db:
        while True:
            for event in fetch(db, last):
                yield event
                last = int(event.id or last)
            sleep(INTERVAL)


@app.post("/events/<data>")
def add(data):
    with closing(sqlite3.connect(DATABASE)) as db, db:
        db.execute("INSERT INTO events (data) VALUES (?)", (data,))
    return "", 201
