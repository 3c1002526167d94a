"""A large file in pieces of 8 KiB, with only one piece in memory.

    gunicorn -k gevent examples.download:app
    curl -N -o copy http://127.0.0.1:8000/download

A client that leaves half way closes the generator, and so the file.
"""

import os
import sys

from flask import Flask

from syncstream import StreamResponse

FILE = os.environ.get("FILE", sys.executable)  # large, and there on every machine

app = Flask(__name__)


@app.get("/download")
def download():
    def pieces():
        with open(FILE, "rb") as file:
            while piece := file.read(8192):
                yield piece

    return StreamResponse(pieces(), content_type="application/octet-stream")
