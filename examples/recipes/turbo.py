"""The steps of a job by Turbo Streams, which npm's @hotwired/turbo makes of events.

    npm install @hotwired/turbo@8
    gunicorn -k gevent -w 4 examples.recipes.turbo:app
    curl -N http://127.0.0.1:8000/events

The page is http://127.0.0.1:8000/. A page whose stream breaks comes back with the id of
its last step, and gets the others.
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


def change(action, target, html):
    return (
        f'<turbo-stream action="{action}" target="{target}">'
        f"<template>{html}</template></turbo-stream>"
    )


def work(last):
    """Do the steps after the one with this id, and tell of each: your job's place."""
    done = int(last) if last and last.isdecimal() else 0
    for number, step in enumerate(STEPS[done:], done + 1):
        sleep(INTERVAL)
        yield Event(change("append", "steps", f"<li>{escape(step)}</li>"), id=number)


@app.get("/events")
def events():
    return SSEResponse(work(last_event_id(request)))


@app.get("/cancel")
def cancel():
    # With the source that it replaces the stream ends.
    text = change("update", "job", "Cancelled")
    return app.response_class(text, mimetype="text/vnd.turbo-stream.html")


@app.get("/")
def page():
    return """<!doctype html><title>Turbo Streams</title>
<meta name="viewport" content="width=device-width">
<script type="module" src="scripts/@hotwired/turbo/dist/turbo.es2017-esm.js"></script>
<main id="job">
  <turbo-stream-source src="events"></turbo-stream-source>
  <ol id="steps"></ol>
  <form action="cancel" data-turbo-stream><button>Cancel</button></form>
</main>"""
