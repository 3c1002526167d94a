"""A stream that resumes where the client's last one ended.

    gunicorn -k gevent examples.reconnection:app
    curl -N -H 'Last-Event-ID: 5' http://127.0.0.1:8000/events

Each response ends after five numbers. The page at http://127.0.0.1:8000/ reconnects
by itself, presents the last id that it saw, and misses nothing. Clients that cannot set
headers ask for /events?lastEventId=5.
"""

import os

from flask import Flask

from syncstream import Event, current_stream, sleep, sse

INTERVAL = float(os.environ.get("INTERVAL", 1))

app = Flask(__name__)


@app.get("/events")
@sse(retry=1000, end="reconnect")
def events():
    # The id comes from the client: it may be any text.
    id = current_stream().last_event_id or "0"
    last = int(id) if id.isdecimal() and len(id) < 19 else 0
    for n in range(last + 1, last + 6):
        yield Event(f"Number {n}", id=n)
        sleep(INTERVAL)


@app.get("/")
def page():
    return """<!doctype html><meta name="viewport" content="width=device-width">
<title>Reconnection</title>
<pre id="log"></pre>
<script>
  const log = document.getElementById("log")
  const source = new EventSource("/events")
  source.onopen = () => log.append("open\\n")
  source.onmessage = (e) => log.append(`${e.lastEventId}: ${e.data}\\n`)
  source.onerror = () => log.append("gone, coming back\\n")
</script>"""
