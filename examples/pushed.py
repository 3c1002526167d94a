"""A view that sends its events, where a generator could not yield: in a callback.

    gunicorn -k gevent examples.pushed:app
    curl -N http://127.0.0.1:8000/copy

When the client leaves, ``send`` raises ClientDisconnected, which ends the work, too.
/counter is a coroutine, which awaits what it sends.
"""

import asyncio
import os

from flask import Flask

from syncstream import sleep, with_sse

INTERVAL = float(os.environ.get("INTERVAL", 1))
app = Flask(__name__)


def copy_files(on_file):
    """Do as a library does that calls you back."""
    for number in range(1, 6):
        sleep(INTERVAL)
        on_file(f"{number}.txt", number / 5)


@app.get("/copy")
@with_sse
def copy(sse):
    def send_progress(name, part):
        sse.send({"file": name, "part": part}, event="progress")

    copy_files(send_progress)
    sse.send("All files are there", event="done")


@app.get("/counter")
@with_sse
async def counter(sse):
    for number in range(5):
        await asyncio.sleep(INTERVAL)
        await sse.send({"counter": number}, id=number)
