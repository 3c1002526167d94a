"""A stream of text: one line a second, each sent the moment it is yielded.

    gunicorn -k gevent examples.number_stream:app
    curl -N http://127.0.0.1:8000/numbers

When the generator has ended, the server marks the end of the response.
"""

import os

from flask import Flask

from syncstream import StreamResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 1))

app = Flask(__name__)


@app.get("/numbers")
def numbers():
    def lines():
        for i in range(5):
            yield f"Number: {i}\n"
            sleep(INTERVAL)

    return StreamResponse(lines())
