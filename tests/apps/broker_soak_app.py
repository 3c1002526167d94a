"""``tests.apps.broker_app`` with a short `max_age`, and a clock that others may move.

$SOAK_CLOCK is a file: its text is added, in seconds, to what `time.time` says.
"""

import os
import time
from pathlib import Path

from syncstream import Hub

MAX_AGE = 20.0  # seconds
MAX_SIZE = 8 << 20  # bytes, of `local:`
CAPACITY = 1000

_clock = time.time


def _moved():
    try:
        return _clock() + float(Path(os.environ["SOAK_CLOCK"]).read_text() or 0)
    except OSError:
        return _clock()


def open_hub(url):
    """Return a hub as all processes of the soak have it."""
    if url.startswith("local:"):
        from syncstream.brokers.local import LocalBroker

        return Hub(broker=LocalBroker(url, CAPACITY, MAX_AGE, MAX_SIZE))
    return Hub(url, capacity=CAPACITY, max_age=MAX_AGE)


if "SOAK_CLOCK" in os.environ:
    time.time = _moved

if "HUB_URL" in os.environ:
    from tests.apps import broker_app

    broker_app.hub_app.hub = open_hub(os.environ["HUB_URL"])

    def wrapped(environ, start_response):
        """As `broker_app`; /clock tells what time it is here."""
        if environ["PATH_INFO"] == "/clock":
            return broker_app.hub_app.plain(str(time.time()), start_response)
        return broker_app.wrapped(environ, start_response)
