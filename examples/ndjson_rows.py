"""Rows as newline-delimited JSON: clients process the first before the last is read.

    gunicorn -k gevent examples.ndjson_rows:app
    curl -N http://127.0.0.1:8000/rows

If a row cannot be read, the last line of the response gives the reason. (Without
`on_error` the response is cut: curl says "transfer closed", and nobody mistakes half
of the rows for all of them.)
"""

import csv
import os

from flask import Flask

from syncstream import NDJSONResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.5))
READINGS = os.environ.get("READINGS", "time,celsius\n9:00,21.5\n9:05,21.75\n9:10,n/a")

app = Flask(__name__)


@app.get("/rows")
def rows():
    def read():
        for row in csv.DictReader(READINGS.splitlines()):
            yield {"time": row["time"], "celsius": float(row["celsius"])}
            sleep(INTERVAL)

    return NDJSONResponse(read(), on_error=lambda error: {"error": str(error)})
