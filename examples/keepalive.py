"""Comments that keep the connection alive, sent only during silence.

    gunicorn -k gevent examples.keepalive:app
    curl -N http://127.0.0.1:8000/events

Send a message with ``curl -X POST http://127.0.0.1:8000/say/hello``.

The wait for a message ends at once when the client leaves. Every message postpones the
comment, which does not interrupt the wait.
"""

import os
import queue

from flask import Flask

from examples.shared.same_site import same_site_only
from syncstream import Event, current_stream, sse

IDLE = float(os.environ.get("IDLE", 15))

app = Flask(__name__)
app.before_request(same_site_only)
inboxes = set()  # of this process: one queue for each client


@app.get("/events")
@sse(end="reconnect", keepalive=IDLE)
def events():
    inbox = queue.Queue()
    inboxes.add(inbox)
    try:
        while True:
            text = current_stream().wait(inbox)
            yield Event({"text": text}, event="update")
    finally:
        inboxes.discard(inbox)


@app.post("/say/<text>")
def say(text):
    listening = list(inboxes)
    for inbox in listening:
        inbox.put(text)
    return {"told": len(listening)}
