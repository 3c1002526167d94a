"""Views that answer with a body, or with a status, a body and headers.

    gunicorn -k gevent examples.streaming_views:app
    curl -N http://127.0.0.1:8000/numbers

The views and their bodies may be asynchronous. The text of ``/events`` and ``/ticks``
is framed already, so their Content-Type makes them event streams with keepalives.
"""

import asyncio
import os
import random

from flask import Flask

from syncstream import sleep, streaming

INTERVAL = float(os.environ.get("INTERVAL", 1))

app = Flask(__name__)


@app.get("/numbers")
@streaming
async def numbers():
    async def generator():
        for i in range(5):
            yield f"Number: {i}\n"
            await asyncio.sleep(INTERVAL)

    return generator()


@app.get("/events")
@streaming
async def events():
    async def event_generator():
        try:
            while True:
                data = f"Random number: {random.randint(1, 100)}"
                yield f"data: {data}\n\n".encode()
                await asyncio.sleep(INTERVAL)
        finally:  # after a CancelledError at the await, or a GeneratorExit at the yield
            print("Client disconnected")

    return 200, event_generator(), [("Content-Type", "text/event-stream")]


@app.get("/ticks")
@streaming
def ticks():
    def event_generator():
        try:
            while True:
                yield "data: tick\n\n"
                sleep(INTERVAL)
        finally:
            print("Last tick")

    return 200, event_generator(), {"Content-Type": "text/event-stream"}
