"""The steps of a job in htmx 2 and in htmx 4, without a line of JavaScript.

    npm install htmx.org@2 htmx-ext-sse htmx4@npm:htmx.org@4
    gunicorn -k gevent -w 4 examples.recipes.htmx:app
    curl -N http://127.0.0.1:8000/events

The pages are http://127.0.0.1:8000/htmx2 and /htmx4. The last event, ``done``, closes
the stream; without it, both would come back for ever. A page whose stream breaks comes
back with the id of its last step, and gets the others.
"""

import os
from pathlib import Path

from flask import Flask, request
from markupsafe import escape

from syncstream import Event, SSEResponse, last_event_id, sleep

INTERVAL = float(os.environ.get("INTERVAL", 1))
SCRIPTS = Path(os.environ.get("NODE_MODULES", "node_modules")).resolve()
STEPS = ("Fetch", "Unpack", "Build", "Test", "Install")
app = Flask(__name__, static_folder=SCRIPTS, static_url_path="/scripts")


def work(last):
    """Do the steps after the one with this id, and tell of each: your job's place."""
    done = int(last) if last and last.isdecimal() else 0
    for number, step in enumerate(STEPS[done:], done + 1):
        sleep(INTERVAL)
        yield Event(f"<li>{escape(step)}</li>", id=number)


@app.get("/events")
def events():
    return SSEResponse(work(last_event_id(request)), end=Event("", event="done"))


@app.get("/cancel")
def cancel():
    return "Cancelled"  # it replaces the list, whose stream ends with it


@app.get("/htmx2")
def htmx2():
    return """<!doctype html><title>htmx 2</title>
<meta name="viewport" content="width=device-width">
<script src="scripts/htmx.org/dist/htmx.min.js"></script>
<script src="scripts/htmx-ext-sse/dist/sse.min.js"></script>
<main>
  <ol hx-ext="sse" sse-connect="events" sse-close="done"
      sse-swap="message" hx-swap="beforeend"></ol>
  <button hx-get="cancel" hx-target="main">Cancel</button>
</main>"""


@app.get("/htmx4")
def htmx4():
    return """<!doctype html><title>htmx 4</title>
<meta name="viewport" content="width=device-width">
<script src="scripts/htmx4/dist/htmx.min.js"></script>
<script src="scripts/htmx4/dist/ext/hx-sse.min.js"></script>
<main>
  <ol hx-sse:connect="events" hx-sse:close="done" hx-swap="beforeend"></ol>
  <button hx-get="cancel" hx-target="main">Cancel</button>
</main>"""
