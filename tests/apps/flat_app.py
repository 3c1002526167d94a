"""An application whose clients make up hosts, paths, channels, ids and queries.

/sub/… subscribes to ``?channel=``, /gen/… and /hand/… are generators, under limits for
each host; /entries tells how many entries all containers of the process have.
"""

import gc
import os
from collections import deque
from urllib.parse import parse_qs

from syncstream import Hub, SSEResponse, StreamMiddleware, current_stream
from syncstream.channels import limits
from syncstream.process import stats
from syncstream.runtime.process import process

# What is kept of idle channels is bounded: by less, here.
limits.MOST_IDLE = limits.CROWD = 5
hub = Hub()


def three():
    yield current_stream().last_event_id
    yield from range(2)


def entries():
    """Count the objects there are, and what all containers among them hold.

    Not the allocated blocks: CPython keeps up to 2,000 freed tuples of each size.
    """
    stats()  # adds up what was counted since
    gc.collect()
    tracked = gc.get_objects()
    # A dict of strings and numbers alone is tracked by nobody.
    there = {id(it): it for it in (*tracked, *gc.get_referents(*tracked))}
    containers = (dict, list, tuple, set, frozenset, deque)
    return len(there) + sum(
        len(it) for it in there.values() if isinstance(it, containers)
    )


def app(environ, start_response):
    _, kind, *_ = environ["PATH_INFO"].split("/")
    if kind in ("entries", "health"):
        found = [entries(), process().open_streams, os.getpid()]
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
