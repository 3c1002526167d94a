"""An application whose clients make up hosts, paths, channels, ids and queries.

/sub/… subscribes to ``?channel=``, /gen/… and /hand/… are generators, under limits for
each host; /blocks tells how many blocks of memory Python has in use.
"""

import gc
import os
import sys
from urllib.parse import parse_qs

from syncstream import Hub, SSEResponse, StreamMiddleware, current_stream
from syncstream.channels import limits
from syncstream.runtime.process import process

# What is kept of idle channels is bounded: by less, here.
limits.MOST_IDLE = limits.CROWD = 20
hub = Hub()


def three():
    yield current_stream().last_event_id
    yield from range(2)


def app(environ, start_response):
    _, kind, *_ = environ["PATH_INFO"].split("/")
    if kind in ("blocks", "health"):
        gc.collect()
        found = [sys.getallocatedblocks(), process().open_streams, os.getpid()]
        body = repr(found).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
    if kind == "hand":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return (b"data: %d\n\n" % n for n in range(3))
    if kind == "gen":
        return SSEResponse(three())(environ, start_response)
    channel = parse_qs(environ["QUERY_STRING"])["channel"][0]
    return SSEResponse(hub.subscribe(channel))(environ, start_response)


wrapped = StreamMiddleware(
    app,
    reserve_threads=2,
    limit_by=lambda environ: environ["HTTP_HOST"],
    max_per_key=5,
)
