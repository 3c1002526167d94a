"""Live sensor data: ten readings a second, as JSON, with a name and ids.

    gunicorn -k gevent examples.live_sensor:app
    curl -N http://127.0.0.1:8000/live-data

In a browser: source.addEventListener("sensor_reading", e => JSON.parse(e.data)).
"""

import os
import time

from flask import Flask

from syncstream import Event, sleep, sse

INTERVAL = float(os.environ.get("INTERVAL", 0.1))

app = Flask(__name__)


@app.get("/live-data")
@sse
def live_data():
    for i in range(100):
        reading = {"timestamp": time.time(), "value": i * 1.5, "sensor": "temp-1"}
        yield Event(reading, event="sensor_reading", id=i)
        sleep(INTERVAL)
