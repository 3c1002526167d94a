"""A comment that keeps the connection alive, sent only when there is nothing else.

    gunicorn -k gevent examples.manual_keepalive:app
    curl -N http://127.0.0.1:8000/events

And, to send something, ``curl -X POST http://127.0.0.1:8000/say/hello``.

Each wait for a message is a new one: every message puts the comment off. It is also
what finds out, on a silent stream, that the client has left.
"""

import os
import queue

from flask import Flask

from syncstream import Event, sse

IDLE = float(os.environ.get("IDLE", 15))

app = Flask(__name__)
inboxes = set()  # of this process: one queue for each client


@app.get("/events")
@sse(end="reconnect")
def events():
    inbox = queue.Queue()
    inboxes.add(inbox)
    try:
        while True:
            try:
                text = inbox.get(timeout=IDLE)
            except queue.Empty:
                yield Event(comment="keepalive")
            else:
                yield Event({"text": text}, event="update")
    finally:
        inboxes.discard(inbox)


@app.post("/say/<text>")
def say(text):
    listening = list(inboxes)
    for inbox in listening:
        inbox.put(text)
    return {"told": len(listening)}
