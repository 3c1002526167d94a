"""A page of Datastar, whose elements and signals its server changes.

    gunicorn -k gevent -w 4 examples.recipes.datastar:app
    curl -N http://127.0.0.1:8000/run --json '{"task": "Bake a cake"}'

The package ``datastar-py`` writes each event, and ``framed=True`` sends it unchanged.
The page needs Datastar's own script as ``static/datastar.js``, beside this file.
"""

import os
import re

from datastar_py import ServerSentEventGenerator as Events
from flask import Flask, abort, request
from markupsafe import escape

from syncstream import SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.5))
HOSTS = {"localhost", "127.0.0.1", "[::1]", *os.environ.get("HOSTS", "").split()}
app = Flask(__name__)


@app.before_request
def same_site_only():
    """Refuse other sites' pages, also one whose own name leads to this machine."""
    origin = request.origin or f"//{request.host}"
    is_ours = re.sub(r":\d+$", "", request.host) in HOSTS
    if not is_ours or origin.partition("//")[2] != request.host:
        abort(403, "HOSTS does not name this host, or it is another site's page.")


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
    signals = request.get_json(silent=True)  # Datastar posts the page's
    if not isinstance(signals, dict) or not isinstance(signals.get("task"), str):
        abort(400, "There must be a signal `task`.")
    return SSEResponse(events(signals["task"]), framed=True, on_error=failure)


@app.get("/")
def page():
    return """<!doctype html>
<title>Steps</title>
<meta name="viewport" content="width=device-width">
<script type="module" src="/static/datastar.js"></script>
<form data-signals="{task: 'Bake a cake', running: false, status: ''}"
      data-on:submit="@post('/run')">
  <input data-bind:task> <button data-attr:disabled="$running">Run</button>
</form>
<ul id="steps"></ul>
<p data-text="$status"></p>"""
