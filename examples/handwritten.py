"""An old view with a hand-written event stream; the last line manages it.

    gunicorn -k gevent examples.handwritten:app
    curl -N -i http://127.0.0.1:8000/events

The middleware adds the headers that keep proxies from buffering, sends the head
before the first event, and closes the generator once its client has left.
"""

import json
import os
import time

from flask import Flask, Response

from syncstream import StreamMiddleware

INTERVAL = float(os.environ.get("INTERVAL", 1))

app = Flask(__name__)


@app.get("/events")
def events():
    def generate():
        try:
            for n in range(1000):
                time.sleep(INTERVAL)
                yield f"id: {n}\ndata: {json.dumps({'n': n})}\n\n"
        finally:
            print("The old view is closed")

    return Response(generate(), mimetype="text/event-stream")


app.wsgi_app = StreamMiddleware(app.wsgi_app)
