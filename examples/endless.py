"""Endless events, until the client leaves; the generator need not check for that.

    gunicorn -k gevent examples.endless:app
    curl -N http://127.0.0.1:8000/endless

`sleep` ends the generator when the client has left; so does the next yield.
"""

import os

from flask import Flask, request

from syncstream import current_stream, sleep, sse

INTERVAL = float(os.environ.get("INTERVAL", 0.2))

app = Flask(__name__)


@app.get("/endless")
@sse
def endless():
    stream, client = current_stream(), request.remote_addr
    stream.on_close(lambda: print(f"Client {client}: {stream.reason} after {i}"))
    i = 0
    while True:
        i += 1
        yield {"data": i}
        sleep(INTERVAL)
