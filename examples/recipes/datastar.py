"""A page of Datastar, whose elements and signals its server changes.

    gunicorn -k gevent -w 4 examples.recipes.datastar:app
    curl -N http://127.0.0.1:8000/run --json '{"task": "Bake a cake"}'

The package ``datastar-py`` writes each event, and ``framed=True`` sends it unchanged.
The page needs Datastar's own script as ``static/datastar.js``, beside this file.
"""

import os

from datastar_py import ServerSentEventGenerator as Events
from flask import Flask, request
from markupsafe import escape

from examples.shared.same_site import same_site_only
from syncstream import SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.5))
app = Flask(__name__)
app.before_request(same_site_only)


def steps(task):
    """Yield what is done, step by step: your work's place."""
    for word in task.split():
        sleep(INTERVAL)
        yield word


def events(task):
    yield Events.patch_signals({"running": True})
    for step in steps(task):
        item = f"<li>{escape(step)}</li>"
        yield Events.patch_elements(item, selector="#steps", mode="append")
    yield Events.patch_signals({"running": False, "status": "Done."})


def failure(error):
    # The log has `error`. After a cut, which tells nothing, Datastar would ask again.
    return Events.patch_signals({"running": False, "status": "It has failed."})


@app.post("/run")
def run():
    source = events(request.get_json()["task"])  # Datastar posts its signals
    return SSEResponse(source, framed=True, on_error=failure)


@app.get("/")
def page():
    return """<!doctype html>
<title>Steps</title>
<script type="module" src="/static/datastar.js"></script>
<form data-signals="{task: 'Bake a cake', running: false, status: ''}"
      data-on:submit="@post('/run')">
  <input data-bind:task> <button data-attr:disabled="$running">Run</button>
</form>
<ul id="steps"></ul>
<p data-text="$status"></p>"""
