"""What the applications of tests/live/test_deployments.py answer, whatever serves them.

The query says what a response is made of: ``key`` names it on the control line,
``rows`` and ``pause`` are how many rows and the seconds between, ``size`` pads each
row, and with ``gated`` each waits at the gate.
"""

import os
import sys
import threading

import psutil

from syncstream import Hub, sleep
from syncstream.runtime.process import process
from tests.apps.control import gate, note

hub = Hub(os.environ["HUB_URL"])


def rows(query):
    """Yield ``row 0``, ``row 1`` …; note how it has ended."""
    key, how = query["key"], "finished"
    note(f"{key}-began", os.getpid())
    padding = "." * int(query.get("size", 0))
    try:
        for n in range(int(query.get("rows", 1_000_000))):
            if "gated" in query:
                gate(key)
            yield f"row {n}{padding}"
            if "pause" in query:
                sleep(float(query["pause"]))
    except BaseException as error:
        how = type(error).__name__
        raise
    finally:
        note(f"{key}-ended", how)


def lines(query):
    """Yield rows as lines of text."""
    for row in rows(query):
        yield f"{row}\n"


def subscription(query):
    return hub.subscribe(query["channel"], after="start")


def life(query):
    names = ("keepalive", "send_timeout")
    return {name: float(query[name]) for name in names if name in query}


def facts():
    """Return what this process holds, but for the request that asks."""
    own, me = process(), psutil.Process()
    return {
        "pid": os.getpid(),
        "open": own.open_streams,
        "attached": own.attached_streams,
        "threads": me.num_threads() - pool(),
        "fds": me.num_fds(),
        "agent": AGENTS[os.environ.get("AGENT", "none")](),
    }


def pool():
    """Count the server's own threads, which come one by one and stay, or go later."""
    if "gevent" in sys.modules:
        from gevent import get_hub

        return get_hub().threadpool.size
    return sum(one.name.startswith("ThreadPool") for one in threading.enumerate())


def newrelic():
    from newrelic.agent import current_transaction

    return current_transaction() is not None


def sentry():
    from sentry_sdk import get_current_span

    return get_current_span() is not None


def opentelemetry():
    from opentelemetry.trace import get_current_span

    return get_current_span().is_recording()


# Tell whether the agent watches the request that runs.
AGENTS = {
    "none": lambda: None,
    "newrelic": newrelic,
    "sentry": sentry,
    "opentelemetry": opentelemetry,
}
