"""Count the connected clients, and notice those that leave.

    gunicorn -k gevent examples.disconnect:app
    curl -N http://127.0.0.1:8000/events

Watch ``curl http://127.0.0.1:8000/clients`` while you start and stop others.
"""

import os
import time

from flask import Flask

from syncstream import current_stream, sleep, sse

INTERVAL = float(os.environ.get("INTERVAL", 1))

app = Flask(__name__)
app.logger.setLevel("INFO")
clients = set()  # of this process


@app.get("/events")
@sse
def events():
    stream = current_stream()
    clients.add(stream)
    app.logger.info("Client connected. Total: %d", len(clients))
    try:
        while stream.connected:
            yield {"timestamp": time.time()}
            sleep(INTERVAL)  # ends the generator, too, when the client has left
    finally:
        clients.discard(stream)
        app.logger.info("Cleanup complete. Remaining: %d", len(clients))


@app.get("/clients")
def count():
    return {"clients": len(clients)}
