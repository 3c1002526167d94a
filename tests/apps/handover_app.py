"""A WSGI application whose subscribers leave their server: tests/live/test_handover.py.

/events/CHANNEL,CHANNEL?OPTION=VALUE subscribes; the options are those of
`Hub.subscribe` and `SSEResponse`, and ``note=KEY``: why the stream ended comes as
``KEY-closed``, or with ``say=WORD`` as a line in the log. /ndjson/CHANNEL the same, as
lines. Before both may stand the name of a middleware: see WRAPPERS. POST
/publish/CHANNEL takes JSON, /plain?tag=TAG gives TAG back, /state tells what this
process holds.
"""

import gc
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
import zlib
from urllib.parse import parse_qs

import psutil

from syncstream import Hub, NDJSONResponse, SSEResponse, StreamMiddleware
from syncstream.brokers.memory import MemoryBroker
from syncstream.errors import Unavailable
from syncstream.runtime.process import process, stats
from syncstream.runtime.sockets import native
from syncstream.servers.connection import HANDOVER
from tests.apps.control import gate, note

JUNK = b": " + b"x" * 100_000 + b"\n\n"
CAPACITY = int(os.environ.get("CAPACITY", "1000"))


class Broker(MemoryBroker):
    """One that may be down for a while."""

    is_down = False

    def read(self, channel, after, limit=1000):
        if self.is_down:
            raise Unavailable("down")
        return super().read(channel, after, limit)


broker = Broker(capacity=CAPACITY)
hub = Hub(broker=broker)
denied = set()  # by who
broken = set()
NUMBERS = ("keepalive", "send_timeout", "max_duration", "throttle")

if "SOFT_LIMIT" in os.environ:  # what `ulimit -S -n` does
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ["SOFT_LIMIT"]), hard))

if "HARD_LIMIT" in os.environ:
    limit = int(os.environ["HARD_LIMIT"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

if "DEBUG" in os.environ:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger("syncstream.fanout").setLevel(logging.DEBUG)


def authorize(subscription):
    who = str(subscription.who)
    if who in broken:
        raise ZeroDivisionError(who)
    if who.startswith("exits") and who in denied:
        sys.exit(3)
    if who.startswith("blocks") and who in denied:
        note(f"{who}-blocks", True)
        gate(f"{who}-go")
    return who not in denied


def snapshot():
    return [{"snapshot": 1}, {"snapshot": 2}]


def app(environ, start_response):
    query = {name: v[0] for name, v in parse_qs(environ["QUERY_STRING"]).items()}
    parts = environ["PATH_INFO"].strip("/").split("/")
    kind, name = [*parts[parts[0] in WRAPPERS :], ""][:2]
    if kind in ("events", "ndjson"):
        answer = subscribe(kind, name, query)
    else:
        answer = plain(ACTS[kind](environ, name, query))
    return answer(environ, start_response)


def subscribe(kind, name, query):
    options = {key: float(query[key]) for key in NUMBERS if key in query}
    own = {"throttle": options.pop("throttle")} if "throttle" in options else {}
    for key in ("after", "on_gap", "who"):
        if key in query:
            value = query[key]
            own[key] = int(value) if value.isdecimal() and key == "after" else value
    if own.get("on_gap") == "snapshot":
        own["on_gap"] = snapshot
    if "conflate" in query:
        own["conflate"] = lambda event: event.data.partition(" ")[0]
    if "tags" in query:
        own["tags"] = query["tags"].split(",")
    if "announce" in query:
        own["announce"] = True
    if "authorize" in query:
        own["authorize"] = authorize, float(query["authorize"])
    subscription = hub.subscribe(*name.split(","), **own)
    if kind == "ndjson":
        options.pop("keepalive", None)
        response = NDJSONResponse(subscription, **options)
    else:
        if "retry" in query:
            options["retry"] = int(query["retry"])
        if query.get("handover") == "0":
            options["handover"] = False
        response = SSEResponse(subscription, **options)
    if "note" in query:
        key, stream = query["note"], response.response
        stream.on_close(lambda: note(f"{key}-closed", stream.reason))
    if "say" in query:
        word, stream = query["say"], response.response
        stream.on_close(lambda: os.write(2, f"{word}: {stream.reason}\n".encode()))
    return response


def plain(text):
    body = (text if isinstance(text, str) else json.dumps(text)).encode()

    def answer(environ, start_response):
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    return answer


def publish(environ, name, query):
    size = int(environ.get("CONTENT_LENGTH") or 0)
    items = json.loads(environ["wsgi.input"].read(size))
    tags = {key: query[key].split(",") for key in ("only", "exclude") if key in query}
    return hub.publish_many(name, items, **tags)


def state(environ, name, query):
    """Return what the process holds; with ``all``, after a garbage collection."""
    objects = []
    if "all" in query:
        gc.collect()
        objects = gc.get_objects()
    greenlet = getattr(sys.modules.get("greenlet"), "greenlet", ())
    me = psutil.Process()
    return {
        **stats(),
        **hub.stats(),
        "attached": process().attached_streams,
        "parked": process().parked_streams,
        "fds": me.num_fds(),
        "threads": me.num_threads(),
        "greenlets": sum(
            isinstance(item, greenlet) and not item.dead for item in objects
        ),
        "cpu": sum(me.cpu_times()[:2]),
        "rss": me.memory_info().rss,
        "pid": os.getpid(),
    }


def kick(environ, name, query):
    return hub.kick(lambda subscription: subscription.who == name)


def close(environ, name, query):
    hub.close()
    return "ok"


def deny(environ, name, query):
    denied.add(name)
    return "ok"


def break_(environ, name, query):
    broken.add(name)
    return "ok"


def down(environ, name, query):
    """Have the broker be down, or up; what was told meanwhile is lost."""
    broker.is_down = name == "yes"
    if broker.is_down:
        hub.sink.resync(None)
    return "ok"


def fork(environ, name, query):
    """Leave a child behind that has all that we have; return its pid."""
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        end = time.monotonic() + 60
        while os.getppid() == parent and time.monotonic() < end:
            native(time, "sleep")(0.05)  # gevent's would let it serve others
        os._exit(0)
    return pid


def execute(environ, name, query):
    """Tell how many sockets a program has that we start."""
    script = "import os; print(sum('socket' in os.readlink(f'/proc/self/fd/{n}')"
    script += " for n in os.listdir('/proc/self/fd') if int(n) > 2 and"
    script += " os.path.lexists(f'/proc/self/fd/{n}')))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, close_fds=False
    )
    return found.stdout.strip()


def storm(environ, name, query):
    """Publish numbers from some threads, greenlets under gevent."""
    count, threads = int(query["count"]), int(query["threads"])

    def work():
        for n in range(count):
            hub.publish(name, str(n))
            if n % 10 == 9:
                time.sleep(0.001)

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    return "ok"


def nap(environ, name, query):
    """Keep a thread busy until the test says so."""
    note(f"{name}-naps", True)
    gate(f"{name}-wake")
    return "ok"


def presence(environ, name, query):
    return sorted(map(str, hub.presence(name)))


def stored(environ, name, query):
    ids, last = [], "0"
    while entries := broker.read(name, last).entries:
        ids += [entry.id for entry in entries]
        last = ids[-1]
    return ids


ACTS = {
    "health": lambda *_: "ok",
    "plain": lambda environ, name, query: query["tag"],
    "publish": publish,
    "state": state,
    "kick": kick,
    "close": close,
    "deny": deny,
    "break": break_,
    "down": down,
    "fork": fork,
    "exec": execute,
    "storm": storm,
    "nap": nap,
    "presence": presence,
    "stored": stored,
}


# Middlewares that a stream may meet.


class Wrapped:
    """What a middleware makes of an iterable."""

    def __init__(self, app_iter, chunks):
        self._app_iter, self._chunks = app_iter, chunks

    def __iter__(self):
        return self._chunks

    def close(self):
        self._app_iter.close()


def compressing(app):
    def wrapped(environ, start_response):
        def start(status, headers, *exc_info):
            return start_response(
                status, [*headers, ("Content-Encoding", "gzip")], *exc_info
            )

        app_iter = app(environ, start)
        return Wrapped(app_iter, compressed(iter(app_iter)))

    return wrapped


def compressed(chunks):
    squeeze = zlib.compressobj(wbits=31)
    for chunk in chunks:
        yield squeeze.compress(chunk) + squeeze.flush(zlib.Z_SYNC_FLUSH)
    yield squeeze.flush()


def with_length(app):
    """Say how long it is: so long that nobody gets to the end."""

    def wrapped(environ, start_response):
        def start(status, headers, *exc_info):
            return start_response(
                status, [*headers, ("Content-Length", "1000000")], *exc_info
            )

        return app(environ, start)

    return wrapped


def forbidding(app):
    def wrapped(environ, start_response):
        environ[HANDOVER] = False
        return app(environ, start_response)

    return wrapped


def lengthening(app):
    """Put something large before each chunk."""

    def wrapped(environ, start_response):
        app_iter = app(environ, start_response)
        return Wrapped(app_iter, (JUNK + chunk for chunk in app_iter))

    return wrapped


WRAPPERS = {
    "gzip": compressing(app),
    "length": with_length(app),
    "environ": forbidding(app),
    "large": lengthening(app),
    "middleware": StreamMiddleware(app, handover=False),
    "plainly": StreamMiddleware(app),
    "three": StreamMiddleware(app, max_streams=3),
    "each": StreamMiddleware(
        app, limit_by=lambda environ: environ["QUERY_STRING"], max_per_key=1
    ),
}


def served(environ, start_response):
    """The application, under the middleware that a path begins with."""
    first = environ["PATH_INFO"].split("/")[1]
    return WRAPPERS.get(first, app)(environ, start_response)
