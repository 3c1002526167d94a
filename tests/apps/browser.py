"""Flask, for browsers: a page that follows streams, and who asked for them."""

import collections

import flask

from syncstream import Event, SSEResponse, StreamMiddleware, last_event_id
from tests.apps.control import gate

app = flask.Flask(__name__)
asked = collections.defaultdict(list)  # a key's Last-Event-IDs, one a request
started = collections.Counter()  # a key's generators that have run

PAGE = """<!doctype html><title>tests</title><link rel="icon" href="data:,">
<script>
const followed = {};
function follow(path, key) {
  const source = new EventSource(path + "?key=" + key);
  const seen = (followed[key] = { opened: 0, events: [], source });
  source.onopen = () => { seen.opened += 1; };
  for (const type of ["message", "named"])
    source.addEventListener(type, (event) =>
      seen.events.push([event.type, event.lastEventId, event.data]));
}
</script>"""


@app.get("/")
def page():
    return PAGE


@app.get("/health")
def health():
    return "ok"


@app.get("/counts")
def counts():
    key = flask.request.args["key"]
    return {"asked": asked[key], "started": started[key]}


SOURCES = {}


def source(function):
    SOURCES[function.__name__] = function
    return function


@source
def three(key):
    for n in range(3):
        yield Event(n, id=n)


@source
def gated(key):
    for n in range(2):
        gate(key)
        yield n


@source
def fields(key):
    yield Event("one\ntwo\r\nthree\rfour", id="é-1", event="named")
    yield " a space, and a\u2028separator\x85"
    yield Event("", id=7)
    yield Event({"text": "naïve\n✓"}, id="")
    gate(key)


@app.get("/<any(stop, reconnect):end>/<name>")
def events(end, name):
    key = flask.request.args["key"]
    asked[key].append(last_event_id(flask.request.environ))

    def counted():
        started[key] += 1
        yield from SOURCES[name](key)

    return SSEResponse(counted(), retry=50, end=end)


limited = StreamMiddleware(app.wsgi_app, reserve_threads=1)
