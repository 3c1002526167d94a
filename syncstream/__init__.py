"""Live streams from synchronous Python web applications.

The map of the package, from top to bottom the way the data takes:

====================  ==========================================================
``errors``            every exception, as a tree
``clock``             the clock that waits go by
``arguments``         commands' arguments, whose errors show no URL
``protocol``          bytes <-> values: event streams, NDJSON, JSON
``sockets``           what is asked of a socket, by its descriptor
``journal``           log lines that harm nobody
``waiting``           the one place that knows threads from gevent; the scope
``watch``             hang-ups and a clock, one per process
``process``           the process's streams, and its stop
``log``               one channel's events: a bounded window, and positions in it
``brokers``           what stores events, and tells of them: ``memory:``
``control``           whom to kick, as a hub's processes tell each other
``presence``          the events that say who comes and goes
``hub``               channels: publish, subscribe, resume
``links``             what gets a thread out of a read
``answers``           frameworks' responses and errors, where an item was due
``stream``            one response's life: iterate, encode, close, one reason
``servers``           the WSGI servers: where each keeps the socket, how it ends
``capacity``          how many streams there may be
``wsgi``              the response classes and the middleware
``flask django``      what each framework needs on top: its responses, ``@sse``
``bottle pyramid``
``falcon gunicorn``
``doctor``            ``python -m syncstream doctor``
``demo``              the demo of ``python -m syncstream demo``
====================  ==========================================================

Imports only point up that list. Importing the package starts no thread, sets no
signal handler, patches nothing and imports no optional package.
"""

from .errors import (
    BrokerError,
    ClientDisconnected,
    Closed,
    Denied,
    PayloadTooLarge,
    ProtocolError,
    RemoteProtocolError,
    SyncStreamError,
    Unavailable,
    Uncertain,
)
from .flask import sse
from .hub import Gap, Hub, Subscription
from .protocol.sse import Event
from .stream import Stream, current_stream
from .waiting import sleep
from .wsgi import (
    NDJSONResponse,
    SSEResponse,
    StreamMiddleware,
    StreamResponse,
    last_event_id,
)

__all__ = [
    "BrokerError",
    "ClientDisconnected",
    "Closed",
    "Denied",
    "Event",
    "Gap",
    "Hub",
    "NDJSONResponse",
    "PayloadTooLarge",
    "ProtocolError",
    "RemoteProtocolError",
    "SSEResponse",
    "Stream",
    "StreamMiddleware",
    "StreamResponse",
    "Subscription",
    "SyncStreamError",
    "Unavailable",
    "Uncertain",
    "current_stream",
    "last_event_id",
    "sleep",
    "sse",
]
__version__ = "0.1.0"
