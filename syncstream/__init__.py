"""Live streams from synchronous Python web applications.

The map of the package, from the bottom to the top; each line may import those above it:

====================  ==========================================================
``errors``            every public exception, as a tree
``arguments``         parsing of commands' arguments; it never shows a URL in an error
``terminal``          what commands print: errors, colours, to closed pipes
``protocol/``         bytes <-> values, pure: event streams, NDJSON, JSON
``runtime/``          this process: waits (of threads and of greenlets), the watch for
                      hang-ups, sockets, streams, log lines
``brokers/``          what stores events, and tells of them: ``memory:``, ``local:``,
                      ``redis:``, ``postgresql:``; names, and the log. The schemes of
                      URLs are in its ``__init__``
``channels/``         the hub: publish, subscribe, resume, kick, presence
``servers/``          the WSGI servers: where each keeps the socket, how it ends
``streams/``          one response's life: iterate, encode, close, one reason
``fanout/``           the loop for connections that no thread and no greenlet serves
``wsgi/``             the response classes, the middleware, the decorators
``publish process``   doors: publishing over HTTP (from a shell: ``__main__``), the
                      counters of a process
``client/``           reading event streams: a client that reconnects and resumes
``sources/``          sources made of others: attempts at one, batches of its events
``flask django``      what each framework needs on top: responses, decorators
``rest_framework``
``bottle pyramid``
``falcon``
``migrations/``       Django's, which install the tables of ``postgresql:``
``gunicorn``          a hook for gunicorn's configuration
``doctor/ demo/``     two commands; buffering is found by ``doctor/timing``
``listen``            the command that prints a stream's events
``testing/``          what tests of applications and of brokers need
``__main__``          the command line: ``demo``, ``listen``, ``publish``, ``doctor``
====================  ==========================================================

Importing the package starts no thread, sets no signal handler, patches nothing and
imports no optional package.
"""

from .channels.gap import Gap
from .channels.hub import Hub
from .channels.subscription import Subscription
from .errors import (
    BrokerError,
    ClientDisconnected,
    Closed,
    ConnectError,
    Denied,
    PayloadTooLarge,
    ProtocolError,
    RemoteProtocolError,
    SyncStreamError,
    Unavailable,
    Uncertain,
)
from .flask import sse, streaming, with_sse
from .protocol.sse import Event
from .runtime.waiting import sleep
from .servers.request import last_event_id
from .streams.stream import Stream, current_stream
from .wsgi.middleware import StreamMiddleware
from .wsgi.responses import NDJSONResponse, SSEResponse, StreamResponse

__all__ = [
    "BrokerError",
    "ClientDisconnected",
    "Closed",
    "ConnectError",
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
    "streaming",
    "with_sse",
]
__version__ = "0.1.0"
